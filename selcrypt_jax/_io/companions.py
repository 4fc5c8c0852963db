"""The other files in a model's folder: configuration, tokenizer, and the like."""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from .folders import read_regular
from .foreign import (
    FLAX,
    GZIP,
    LFS,
    ONNX,
    OURS,
    WEIGHTS,
    ZIP,
    by_a_few_bytes,
    by_magic,
    by_name,
    is_index,
)  # fmt: skip
from .safetensors import MAX_HEADER

MOST = 256 << 20
"""Bytes; no configuration or tokenizer is that large."""

# Weights in formats that no model loader looks for, arrays, and archives, which may hold some.
_OTHER_WEIGHTS = frozenset(
    {".7z", ".arrow", ".bz2", ".engine", ".gz", ".joblib", ".mlmodel", ".npy", ".orbax", ".ort"}
    | {".ot", ".params", ".parquet", ".pdparams", ".pickle", ".pkl", ".plan", ".tar", ".tgz"}
    | {".xz", ".zip", ".zst"}
    # External data of ONNX models: for all tensors in one file, or one file per tensor.
    | {".bias", ".data", ".weight", ".weights"}
)
_ARCHIVE = "an archive, which may hold weights"
# Why a file whose format `by_magic` recognises is left out, if not because it holds weights.
_REASONS = {
    LFS: f"{LFS.name}: {LFS.remedy}",
    OURS: OURS.name,
    ZIP: _ARCHIVE,
    GZIP: _ARCHIVE,
}
# The first bytes of further files, whatever their names.
_MAGIC = {
    b"-----BEGIN": "a key",
    b"AGE-SECRET-KEY-": "a key",
    b"\x28\xb5\x2f\xfd": _ARCHIVE,
    **{bytes([0x80, n]): "a pickle, which may hold weights" for n in range(2, 6)},
}
_ORBAX = frozenset({"_METADATA", "manifest.ocdbt"})  # in the folder of a checkpoint


class Companions(NamedTuple):
    """The other files in a folder of weights: those to copy, and those to leave out.

    Attributes:
        folder: the folder.
        copied: paths relative to it, with ``/`` between steps, sorted.
        left_out: path → why it is left out.
    """

    folder: Path
    copied: tuple[str, ...]
    left_out: dict[str, str]

    def copy_to(self, folder: Path) -> None:
        """Copies them into another folder; replaces nothing.

        Raises:
            FileExistsError: a file of that name exists.
            ValueError, OSError: a file has changed, or cannot be read or written.
        """
        for name in self.copied:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            data = read_regular(os.path.realpath(self.folder / name), MOST)
            with target.open("xb") as file:
                file.write(data)


def companions(folder: Path, own: Collection[str] = ()) -> Companions:
    """The other files in a folder of weights; those that cannot be weights are to be copied.

    Hidden files and folders (``.git``) are left out, as are links that lead out of the folder,
    except for links into the Hugging Face cache's store, of which a snapshot consists.

    Args:
        folder: a model's folder.
        own: names of its weights, which are not mentioned in the result.

    Raises:
        OSError: the folder cannot be read.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    copied, left_out = [], {}
    for name, path in _files(folder):
        if name in own:
            continue
        reason = _reason(name, path, inside)
        if reason is None:
            copied.append(name)
        else:
            left_out[name] = reason
    return Companions(folder, tuple(sorted(copied)), dict(sorted(left_out.items())))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files, and folders that are not entered; skips hidden ones."""
    for top, folders, names in os.walk(folder):
        step = PurePath(top).relative_to(folder)
        kept = [name for name in folders if not _is_hidden(name)]
        folders[:] = []
        for name in kept:
            path = Path(top, name)
            if path.is_symlink() or any(os.path.lexists(path / each) for each in _ORBAX):
                yield (step / name).as_posix(), path
            else:
                folders.append(name)
        for name in names:
            if not _is_hidden(name):
                yield (step / name).as_posix(), Path(top, name)


def _reason(name: str, path: Path, inside: list[Path]) -> str | None:
    """Why a file is left out, or None."""
    real = Path(os.path.realpath(path))
    if any(_is_named_as_weights(each) for each in (PurePath(name), real)):
        return "weights"
    root = next((each for each in inside if real.is_relative_to(each)), None)
    if root is None:
        return "a link that leads out of the folder: put the file itself there"
    if any(_is_hidden(step) for step in real.relative_to(root).parts):
        return "a link to a hidden file"
    try:
        info = real.lstat()
    except FileNotFoundError:
        return "a link that leads nowhere"
    if stat.S_ISDIR(info.st_mode):
        return "a link to a folder" if path.is_symlink() else "an Orbax checkpoint"
    if not stat.S_ISREG(info.st_mode):
        return "a pipe, socket or device"
    if info.st_size > MOST:
        return f"larger than {MOST >> 20} MiB, as weights are"
    first = read_regular(real, 32, 0, min(info.st_size, 32))
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= MAX_HEADER:
        return "weights"  # a safetensors file, whatever its name
    if (kind := by_magic(first)) is not None:
        return _REASONS.get(kind, "weights")
    if by_a_few_bytes(first) in (FLAX, ONNX):
        return "weights"
    return next((reason for magic, reason in _MAGIC.items() if first.startswith(magic)), None)


def _is_named_as_weights(path: PurePath) -> bool:
    suffix = path.suffix.lower()
    return (
        is_index(path.name)
        or by_name(path.name) is not None
        or suffix in WEIGHTS | _OTHER_WEIGHTS
        or suffix.startswith(".onnx_data")  # also .onnx_data_1
        or path.name.startswith("onnx__")
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"
