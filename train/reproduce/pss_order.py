"""Which kernels PSS selects at its budgets, layer by layer, and how soon their order settles.

Example::

    python train/reproduce/pss_order.py --data DATA --out docs/results

Learns the importance of all convolutions of a DnCNN at several budgets, in one run. The picture has
three parts: the share of each layer's kernels that every budget selects; the kernels of the three
layers with the most of them, input by output channel, coloured by the smallest budget that selects
them; and, step by step, the share of a budget's kernels that the estimates so far already name.
Writes ``pss_order.json`` and ``.png``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib.colors
import matplotlib.figure
import numpy as np
import tyro
from _paper import CONVOLUTIONS, Experiment, kernels_of, provenance, write_report
from _tasks import denoising_loss
from dncnn_strategies import KERNELS_IN_ALL, STEPS, read

from selcrypt_jax import PSSBudgets, nested_masks, pss_learner
from selcrypt_jax._tree.names import named_leaves

EVERY = 4  # steps between two looks at the order
MAPS = 3


@dataclass(frozen=True)
class Config(Experiment):
    """The network, and the location of the data."""

    network: Literal["colour", "s15", "s25", "s50"] = "s25"
    """The paper's colour network, or a grey one for noise with that σ."""

    seed: int = 0
    """Seed of the gates, the noise and the batches."""


def main(config: Config) -> None:
    """Learns, and draws; see `Config`."""
    subject, batches_of = read(config.data, config.network)
    state = subject.state
    groups = sum(kernels_of(state, CONVOLUTIONS))
    shares = tuple((count + 0.5) / groups for count in KERNELS_IN_ALL)
    learner = pss_learner(
        denoising_loss(subject.graph),
        state,
        config=PSSBudgets(shares, "model", steps=STEPS),
        select=CONVOLUTIONS,
    )
    batches = batches_of(config.seed)
    learning = learner.init(state, batches, key=jax.random.key(config.seed))
    history = []
    while int(learning.step) < learner.steps:
        taken = min(EVERY, learner.steps - int(learning.step))
        learning, _ = learner.run(state, batches, learning, taken)
        history.append((int(learning.step), selected(learner.scores(learning), shares)))
    last = history[-1][1]
    report = {
        **provenance(__file__, config),
        "kernels": KERNELS_IN_ALL,
        # The share of the final selection that the estimates name, by step and budget.
        "settled": [
            {"step": step, "share": [overlap(a, b) for a, b in zip(now, last, strict=True)]}
            for step, now in history
        ],
        # Kernels selected, by layer and budget.
        "selected": {
            name: [int(masks[name].sum()) for masks in last] + [int(last[0][name].size)]
            for name in last[0]
        },
    }
    write_report(report, config.out / "pss_order.json")
    plot(report, last, config.out / "pss_order.png")


def selected(scores: Any, shares: tuple[float, ...]) -> list[dict[str, np.ndarray]]:
    """For every budget, name → which kernels it selects, ``[inputs, outputs]``."""
    return [
        {
            name: leaf.reshape(leaf.shape[-2:])
            for name, leaf in named_leaves(mask).leaves.items()
            if leaf is not False
        }
        for mask in nested_masks(scores, shares, scope="model")
    ]


def overlap(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """The share of the one selection that is in the other; they have the same size."""
    both = sum(int((some[name] & others[name]).sum()) for name in some)
    return both / sum(int(mask.sum()) for mask in others.values())


def plot(report: dict[str, Any], last: list[dict[str, np.ndarray]], path: Path) -> None:
    """The three parts, one below the other."""
    kernels = report["kernels"]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.95, 0, len(kernels)))
    figure = matplotlib.figure.Figure(figsize=(11, 10), layout="constrained")
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=(3, 4, 3))
    above, middle, below = parts[:, 0]

    axes = above.subplots()
    names = list(report["selected"])
    for number in reversed(range(len(kernels))):  # the larger ones behind
        taken = [100 * counts[number] / counts[-1] for counts in report["selected"].values()]
        axes.bar(range(len(names)), taken, color=colours[number], label=str(kernels[number]))
    axes.set_xticks(range(len(names)))
    axes.set(xlabel="convolution", ylabel="% of its kernels", title="selected in each layer")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="kernels in all", frameon=False, ncols=2)

    most = sorted(names, key=lambda name: -report["selected"][name][-2])[:MAPS]
    for axes, name in zip(middle.subplots(1, MAPS, squeeze=False)[0], most, strict=True):
        budgets = np.sum([mask[name] for mask in last], axis=0)
        image = np.ones((*budgets.shape, 3))
        image[budgets > 0] = colours[len(kernels) - budgets[budgets > 0], :3]
        axes.imshow(image, interpolation="nearest")
        number = names.index(name)
        axes.set(title=f"convolution {number}", xlabel="output channel", ylabel="input channel")

    axes = below.subplots()
    steps = [row["step"] for row in report["settled"]]
    for number, count in enumerate(kernels):
        shares = [100 * row["share"][number] for row in report["settled"]]
        axes.plot(steps, shares, color=colours[number], label=f"{count} kernels")
    axes.set(xlabel="gradient steps", ylabel="% of the final kernels", ylim=(0, 103))
    axes.set_title("how soon the estimates name the kernels that are selected in the end")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
