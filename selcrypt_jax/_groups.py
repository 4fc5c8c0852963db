"""A leaf seen as groups of weights; without JAX."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Granularity = Literal["kernel", "filter", "weight"]
Layout = Literal["HWIO", "OIHW"]


class Ring(NamedTuple):
    """What one level adds in one leaf.

    Attributes:
        name: of the leaf.
        level: 1..M.
        mask: boolean, with as many axes as the leaf; true where the ring has a group.
    """

    name: str
    level: int
    mask: np.ndarray


def inner_axes(shape: Sequence[int], granularity: Granularity, layout: Layout) -> tuple[int, ...]:
    """The axes of a leaf that lie inside a group.

    Args:
        shape: of the leaf, with any number of spatial axes.
        granularity: ``"kernel"``: one (input, output) pair with all its spatial weights, the
            unit of the paper; ``"filter"``: one output channel; ``"weight"``: one element.
            For a dense leaf a kernel is one weight; a leaf with one axis has a group an element.
        layout: ``"HWIO"``: the last two axes are input and output (JAX); ``"OIHW"``: the first
            two axes are output and input (PyTorch). An embedding table of one row a token is
            ``"OIHW"`` where a filter should be a row.

    Raises:
        ValueError: unknown granularity or layout.
    """
    if granularity not in ("kernel", "filter", "weight"):
        raise ValueError(
            f"granularity: expected 'kernel', 'filter' or 'weight', got {granularity!r}."
        )
    if layout not in ("HWIO", "OIHW"):
        raise ValueError(f"layout: expected 'HWIO' or 'OIHW', got {layout!r}.")
    ndim = len(shape)
    if granularity == "weight" or ndim < 2:
        return ()
    output, inputs = (ndim - 1, ndim - 2) if layout == "HWIO" else (0, 1)
    group = {output, inputs} if granularity == "kernel" else {output}
    return tuple(axis for axis in range(ndim) if axis not in group)


def group_shape(shape: Sequence[int], granularity: Granularity, layout: Layout) -> tuple[int, ...]:
    """The shape of a leaf's scores: its own, with size 1 on the axes inside a group.

    Arguments and errors as in `inner_axes`.
    """
    inside = inner_axes(shape, granularity, layout)
    return tuple(1 if axis in inside else size for axis, size in enumerate(shape))


def group_positions(shape: Sequence[int], mask: np.ndarray) -> np.ndarray:
    """Flat (C order) positions of the selected weights, ``[groups, weights in a group]``.

    Args:
        shape: of the leaf.
        mask: boolean, broadcastable to ``shape`` with the same number of axes. An axis on which
            the mask has size 1 and the leaf has not lies inside the group.

    Returns:
        int32 array; groups in C order of the mask, weights of a group in C order of the leaf.
    """
    inside = [size if mask.shape[axis] == 1 and size != 1 else 1 for axis, size in enumerate(shape)]
    strides = np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)
    offsets = (np.indices(inside).reshape(len(shape), math.prod(inside)).T @ strides).astype(
        np.int32
    )
    # Much faster than argwhere: positions in the mask, taken apart axis by axis.
    rest = np.flatnonzero(mask).astype(np.int32)
    first = np.zeros(len(rest), np.int32)
    for axis in reversed(range(len(shape))):
        if mask.shape[axis] > 1:
            rest, index = np.divmod(rest, np.int32(mask.shape[axis]))
            first += index * np.int32(strides[axis])
    return first[:, None] + offsets
