"""Scores for the tensors of a checkpoint or a tree: from a strategy, or given."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._ciphers.lossless import LosslessCipher
from .._importance import closed
from .._io.arrays import ArraySource, as_array
from .._io.safetensors import PROTECTED, SafetensorsFile
from .._keys.chacha import chacha20_key
from .._tree.dtypes import SAFETENSORS
from .._tree.groups import Granularity, Layout, group_shape
from .._tree.hosts import from_first
from .._tree.names import NamedLeaves, Selector, listed, named_leaves, select_leaves
from .change import Base
from .masks import checked_score
from .options import STRATEGIES, Select
from .packed import code_tables
from .ranks import Scores
from .selection import leaves_of_tensors, small_leaves


class _Leaf:
    """Shape and dtype of a tensor that is not read; unlike a NamedTuple, it is not a pytree."""

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype, self.shape = np.dtype(SAFETENSORS[dtype].name), tuple(shape)
        self.ndim = len(shape)


@runtime_checkable
class NamedTensors(Protocol):
    """Tensors with dtype (safetensors' name) and shape, to be read one by one."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> memoryview: ...


def scores_for(
    source: NamedTensors,
    selection: Select,
    stack: ExitStack,
    *,
    metadata: Mapping[str, str],
    what: str,
) -> tuple[Scores, Layout | None]:
    """The order of importance that the options request.

    Args:
        source: the tensors of a checkpoint or of a tree.
        selection: the options.
        stack: closes the file of the scores, which are read one tensor at a time.
        metadata: the checkpoint's metadata; may imply the layout.
        what: the checkpoint or tree, for messages.

    Returns:
        The scores, and the layout of the kernels; None for given scores, whose shapes decide.

    Raises:
        ValueError: no tensors, nothing selected, scores that do not fit, options that exclude each
            other.
        OSError: a file of scores that cannot be read.
    """
    if not source.tensors:
        raise ValueError(
            f"{what}: has no tensors, expected some to encrypt. Check that it is the right "
            "checkpoint, and save it again if its weights were lost."
        )
    importance = selection.importance
    if not (isinstance(importance, str) and importance in STRATEGIES):
        for name in ("granularity", "layout"):
            if getattr(selection, name) is not None:
                raise ValueError(
                    f"importance: expected scores alone, got {name} too, which the scores "
                    "determine. Omit it."
                )
        return _checked(_given(source, selection, stack)), None
    granularity = selection.granularity or "kernel"
    try:
        names = choose_tensors(source.tensors, selection.select)
        layout = selection.layout or guess_layout(source.tensors, names, metadata, granularity)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    base = None if selection.base is None else Base(selection.base, source.tensors, stack)
    scores = strategy_scores(source, names, importance, granularity, layout, base)
    return _checked(scores), layout


def _given(source: NamedTensors, selection: Select, stack: ExitStack) -> Scores:
    importance = selection.importance
    if (path := selection.scores_file) is not None:
        if isinstance(importance, str) and not os.path.lexists(path):
            raise ValueError(
                f"importance: expected {', '.join(STRATEGIES)}, or a .safetensors file with "
                f"scores, got {importance!r}, which is neither. Learned scores (pss) come from a "
                "file, or in Python from a pytree."
            )
        what = str(path)
        file = stack.enter_context(SafetensorsFile(path))
        if PROTECTED in (file.metadata or {}):
            raise ValueError(
                f"{path}: expected scores, got a protected file, whose values mean nothing. Save "
                "scores under the names of the checkpoint's tensors."
            )
        given: NamedTensors = file
    else:
        what = "importance"
        leaves = named_leaves(importance, what).leaves
        arrays = {n: checked_score(n, leaf) for n, leaf in leaves.items()}
        given = ArraySource({n: a for n, a in arrays.items() if a is not None}, what)
    return given_scores(given, source.tensors, selection.select, what)


def _checked(scores: Scores) -> Scores:
    """The same scores; refuses NaN as they are read."""

    def of(name: str) -> np.ndarray:
        array = checked_score(name, scores.of(name))
        assert array is not None
        return array

    return Scores(scores.shapes, of)


def source_of_tree(tree: NamedLeaves) -> ArraySource:
    """The arrays of a tree as tensors, without random keys."""
    return ArraySource(tree.stored)


def whole_leaves(
    tensors: Mapping[str, Any],
    scores: Scores,
    selection: Select,
    cipher: LosslessCipher,
    *,
    default: float,
) -> list[str]:
    """Names of the tensors that are encrypted as a whole, see `Select.small`.

    Raises:
        ValueError: the share is out of range, or leaves nothing for levels to open.
    """
    share = default if selection.small is None else selection.small
    among = None if selection.select is None else choose_tensors(tensors, selection.select)
    names = small_leaves(leaves_of_tensors(tensors), share, among=among, cipher=cipher)
    if set(scores.shapes) <= set(names):
        if selection.small is not None:
            raise ValueError(
                f"small: {share:g} of all weights covers every selected tensor "
                f"({listed(scores.shapes)}), and leaves nothing for levels to open. Pass a smaller "
                "share, or select larger tensors."
            )
        names = [name for name in names if name not in scores.shapes]
    return names


def choose_tensors(tensors: Mapping[str, Any], select: Selector) -> list[str]:
    """Names of the selected tensors.

    Args:
        tensors: by name, with dtype and shape.
        select: see `selcrypt_jax.importance`; None takes floats with a mantissa and two axes or
            more. (float4, and pure scales such as float8_e8m0fnu, have nothing to hide.)

    Raises:
        ValueError: nothing is selected, or a selected tensor does not hold numbers.
    """
    leaves = {name: _Leaf(info.dtype, info.shape) for name, info in tensors.items()}
    if select is None:
        tables = code_tables({name: SAFETENSORS[info.dtype] for name, info in tensors.items()})
        chosen = [n for n, info in tensors.items() if _by_default(info) and n not in tables]
        if not chosen:
            kinds = [f"{name} ({leaf.dtype}{list(leaf.shape)})" for name, leaf in leaves.items()]
            raise ValueError(
                "select: expected floats of 8 bits or more with two axes or more, got "
                f"{listed(kinds)}. Name the tensors to protect with `select`."
            )
    else:
        chosen = select_leaves(leaves, select)
    return [name for name in tensors if name in chosen]


def _by_default(info: Any) -> bool:
    dtype = SAFETENSORS[info.dtype]
    return dtype.kind == "float" and dtype.bits >= 8 and dtype.mantissa > 0 and len(info.shape) > 1


def guess_layout(
    tensors: Mapping[str, Any],
    names: Sequence[str],
    metadata: Mapping[str, str],
    granularity: Granularity,
) -> Layout:
    """Finds the output and input axes of kernels.

    For PyTorch and ONNX the metadata's ``format`` names it. Otherwise shapes decide: spatial axes
    are short, and come last in PyTorch and first in JAX. Without a leaf of three axes or more, the
    metadata decide.

    Raises:
        ValueError: the leaves disagree, or nothing decides.
    """
    if metadata.get("format") in ("pt", "onnx"):
        return "OIHW"
    votes: dict[Layout, str] = {}
    for name in names:
        shape = tensors[name].shape
        if len(shape) < 3:
            continue
        first, last = math.prod(shape[:-2]), math.prod(shape[2:])
        if first != last:
            votes["HWIO" if first < last else "OIHW"] = name
    if len(votes) == 1:
        return next(iter(votes))
    if metadata.get("format") in ("np", "flax", "jax"):
        return "HWIO"
    flat = all(len(tensors[name].shape) < 3 for name in names)
    if granularity == "weight" or (granularity == "kernel" and not votes and flat):
        return "HWIO"  # a kernel of two axes is one weight in either layout
    raise ValueError(
        "layout: cannot tell where the output and input axes are"
        + "".join(f"; {name!r} looks like {layout}" for layout, name in votes.items())
        + ". Name it (--layout): OIHW as in PyTorch, or HWIO as in JAX and TensorFlow."
    )


def strategy_scores(
    source: NamedTensors,
    names: Sequence[str],
    strategy: str,
    granularity: Granularity,
    layout: Layout,
    base: Base | None = None,
) -> Scores:
    """Scores that need no data; with a base, scores of the change from it."""
    options: dict[str, Any] = {
        "select": lambda *_: True,
        "granularity": granularity,
        "layout": layout,
    }
    if strategy == "random":
        # An attacker cannot repeat it, and all hosts have the same one.
        options["key"] = chacha20_key(from_first(os.urandom(32)))
    function = getattr(closed, strategy)

    def scores(name: str) -> np.ndarray:
        info = source.tensors[name]
        data = source.read(name)
        if base is None:
            leaf = as_array(data, info.dtype, info.shape)
        else:
            leaf = base.change(name, info, data)
        return np.asarray(function({name: leaf}, **options)[name])

    shapes = {name: group_shape(source.tensors[name].shape, granularity, layout) for name in names}
    return Scores(shapes, scores)


def given_scores(
    given: NamedTensors, tensors: Mapping[str, Any], select: Selector, what: str
) -> Scores:
    """Scores from a file.

    Args:
        given: the scores.
        tensors: the checkpoint's tensors.
        select: which of the scores to use; None for all.
        what: the scores, for messages.

    Raises:
        ValueError: names that the checkpoint lacks, or shapes that do not broadcast.
    """
    unknown = [name for name in given.tensors if name not in tensors]
    if unknown or not given.tensors:
        raise ValueError(
            f"{what}: expected scores for tensors of the checkpoint ({listed(tensors)}), got "
            f"{listed(unknown)}. Save them under the same names."
        )
    for name, info in given.tensors.items():
        shape = tensors[name].shape
        if SAFETENSORS[info.dtype].kind == "other":
            raise ValueError(
                f"{what}: {name!r}: expected numbers, higher for more important, got "
                f"{info.dtype}. Save scores, not masks."
            )
        if len(info.shape) != len(shape) or any(
            m not in (1, n) for m, n in zip(info.shape, shape, strict=True)
        ):
            raise ValueError(
                f"{what}: {name!r}: expected scores that broadcast against shape "
                f"{tuple(shape)}, each axis of size 1 or the tensor's, got shape "
                f"{tuple(info.shape)}. They belong to another model or layout: score this one."
            )

    def scores(name: str) -> np.ndarray:
        info = given.tensors[name]
        return as_array(given.read(name), info.dtype, info.shape)

    names = list(given.tensors)
    if select is not None:
        names = choose_tensors({name: tensors[name] for name in names}, select)
    return Scores({name: tuple(given.tensors[name].shape) for name in names}, scores)
