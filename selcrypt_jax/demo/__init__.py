"""The demo: trains two networks, protects them in five levels and measures what each level gives.

``selcrypt demo --out DIR`` on the command line, `run` from Python. Needs the extra ``demo``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from ._report import Result


@dataclass(frozen=True)
class DemoConfig:
    """Train VGG19 on digits and DnCNN on photographs, and protect both in five levels.

    All data is installed with the packages. Writes tiers.json (what was measured), tiers.png
    (levels, and selection strategies) and denoised.png (a photograph at each level).
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory for the results; made if it does not exist."""

    seed: int = 0
    """Seed of data, training and noise. Keys are new each time."""

    quick: bool = False
    """A minute instead of several: smaller networks, hardly trained. Shows that all works."""


def run(config: DemoConfig, console: "Console | None" = None) -> "dict[str, Result]":
    """Runs the demo.

    Args:
        config: see `DemoConfig`.
        console: where progress and the table go; standard output by default.

    Returns:
        ``"vgg19"`` and ``"dncnn"`` → what was measured, as in ``tiers.json``.

    Raises:
        ModuleNotFoundError: the extra ``demo`` is not installed.
        OSError: the directory cannot be made or written to; before anything is computed.
    """
    try:
        from . import _run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs {error.name}, which is not installed. "
            "Install the extra: pip install 'selcrypt-jax[demo]'",
            name=error.name,
        ) from error
    return _run.run(config, console)
