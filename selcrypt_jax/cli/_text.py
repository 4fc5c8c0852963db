"""Text for a terminal or a pipe: never truncated, and free of control characters."""

import sys
import unicodedata
from collections.abc import Collection, Sequence

# Control and format characters, lone surrogates, private and unassigned characters, and line and
# paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: object) -> str:
    """One line of text, with invisible characters escaped as in Python.

    Names of tensors and files, and messages of other libraries, come from strangers: they could
    colour, hide or rewrite the text around them.
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _HIDDEN else c for c in str(text))


def note(text: str) -> None:
    """Prints a line to standard error."""
    print(printable(text), file=sys.stderr)


def columns(rows: Sequence[Sequence[str]], *, numbers: bool | Collection[int] = False) -> str:
    """Aligns rows in columns, as wide as their contents, whatever the terminal's width.

    Args:
        rows: rows with the same number of cells.
        numbers: whether columns are right-aligned; or which ones.
    """
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = range(len(widths) * numbers) if isinstance(numbers, bool) else numbers
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
