"""Functions of the user's own, by import path."""

import contextlib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def imported(what: str, path: str, known: Sequence[str] = (), *, data: bool = False) -> Any:
    """The object that an import path ``module:name`` stands for; the working folder is searched.

    Args:
        what: it is for, for messages.
        path: import path.
        known: names that would have meant something as well, for messages.
        data: whether it may be something else than a function.

    Returns:
        A function whose errors are `blamed` on it, or with `data` whatever it is.

    Raises:
        ValueError: no such path, or something that cannot be imported or called.
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
    except Exception as error:  # whatever the module does as it is imported
        raise ValueError(
            f"{what}: expected {path!r} to import, got {type(error).__name__}: {error}. Correct "
            "the path or the module; modules of the working folder are found too."
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
    """The function, whose errors are said to be its own, with the place in its file.

    What it prints goes to stderr: stdout is for results, which may be JSON.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return function(*args, **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # whatever the function does
            frames = traceback.extract_tb(error.__traceback__)[1:]
            own = [frame for frame in frames if frame.filename == frames[0].filename]
            place = f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""
            raise ValueError(
                f"{what}: {path} raised {type(error).__name__}{place}: {error}. Correct it there."
            ) from error

    return call
