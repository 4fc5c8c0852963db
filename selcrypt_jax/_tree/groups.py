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
    """What one level adds in one leaf.

    Attributes:
        name: of the leaf.
        level: 1..M.
        mask: boolean, with as many axes as the leaf; true where the ring has a group.

    Examples:
        >>> LosslessCipher().check(Ring("w", 1, np.ones((64, 64), bool)), np.zeros((64, 64)))
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
    first, offsets, _ = _corners(shape, mask.shape, np.flatnonzero(mask))
    return first[:, None] + offsets


def unit_positions(
    shape: Sequence[int], masks: Sequence[np.ndarray], unit: Literal["weight", "group"]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Flat positions of all selected weights as the cipher counts them.

    Args:
        shape: of the leaf.
        masks: disjoint and of one shape, see `group_positions`.
        unit: ``"group"``: as there; ``"weight"``: single weights in C order of the leaf, so that
            only the set of positions matters, and not the shape of the mask.

    Returns:
        int32 ``[units, weights in a unit]``, and for each mask which units are its own, in order.
    """
    label = np.zeros(masks[0].shape, np.min_scalar_type(len(masks)))
    for number, mask in enumerate(masks, 1):
        label |= mask * label.dtype.type(number)
    groups = np.flatnonzero(label != 0)
    label = label.reshape(-1)[groups]
    own = [np.flatnonzero(label == number) for number in range(1, len(masks) + 1)]
    first, offsets, step = _corners(shape, masks[0].shape, groups)
    count, size = len(first), len(offsets)
    if unit == "group" or size == 1:
        return first[:, None] + offsets, own
    within = np.arange(size)
    if not count or offsets[-1] < step:  # groups lie one after the other: OIHW
        positions = first[:, None] + offsets
        own = [(mine[:, None] * size + within).reshape(-1) for mine in own]
    elif first[-1] < offsets[1]:  # all first weights come first, and then all second ones: HWIO
        positions = offsets[:, None] + first
        own = [(within[:, None] * count + mine).reshape(-1) for mine in own]
    else:
        flat = (first[:, None] + offsets).reshape(-1)
        order = np.argsort(flat)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        positions, rank = flat[order], rank.reshape(count, size)
        own = [np.sort(rank[mine], axis=None) for mine in own]
    return positions.reshape(-1, 1), own


def _corners(
    shape: Sequence[int], mask_shape: Sequence[int], groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Where groups lie.

    Returns:
        The first weight of each group; those of a group, counted from there; both ascending; and
        the least distance that the first weights of two groups can have.
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
        # The axes outside of groups are neighbours: one step a group.
        first = rest * np.int32(steps[-1] if steps else 1)
    else:
        first = np.zeros(len(rest), np.int32)
        for axis in reversed(outside):
            rest, index = np.divmod(rest, np.int32(mask_shape[axis]))
            first += index * np.int32(strides[axis])
    return first, offsets, min(steps, default=math.prod(shape))
