"""A leaf seen as groups of weights; without JAX."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Granularity = Literal["kernel", "filter", "weight"]
Layout = Literal["HWIO", "OIHW"]
Selector = str | Callable[[str, Any], bool] | None
"""Which leaves: a regular expression, a function of name and leaf, or None for the default."""


class Ring(NamedTuple):
    """The groups that one level adds in one leaf.

    Attributes:
        name: the leaf's name.
        level: 1..M.
        mask: boolean, with as many axes as the leaf; true at the ring's groups.

    Examples:
        >>> LosslessCipher().check(Ring("w", 1, np.ones((64, 64), bool)), np.zeros((64, 64)))
    """

    name: str
    level: int
    mask: np.ndarray


def inner_axes(shape: Sequence[int], granularity: Granularity, layout: Layout) -> tuple[int, ...]:
    """The axes of a leaf that lie inside a group.

    Args:
        shape: the leaf's shape, with any number of spatial axes.
        granularity: ``"kernel"``: one (input, output) pair with all its spatial weights, the
            unit of the paper; ``"filter"``: one output channel; ``"weight"``: one element.
            In a dense leaf a kernel is one weight; in a leaf with one axis, each element is one.
        layout: ``"HWIO"``: the last two axes are input and output (JAX); ``"OIHW"``: the first
            two axes are output and input (PyTorch). Use ``"OIHW"`` for an embedding table with one
            row per token if a filter should be a row.

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
    """The shape of a leaf's scores: the leaf's shape, with size 1 on the axes inside a group.

    Arguments and errors as in `inner_axes`.
    """
    inside = inner_axes(shape, granularity, layout)
    return tuple(1 if axis in inside else size for axis, size in enumerate(shape))


def group_positions(shape: Sequence[int], mask: np.ndarray) -> np.ndarray:
    """Flat (C order) positions of the selected weights, ``[groups, weights in a group]``.

    Args:
        shape: the leaf's shape.
        mask: boolean, broadcastable to ``shape`` with the same number of axes. An axis on which
            the mask has size 1 and the leaf does not lies inside the group.

    Returns:
        int32 array; groups in C order of the mask, weights of a group in C order of the leaf.
    """
    first, offsets, _ = _corners(shape, mask.shape, np.flatnonzero(mask))
    return first[:, None] + offsets


def unit_positions(
    shape: Sequence[int],
    mask_shape: Sequence[int],
    groups: np.ndarray,
    unit: Literal["weight", "group"],
) -> np.ndarray:
    """Flat positions of the selected weights, in the order that the cipher numbers them.

    Args:
        shape: the leaf's shape.
        mask_shape: the mask's shape, see `group_positions`.
        groups: which elements of the mask are selected, ascending, in C order.
        unit: ``"group"``: as in `group_positions`; ``"weight"``: single weights in C order of the
            leaf, so that only the set of positions matters, not the shape of the mask.

    Returns:
        Integers ``[units, weights in a unit]``.
    """
    first, offsets, step = _corners(shape, mask_shape, groups)
    if unit == "group" or len(offsets) == 1:
        return first[:, None] + offsets
    if not len(first) or offsets[-1] < step:  # each group precedes the next one: OIHW
        positions = first[:, None] + offsets
    elif first[-1] < offsets[1]:  # the first weights of all groups precede the second ones: HWIO
        positions = offsets[:, None] + first
    else:
        positions = np.sort(first[:, None] + offsets, axis=None)
    return positions.reshape(-1, 1)


class Places(NamedTuple):
    """Where a ring's weights lie, as runs of adjacent weights that are read and written together.

    Attributes:
        runs: the index of each run: ``leaf.reshape(-1, size)[runs]`` gives the weights in the order
            of `unit_positions`. A full slice if that is the order of the leaf.
        size: the number of weights in a run.
        units: the number of units in the ring.
    """

    runs: np.ndarray | slice
    size: int
    units: int


def unit_places(
    shape: Sequence[int],
    mask_shape: Sequence[int],
    groups: np.ndarray | None,
    unit: Literal["weight", "group"],
) -> Places:
    """Like `unit_positions`, as runs; ``groups=None`` means all groups."""
    inside = [axis for axis, n in enumerate(mask_shape) if n == 1 and shape[axis] != 1]
    behind = [axis for axis, n in enumerate(shape) if n != 1][-len(inside) :] if inside else []
    size = math.prod(shape[axis] for axis in inside)
    everything = math.prod(mask_shape)
    count = everything if groups is None else len(groups)
    units = count * (1 if unit == "group" else size)
    together = inside == behind  # each group is a run
    if count == everything and (together or unit == "weight"):
        return Places(slice(None), 1, units)
    if groups is None:
        groups = np.arange(everything)
    if together:
        return Places(groups, size, units)
    positions = unit_positions(shape, mask_shape, groups, unit)
    return Places(positions.astype(np.intp).reshape(-1), 1, units)


def _corners(
    shape: Sequence[int], mask_shape: Sequence[int], groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """The positions of groups.

    Returns:
        The first weight of each group; the offsets of a group's weights from its first; both
        ascending; and the smallest possible distance between the first weights of two groups.
    """
    axes = range(len(shape))
    strides = [math.prod(shape[axis + 1 :]) for axis in axes]
    inside = [size if mask_shape[axis] == 1 and size != 1 else 1 for axis, size in enumerate(shape)]
    offsets = np.zeros(1, np.int32)
    for axis in axes:
        if inside[axis] > 1:
            along = np.arange(inside[axis], dtype=np.int32) * np.int32(strides[axis])
            offsets = (offsets[:, None] + along).reshape(-1)
    outside = [axis for axis in axes if mask_shape[axis] > 1]
    steps = [strides[axis] for axis in outside]
    counted = [math.prod(mask_shape[axis + 1 :]) for axis in outside]
    rest = groups.astype(np.int32)
    if len({step // count for step, count in zip(steps, counted, strict=True)}) <= 1:
        # The axes outside of groups are adjacent: one stride per group.
        first = rest * np.int32(steps[-1] if steps else 1)
    else:
        first = np.zeros(len(rest), np.int32)
        for axis in reversed(outside):
            rest, index = np.divmod(rest, np.int32(mask_shape[axis]))
            first += index * np.int32(strides[axis])
    return first, offsets, min(steps, default=math.prod(shape))
