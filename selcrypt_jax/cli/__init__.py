"""The ``selcrypt`` program."""

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ._help import Filled, as_typed, one_line_each, options_of, summary_of
from ._memory import check_memory
from ._text import note

COMMANDS = {
    "keygen": "_owner",
    "protect": "_protect",
    "grant": "_owner",
    "unlock": "_customer",
    "inspect": "_customer",
    "verify": "_customer",
    "rotate": "_owner",
    "calibrate": "_plan",
    "levels": "_plan",
    "audit": "_other",
    "demo": "_other",
    "version": "_other",
}
"""Command → the module of its function."""


def command(name: str) -> Any:
    """The function of a command; its module is imported only now, which keeps startup fast."""
    return one_line_each(getattr(importlib.import_module(f".{COMMANDS[name]}", __name__), name))


_DESCRIPTION = """\
Selective encryption of neural network weights, in levels.

A protected model is an ordinary safetensors file that anyone may download. By default it is
sealed: without a key it is worthless, and reveals only names, shapes, dtypes and the range of
exponents. With --rest plain it runs without a key, at reduced quality. Each grant opens a level of
quality; the top level is the original, bit for bit.

  selcrypt keygen -o keys
  selcrypt protect model.safetensors -o public.safetensors \\
    --secret keys/secret.key --signing keys/signing.key
  selcrypt grant public.safetensors --level 2 \\
    --secret keys/secret.key -o alice.grant
  selcrypt unlock public.safetensors --grant alice.grant -o alice.safetensors
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs ``selcrypt``.

    Args:
        args: the command line; by default that of the process.

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
    # Build only the parser that is needed.
    names = args[:1] if args and args[0] in COMMANDS else COMMANDS
    options: set[str] = set()
    try:
        check_memory(args[0] if args else "")
        import tyro  # here, so that a failed import is reported too

        from ._types import plain_types

        stdout: Any = sys.stdout
        functions = {name: command(name) for name in names}
        if names is not COMMANDS:
            options = options_of(functions[args[0]])
        if stdout is not None and {"-h", "--help"}.intersection(args):
            stdout = Filled(stdout)
            if names is COMMANDS:
                functions = {name: summary_of(each) for name, each in functions.items()}
        with plain_types(), contextlib.redirect_stdout(stdout):
            tyro.extras.subcommand_cli_from_dict(
                functions,
                prog="selcrypt",
                description=_DESCRIPTION,
                args=args,
            )
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe: no error, not even while Python exits.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # str(error) begins with a number and ends with the path.
        known = error.strerror is not None and error.filename is not None
        text = f"{error.filename}: {_reason(error)}" if known else as_typed(str(error), options)
        _complain(text)
        return 1
    except ValueError as error:
        _complain(as_typed(str(error), options))
        return 1
    except ImportError as error:
        _complain(_missing(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_short(error):
            raise
        _complain(
            str(error)
            if str(error).startswith("memory: ")
            else "not enough memory, or too few threads allowed; nothing was written. A few copies "
            "of one tensor at a time have to fit: free some memory, or raise the limit."
        )
        return 1
    except (KeyboardInterrupt, EOFError):
        _complain("interrupted; nothing was written")
        return 130
    return 0


def _is_short(error: MemoryError | RuntimeError) -> bool:
    """Whether memory or threads ran out."""
    words = ("RESOURCE_EXHAUSTED", "can't start new thread")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _missing(error: ImportError) -> str:
    text = str(error).strip()
    if isinstance(error, ModuleNotFoundError) and not text.startswith("No module named"):
        return text  # our own error, which names the extra
    return (
        f"a library failed to load: {text.splitlines()[-1] if text else type(error).__name__}. The "
        "installation is broken, or memory is short: reinstall (pip install --force-reinstall), or "
        "raise the limit (ulimit -v)."
    )


# Replacements for the system's messages, which say what is wrong, but not what to do.
_REASONS = {
    errno.ENOENT: "there is no such file. Check its name and the working folder.",
    errno.EEXIST: "expected a folder, got a file. Name another one.",
    errno.ENOTDIR: "expected only folders above it, got a file. Check the path.",
    errno.EISDIR: "expected a file, got a folder. Name a file in it.",
    errno.EACCES: "permission denied. Check its permissions, or name another.",
    errno.ELOOP: "expected a file, got a loop of symbolic links. Name the file itself.",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter one.",
    errno.EROFS: "the file system is read-only. Name another place.",
    errno.EIO: "the disk failed to read or write it. Check the disk, or take another copy.",
}


def _reason(error: OSError) -> str:
    text = error.strerror or ""
    plain = error.errno is not None and text == os.strerror(error.errno)
    return _REASONS.get(error.errno or 0, text) if plain else text


def _complain(text: str) -> None:
    """Prints an error as one line, even if a library's message has several."""
    note(" ".join(["selcrypt:", *map(str.strip, text.split("\n"))]))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"selcrypt: warning: {message}")
