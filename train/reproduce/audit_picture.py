"""The picture of the weaker attacks, from their figures.

Example::

    python train/reproduce/audit_picture.py --results docs/results

Reads ``audit.json`` and writes ``audit.png``: the best attack so far by steps, and its advantage
over the architecture alone by what is encrypted.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import tyro
from _paper import COLOURS
from matplotlib.axes import Axes

REFERENCE = "architecture alone"
KERNELS = "8 % of the kernels, l2"
SMALL = "small tensors and 8 % of the kernels"
WITH_SMALL = "#0072B2"


@dataclass(frozen=True)
class Config:
    """The folder of the figures and of the picture."""

    results: Path = Path("docs/results")
    """Folder with ``audit.json``."""


def main(config: Config) -> None:
    """Makes the picture; see `Config`."""
    report = json.loads((config.results / "audit.json").read_text(encoding="utf-8"))
    figure = matplotlib.figure.Figure(figsize=(9.5, 3.8), layout="constrained")
    by_steps, by_share = figure.subplots(1, 2)
    _draw_steps(by_steps, report)
    _draw_shares(by_share, report)
    figure.suptitle("Weaker attacks on a DnCNN with 20 of its 400 training images, plain rest")
    figure.savefig(config.results / "audit.png", dpi=110)


def _draw_steps(axes: Axes, report: dict[str, Any]) -> None:
    """PSNR against the attacker's steps."""
    original = report["networks"]["dncnn"]["clean"]
    axes.axhline(original, color="grey", lw=0.8)
    axes.annotate(
        f"original: {original:.1f} dB", (50, original), (0, -4),
        textcoords="offset points", va="top", color="0.35",
    )  # fmt: skip
    for name, style, colour in (
        (KERNELS, "s-", COLOURS["l2"]),
        (SMALL, "o-", WITH_SMALL),
        (REFERENCE, "--", "black"),
    ):
        steps = report["best"][name]["steps"]
        axes.plot([int(n) for n in steps], list(steps.values()), style, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xticks([50, 200, 500, 1000, 2000], ["50", "200", "500", "1,000", "2,000"])
    axes.minorticks_off()
    axes.set(title="best attack so far", xlabel="attacker's steps", ylabel="PSNR / dB")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def _draw_shares(axes: Axes, report: dict[str, Any]) -> None:
    """Advantage after 200 steps against the share encrypted."""
    original, best = report["networks"]["dncnn"]["clean"], report["best"]
    nothing = best[REFERENCE]["steps"]["200"]

    def plot(points: dict[float, float], label: str, style: str, colour: str) -> None:
        x = [100 * share for share in sorted(points)]
        y = [(points[share] - nothing) / (original - nothing) for share in sorted(points)]
        axes.plot(x, y, style, color=colour, label=label)

    fisher: dict[float, float] = {}
    for row in report["kernels"]:
        if row["selection"] == "fisher":
            share = row["share"]
            fisher[share] = max(row["steps"]["200"], fisher.get(share, 0))
    small = [best[name] for name in best if name.startswith(("small", "normalisation"))]
    plot(fisher, "kernels by fisher", "^-", COLOURS["fisher"])
    plot({0.08: best[KERNELS]["steps"]["200"]}, "kernels by l2", "s", COLOURS["l2"])
    points = {entry["share"]: entry["steps"]["200"] for entry in small}
    plot(points, "normalisation, then small tensors and kernels", "o-", WITH_SMALL)
    axes.axhline(0, color="black", ls="--", lw=1.5, label=REFERENCE)
    axes.set_xscale("log")
    axes.set_xticks([0.7, 1, 2, 4, 8], ["0.7", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set(
        title="after 200 steps", xlabel="weights encrypted / %",
        ylabel="advantage (1: the original)", ylim=(-0.08, 1.25),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper right")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
