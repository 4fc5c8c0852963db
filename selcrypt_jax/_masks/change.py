"""How far a network has moved from a public base model, which an attacker has too."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from .._io.arrays import ArraySource, as_array
from .._io.safetensors import PROTECTED, SafetensorsFile
from .._io.shards import ShardIndex, check_shards, find_shards
from .._tree.dtypes import SAFETENSORS
from .._tree.names import listed, named_leaves


class Base:
    """The tensors of a base model.

    Args:
        given: a safetensors file, the index or the folder of a checkpoint in several files, or a
            pytree.
        tensors: the tensors of the network derived from it, by name, with dtype and shape.
        stack: closes the files.

    Attributes:
        lacking: names of the network's tensors that the base does not have in the same shape.

    Raises:
        ValueError: not a checkpoint, a protected one, or not one of a network like this one.
        OSError: a file that cannot be read.
    """

    def __init__(self, given: Any, tensors: Mapping[str, Any], stack: ExitStack) -> None:
        if isinstance(given, str | os.PathLike):
            index = find_shards(given)
            paths = index.shards if isinstance(index, ShardIndex) else {"": index}
            files = {n: stack.enter_context(SafetensorsFile(p)) for n, p in paths.items()}
            if isinstance(index, ShardIndex):
                check_shards(index, files)
            for file in files.values():
                if PROTECTED in (file.metadata or {}):
                    raise ValueError(
                        f"{file.path}: base: is a protected file, expected a plain checkpoint: a "
                        "difference from ciphertext is meaningless. Give the network that this one "
                        "was fine-tuned from, unlocked at its top level."
                    )
            sources: list[Any] = list(files.values())
        else:
            sources = [ArraySource(named_leaves(given, "base").arrays, "base")]
        self._source = {name: source for source in sources for name in source.tensors}
        self.lacking = [name for name, info in tensors.items() if not self._has(name, info)]
        if len(self.lacking) == len(tensors):
            raise ValueError(
                f"base: expected the tensors of this network, such as {listed(tensors)}, got "
                f"{listed(self._source)}. Give the network that this one was fine-tuned from."
            )

    def _has(self, name: str, info: Any) -> bool:
        if name not in self._source:
            return False
        return tuple(self._source[name].tensors[name].shape) == tuple(info.shape)

    def change(self, name: str, info: Any, data: memoryview) -> np.ndarray:
        """The change of a tensor, float32; the whole tensor if the base lacks it in this shape.

        Args:
            name: the tensor's name.
            info: its dtype (safetensors' name) and shape.
            data: its bytes.

        Raises:
            ValueError: the base is not finite where the network is.
        """
        leaf = as_array(data, info.dtype, tuple(info.shape)).astype(np.float32)
        if self._has(name, info):
            theirs = self._source[name]
            dtype = theirs.tensors[name].dtype
            known = as_array(theirs.read(name), dtype, tuple(info.shape)).astype(np.float32)
            broken = np.count_nonzero(np.isfinite(leaf) & ~np.isfinite(known))
            if broken:
                raise ValueError(
                    f"base: {name!r}: expected finite weights where the network has them, got NaN "
                    f"or infinity in {broken} of {known.size}. Give a base model that works."
                )
            leaf -= known
        return leaf


def is_counted(info: Any) -> bool:
    """Whether the change of a tensor counts: floats of 8 bits or more."""
    dtype = SAFETENSORS[info.dtype]
    return dtype.kind == "float" and dtype.bits >= 8 and dtype.mantissa > 0
