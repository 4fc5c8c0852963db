"""Weights in ONNX models and Flax msgpack files, which are read but never written."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._tree.dtypes import known_dtype
from .arrays import ArraySource
from .errors import extra, quoted
from .foreign import FLAX, ONNX, Kind
from .strict_json import listing, show

_LARGE = 1024  # elements of a constant that may be weights; shapes and axes are smaller
_OLDEST = (1, 21)  # earlier ones read external data through links, and bfloat16 as float32
_EXPORT = "It is damaged: export the model again, or download it again."
_NUMBERS = "Leave it out, or protect the model as it was before it was quantised."
_BESIDE = (
    "External data must be plain files in the folder of the model: download it whole, and replace "
    "links by their targets (cp -rL)."
)


class ConvertedFile(ArraySource):
    """The arrays of a file of another format, all of them in memory.

    Args:
        path: the file, which `SafetensorsFile` found to be regular.
        kind: `ONNX` or `FLAX`.

    Attributes:
        path: as given.
        metadata: the metadata for a safetensors file of these arrays; ``format`` implies the layout
            of kernels.
        inputs: all files that were read.

    Raises:
        ValueError: a damaged file, no arrays, or something that a safetensors file cannot hold.
        ModuleNotFoundError: the extra that reads this format is not installed.
        OSError: the file cannot be read.

    Warns:
        UserWarning: there are weights in a place where they are not read.
    """

    def __init__(self, path: str | os.PathLike[str], kind: Kind) -> None:
        self.path = Path(path)
        beside: set[Path] = set()
        found = _flax(self.path) if kind is FLAX else _onnx(self.path, beside)
        self.inputs = [self.path, *sorted(beside)]
        super().__init__(found, f"{self.path}:")
        self.metadata = {"format": "flax" if kind is FLAX else "onnx"}

    @property
    def size(self) -> int:
        """Bytes of all files that were read."""
        return sum(path.stat().st_size for path in self.inputs)


CONVERTED = frozenset({ONNX, FLAX})
"""The formats that `ConvertedFile` reads."""


def _flax(path: Path) -> dict[str, Any]:
    """The path in the tree, its steps joined by ``/`` → array."""
    from flax import serialization

    from .._tree.names import named_leaves

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except (MemoryError, OSError):
        raise
    except Exception as error:  # msgpack, NumPy and Flax each have their own
        raise ValueError(
            f"{path}: expected a msgpack file as flax.serialization.to_bytes makes it, got: "
            f"{quoted(error)}. It is damaged, or another program wrote it: save it again."
        ) from error
    leaves = named_leaves(tree, str(path)).leaves if isinstance(tree, dict) else {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray | np.generic):
            raise ValueError(
                f"{path}: {name!r}: expected an array, got {type(leaf).__name__}. Save the weights "
                "without it, such as the params and batch_stats of a train state."
            )
    if not leaves:
        raise ValueError(f"{path}: expected nested dicts of arrays, got none. Save the weights.")
    return leaves


def _onnx(path: Path, beside: set[Path]) -> dict[str, np.ndarray]:
    """Initialisers of the main graph, by name; adds files of external data to `beside`."""
    try:
        import onnx  # pyright: ignore[reportMissingImports] - an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: is an ONNX model, and the package onnx is not installed. {extra('onnx')}.",
            name=error.name,
        ) from error
    if tuple(int(step) for step in onnx.__version__.split(".")[:2]) < _OLDEST:
        raise ModuleNotFoundError(
            f"{path}: is an ONNX model: expected onnx {'.'.join(map(str, _OLDEST))} or later to "
            f"read it, got {onnx.__version__}. {extra('onnx')}."
        )
    found: dict[str, np.ndarray] = {}
    where, remedy = "", _EXPORT
    try:
        # Data in other files are read tensor by tensor, which does not change the model.
        model = onnx.load(path, format="protobuf", load_external_data=False)
        for tensor in model.graph.initializer:
            where = f" initialiser {show(tensor.name)}:"
            remedy = _NUMBERS
            _check_type(tensor.data_type, onnx)
            remedy = _BESIDE if tensor.external_data else _EXPORT
            if tensor.name in found:
                raise ValueError("expected each name once, got it twice")
            array = onnx.numpy_helper.to_array(tensor, str(path.absolute().parent))
            if array.shape != tuple(tensor.dims):  # -1 stands for the rest in NumPy alone
                raise ValueError(f"expected non-negative lengths, got shape {list(tensor.dims)}")
            found[tensor.name] = array
            beside.update(
                path.parent / each.value for each in tensor.external_data if each.key == "location"
            )
        sparse = [tensor.values.name for tensor in model.graph.sparse_initializer]
        where, remedy = "", _EXPORT
        others = {n: size for n, size in _elsewhere(model) if size >= _LARGE}
    except (MemoryError, OSError):
        raise
    except Exception as error:  # protobuf, NumPy and onnx each have their own
        text = quoted(error)
        if not text.startswith("expected"):
            text = f"expected data that onnx can read, got: {text}"
        raise ValueError(f"{path}:{where} {text}. {remedy}") from error
    if sparse:
        raise ValueError(
            f"{path}: expected dense initialisers, got sparse ones: {listing(sparse)}. Make them "
            "dense before you protect the model."
        )
    if not found:
        raise ValueError(
            f"{path}: expected initialisers, got none"
            + (f"; weights seem to be in {listing(sorted(others))}. " if others else ". ")
            + "Export the model with its weights as initialisers of the main graph."
        )
    if others:
        warnings.warn(
            f"{path}: only initialisers of the main graph are protected, not "
            f"{listing(sorted(others))}, of {_LARGE} elements or more, in nodes or inner graphs. "
            "They stay plain in any graph that you publish: if they are weights, turn them into "
            "initialisers first.",
            stacklevel=2,
        )
    return found


def _check_type(code: int, onnx: Any) -> None:
    """Checks that a safetensors file can hold elements of this type.

    Raises:
        ValueError: text, packed numbers, types that safetensors lacks, or an unknown type.
    """
    name = onnx.TensorProto.DataType.Name(code)
    known = None
    if code not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        known = known_dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    if known is None or known.code is None or known.bits < 8:
        raise ValueError(
            f"expected numbers of 8 bits or more, as safetensors files hold them, got {name}"
        )


def _elsewhere(model: Any) -> Iterator[tuple[str, int]]:
    """Name and size of arrays that are not initialisers of the main graph."""
    yield from _in_nodes(model.graph.node)
    for function in model.functions:
        yield from _in_nodes(function.node)
    for training in model.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from _in_graph(graph)


def _in_graph(graph: Any) -> Iterator[tuple[str, int]]:
    tensors = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    yield from ((tensor.name, math.prod(tensor.dims)) for tensor in tensors)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[Any]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        name = node.name or next(iter(node.output), node.op_type)
        for attribute in node.attribute:
            sparse = [attribute.sparse_tensor, *attribute.sparse_tensors]
            dense = [attribute.t, *attribute.tensors, *(each.values for each in sparse)]
            # An absent tensor has no dims, as a scalar.
            yield from ((name, math.prod(tensor.dims)) for tensor in dense)
            yield name, len(attribute.floats)
            for graph in (attribute.g, *attribute.graphs):
                yield from _in_graph(graph)
