"""Converts arrays to the bytes of a file and back; only trees need JAX."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .._tree.dtypes import SAFETENSORS, Dtype, known_dtype
from .buffers import new_buffer


class ArrayInfo(NamedTuple):
    """Dtype (safetensors' name) and shape."""

    dtype: str
    shape: tuple[int, ...]


def as_array(
    data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]
) -> np.ndarray:
    """The array encoded by bytes of a file.

    Args:
        data: little-endian, in C order; the array shares this memory.
        dtype: safetensors' name.
        shape: the array's shape.

    Raises:
        ValueError: the dtype packs several elements into a byte.
    """
    known = SAFETENSORS[dtype]
    if known.bits < 8:
        raise ValueError(
            f"expected a dtype of 8 bits or more, got {dtype}, for which NumPy has no packed "
            "arrays. Unlock it into a file, for a program that supports them"
        )
    return np.frombuffer(data, _numpy_dtype(known.name)).reshape(shape)


def _advice(array: Any, known: Dtype | None) -> str:
    text = str(array.dtype)
    if type(array).__module__.partition(".")[0] == "torch":
        return (
            "Pass NumPy arrays: tensor.detach().cpu().numpy(). For bfloat16, which NumPy lacks, "
            "save a file with safetensors.torch, and use protect_file."
        )
    if known is not None and known.bits < 8:
        wide = "float8_e4m3fn" if known.kind == "float" else known.name.rstrip("0124") + "8"
        return f"Convert it to a wider dtype, leaf.astype({wide!r}), and back after unlocking."
    if text.startswith("key<"):
        return "Keep random state out of the tree: nnx.state(model, (nnx.Param, nnx.BatchStat))."
    return "Convert it, or keep it out of the tree."


def _numpy_dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # noqa: F401 - registers bfloat16 and float8 with NumPy

        return np.dtype(name)


class ArraySource:
    """Named arrays as a `TensorSource`.

    Args:
        arrays: name → NumPy or JAX array.
        what: the arrays, for messages.

    Raises:
        ValueError: safetensors lacks a dtype.
    """

    def __init__(self, arrays: Mapping[str, Any], what: str = "params") -> None:
        self.tensors = {}
        for name, array in arrays.items():
            known = known_dtype(array.dtype)
            if known is None or known.code is None or known.bits < 8:
                raise ValueError(
                    f"{what} {name!r}: expected a NumPy or JAX array of one of the dtypes that a "
                    f"safetensors file can hold, got {array.dtype}. {_advice(array, known)}"
                )
            self.tensors[name] = ArrayInfo(known.code, tuple(array.shape))
        self._arrays: dict[str, Any] = dict(arrays)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Reads of this array do not involve other hosts: it is gathered once, here.

        All processes enter this in the same order, as JAX requires, and not in threads.
        """
        array = self._arrays[name]
        if getattr(array, "is_fully_addressable", True):
            yield
            return
        from .._tree.hosts import gathered

        self._arrays[name] = gathered(array)
        try:
            yield
        finally:
            self._arrays[name] = array

    def read(self, name: str) -> memoryview:
        """See `TensorSource`."""
        with self.held(name):
            data = self._bytes(name)
            buffer = new_buffer(len(data))
            buffer[:] = data
            return buffer

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `StoredTensors`."""
        with self.held(name):
            buffer[:] = self._bytes(name)[start : start + len(buffer)]

    def _bytes(self, name: str) -> memoryview:
        array = np.asarray(self._arrays[name])
        if sys.byteorder == "big" or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("<"))
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
