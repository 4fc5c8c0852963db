"""The commands that show and judge: demo, audit, version."""

from pathlib import Path
from typing import Annotated

import tyro

from .. import __version__
from ..demo import DemoConfig
from ..demo import run as run_demo
from ._text import printable


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
        config: A TOML file, see docs/audit.md; or demo, demo-vgg19, demo-dncnn, demo-transformer.
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
    print(printable(f"Wrote {out / 'report.html'} and {out / 'audit.json'}."))


def version() -> None:
    """Prints the version."""
    print(__version__)
