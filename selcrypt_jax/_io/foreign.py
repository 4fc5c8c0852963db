"""Weights in other formats: recognises a file that is not safetensors, and how to convert it."""

import re
from pathlib import Path, PurePath
from typing import NamedTuple

from .strict_json import listing


class Kind(NamedTuple):
    """A file format.

    Attributes:
        name: its name in messages, with an article.
        remedy: how to make a safetensors file of it.
    """

    name: str
    remedy: str


class OtherFormatError(ValueError):
    """A file of another format in place of a safetensors file.

    Attributes:
        path: the file's path.
        kind: its format.
    """

    path: Path
    kind: Kind

    @classmethod
    def of(cls, path: Path, kind: Kind) -> "OtherFormatError":
        """The error for a file; its message says how to convert it."""
        error = cls(
            f"{path}: expected a safetensors file, got what looks like {kind.name}. "
            f"{kind.remedy[:1].upper()}{kind.remedy[1:]}."
        )
        error.path, error.kind = path, kind
        return error


_NUMPY = "save its arrays under their names with safetensors.numpy.save_file"
_TORCH = Kind(
    "a PyTorch checkpoint",
    "load it with torch.load(path, weights_only=True) and save its tensors (for Lightning, those "
    "under 'state_dict') with safetensors.torch.save_file",
)
_READ = "only selcrypt protect and calibrate read such files, by name; for anything else, "
FLAX = Kind(
    "a Flax msgpack file",
    f"{_READ}load it with flax.serialization.msgpack_restore(data), name its leaves with "
    "flax.traverse_util.flatten_dict(tree, sep='/') and save them with safetensors.flax.save_file",
)
ONNX = Kind(
    "an ONNX model",
    f"{_READ}save its initialisers (onnx.numpy_helper.to_array) with safetensors.numpy.save_file",
)
_KERAS = Kind(
    "an HDF5 file, such as a Keras .h5", f"load it with the library that wrote it, and {_NUMPY}"
)
_TENSORFLOW = Kind(
    "a file of a TensorFlow checkpoint or SavedModel",
    f"read it with tf.train.load_checkpoint(path) and {_NUMPY}",
)
_TFLITE = Kind("a TensorFlow Lite model", "protect the checkpoint that it was converted from")
_GGUF = Kind("a GGUF file", "use the safetensors file that it was made from")
ZIP = Kind(
    "a zip archive, such as a PyTorch .pt, a Keras .keras or a NumPy .npz file",
    "load it with the library that wrote it, and save it with safetensors.torch or "
    "safetensors.numpy",
)

LFS = Kind("a Git LFS pointer", "get the file itself with `git lfs pull`")
GZIP = Kind("gzip-compressed data", "unpack it first")
OURS = Kind("a selcrypt key or grant", "name the model's file")

_MAGIC = {
    b"version https://git-lfs": LFS,
    b"PK\x03\x04": ZIP,
    b"\x93NUMPY": Kind(
        "a NumPy .npy file", "save it with safetensors.numpy, under its tensor's name"
    ),
    b"\x89HDF": _KERAS,
    b"GGUF": _GGUF,
    b"\x1f\x8b\x08": GZIP,
    b"selcrypt-": OURS,
}
_SUFFIXES = {
    ".msgpack": FLAX,
    ".onnx": ONNX,
    ".ckpt": _TORCH,
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".h5": _KERAS,
    ".hdf5": _KERAS,
    ".keras": ZIP,
    ".npz": ZIP,
    ".gguf": _GGUF,
    ".tflite": _TFLITE,
    ".pb": _TENSORFLOW,
}
WEIGHTS = frozenset({".safetensors", *_SUFFIXES})
"""Suffixes of files that loaders treat as a model's weights."""

# Files that trainers leave beside a model; none of them holds weights that a model loader reads.
_OF_TRAINING = re.compile(
    r"(training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth)$"
)


def format_of(first: bytes, name: str, *, certain: bool) -> Kind | None:
    """The format of a refused file; None if it is unknown.

    Args:
        first: its first bytes, 16 or more unless the file is shorter.
        name: the file's name.
        certain: whether those bytes cannot begin a safetensors file, so that weak evidence
            suffices.
    """
    # Of a refused file alone: the length of a header may look like any of these.
    kind = by_magic(first)
    if kind is None and certain:
        kind = by_a_few_bytes(first)
    if (kind is None or kind is ONNX) and first:  # any protobuf may look like ONNX
        kind = by_name(name) or kind
    return kind


def by_magic(first: bytes) -> Kind | None:
    """The format that begins with these bytes, if there are enough to tell."""
    return next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)


def by_a_few_bytes(first: bytes) -> Kind | None:
    """The format that these bytes suggest, of a file that is known not to be safetensors."""
    one, two = first[:1], first[1:2]
    if first[4:8] == b"TFL3":
        return _TFLITE
    if one == b"\x80" and two and two[0] <= 5:
        return Kind(
            "a Python pickle, such as an old PyTorch .pt or .ckpt file",
            "load it with the library that wrote it, and save it with safetensors.torch",
        )
    if one == b"<":
        return Kind("a web page", "download the file itself")
    if one == b"{":
        return Kind("JSON text", "the index of a sharded model is called *.safetensors.index.json")
    # A map, as in all Flax files, whose first key is text.
    is_map = b"\x80" < one <= b"\x8f" or one in (b"\xde", b"\xdf")
    key = first[{b"\xde": 3, b"\xdf": 5}.get(one, 1) :][:1]
    if is_map and (b"\xa0" <= key <= b"\xbf" or key in (b"\xd9", b"\xda", b"\xdb")):
        return FLAX
    # Its first field is a small version, and its second one the producer's name or a later field.
    if one == b"\x08" and two and two[0] < 32 and first[2:3] in (b"\x12", b"\x1a", b"\x3a", b"B"):
        return ONNX
    return None


def by_name(name: str) -> Kind | None:
    """The format that a file's name implies."""
    if (".ckpt" in name and PurePath(name).suffix in (".index", ".meta")) or ".ckpt.data-" in name:
        return _TENSORFLOW
    return _SUFFIXES.get(PurePath(name).suffix.lower())


def weights_in(folder: Path) -> list[str]:
    """Names of the files in a folder that some loader treats as weights, or as their index."""
    found = (item.name for item in folder.iterdir())
    return sorted(
        name
        for name in found
        if is_index(name)
        or (PurePath(name).suffix.lower() in WEIGHTS and not _OF_TRAINING.match(name))
    )


def is_index(name: str) -> bool:
    """Whether a file name is that of an index for a checkpoint in several files.

    Variants have their own names, such as ``model.safetensors.index.fp16.json``.
    """
    return ".safetensors.index." in name and name.endswith(".json")


def components_in(folder: Path) -> list[str]:
    """Names of subfolders that hold safetensors files, as in pipelines."""
    return sorted(
        item.name
        for item in folder.iterdir()
        if item.is_dir() and any(file.suffix == ".safetensors" for file in item.iterdir())
    )


def other_weights(folder: Path) -> str:
    """A sentence about the weights in a folder without safetensors files; or nothing."""
    for name in weights_in(folder):
        if (kind := by_name(name)) is not None:
            return f" {listing([name])} looks like {kind.name}; {kind.remedy}."
    return ""
