"""The demo's pictures."""

from pathlib import Path

import matplotlib.figure
import matplotlib.patheffects
import numpy as np
from jaxtyping import PyTree
from matplotlib.axes import Axes

from ..models._network import psnr
from ._report import METRIC, WORTHLESS, Result
from ._tiers import NAMES, Tiers
from ._train import Pictures

# Wong's palette, which colour-blind readers can tell apart, with markers for greyscale prints.
_LOOKS = {
    "pss": ("#D55E00", "o-"),
    "random": ("#999999", "s--"),
    "descend": ("#0072B2", "^-"),
    "ascend": ("#56B4E9", "v:"),
    "mean": ("#009E73", "D-."),
}
_TIER = "#0072B2"


def draw_tiers(path: Path, results: dict[str, Result]) -> None:
    """``tiers.png``: quality on held-out data and target of each tier, and the sealed file."""
    size = (6.2 * len(results), 5.1)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=130)
    for axis, result in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.values(), strict=True
    ):
        _draw_tiers(axis, result.tiers)
        axis.set_title(result.title)
    drawn, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(drawn, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _draw_tiers(axis: Axes, tiers: Tiers) -> None:
    values = [tier.held_out.mean for tier in tiers.tiers]
    span = values[-1] - min(values[0], tiers.worthless)
    low, high = min(values[0], tiers.worthless) - 0.22 * span, values[-1] + 0.16 * span
    line = tiers.without_file.mean
    axis.axhspan(low, line, color="0.92", zorder=0)
    axis.axhline(line, color="0.35", linestyle="--", linewidth=1.2)
    axis.annotate(
        f"trained without the file: {line:.1f} {tiers.unit}\n"
        "tiers below are worth nothing\nto someone with such data",
        (-1.4, line), (2, -4), textcoords="offset points", va="top", fontsize="small", color="0.25",
    )  # fmt: skip
    axis.axhline(tiers.worthless, color="0.35", linestyle=":", linewidth=1.2)
    axis.annotate(
        f"{WORTHLESS[tiers.unit]}: {tiers.worthless:.1f} {tiers.unit}",
        (len(values) - 0.6, tiers.worthless), (0, 5),
        textcoords="offset points", ha="right", fontsize="small", color="0.25",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )  # fmt: skip
    places = range(len(values))
    errors = [2 * tier.difference_error for tier in tiers.tiers]
    axis.errorbar(
        places, values, errors, fmt="o-", color=_TIER, capsize=3, zorder=3,
        label="held-out data, ± 2 standard errors of its difference from the calibration data",
    )  # fmt: skip
    targets = [(n, t.target) for n, t in enumerate(tiers.tiers) if t.target is not None]
    axis.plot(
        *zip(*targets, strict=True), "_", color="black", markersize=22, markeredgewidth=1.6,
        label="target", zorder=2,
    )  # fmt: skip
    for place, value in zip(places, values, strict=True):
        axis.annotate(
            f"{value:.1f}", (place, value), (-9, 7), textcoords="offset points", ha="right",
            path_effects=[matplotlib.patheffects.withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    sealed = tiers.sealed.mean
    shown = max(sealed, low + 0.06 * span)
    axis.plot([-1], [shown], "X", color="black", markersize=9, label="sealed file without a key")
    axis.annotate(
        f"{sealed:.1f}" + (" ↓" if shown > sealed else ""), (-1, shown), (0, 8),
        textcoords="offset points", ha="center",
    )  # fmt: skip
    names = [*NAMES[:-1], f"{NAMES[-1]},\nexact"]
    axis.set_xticks(range(-1, len(values)), ["sealed,\nno key", f"{names[0]},\nno key", *names[1:]])
    axis.set_xlim(-1.45, len(values) - 0.55)
    axis.set_ylim(low, high)
    axis.set_ylabel(METRIC[tiers.unit])
    axis.spines[["top", "right"]].set_visible(False)


def draw_paper(path: Path, results: dict[str, Result]) -> None:
    """``paper.png``: above, the paper's levels; below, strategies against the encrypted share."""
    size = (5.6 * len(results), 8)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(2, len(results), squeeze=False)
    for (above, below), result in zip(axes.T, results.values(), strict=True):
        tiers, paper = result.tiers, result.paper
        metrics = [level.metric for level in paper.levels]
        last = len(metrics) - 1
        above.plot(range(last + 1), metrics, "o-", color=_LOOKS["pss"][0])
        for level, metric in enumerate(metrics):
            # To the lower right: there the rising curve is not. Except at its two ends.
            offset, side = ((0, -9), "center") if level == last else ((4, -7), "left")
            offset, height = (offset, "top") if level else ((9, -4), "center")
            above.annotate(
                f"{metric:.1f}", (level, metric), offset,
                textcoords="offset points", ha=side, va=height,
            )  # fmt: skip
        above.set_title(
            f"{result.title}\n{paper.fraction:.3%} of the convolution weights encrypted"
        )
        above.set_xlabel("permission level (0: no key)")
        shares = [100 * share for share in paper.strategies["pss"]]
        for name, found in paper.strategies.items():
            label, (colour, style) = "PSS" if name == "pss" else name, _LOOKS[name]
            below.plot(shares, list(found.values()), style, color=colour, label=label)
        below.axvline(100 * paper.budget, color="0.8", zorder=0)
        below.set_xscale("log")
        below.set_xticks(shares, [f"{share:g}" for share in shares])
        below.minorticks_off()
        below.set_title("Without a key, by what was selected")
        below.set_xlabel("encrypted share of the convolution weights, %")
        every = [v for found in paper.strategies.values() for v in found.values()]
        clean, low = tiers.tiers[-1].held_out.mean, min(tiers.worthless, *metrics, *every)
        margin = (clean - low) * 0.12
        for axis in (above, below):
            axis.set_ylabel(METRIC[tiers.unit])
            axis.set_ylim(low - margin, clean + margin)
            for value, style, label in (
                (clean, "--", "untouched"),
                (tiers.worthless, ":", WORTHLESS[tiers.unit]),
            ):
                axis.axhline(value, color="0.5", linestyle=style, linewidth=1.1, label=label)
            axis.spines[["top", "right"]].set_visible(False)
        below.legend(
            frameon=False,
            fontsize="small",
            ncols=4,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
        )
    figure.savefig(path)


def draw_photographs(path: Path, pictures: Pictures, opened: list[PyTree]) -> None:
    """``denoised.png``: one photograph, noisy, and as denoised at each tier, with its PSNR.

    Args:
        path: the path of the picture.
        pictures: the test photographs, and a function that denoises them.
        opened: the parameters of the sealed file without a key, and those of each tier.
    """
    names = ["sealed, no key", f"{NAMES[0]}, no key", *NAMES[1:]]
    shown = [("original", pictures.clean), ("noisy input", pictures.noisy)]
    shown += [(name, pictures.denoise(p)) for name, p in zip(names, opened, strict=True)]
    figure = matplotlib.figure.Figure(figsize=(11, 6.1), layout="constrained", dpi=130)
    axes = figure.subplots(2, 4)
    for axis, (name, images) in zip(axes.flat, shown, strict=True):
        axis.imshow(np.asarray(images)[0, ..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
        quality = float(psnr(images[:1], pictures.clean[:1])[0])
        axis.set_title(name if name == "original" else f"{name}\n{quality:.1f} dB")
    figure.savefig(path)
