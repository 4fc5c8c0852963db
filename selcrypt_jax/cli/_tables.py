"""What commands print: a file's levels, and what levels give."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .._calibrate.levels import Calibration
    from .._release.use import Inspection


def inspection_as_dict(found: "Inspection") -> dict[str, Any]:
    """An inspection as JSON has it."""
    cipher = {"name": "lossless"} | vars(found.cipher)
    return found._asdict() | {
        "cipher": cipher,
        "levels": [level._asdict() for level in found.levels],
    }


def print_inspection(
    found: "Inspection",
    as_json: bool,
    chosen: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
) -> None:
    """Prints what a file says, what was selected in it, and what its levels give."""
    if as_json:
        more = {"calibration": calibration} if calibration else {}
        print(json.dumps(inspection_as_dict(found) | (chosen or {}) | more, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cipher = f"lossless, permuted by {found.cipher.unit}" if found.cipher.permute else "stream"
    lines = Table.grid(padding=(0, 2))
    for name, value in {
        "file": found.path + (f" ({found.files} files)" if found.files > 1 else ""),
        "model": found.model_id,
        "signer": found.signer or "not signed",
        "cipher": cipher,
        "rest": "sealed: nothing can be used without a grant"
        if found.rest == "sealed"
        else "plain: anyone can run level 0",
        "tensors": f"{found.tensors}, {found.weights:,} weights",
        "size": f"{found.file_bytes:,} bytes, {found.manifest_bytes:,} of them manifest",
    }.items():
        lines.add_row(name, Text(value))  # as text: a name of a file may hold markup
    if chosen is not None:
        names = ", ".join(f"{name} ({groups:,})" for name, groups in chosen["selected"].items())
        layout = f", layout {chosen['layout']}" if chosen["layout"] else ""
        count = len(chosen["selected"])
        tensors = f"{count} tensor{'s' * (count != 1)}"
        lines.add_row("selected", Text(f"groups in {tensors}{layout}: {names}"))
        if (change := chosen.get("plain_change")) is not None:
            lines.add_row("change", f"{change:.2%} of what changed from the base stays plain")
        if chosen["untouched"]:
            rest = ", ".join(f"{n:,} {dtype}" for dtype, n in chosen["untouched"].items())
            lines.add_row("untouched", Text(f"in the other tensors: {rest}"))
    table = Table(box=None, pad_edge=False)
    for title in ("level", "groups", "weights", "of all weights"):
        table.add_column(title, justify="right")
    grant = any(level.opens is not None for level in found.levels)
    if grant:
        table.add_column("with this grant")
    for level in found.levels:
        row = [str(level.level), f"{level.groups:,}", f"{level.weights:,}", f"{level.share:.3%}"]
        table.add_row(*row, *(["opens" if level.opens else "stays closed"] if grant else []))
    console = Console(highlight=False, soft_wrap=True)
    console.print(lines)
    console.print()
    console.print(table)
    if calibration:
        console.print()
        print_levels(calibration, console)


def calibration_as_dict(
    found: "Calibration", targets: Sequence[float | None], *, spreads: bool, first: int = 0
) -> dict[str, Any]:
    """What levels give, from the first that has a target, as JSON has it."""
    rows: list[dict[str, Any]] = []
    for level, (share, target, value, spread) in enumerate(
        zip(
            (0.0, *found.levels),
            (*targets, None),
            (*found.values, found.untouched),
            (*(None if math.isnan(s) else s for s in found.spreads), 0.0),
            strict=True,
        ),
        first,
    ):
        row = {"level": level, "share": share, "target": target, "value": value}
        rows.append(row | {"spread": spread} if spreads else row)
    return {
        "levels": rows,
        "untouched": found.untouched,
        "exact": found.exact,
        "evaluations": found.evaluations,
        "calls": found.calls,
    }


def print_levels(found: dict[str, Any], console: "Console | None" = None) -> None:
    """The table of what levels give."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    spreads = "spread" in found["levels"][0]
    for title in ("level", "opens", "target", "gives", *(["± over keys"] if spreads else [])):
        table.add_column(title, justify="right")
    for row in found["levels"]:
        numbers = ("target", "value", *(["spread"] if spreads else []))
        texts = ["" if row[name] is None else f"{row[name]:.4g}" for name in numbers]
        table.add_row(str(row["level"]), f"{row['share']:.4%}", *texts)
    (console or Console(highlight=False, soft_wrap=True)).print(table)
