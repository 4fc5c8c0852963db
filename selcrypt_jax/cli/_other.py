"""The commands that demonstrate and audit: demo, audit, version."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .. import __version__
from .._io.errors import extra
from ..demo import DemoConfig
from ..demo import run as run_demo
from ._options import Flat, Maybe, Switch
from ._text import printable


@dataclass(frozen=True)
class Demo(DemoConfig):
    """The demo's options."""

    quick: Switch = False


def demo(config: Annotated[Demo, Flat]) -> None:
    """Trains two networks on real images, protects them in tiers, and measures every tier."""
    run_demo(config)


def audit(
    config: tyro.conf.Positional[str],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    quick: Switch = False,
    advise: Switch = False,
    target_advantage: Maybe[float] = None,
) -> None:
    """Attacks your network as an attacker would, and reports how much they recover.

    Writes audit.json, plots and report.html, a self-contained page. An interrupted run
    resumes where it stopped.

    Args:
        config: A TOML file (see docs/audit.md), or demo, demo-vgg19, demo-dncnn, demo-transformer.
        out: Folder for the results, created if it does not exist.
        quick: A reduced grid: the strongest attacks, one key, few steps.
        advise: Find the smallest share that meets the target, instead of trying the given shares.
        target_advantage: With --advise: how far the strongest attacker may get from what the
            architecture alone gives (0) to the original (1); 0.1 by default.
    """
    if target_advantage is not None and not advise:
        raise ValueError("--target-advantage: expected only with --advise. Add --advise.")
    try:
        from ..audit._audit import audit as run_audit
        from ..audit._config import read_config
        from ..audit._words import TARGET

        run_audit(
            read_config(config),
            out,
            quick=quick,
            target_advantage=TARGET if advise and target_advantage is None else target_advantage,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the audit needs {error.name or error}, which is not installed. "
            f"{extra('audit,demo')}.",
            name=error.name,
        ) from error
    print(printable(f"Wrote {out / 'report.html'} and {out / 'audit.json'}."))


def version() -> None:
    """Prints the version."""
    print(__version__)
