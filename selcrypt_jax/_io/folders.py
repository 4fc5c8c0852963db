"""Untrusted folders: checks that files are regular and not larger than they should be."""

import os
import stat
from pathlib import Path


def regular_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """All files of a folder, after checking that none leads elsewhere or blocks a reader.

    Args:
        folder: may be a link itself, since its name comes from the caller.

    Returns:
        Path relative to the folder, with ``/`` between steps → size in bytes.

    Raises:
        ValueError: there is a symbolic link, pipe, socket or device anywhere in it.
        OSError: the folder cannot be read.
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
    """The bytes of a file, or some of them, after checking their number.

    Args:
        path: the file's path.
        most: the largest number of bytes to read.
        start: the first byte to read.
        stop: one past the last byte; by default the end of the file.

    Raises:
        ValueError: it is a link, pipe or device; or larger than `most`, or too small for `stop`.
        OSError: the file cannot be read.
    """
    path = Path(path)
    # Checked before opening it, since opening a pipe blocks; and again once it is open.
    _check_regular(path, path.lstat().st_mode)
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, os.O_RDONLY | flags), "rb") as file:
        info = os.fstat(file.fileno())
        _check_regular(path, info.st_mode)
        stop = info.st_size if stop is None else stop
        if stop - start > most:
            raise ValueError(
                f"{path}: expected at most {most} bytes, got {stop - start}. It was damaged or "
                "altered: download it again."
            )
        file.seek(start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise ValueError(
            f"{path}: expected {stop} bytes or more, got {start + len(data)}. It is truncated: "
            "download it again."
        )
    return data


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        actual = "a pipe, socket or device"
        remedy = "No checkpoint holds one: remove it, or download the folder again."
        if stat.S_ISDIR(mode):
            actual, remedy = "a folder", "Download the whole checkpoint again."
        if stat.S_ISLNK(mode):
            actual, remedy = "a symbolic link", "If you trust the folder, copy the targets of its "
            remedy += "links (cp -rL), and name the copy."
        raise ValueError(f"{path}: expected a regular file, got {actual}. {remedy}")
