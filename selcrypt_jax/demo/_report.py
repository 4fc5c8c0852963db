"""The table, the JSON file and the pictures of the demo."""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np
from jaxtyping import PyTree
from rich.table import Table

from ..models._network import psnr
from ._tiers import Tiers
from ._train import Pictures

# Wong's palette, which colour-blind readers can tell apart.
_COLOURS = {
    "pss": "#D55E00",
    "random": "#999999",
    "descend": "#0072B2",
    "ascend": "#56B4E9",
    "mean": "#009E73",
}


class Result(NamedTuple):
    """What was measured of one network, and how long it took.

    Attributes:
        title: network, data.
        tiers: levels and strategies.
        seconds: from the start of training to the last measurement.
    """

    title: str
    tiers: Tiers
    seconds: float


def write_json(path: Path, results: dict[str, Result]) -> None:
    """``tiers.json``: name → all of `Tiers`, and seconds."""
    content = {}
    for name, (_, tiers, seconds) in results.items():
        strategies = {
            strategy: [{"fraction": share, "metric": metric} for share, metric in shares.items()]
            for strategy, shares in tiers.strategies.items()
        }
        levels = [level._asdict() for level in tiers.levels]
        content[name] = tiers._asdict() | {
            "levels": levels, "strategies": strategies, "seconds": round(seconds, 1)
        }  # fmt: skip
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(result: Result) -> Table:
    """Levels, and the strategies at the same encrypted share, for the terminal."""
    tiers = result.tiers
    view = Table(
        title=f"{result.title}: {tiers.fraction:.3%} of the convolution weights encrypted",
        caption=f"means over {tiers.keys} keys; top level bit-exact: "
        f"{'yes' if tiers.top_bit_exact else 'NO'}; {result.seconds:.0f} s",
    )
    view.add_column("level or strategy")
    for heading in ("kernels decrypted", "share of weights", f"metric, {tiers.unit}"):
        view.add_column(heading, justify="right")
    for level in tiers.levels:
        name = "level 0 (no key)" if level.level == 0 else f"level {level.level}"
        view.add_row(name, str(level.groups), f"{level.fraction:.3%}", f"{level.metric:.2f}")
    view.add_row("untouched", "", "", f"{tiers.clean:.2f}")
    view.add_row(_WORTHLESS[tiers.unit], "", "", f"{tiers.worthless:.2f}", end_section=True)
    share = min(tiers.strategies["pss"], key=lambda share: abs(share - tiers.budget))
    for name, metrics in tiers.strategies.items():
        view.add_row(f"no key, {name}", "", f"{share:.3%}", f"{metrics[share]:.2f}")
    return view


_WORTHLESS = {"%": "chance", "dB": "noisy image"}
_METRIC = {"%": "accuracy on test digits, %", "dB": "PSNR of test photographs, dB"}


def draw_curves(path: Path, results: dict[str, Result]) -> None:
    """``tiers.png``: above, the metric of each level; below, strategies against the share."""
    size = (5.6 * len(results), 8)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(2, len(results), squeeze=False)
    for (above, below), result in zip(axes.T, results.values(), strict=True):
        tiers = result.tiers
        metrics = [level.metric for level in tiers.levels]
        last = len(metrics) - 1
        above.plot(range(last + 1), metrics, "o-", color=_COLOURS["pss"])
        for level, metric in enumerate(metrics):
            # To the lower right: there the rising curve is not. Except at its two ends.
            offset, side = ((0, -9), "center") if level == last else ((4, -7), "left")
            offset, height = (offset, "top") if level else ((9, -4), "center")
            above.annotate(
                f"{metric:.1f}", (level, metric), offset,
                textcoords="offset points", ha=side, va=height,
            )  # fmt: skip
        above.set_title(
            f"{result.title}\n{tiers.fraction:.3%} of the convolution weights encrypted"
        )
        above.set_xlabel("permission level (0: no key)")
        shares = [100 * share for share in tiers.strategies["pss"]]
        for name, found in tiers.strategies.items():
            label = "PSS" if name == "pss" else name
            below.plot(shares, list(found.values()), "o-", color=_COLOURS[name], label=label)
        below.axvline(100 * tiers.budget, color="0.8", zorder=0)
        below.set_xscale("log")
        below.set_xticks(shares, [f"{share:g}" for share in shares])
        below.minorticks_off()
        below.set_title("Without a key, by what was selected")
        below.set_xlabel("encrypted share of the convolution weights, %")
        every = [v for found in tiers.strategies.values() for v in found.values()]
        low = min(tiers.worthless, *metrics, *every)
        margin = (tiers.clean - low) * 0.12
        for axis in (above, below):
            axis.set_ylabel(_METRIC[tiers.unit])
            axis.set_ylim(low - margin, tiers.clean + margin)
            for value, style, label in (
                (tiers.clean, "--", "untouched"),
                (tiers.worthless, ":", _WORTHLESS[tiers.unit]),
            ):
                axis.axhline(value, color="0.5", linestyle=style, linewidth=1.1, label=label)
            axis.spines[["top", "right"]].set_visible(False)
        below.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def draw_photographs(path: Path, pictures: Pictures, opened: list[PyTree], tiers: Tiers) -> None:
    """``denoised.png``: one test photograph, noisy and at each level, with its PSNR.

    Args:
        path: of the file.
        pictures: the test photographs, and how parameters denoise them.
        opened: parameters at levels 0..5.
        tiers: for the titles.
    """
    shown = [("original", pictures.clean), ("noisy", pictures.noisy)]
    for level, params in zip(tiers.levels, opened, strict=True):
        name = "level 0, no key" if level.level == 0 else f"level {level.level}"
        shown.append((name, pictures.denoise(params)))
    figure = matplotlib.figure.Figure(figsize=(11, 6.1), layout="constrained", dpi=130)
    axes = figure.subplots(2, 4)
    for axis, (name, images) in zip(axes.flat, shown, strict=True):
        axis.imshow(np.asarray(images)[0, ..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
        quality = float(psnr(images[:1], pictures.clean[:1])[0])
        axis.set_title(name if name == "original" else f"{name}\n{quality:.2f} dB")
    figure.savefig(path)
