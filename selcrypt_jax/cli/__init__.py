"""The ``selcrypt`` program."""

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from .. import __version__
from ..demo import DemoConfig
from ..demo import run as run_demo
from . import _commands
from ._calibrate import calibrate


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Shows it all on real images: train, learn importance, protect in levels, evaluate."""
    run_demo(config)


def audit(
    config: tyro.conf.Positional[str],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    quick: bool = False,
    advise: bool = False,
    target_advantage: float = 0.1,
) -> None:
    """Attacks your network as a thief would, and reports what he gets.

    Writes audit.json, plots and report.html, one page that needs nothing else. A run that was
    killed goes on.

    Args:
        config: A TOML file, see docs/audit.md; or demo, demo-vgg19, demo-dncnn.
        out: Folder for the results; made if it does not exist.
        quick: A reduced grid: the strongest attacks, one key, few steps.
        advise: Look for the smallest share that meets the target, instead of trying given ones.
        target_advantage: How much the strongest thief may be ahead of whoever has the
            architecture alone: 0 nothing, 1 all of the original's quality.
    """
    try:
        from ..audit._audit import audit as run_audit
        from ..audit._config import read_config

        run_audit(
            read_config(config),
            out,
            quick=quick,
            target_advantage=target_advantage if advise else None,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the audit needs {error.name or error}, which is not installed. "
            "Install the extra: pip install 'selcrypt-jax[audit,demo]'",
            name=error.name,
        ) from error
    print(f"Wrote {out / 'report.html'} and {out / 'audit.json'}.")


def version() -> None:
    """Prints the version."""
    print(__version__)


COMMANDS: dict[str, Any] = {
    "keygen": _commands.keygen,
    "protect": _commands.protect,
    "grant": _commands.grant,
    "unlock": _commands.unlock,
    "inspect": _commands.inspect,
    "verify": _commands.verify,
    "rotate": _commands.rotate,
    "calibrate": calibrate,
    "audit": audit,
    "demo": demo,
    "version": version,
}

_DESCRIPTION = """\
Selective encryption of neural network weights, in levels.

A protected model is an ordinary safetensors file that everybody may have. Without a key it runs
badly; each grant opens a level of quality; the top level is the original, bit for bit.

  selcrypt keygen -o keys
  selcrypt protect model.safetensors -o public.safetensors --secret keys/secret.key
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
        warnings.filterwarnings("always", message=".*others may read this file")
        warnings.showwarning = _show_warning
        return _run(sys.argv[1:] if args is None else list(args))


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        args = ["version"]
    # One command's parser is made, not ten: a start takes long enough.
    chosen = {args[0]: COMMANDS[args[0]]} if args and args[0] in COMMANDS else COMMANDS
    try:
        tyro.extras.subcommand_cli_from_dict(
            chosen, prog="selcrypt", description=_DESCRIPTION, args=args
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
}


def _reason(error: OSError) -> str:
    text = error.strerror or ""
    plain = error.errno is not None and text == os.strerror(error.errno)
    return _REASONS.get(error.errno or 0, text) if plain else text


def _complain(text: str) -> None:
    """One line, also where a file's name or a library's message has several."""
    print("selcrypt:", *(line.strip() for line in text.splitlines()), file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"selcrypt: warning: {message}", file=sys.stderr)
