"""What PSS costs: gradient steps and seconds until its selection breaks the network.

Example::

    python train/reproduce/pss_cost.py --data DATA --out docs/results

Learns the importance of all convolutions of the paper's DnCNN, and pauses at intervals to encrypt
the best kernels and to measure the quality without a key: with both objectives for all layers
together, and with the published release's recipe, one layer at a time. Writes ``pss_cost.json`` and
``.png``; a run that was killed resumes with the next recipe.

References:
    Tian, Zhou, Duan, CVPR 2021, section 3.1, and its published release: 130 epochs per layer.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax
import tyro
from _paper import (
    CONVOLUTIONS,
    Experiment,
    colour_denoiser,
    provenance,
    stacked,
    without_a_key,
    write_report,
)
from _tasks import denoising_loss, patch_batches
from dncnn_strategies import BATCHES, OBJECTIVES, described, photographs
from rich.progress import Progress

from selcrypt_jax import PSSConfig, nested_masks, pss_learner
from selcrypt_jax.audit._cells import Cells
from selcrypt_jax.models._network import psnr

LAYERS = 17
STEPS_A_LAYER = 30
KERNELS = (31, 246)  # 0.05 and 0.40 % of the convolution weights
RECIPES = {
    "break": OBJECTIVES["break"],
    "keep": OBJECTIVES["keep"],
    "release, layer by layer": PSSConfig(
        "keep",
        steps=STEPS_A_LAYER,
        penalty=1e-4,
        initial_log_alpha=1.0,
        sampled=False,
        layerwise=True,
        optimizer=optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
}
DESCRIBED = {
    "break": described(OBJECTIVES["break"]),
    "keep": described(OBJECTIVES["keep"]),
    "release, layer by layer": f"{STEPS_A_LAYER} steps per layer, λ = 0.0001, SGD, rate 0.1, "
    "Nesterov momentum 0.9, gates not sampled",
}
STOPS = (2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 400, 510)
EPOCHS = 130  # in the release, per layer
BROKEN = 14.5  # dB; the noisy input has 14.16


@dataclass(frozen=True)
class Config(Experiment):
    """The location of the data, and the numbers to average over."""

    keys: int = 2
    """Number of protections under different keys."""

    seed: int = 0
    """Seed for PSS and for the keys."""


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    subject = colour_denoiser(config.data)
    state = subject.state
    loss_fn = denoising_loss(subject.graph)
    make = patch_batches(photographs(), 8, 48, (50 / 255, 50 / 255), seed=config.seed)
    batches = stacked(make, range(BATCHES))
    settings = {"keys": config.keys, "seed": config.seed, "recipes": DESCRIBED}
    cells = Cells(config.out / ".pss_cost.jsonl", settings)

    def without(scores: Any, kernels: int) -> float:
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(scores) if not isinstance(leaf, bool)]
        masks = nested_masks(scores, [(kernels + 0.5) / sum(sizes)], scope="model")
        opened = without_a_key(state, masks, keys=config.keys, seed=config.seed)
        return float(np.mean([subject.quality(params) for params in opened]))

    def curve(recipe: PSSConfig, progress: Progress) -> list[dict[str, float]]:
        learner = pss_learner(loss_fn, state, config=recipe, select=CONVOLUTIONS)
        pss_state = learner.init(state, batches, key=jax.random.key(config.seed))
        learner.run(state, batches, pss_state, 1)  # compiled
        seconds, rows = 0.0, []
        stops = [step for step in STOPS if step <= learner.steps]
        for step in progress.track(stops):
            start = time.perf_counter()
            pss_state, metrics = learner.run(state, batches, pss_state, step - int(pss_state.step))
            jax.block_until_ready(metrics)
            seconds += time.perf_counter() - start
            row = {"step": step, "seconds": round(seconds, 1)}
            scores = learner.scores(pss_state)
            rows.append(
                row | {f"db_{count}": round(without(scores, count), 2) for count in KERNELS}
            )
        return rows

    curves = {}
    with Progress() as progress:
        for name, recipe in RECIPES.items():
            curves[name] = cells.get(name, lambda recipe=recipe: curve(recipe, progress))
    last = curves["release, layer by layer"][-1]
    report = {
        **provenance(__file__, config),
        "noisy": float(psnr(subject.noisy, subject.clean).mean()),
        "untouched": float(subject.quality(state).mean()),
        "recipes": DESCRIBED,
        "curves": curves,
        f"steps_until_below_{BROKEN}_db": {
            name: {
                str(count): next((r["step"] for r in rows if r[f"db_{count}"] <= BROKEN), None)
                for count in KERNELS
            }
            for name, rows in curves.items()
        },
        "release_recipe": {
            "epochs_a_layer": EPOCHS,
            "steps_with_epochs_of_these_batches": EPOCHS * BATCHES * LAYERS,
            "hours_at_this_speed": round(
                EPOCHS * BATCHES * LAYERS * last["seconds"] / last["step"] / 3600, 1
            ),
        },
    }
    write_report(report, config.out / "pss_cost.json")
    plot(report, config.out / "pss_cost.png")
    cells.done()


def plot(report: dict[str, Any], path: Path) -> None:
    """PSNR without a key against gradient steps."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(KERNELS), sharey=True), KERNELS, strict=True):
        for (name, rows), colour in zip(
            report["curves"].items(), ("#D55E00", "#E69F00", "#000000"), strict=True
        ):
            quality = [max(row[f"db_{count}"], 5) for row in rows]
            axes.plot([r["step"] for r in rows], quality, "o-", ms=4, color=colour, label=name)
        axes.axhline(report["noisy"], color="grey", lw=0.8, ls="--")
        axes.axhline(report["untouched"], color="grey", lw=0.8)
        axes.set_xscale("log")
        axes.set(title=f"the best {count} kernels encrypted", xlabel="gradient steps")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("PSNR without a key / dB")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
