"""Where outputs may go; checked before the work."""

import errno
import os
from pathlib import Path

# Not .ckpt: Orbax folders may be called that.
_OF_FILES = frozenset(
    {".safetensors", ".json", ".toml", ".html", ".png", ".key", ".pub", ".grant", ".onnx"}
    | {".msgpack", ".bin", ".pt", ".pth", ".npz"}
)


def check_output(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Checks that an output isn't one of the inputs, under any name or link.

    Raises:
        ValueError: it is one of them.
    """
    for path in inputs:
        try:
            same = os.path.samefile(output, path)
        except OSError:
            continue  # an output that doesn't exist cannot be an input; no message shows either
        if same:
            raise ValueError(
                f"{os.fspath(output)}: expected a different file from the input, got "
                f"{os.fspath(path)} again. Name another output."
            )


def check_folder_name(path: str | os.PathLike[str], remedy: str = "Name a folder") -> None:
    """Refuses a new folder with the name of a file: a file was meant.

    Raises:
        NotADirectoryError: it has one.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _OF_FILES and not os.path.lexists(path):
        text = f"expected a folder as the output, got the name of a {suffix} file. {remedy}"
        raise NotADirectoryError(errno.ENOTDIR, text, os.fspath(path))


def writable_folder(path: Path) -> None:
    """Makes a folder if it is missing, and tests that it is writable before minutes of work.

    Raises:
        OSError: it cannot be made or written to; or see `check_folder_name`.
    """
    check_folder_name(path)
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".selcrypt-probe"
    probe.touch()
    probe.unlink()
