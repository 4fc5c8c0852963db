"""The ``selcrypt`` program."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from . import __version__
from .demo import DemoConfig
from .demo import run as run_demo


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Shows it all on real images: train, learn importance, protect in levels, evaluate."""
    run_demo(config)


def version() -> None:
    """Prints the version."""
    print(__version__)


def main(args: Sequence[str] | None = None) -> int:
    """Runs ``selcrypt``.

    Args:
        args: command line; that of the process by default.

    Returns:
        Exit status: 0, or 1 with the reason on standard error.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo, "version": version},
            prog="selcrypt",
            description="Selective encryption of neural network weights, in levels.",
            args=args,
        )
    except (OSError, ModuleNotFoundError, ValueError) as error:
        print(f"selcrypt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selcrypt: interrupted", file=sys.stderr)
        return 130
    return 0
