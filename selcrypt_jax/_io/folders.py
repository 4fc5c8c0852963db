"""Folders of unknown origin: files that are regular and no larger than they should be."""

import os
import stat
from pathlib import Path


def regular_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """All files of a folder, once none of them can lead elsewhere or make a reader wait.

    Args:
        folder: may be a link itself; its name comes from the caller, and not from the folder.

    Returns:
        Path from the folder, with ``/`` between steps → bytes.

    Raises:
        ValueError: a symbolic link, pipe, socket or device anywhere in it.
        OSError: it cannot be read.
    """
    found: dict[str, int] = {}
    steps = [""]
    while steps:
        step = steps.pop()
        with os.scandir(os.path.join(folder, step)) as items:
            for item in items:
                name, info = f"{step}{item.name}", item.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    steps.append(f"{name}/")
                else:
                    _check_regular(Path(item.path), info.st_mode)
                    found[name] = info.st_size
    return found


def read_regular(
    path: str | os.PathLike[str], most: int, start: int = 0, stop: int | None = None
) -> bytes:
    """The bytes of a file, or some of them, once it is known how many that are.

    Args:
        path: of the file.
        most: bytes to read.
        start: of what is read.
        stop: behind the last byte; by default the end of the file.

    Raises:
        ValueError: a link, pipe or device; or larger than `most`, or too small for `stop`.
        OSError: it cannot be read.
    """
    path = Path(path)
    # Before opening it, since opening a pipe waits for its other end; and again, when it is open.
    _check_regular(path, path.lstat().st_mode)
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, os.O_RDONLY | flags), "rb") as file:
        info = os.fstat(file.fileno())
        _check_regular(path, info.st_mode)
        stop = info.st_size if stop is None else stop
        if stop - start > most:
            raise ValueError(
                f"{path}: expected at most {most} bytes, got {stop - start}. It was damaged or "
                "altered: get it again."
            )
        file.seek(start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise ValueError(
            f"{path}: expected {stop} bytes or more, got {start + len(data)}. It is cut off: get "
            "it again."
        )
    return data


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        actual = "a pipe, socket or device"
        remedy = "No checkpoint holds one: remove it, or get the folder again."
        if stat.S_ISDIR(mode):
            actual, remedy = "a folder", "Get the folder around it again."
        if stat.S_ISLNK(mode):
            actual, remedy = "a symbolic link", "If you trust the folder, copy what its links "
            remedy += "point to (cp -rL), and name the copy."
        raise ValueError(f"{path}: expected a regular file, got {actual}. {remedy}")
