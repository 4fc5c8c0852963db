"""Rows of the comparison, and the tables made from them; nothing here needs JAX."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEADINGS = {
    "case": "case",
    "contender": "contender",
    "median_ms": "median, ms",
    "minimum_ms": "min, ms",
    "ratio": "ratio",
    "gb_per_s": "GB/s",
    "peak_mb": "peak, MB",
    "runs": "runs",
}
MISSING = "–"

Value = float | str | None


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    Attributes:
        repeats: runs of each contender, after the warm-up.
        quick: tiny sizes, to check that everything works.
        large: also the sizes that need many gigabytes.
        tensorizer_python: an interpreter that may have tensorizer.
    """

    repeats: int
    quick: bool
    large: bool
    tensorizer_python: str


@dataclass(frozen=True)
class Row:
    """A line of a table; None for values that were not measured.

    Attributes:
        section: the table.
        case: the operation and its input.
        contender: the program measured.
        median_ms: milliseconds per run.
        minimum_ms: milliseconds of the fastest run.
        ratio: the median relative to that of the section's baseline in the same case.
        gb_per_s: size of the model or of the output, divided by the median time.
        peak_mb: the peak memory of a run above the memory held before, in 10⁶ bytes.
        runs: the number of runs.
        more: other columns, by their headings.
        note: a remark, such as why nothing was measured.
    """

    section: str
    case: str
    contender: str
    median_ms: float | None = None
    minimum_ms: float | None = None
    ratio: float | None = None
    gb_per_s: float | None = None
    peak_mb: float | None = None
    runs: int = 0
    more: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def text_of(value: Value) -> str:
    """A cell: three significant digits, or all digits before the point if there are more."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, str | int):
        return str(value) if isinstance(value, str) else f"{value:,}"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4}f}"


def table(rows: Sequence[Row]) -> str:
    """Rows of a section in Markdown, without empty columns."""
    cells: list[dict[str, Value]] = []
    for row in rows:
        values = asdict(row)
        named: dict[str, Value] = {title: values[name] for name, title in HEADINGS.items()}
        cells.append(named | {"runs": row.runs or None, **row.more, "note": row.note})
    titles = list(dict.fromkeys(title for line in cells for title in line))
    titles.remove("note")
    titles = [t for t in [*titles, "note"] if any(line.get(t) not in (None, "") for line in cells)]
    aligned = ["---" if t in ("case", "contender", "note") else "---:" for t in titles]
    lines = [titles, aligned, *([text_of(line.get(t)) for t in titles] for line in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(environment: Mapping[str, str], rows: Iterable[Row], notes: Mapping[str, str]) -> str:
    """The whole report in Markdown.

    Args:
        environment: the machine and versions of the run.
        rows: the rows of all sections.
        notes: section → how to read its table; the longest matching prefix applies.
    """
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row.section, []).append(row)
    parts = ["# Performance", "\n".join(f"- {what}: {is_}" for what, is_ in environment.items())]
    for section, found in tables.items():
        known = [name for name in notes if section.startswith(name)]
        parts += [f"## {section}", notes[max(known, key=len)] if known else "", table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(
    folder: Path, environment: Mapping[str, str], rows: Sequence[Row], notes: Mapping[str, str]
) -> str:
    """Writes performance.json and performance.md; returns the latter's text."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"environment": dict(environment), "rows": [asdict(row) for row in rows]}
    (folder / "performance.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    text = report(environment, rows, notes)
    (folder / "performance.md").write_text(text)
    return text
