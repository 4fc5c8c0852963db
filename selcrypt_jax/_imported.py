"""Functions of the user's own, by import path."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def imported(what: str, path: str, known: Sequence[str] = ()) -> Callable[..., Any]:
    """What ``module:function`` names; the working folder is searched too.

    Args:
        what: it is for, for messages.
        path: import path.
        known: names that would have meant something as well, for messages.

    Raises:
        ValueError: no such path, or something that cannot be imported or called.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name or module.startswith("."):
        others = f"one of {', '.join(known)} or " if known else ""
        raise ValueError(f"{what}: expected {others}an import path module:function, got {path!r}.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does as it is imported
        raise ValueError(
            f"{what}: expected {path!r} to import, got {type(error).__name__}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"{what}: expected a function, got {found!r}.")
    return found
