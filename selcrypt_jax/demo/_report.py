"""The demo's tables and JSON file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from .._io.errors import counted
from ._paper import Paper
from ._tiers import DATA, Measured, Tiers

WORTHLESS = {"%": "chance", "dB": "noisy image"}
METRIC = {"%": "accuracy on held-out digits, %", "dB": "PSNR on held-out photographs, dB"}
_EXAMPLES = {"%": "digits", "dB": "squares of photographs"}
_TRAINED_ON = {"%": "digits", "dB": "patches"}


class Result(NamedTuple):
    """The measurements of one network, and how long they took.

    Attributes:
        title: the network and its data.
        tiers: the tiers by target.
        paper: the paper's levels and strategies.
        seconds: from the start of training to the last measurement.
    """

    title: str
    tiers: Tiers
    paper: Paper
    seconds: float


def write_json(path: Path, results: dict[str, Result]) -> None:
    """``tiers.json``: name → all of `Tiers`, ``paper`` with all of `Paper`, and seconds."""
    content = {}
    for name, (_, tiers, paper, seconds) in results.items():
        strategies = {
            strategy: [{"fraction": share, "metric": metric} for share, metric in shares.items()]
            for strategy, shares in paper.strategies.items()
        }
        rest = {"paper": paper._asdict() | {"strategies": strategies}, "seconds": round(seconds, 1)}
        content[name] = _named(tiers._asdict() | rest)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _named(value: Any) -> Any:
    """Named tuples as dicts, at every depth."""
    as_dict = getattr(value, "_asdict", None)
    if as_dict is not None:
        value = as_dict()
    if isinstance(value, dict):
        return {name: _named(inner) for name, inner in value.items()}
    return [_named(inner) for inner in value] if isinstance(value, list | tuple) else value


def tier_table(result: Result) -> Table:
    """The tiers by target, for the terminal."""
    tiers = result.tiers
    examples = _EXAMPLES[tiers.unit]
    exact = "yes" if tiers.top_bit_exact else "NO"
    view = Table(
        title=f"{result.title}: tiers by target, {tiers.unit}",
        caption="± is one standard error over examples; that of the difference includes the "
        f"calibration data, on which the target was met. Calibrated on {tiers.calibrated_on} "
        f"{examples}, held out {tiers.held_out} others; "
        f"{counted(tiers.evaluations, 'evaluation')}. {tiers.fraction:.1%} of the convolution "
        f"weights encrypted. Top level bit-exact: {exact}. {result.seconds:.0f} s for this "
        "network.",
    )
    view.add_column("level")
    for heading in ("target", "calibration\ndata", "held-out\ndata", "difference\nfrom target"):
        view.add_column(heading, justify="right")
    view.add_row("0: sealed, no key", "", "", _shown(tiers.sealed), "")
    for level, tier in enumerate(tiers.tiers):
        name = f"{level}: {tier.name}" + ("" if level else ", no key")
        target, difference = "exact", ""
        if tier.target is not None:
            off = tier.held_out.mean - tier.target
            target, difference = f"{tier.target:g}", f"{off:+.2f} ± {tier.difference_error:.2f}"
        seen = f"{tier.calibration.mean:.2f}"
        view.add_row(name, target, seen, _shown(tier.held_out), difference)
    view.rows[-1].end_section = True
    view.add_row("without the file", "", "", _shown(tiers.without_file))
    view.add_row(WORTHLESS[tiers.unit], "", "", f"{tiers.worthless:.2f}")
    return view


def _shown(measured: Measured) -> str:
    return f"{measured.mean:.2f} ± {measured.error:.2f}"


def warning(result: Result) -> str:
    """A message about what training without the file means for the tiers."""
    tiers = result.tiers
    said = (
        f"{result.title}: {counted(tiers.steps, 'training step')} from fresh weights on "
        f"{tiers.examples} {_TRAINED_ON[tiers.unit]} ({100 * DATA:g} % of the training data), "
        f"without the file, reach {tiers.without_file.mean:.1f} {tiers.unit}. "
    )
    below = ", ".join(tiers.pointless)
    if not below:
        return said + "Every tier gives more than that, but longer training may catch up."
    return said + f"To someone who has such data, these tiers are worth nothing: {below}."


def paper_table(result: Result) -> Table:
    """The paper's levels, and the strategies at the same encrypted share, for the terminal."""
    tiers, paper = result.tiers, result.paper
    view = Table(
        title=f"{result.title}: the paper's levels, {paper.fraction:.3%} of the convolution "
        "weights encrypted",
        caption=f"on held-out data, averaged over {counted(paper.keys, 'key')}; top level "
        f"bit-exact: {'yes' if paper.top_bit_exact else 'NO'}",
    )
    view.add_column("level or strategy")
    for heading in ("kernels decrypted", "share of weights", f"metric, {tiers.unit}"):
        view.add_column(heading, justify="right")
    for level in paper.levels:
        name = "level 0 (no key)" if level.level == 0 else f"level {level.level}"
        view.add_row(name, str(level.groups), f"{level.fraction:.3%}", f"{level.metric:.1f}")
    view.rows[-1].end_section = True
    share = min(paper.strategies["pss"], key=lambda share: abs(share - paper.budget))
    for name, metrics in paper.strategies.items():
        view.add_row(f"no key, {name}", "", f"{share:.3%}", f"{metrics[share]:.1f}")
    return view
