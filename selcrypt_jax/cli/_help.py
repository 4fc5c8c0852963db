"""The help of the commands, filled to the terminal's width; options as typed, in messages."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import fields, is_dataclass
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


def options_of(command: Any) -> set[str]:
    """The options of a command, by their names in Python."""
    from tyro.conf import Positional  # here, so that a failed import is reported

    found = set()
    for name, kind in command.__annotations__.items():
        kind, marks = getattr(kind, "__origin__", kind), getattr(kind, "__metadata__", ())
        if is_dataclass(kind):
            found |= {option.name for option in fields(kind)}
        elif Positional not in marks:
            found.add(name)
    # Messages say this of the words themselves, not of the option that asks for them.
    return found - {"passphrase", "return"}


def as_typed(text: str, options: Collection[str]) -> str:
    """A message for Python, with options as they are typed on the command line.

    Args:
        text: the message: it names an option with a colon after it, at its start or after another
            colon; in backquotes; or as an argument, such as ``small=0`` or ``force=True``.
        options: the names in Python of the options that there are.
    """
    if not options:
        return text

    def typed(name: str) -> str:
        return "--" + name.replace("_", "-")

    def argument(found: re.Match[str]) -> str:
        name, value = found.groups()
        value = value[1:-1] if value[1:-1].isalnum() and value[0] == "'" else value
        return typed(name) if value == "True" else f"{typed(name)} {value}"

    def subject(found: re.Match[str]) -> str:
        start, name, index = found.groups()
        return f"{start}{typed(name)}{f', value {int(index) + 1}' if index else ''}:"

    name = f"({'|'.join(sorted(options))})"
    value = r"(True|\d[\d.]*\d|\d|'[^']*')"
    both = r"(?: \(--[a-z-]+\)|, --[a-z-]+)?"  # where a message has the option beside it
    text = re.sub(rf"(?<![\w.]){name}={value}{both}", argument, text)
    text = re.sub(rf"(^|: ){name}(?:\[(\d+)\])?:", subject, text)
    text = re.sub(f"`{name}`", lambda found: typed(found[1]), text)
    text = re.sub(r'(?<=first target )None\b|None \("any"\)', "any", text)
    return re.sub(r", or (Grant\.)?read\([^)]*\)", "", text)  # next to the option


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
