"""The tables that commands print: a file's levels, and their quality."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._io.errors import counted
from ._text import columns

if TYPE_CHECKING:
    from .._calibrate.levels import Calibration
    from .._release.measure import MeasuredLevel
    from .._release.use import Inspection

_SHOWN = 8  # tensors, or kinds of them
_NUMBER = re.compile(r"\d+")


def inspection_as_dict(found: "Inspection") -> dict[str, Any]:
    """An inspection, for JSON."""
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
    verbose: bool = False,
) -> None:
    """Prints a file's manifest, what was selected in it, and the quality of its levels."""
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
        "tensors": f"{found.tensors}, {counted(found.weights, 'weight')}",
        "size": f"{found.file_bytes:,} bytes, {found.manifest_bytes:,} of them manifest",
    }
    blocks = []
    if chosen is not None:
        groups, whole = chosen["selected"], len(chosen["whole"])
        text = f"{counted(sum(groups.values()), 'group')} in {counted(len(groups), 'tensor')}"
        text += f", {whole} of them whole" if whole else ""
        text += f", layout {chosen['layout']}" if chosen["layout"] else ""
        # Level 1 of a sealed file has no rings of its own: it opens its groups with the seal.
        first = sum(groups.values()) - sum(level.groups for level in found.levels)
        text += f"; level 1 opens {first:,} of the groups with the rest" if first else ""
        lines["selected"] = text
        blocks = [columns(selected_rows(groups, chosen["whole"], verbose), numbers={1, 2, 4})]
        if (change := chosen.get("plain_change")) is not None:
            lines["change"] = f"{change:.2%} of the change from the base stays plain"
        if chosen["untouched"]:
            rest = ", ".join(f"{n:,} {dtype}" for dtype, n in chosen["untouched"].items())
            lines["untouched"] = f"in the other tensors: {rest}"
    grant = any(level.opens is not None for level in found.levels)
    titles = ["level", "groups", "weights", "of all weights"]
    rows = [[*titles, *(["with this grant"] if grant else [])]]
    for level in found.levels:
        of = "the rest" if found.rest == "sealed" and level.level == 1 else f"{level.groups:,}"
        row = [str(level.level), of, f"{level.weights:,}", f"{level.share:.3%}"]
        rows.append([*row, *(["opens" if level.opens else "stays closed"] if grant else [])])
    blocks = [columns(list(lines.items())), *blocks, columns(rows, numbers=True)]
    print(*blocks, sep="\n\n")
    if calibration:
        print()
        print_levels(calibration)


def selected_rows(
    groups: Mapping[str, int], whole: Collection[str], verbose: bool
) -> list[tuple[str, ...]]:
    """The selection as a table: every tensor if there are few, otherwise kinds of tensors.

    A kind is all tensors whose names differ only in numbers, such as the layers of a stack; its
    last column counts the tensors that were selected whole.

    Args:
        groups: tensor → number of selected groups.
        whole: names of tensors that were selected whole.
        verbose: list every tensor, however many there are.
    """
    if verbose or len(groups) <= _SHOWN:
        rows = [(name, f"{n:,}", "yes" if name in whole else "") for name, n in groups.items()]
        return [("tensor", "groups", "whole"), *rows]
    kinds: dict[str, list[str]] = {}
    for name in groups:
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    ranked = sorted(kinds.values(), key=lambda names: -sum(map(groups.__getitem__, names)))
    rows = [("name", "tensors", "groups", "largest", "whole")]
    for names in ranked[:_SHOWN]:
        largest, entire = max(names, key=groups.__getitem__), sum(name in whole for name in names)
        rows.append(
            (
                names[0] if len(names) == 1 else _NUMBER.sub("*", names[0]),
                str(len(names)),
                f"{sum(map(groups.__getitem__, names)):,}",
                "" if len(names) == 1 else f"{largest} ({groups[largest]:,})",
                str(entire or ""),
            )
        )
    if rest := [name for names in ranked[_SHOWN:] for name in names]:
        entire = sum(name in whole for name in rest)
        text = f"{counted(len(ranked) - _SHOWN, 'more kind')}, --verbose lists all"
        total = f"{sum(map(groups.__getitem__, rest)):,}"
        rows.append((text, str(len(rest)), total, "", str(entire or "")))
    return rows


def calibration_as_dict(
    found: "Calibration", targets: Sequence[float | None], *, spreads: bool, first: int = 0
) -> dict[str, Any]:
    """The quality of levels, from the first that has a target, for JSON."""
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
    """Prints the quality of levels as a table."""
    spreads = "spread" in found["levels"][0]
    rows = [["level", "opens", "target", "gives", *(["± over keys"] if spreads else [])]]
    for row in found["levels"]:
        numbers = ("target", "value", *(["spread"] if spreads else []))
        texts = ["" if row[name] is None else f"{row[name]:.4g}" for name in numbers]
        rows.append([str(row["level"]), f"{row['share']:.4%}", *texts])
    print(columns(rows, numbers=True))


def print_measured(
    file: str,
    metric: str,
    found: "Sequence[MeasuredLevel]",
    reference: float | None,
    as_json: bool,
) -> None:
    """Prints the measured quality of every level, beside what is reached without the file."""
    if as_json:
        rows = [
            level._asdict() | {"value": level.value if math.isfinite(level.value) else None}
            for level in found
        ]
        content = {"file": file, "evaluate": metric, "reference": reference, "levels": rows}
        print(json.dumps(content, indent=2))
        return
    lines = [("file", file), ("metric", metric)]
    rows = [["level", "of all weights", "gives"]]
    rows += [[str(each.level), f"{each.share:.3%}", f"{each.value:.4g}"] for each in found]
    if reference is not None:
        lines.append(("without the file", f"{reference:.4g}"))
        marks = ["worth nothing" if each.worthless else "" for each in found]
        rows = [[*row, mark] for row, mark in zip(rows, ["", *marks], strict=True)]
    print(columns(lines), columns(rows, numbers={0, 1, 2}), sep="\n\n")
    below = ", ".join(str(each.level) for each in found if each.worthless)
    if below:
        print(f"\nTo someone who reaches that, these levels are worth nothing: {below}.")
