"""The ``selcrypt`` program."""

import errno
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from ._text import note
from ._types import plain_types

COMMANDS = {
    "keygen": "_owner",
    "protect": "_owner",
    "grant": "_owner",
    "unlock": "_customer",
    "inspect": "_customer",
    "verify": "_customer",
    "rotate": "_owner",
    "calibrate": "_owner",
    "audit": "_other",
    "demo": "_other",
    "version": "_other",
}
"""Command → the module of its function."""


def command(name: str) -> Any:
    """The function of a command; its module is imported now, since a start takes long enough."""
    return getattr(importlib.import_module(f".{COMMANDS[name]}", __name__), name)


_DESCRIPTION = """\
Selective encryption of neural network weights, in levels.

A protected model is an ordinary safetensors file that anyone may download. By default it is
sealed: without a key it is worthless, and gives nothing but names, shapes, dtypes and the range of
exponents. With --rest plain it runs without a key, badly. Each grant opens a level of quality; the
top level is the original, bit for bit.

  selcrypt keygen -o keys
  selcrypt protect model.safetensors -o public.safetensors --secret keys/secret.key \\
    --signing keys/signing.key
  selcrypt grant public.safetensors --level 2 --secret keys/secret.key -o alice.grant
  selcrypt unlock public.safetensors --grant alice.grant -o alice.safetensors
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs ``selcrypt``.

    Args:
        args: command line; that of the process by default.

    Returns:
        Exit status: 0, or 1 with the reason on standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    if args is None:  # as a program: clean up when asked to end, as after Ctrl-C
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, _end)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="(?s).*others may read this")
        warnings.showwarning = _show_warning
        return _run(sys.argv[1:] if args is None else list(args))


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        args = ["version"]
    # One command's parser is made, not ten.
    names = args[:1] if args and args[0] in COMMANDS else COMMANDS
    try:
        with plain_types():
            tyro.extras.subcommand_cli_from_dict(
                {name: command(name) for name in names},
                prog="selcrypt",
                description=_DESCRIPTION,
                args=args,
            )
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough: no complaint, not even while Python ends.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Its own text begins with a number, and ends with the path.
        known = error.strerror is not None and error.filename is not None
        _complain(f"{error.filename}: {_reason(error)}" if known else str(error))
        return 1
    except (ModuleNotFoundError, ValueError) as error:
        _complain(str(error))
        return 1
    except MemoryError:
        _complain(
            "not enough memory. A tensor at a time is held, a few times over; nothing was written."
        )
        return 1
    except (KeyboardInterrupt, EOFError):
        _complain("interrupted; nothing was written")
        return 130
    return 0


# For the system's own texts, which say what is wrong, and not what to do.
_REASONS = {
    errno.ENOENT: "there is no such file. Check its name, and the folder that you are in.",
    errno.EEXIST: "expected a folder, got a file. Name another one.",
    errno.ENOTDIR: "expected a folder on the way, got a file. Check the path.",
    errno.EISDIR: "expected a file, got a folder. Name a file in it.",
    errno.EACCES: "permission denied. Check who may read and write it, or name another.",
    errno.ELOOP: "expected a file, got links that lead round in a circle. Name the file itself.",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter one.",
    errno.EROFS: "the file system is read-only. Name another place.",
    errno.EIO: "the disk failed to read or write it. Check the disk, or take another copy.",
}


def _reason(error: OSError) -> str:
    text = error.strerror or ""
    plain = error.errno is not None and text == os.strerror(error.errno)
    return _REASONS.get(error.errno or 0, text) if plain else text


def _complain(text: str) -> None:
    """One line, also where a library's message has several."""
    note(" ".join(["selcrypt:", *map(str.strip, text.split("\n"))]))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"selcrypt: warning: {message}")
