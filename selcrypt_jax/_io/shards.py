"""Checkpoints in several safetensors files with an index; without JAX and NumPy."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from .errors import counted
from .foreign import components_in, is_index, other_weights, weights_in
from .safetensors import MAX_HEADER, SafetensorsFile
from .strict_json import DAMAGED, json_object, listing, show


class ShardIndex(NamedTuple):
    """The index of a model in several files.

    Attributes:
        path: the index's path.
        shards: file name → path, sorted by name.
        weight_map: tensor name → file name.
        text: the index, unchanged.
    """

    path: Path
    shards: dict[str, Path]
    weight_map: dict[str, str]
    text: bytes


def find_shards(path: str | os.PathLike[str]) -> ShardIndex | Path:
    """The index of a sharded model, or the path of a model in one file.

    Args:
        path: an index (``*.safetensors.index.json``, of a variant ``*.safetensors.index.*.json``),
            a file, or a folder that holds exactly one index, or no index and exactly one
            safetensors file.

    Raises:
        ValueError: the folder holds neither, or several; the index isn't one, or it names files
            that are missing or not beside it.
        OSError: a file can't be read, or doesn't exist.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_one(path)
    if not is_index(path.name):
        path.stat()  # a missing name is not a plain file either
        return path
    try:
        return _parse_index(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _only_one(folder: Path) -> Path:
    names = weights_in(folder)
    indexes = [name for name in names if is_index(name)]
    files = [name for name in names if name.endswith(".safetensors")]
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return folder / (indexes or files)[0]
    if not names and (parts := components_in(folder)):
        raise ValueError(
            f"{folder}: expected one model, got a folder of {listing(parts)}, each with its own "
            f"weights. Name them one by one, such as {folder / parts[0]}, and copy the rest."
        )
    if indexes:
        raise ValueError(
            f"{folder}: expected one index in this folder, got {listing(indexes)}. Name the right "
            "one."
        )
    got = listing(files) if files else f"none.{other_weights(folder)}"
    raise ValueError(
        f"{folder}: expected one *.safetensors.index.json or one *.safetensors in this folder, got "
        f"{got.removesuffix('.')}. Name the file to use."
    )


def check_no_others(folder: Path, known: Collection[str]) -> None:
    """Refuses weights in a folder that do not belong to a checkpoint: a loader may prefer them.

    Args:
        folder: the checkpoint's folder.
        known: names of its files.

    Raises:
        ValueError: there are other files that hold weights, or an index of some.
    """
    others = [name for name in weights_in(folder) if name not in known]
    if others:
        raise ValueError(
            f"{folder}: expected no other weights than those of the checkpoint, got "
            f"{listing(others)}, which its owner did not sign, and which a program may load "
            "instead. Remove them, or name the file to use."
        )


def check_shards(index: ShardIndex, files: Mapping[str, SafetensorsFile]) -> None:
    """Checks that the shards hold exactly the tensors of the index, each once.

    Args:
        index: from `find_shards`.
        files: by file name, one for each of `index.shards`.

    Raises:
        ValueError: they differ; with the names of the tensors.
    """
    listed = set(index.weight_map.items())
    held = {(name, file_name) for file_name in files for name in files[file_name].tensors}
    if listed != held:
        raise ValueError(
            f"{index.path}: expected the shards to hold the tensors that it lists. Only listed: "
            f"{listing(sorted(listed - held))}. Only held: {listing(sorted(held - listed))}. "
            "A shard is damaged or of another model: download all of them again, with their index."
        )


def _parse_index(path: Path) -> ShardIndex:
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(
            "index: expected a regular file, got a folder, pipe or device. Save it to a file."
        )
    if size > MAX_HEADER:
        raise ValueError(
            f"index: expected a file of at most {MAX_HEADER} bytes, got {size}. {DAMAGED}"
        )
    text = path.read_bytes()
    weight_map = json_object(text, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"weight_map: expected an object of tensors, got {show(weight_map)}. {DAMAGED}"
        )
    for name, file_name in weight_map.items():
        # Also other systems' path separators: an index must work everywhere or nowhere.
        if (
            not isinstance(file_name, str)
            or file_name in {"", ".", ".."}
            or not file_name.isprintable()
            or PureWindowsPath(file_name).name != file_name
        ):
            raise ValueError(
                f"weight_map: tensor {show(name)}: expected the name of a file beside the index, "
                f"got {show(file_name)}. {DAMAGED}"
            )
    shards = {name: path.parent / name for name in sorted(set(weight_map.values()))}
    missing = [name for name, shard in shards.items() if not os.path.lexists(shard)]
    if missing:
        raise ValueError(
            f"expected {counted(len(shards), 'shard')} beside the index, got "
            f"{len(shards) - len(missing)}; missing: {listing(missing)}. Download them first."
        )
    others = [name for name, shard in shards.items() if not shard.is_file()]
    if others:
        raise ValueError(
            f"expected shards that are regular files, got {listing(others)}: folders, pipes, "
            "devices, or broken links. Put the files themselves there."
        )
    return ShardIndex(path, shards, weight_map, text)
