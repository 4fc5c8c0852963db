"""Text for a terminal or a pipe: never cut, and with nothing in it that a terminal obeys."""

import sys
import unicodedata
from collections.abc import Collection, Sequence

# Controls, marks that turn or hide text, lone surrogates, private and unknown characters, and
# separators of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: object) -> str:
    """One line of text, in which characters that are not seen are escaped as Python writes them.

    Names of tensors and files, and texts of other libraries, come from strangers: they could
    colour, hide or rewrite what stands around them.
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _HIDDEN else c for c in str(text))


def note(text: str) -> None:
    """A line on standard error."""
    print(printable(text), file=sys.stderr)


def columns(rows: Sequence[Sequence[str]], *, numbers: bool | Collection[int] = False) -> str:
    """Lines of columns, as wide as their contents whatever the terminal.

    Args:
        rows: of as many texts each.
        numbers: whether columns are aligned at the right; or which of them.
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
