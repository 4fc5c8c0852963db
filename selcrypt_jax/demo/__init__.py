"""The demo: trains two networks, and protects them in tiers that meet their targets.

``selcrypt demo --out DIR`` on the command line, `run` from Python. Needs the extra ``demo``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .._io.errors import extra

if TYPE_CHECKING:
    from rich.console import Console

    from ._report import Result


@dataclass(frozen=True)
class DemoConfig:
    """Train two networks, VGG19 on digits and DnCNN on photographs, and sell them in tiers.

    Each tier has a target: for VGG19 public 10 %, free 40 %, basic 60 %, pro 80 %, full exact. The
    quality that it really gives is measured on held-out data. Then come the paper's levels and
    selection strategies. All data are installed with the packages. Writes tiers.json (the
    measurements), tiers.png (the quality of each tier), denoised.png (a photograph at each tier)
    and paper.png.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory for the results; created if it does not exist."""

    seed: int = 0
    """Seed for data, training and noise. Keys are new each time."""

    quick: bool = False
    """A minute or two instead of several: smaller networks, barely trained, and lower targets."""


def run(config: DemoConfig, console: "Console | None" = None) -> "dict[str, Result]":
    """Runs the demo.

    Args:
        config: see `DemoConfig`.
        console: where to print progress and the tables; standard output by default.

    Returns:
        ``"vgg19"`` and ``"dncnn"`` → the measurements, as in ``tiers.json``.

    Raises:
        ModuleNotFoundError: the extra ``demo`` is not installed.
        OSError: the directory cannot be created or written to; raised before anything is computed.
        ValueError: no release met the targets. Keys are new each time: run it again.
    """
    try:
        from . import _run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs {error.name}, which is not installed. {extra('demo')}.",
            name=error.name,
        ) from error
    return _run.run(config, console)
