"""The help of the commands: paragraphs that fill the width of the terminal."""

import inspect
import re
import shutil
import textwrap
from typing import Any, TextIO


def one_line_each(described: Any) -> Any:
    """The same function or class, whose docstring has each argument's description on one line.

    tyro keeps line breaks in these, and the help would wrap at the source's width and again at the
    terminal's.
    """
    # After cleandoc, descriptions are indented by four spaces and their further lines by eight.
    described.__doc__ = re.sub(r"\n {8}(?=\S)", " ", inspect.cleandoc(described.__doc__))
    return described


def summary_of(command: Any) -> Any:
    """A stand-in for a command in the list of commands, with the first line of its help alone."""

    def listed() -> None:
        pass

    listed.__doc__ = command.__doc__.partition("\n")[0]
    return listed


class Filled:
    """A stream that wraps long lines at words; tyro leaves the description of a command unwrapped.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        width = max(40, shutil.get_terminal_size().columns)
        lines = re.sub(r"\n{3,}", "\n\n", text).split("\n")
        return self._stream.write("\n".join(_filled(line, width) for line in lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _filled(line: str, width: int) -> str:
    if len(line) <= width or not line[0].isalpha():  # an example, or in a box, which tyro fills
        return line
    indent = ""
    if line.startswith("usage: "):
        line, indent = line.replace(",", ", "), " " * 7
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
