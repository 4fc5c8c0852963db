"""The user's own functions, given by import path."""

import contextlib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import described


def imported(what: str, path: str, known: Sequence[str] = (), *, data: bool = False) -> Any:
    """The object at an import path ``module:name``; the working folder is searched too.

    Args:
        what: its purpose, for messages.
        path: import path.
        known: names that would also have been valid, for messages.
        data: whether it may be something other than a function.

    Returns:
        A function whose errors are attributed to it (`blamed`), or with `data` any object.

    Raises:
        ValueError: the path does not exist, or its object cannot be imported or called.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name or module.startswith(".") or module.endswith(".py"):
        others = f"one of {', '.join(known)} or " if known else ""
        raise ValueError(
            f"{what}: expected {others}an import path module:function, got {path!r}. For a "
            "function psnr in mine.py write mine:psnr."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything on import
        raise ValueError(
            f"{what}: expected {path!r} to import, got {described(error)}. Correct "
            "the path or the module; modules in the working folder are found too."
        ) from error
    if not callable(found):
        if data:
            return found
        raise ValueError(
            f"{what}: expected a function, got {path!r}, which is {type(found).__name__}. Name a "
            "function of that module."
        )
    return blamed(what, path, found)


def blamed(what: str, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Attributes a function's errors to it, with the line in its file.

    Its output goes to stderr: stdout is for results, which may be JSON.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return function(*args, **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # a user's function may raise anything
            frames = traceback.extract_tb(error.__traceback__)[1:]
            own = [frame for frame in frames if frame.filename == frames[0].filename]
            place = f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""
            raise ValueError(
                f"{what}: {path} raised {described(error, place)}. Correct it there."
            ) from error

    return call
