"""What commands print: a file's levels, and what levels give."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._text import columns

if TYPE_CHECKING:
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
    cipher = f"lossless, permuted by {found.cipher.unit}" if found.cipher.permute else "stream"
    lines = {
        "file": found.path + (f" ({found.files} files)" if found.files > 1 else ""),
        "model": found.model_id,
        "signer": found.signer or "not signed",
        "cipher": cipher,
        "rest": "sealed: nothing can be used without a grant"
        if found.rest == "sealed"
        else "plain: anyone can run level 0",
        "tensors": f"{found.tensors}, {found.weights:,} weights",
        "size": f"{found.file_bytes:,} bytes, {found.manifest_bytes:,} of them manifest",
    }
    if chosen is not None:
        names = ", ".join(f"{name} ({groups:,})" for name, groups in chosen["selected"].items())
        layout = f", layout {chosen['layout']}" if chosen["layout"] else ""
        count = len(chosen["selected"])
        tensors = f"{count} tensor{'s' * (count != 1)}"
        lines["selected"] = f"groups in {tensors}{layout}: {names}"
        if (change := chosen.get("plain_change")) is not None:
            lines["change"] = f"{change:.2%} of what changed from the base stays plain"
        if chosen["untouched"]:
            rest = ", ".join(f"{n:,} {dtype}" for dtype, n in chosen["untouched"].items())
            lines["untouched"] = f"in the other tensors: {rest}"
    grant = any(level.opens is not None for level in found.levels)
    titles = ["level", "groups", "weights", "of all weights"]
    rows = [[*titles, *(["with this grant"] if grant else [])]]
    for level in found.levels:
        row = [str(level.level), f"{level.groups:,}", f"{level.weights:,}", f"{level.share:.3%}"]
        rows.append([*row, *(["opens" if level.opens else "stays closed"] if grant else [])])
    print(columns(list(lines.items())), columns(rows, numbers=True), sep="\n\n")
    if calibration:
        print()
        print_levels(calibration)


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


def print_levels(found: dict[str, Any]) -> None:
    """The table of what levels give."""
    spreads = "spread" in found["levels"][0]
    rows = [["level", "opens", "target", "gives", *(["± over keys"] if spreads else [])]]
    for row in found["levels"]:
        numbers = ("target", "value", *(["spread"] if spreads else []))
        texts = ["" if row[name] is None else f"{row[name]:.4g}" for name in numbers]
        rows.append([str(row["level"]), f"{row['share']:.4%}", *texts])
    print(columns(rows, numbers=True))
