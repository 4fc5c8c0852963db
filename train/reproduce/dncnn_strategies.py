"""Which weights of DnCNN to encrypt: PSS, published and learned here, against other strategies.

Example::

    python train/reproduce/dncnn_strategies.py --data DATA --out docs/results --network colour

Encrypts the kernels that a strategy selects, with the Gaussian cipher, wrapped around, and measures
PSNR without a key: with equal numbers of kernels in each of the paper's three layers, as in the
release; and with the same numbers from all convolutions together, wherever each strategy ranks them
highest. PSS is learned from photographs of scikit-image (colour) or from ``train400`` (grey), never
from test images, for each of the two selections: at its numbers of kernels, and without a budget
for both objectives. Writes ``dncnn_strategies_NETWORK.json`` and ``.png``; a run that was killed
resumes.

References:
    Tian, Zhou, Duan, CVPR 2021, section 4.2 and figure 4; and its published release.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib.figure
import numpy as np
import optax
import tyro
from _paper import (
    CONVOLUTIONS,
    LAYERS,
    Denoiser,
    Experiment,
    closed_form,
    colour_denoiser,
    convolution_weights,
    denoiser,
    draw,
    kernels_of,
    legend,
    provenance,
    published_scores,
    stacked,
    without_a_key,
    write_report,
)
from _tasks import denoising_loss, patch_batches
from rich.progress import Progress

from selcrypt_jax import LosslessCipher, PSSBudgets, PSSConfig, nested_masks, pss
from selcrypt_jax._masks.ranks import Scope
from selcrypt_jax.audit._cells import Cells
from selcrypt_jax.models import DnCNN
from selcrypt_jax.models._files import read_images, read_model
from selcrypt_jax.models._network import centre, psnr

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")
THREE_LAYERS = rf"^convs/({'|'.join(map(str, LAYERS.values()))})/kernel$"
KERNELS_A_LAYER = (11, 21, 41, 82, 164)
# Of all convolutions of the colour network: 0.016, 0.05, 0.1, 0.40, 1 and 2 % of the weights.
KERNELS_IN_ALL = (10, 31, 62, 246, 618, 1236)
OBJECTIVES = {
    "break": PSSConfig("break", steps=100, penalty=2e-3, optimizer=optax.adam(0.1, eps=2e-3)),
    "keep": PSSConfig("keep", steps=100, penalty=1e-5, optimizer=optax.adam(0.1, eps=1e-5)),
}
STEPS = 200  # for all numbers of kernels together
CLOSED_FORM = ("random", "descend", "ascend", "mean", "l2", "taylor", "fisher")
BATCHES = 40


@dataclass(frozen=True)
class Config(Experiment):
    """The location of the data, and the numbers to average over."""

    network: Literal["colour", "s15", "s25", "s50"] = "colour"
    """The paper's colour network, or a grey one for noise with that σ."""

    keys: int = 5
    """Number of protections under different keys, for PSS."""

    other_keys: int = 3
    """Number of protections for other strategies, and with the lossless cipher."""

    seeds: int = 3
    """Runs of PSS, and draws of "random"."""


def described(config: PSSConfig) -> str:
    """The settings of PSS in one line."""
    return f"{config.steps} steps, λ = {config.penalty:g}, Adam with rate 0.1 and ε = λ"


def photographs() -> list[np.ndarray]:
    """Colour photographs of scikit-image, uint8, BGR."""
    import skimage.data

    images = []
    for name in PHOTOGRAPHS:
        image = getattr(skimage.data, name)()
        image = image[0] if isinstance(image, tuple) else image  # one of a stereo pair
        images.append(image[..., ::-1])
    return images


