"""Which weights of VGG19 to encrypt: accuracy on CIFAR-10 without a key, by strategy and share.

Example::

    python train/reproduce/vgg19_strategies.py --data DATA --out docs/results

Encrypts the kernels that a strategy selects, with the Gaussian cipher, wrapped around, and measures
accuracy without a key: with a share of each of the paper's four layers (0, 1, 4 and 8), with a
share of every convolution, and with a share of all convolutions together, wherever the strategy
ranks groups highest. PSS is learned from training images: for the shares of each selection in one
run, and without a budget (objective "break") for the four layers and for all. Writes
``vgg19_strategies.json`` and ``.png``; a run that was killed resumes.

References:
    Tian, Zhou, Duan, CVPR 2021, section 4.1 and figure 3.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from _paper import (
    CONVOLUTIONS,
    Experiment,
    closed_form,
    convolution_weights,
    draw_panels,
    provenance,
    stacked,
    sweep,
    without_a_key,
    write_report,
)
from _tasks import Vgg19Task, accuracy_of
from flax import nnx

from selcrypt_jax import PSSBudgets, PSSConfig, mask_counts, nested_masks, pss
from selcrypt_jax.audit._cells import Cells
from selcrypt_jax.models._files import read_cifar

FOUR_LAYERS = r"^convs/(0|1|4|8)/kernel$"
STRATEGIES = ("PSS, budgets", "PSS, break", "random", "descend", "l2", "taylor", "fisher")


class Selection(NamedTuple):
    """A panel of the figure.

    Attributes:
        select: convolutions that take part.
        scope: whether the share applies to each of them, or to all together.
        shares: the encrypted shares of their kernels.
        strategies: the strategies compared.
    """

    select: str
    scope: Literal["leaf", "model"]
    shares: tuple[float, ...]
    strategies: tuple[str, ...] = STRATEGIES


PANELS = {
    "four": "of each of four layers",
    "each": "of each of all layers",
    "anywhere": "anywhere in all layers",
}
SELECTIONS = {
    PANELS["four"]: Selection(
        FOUR_LAYERS, "leaf", (0.02, 0.04, 0.08, 0.16, 0.24, 0.4), (*STRATEGIES, "ascend", "mean")
    ),
    PANELS["each"]: Selection(CONVOLUTIONS, "leaf", (0.0025, 0.005, 0.01, 0.02, 0.08)),
    PANELS["anywhere"]: Selection(CONVOLUTIONS, "model", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 6.05e-3)),
}
PSS = PSSConfig("break", steps=100, penalty=1e-4)
STEPS = 200  # for all shares of a selection together
DESCRIBED = {
    "PSS, budgets": f"{STEPS} steps for all shares of a selection",
    "PSS, break": f"{PSS.steps} steps, λ = {PSS.penalty:g}, Adam with rate 0.1 and ε = λ/10",
}
BATCHES = 40


@dataclass(frozen=True)
class Config(Experiment):
    """The location of the data, and the numbers to average over."""

    panels: tuple[Literal["four", "each", "anywhere"], ...] = ("four", "each", "anywhere")
    """Shares of each of four layers, of every layer, and of all layers together."""

    keys: int = 2
    """Number of protections under different keys."""

    tests: int = 2000
    """Number of test images; there are 10,000."""

    seed: int = 0
    """Seed for PSS, for "random" and for the keys."""


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    task = Vgg19Task(weights=config.data / "vgg19_cifar10.safetensors", data=config.data / "tfds")
    learned = task.task(config.seed)
    state = learned.params
    graph, _ = nnx.split(learned.model)
    accuracy = accuracy_of(graph, *read_cifar(task.data / "cifar10", "test", config.tests))
    batches = stacked(learned.batch, range(1, BATCHES + 1))
    settings = {
        "keys": config.keys, "tests": config.tests, "seed": config.seed, "pss": DESCRIBED
    }  # fmt: skip
    cells = Cells(config.out / ".vgg19_strategies.jsonl", settings)
    scores: dict[tuple[Any, ...], Any] = {}

    def scores_of(strategy: str, panel: Selection) -> Any:
        select = panel.select
        budgets = PSSBudgets(panel.shares, panel.scope, steps=STEPS)
        known = (strategy, select, budgets if strategy == "PSS, budgets" else None)
        if known not in scores:
            if strategy.startswith("PSS"):
                key = jax.random.key(config.seed)
                how = budgets if strategy == "PSS, budgets" else PSS
                scores[known] = pss(
                    learned.loss_fn, state, batches, key=key, config=how, select=select
                )
            else:
                scores[known] = closed_form(
                    strategy, state, select,
                    loss_fn=learned.loss_fn, batches=batches, seed=config.seed,
                )  # fmt: skip
        return scores[known]

    def without(selection: str, strategy: str, share: float) -> dict[str, Any]:
        panel = SELECTIONS[selection]
        masks = nested_masks(scores_of(strategy, panel), [share], scope=panel.scope)
        counts = mask_counts(state, masks[0])
        weights = sum(count.weights for count in counts.values())
        opened = without_a_key(state, masks, keys=config.keys, seed=config.seed)
        found = [accuracy(params)["accuracy"] for params in opened]
        return {
            "kernels": sum(count.groups for count in counts.values()),
            "share_of_conv_weights": weights / conv_weights,
            "accuracy": float(np.mean(found)),
            "std": float(np.std(found)),
        }

    conv_weights = convolution_weights(state)
    selections = {name: SELECTIONS[name] for name in (PANELS[panel] for panel in config.panels)}
    work = [
        (selection, strategy, share)
        for selection, panel in selections.items()
        for strategy in panel.strategies
        for share in panel.shares
    ]
    report = {
        **provenance(__file__, config),
        "pss": DESCRIBED,
        "conv_weights": conv_weights,
        "untouched": cells.get("untouched", lambda: accuracy(state)["accuracy"]),
        "accuracy_without_a_key": sweep(cells, work, without),
    }
    write_report(report, config.out / "vgg19_strategies.json")
    plot(report, config.out / "vgg19_strategies.png")
    cells.done()


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against share, one panel per selection."""
    draw_panels(
        report["accuracy_without_a_key"], path, metric="accuracy", share_of="the kernels",
        untouched=report["untouched"], chance=0.1, ylim=(0, 90),
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