def read(data: Path, network: str) -> tuple[Denoiser, Any]:
    """The network, and ``seed -> batches`` to learn from."""
    if network == "colour":
        subject, images, sigma, patch = colour_denoiser(data), photographs(), 50, 48
    else:
        sigma, patch = int(network[1:]), 40
        folder = data / "dncnn_gray"
        model = read_model(folder / f"dncnn_{network}.safetensors", DnCNN)
        images = read_images(folder / "train400", split="train", channels=1)
        tests = read_images(folder / "set12", split="test", channels=1)
        clean = np.stack([centre(image, 128) for image in tests]).astype(np.float32) / 255
        noise = np.random.default_rng(0).standard_normal(clean.shape, np.float32)
        subject = denoiser(model, clean, clean + np.float32(sigma / 255) * noise)

    def batches(seed: int) -> Any:
        deviation = (sigma / 255, sigma / 255)
        make = patch_batches(images, 8, patch, deviation, seed=seed)
        return stacked(make, range(BATCHES))

    return subject, batches


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    subject, batches_of = read(config.data, config.network)
    state = subject.state
    loss_fn = denoising_loss(subject.graph)
    name = f"dncnn_strategies_{config.network}"
    settings = {
        "keys": [config.keys, config.other_keys],
        "pss": {
            "budgets": f"{STEPS} steps for all numbers of kernels",
            **{k: described(v) for k, v in OBJECTIVES.items()},
        },
    }
    cells = Cells(config.out / f".{name}.jsonl", settings)
    selections: dict[str, tuple[str, tuple[int, ...]]] = {
        "each of three layers": (THREE_LAYERS, KERNELS_A_LAYER),
        "all layers": (CONVOLUTIONS, KERNELS_IN_ALL),
    }

    def groups_of(selection: str) -> tuple[Scope, int]:
        """The scope of the counts, and how many kernels they are out of."""
        groups = kernels_of(state, selections[selection][0])
        return ("model", sum(groups)) if selection == "all layers" else ("leaf", groups[0])

    def scores_of(strategy: str, selection: str, seed: int) -> Any:
        select, counts = selections[selection]
        if strategy == "PSS, published":
            return published_scores(config.data, state)
        batches = batches_of(seed)
        if not strategy.startswith("PSS, "):
            return closed_form(strategy, state, select, loss_fn=loss_fn, batches=batches, seed=seed)
        how: PSSConfig | PSSBudgets
        if strategy == "PSS, budgets":
            scope, total = groups_of(selection)
            shares = [(count + 0.5) / total for count in counts]
            how = PSSBudgets(shares, scope, steps=STEPS)
        else:
            how = OBJECTIVES[strategy.removeprefix("PSS, ")]
        key = jax.random.key(seed)
        return pss(loss_fn, state, batches, key=key, config=how, select=select)

    def quality(strategy: str, selection: str, seed: int) -> dict[str, Any]:
        """Number of kernels → dB by key; for PSS over all layers also with the lossless cipher."""
        counts = selections[selection][1]
        scores = scores_of(strategy, selection, seed)
        scope, total = groups_of(selection)
        found: dict[str, Any] = {}
        for count in counts:
            masks = nested_masks(scores, [(count + 0.5) / total], scope=scope)
            keys = config.keys if strategy.startswith("PSS") else config.other_keys
            opened = without_a_key(state, masks, keys=keys, seed=seed)
            row = {"gaussian": [float(subject.quality(s).mean()) for s in opened], "lossless": []}
            if strategy.startswith("PSS") and scope == "model":
                try:
                    opened = without_a_key(
                        state, masks, keys=config.other_keys, seed=seed, cipher=LosslessCipher()
                    )
                    row["lossless"] = [float(subject.quality(s).mean()) for s in opened]
                except ValueError:  # too few kernels in a layer to hide in
                    pass
            found[str(count)] = row
        return found

    work = []
    for selection in selections:
        learned = ("PSS, published", "PSS, budgets", *(f"PSS, {o}" for o in OBJECTIVES))
        for strategy in (*learned, *CLOSED_FORM):
            published = strategy == "PSS, published"
            if published and (selection == "all layers" or config.network != "colour"):
                continue
            many = strategy == "random" or (strategy.startswith("PSS") and not published)
            work += [(selection, strategy, seed) for seed in range(config.seeds if many else 1)]
    results: dict[str, Any] = {selection: {} for selection in selections}
    with Progress() as progress:
        for selection, strategy, seed in progress.track(work):
            cell = cells.get(
                f"{selection}/{strategy}/{seed}",
                lambda s=selection, t=strategy, n=seed: quality(t, s, n),
            )
            results[selection].setdefault(strategy, []).append(cell)

    report = {
        **provenance(__file__, config),
        "noisy": float(psnr(subject.noisy, subject.clean).mean()),
        "untouched": float(subject.quality(state).mean()),
        "conv_weights": convolution_weights(state),
        "pss": settings["pss"],
        "db_without_a_key": {
            selection: {
                strategy: {count: summary([seed[count] for seed in seeds]) for count in seeds[0]}
                for strategy, seeds in strategies.items()
            }
            for selection, strategies in results.items()
        },
    }
    if config.network == "colour":
        path = config.data / "dncnn_color_paper" / "release_reference.json"
        report["release"] = json.loads(path.read_text())["strategies"]
    write_report(report, config.out / f"{name}.json")
    plot(report, config, config.out / f"{name}.png")
    cells.done()


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over keys and seeds, for both ciphers."""
    gaussian = np.array([seed["gaussian"] for seed in seeds])
    lossless = [value for seed in seeds for value in seed["lossless"]]
    return {
        "mean": round(float(gaussian.mean()), 2),
        "std": round(float(gaussian.std()), 2),
        "lossless": round(float(np.mean(lossless)), 2) if lossless else None,
    }


def plot(report: dict[str, Any], config: Config, path: Path) -> None:
    """PSNR against the number of kernels, for both selections."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    found = report["db_without_a_key"]
    for axes, selection in zip(figure.subplots(1, len(found), sharey=True), found, strict=True):
        for strategy, rows in found[selection].items():
            counts = [int(count) for count in rows]
            # Below 0 dB nothing of the image is left; one scale shows the visible range.
            quality = [max(row["mean"], 5) for row in rows.values()]
            error = [row["std"] if row["mean"] > 5 else 0 for row in rows.values()]
            draw(axes, strategy, counts, quality, error)
        axes.axhline(report["noisy"], color="grey", lw=0.8, ls="--", label="noisy input")
        axes.axhline(report["untouched"], color="grey", lw=0.8, label="untouched")
        axes.set(title=f"kernels encrypted in {selection}", xlabel="kernels")
    figure.axes[0].set_ylabel("PSNR without a key / dB (5 or less shown as 5)")
    legend(figure)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
