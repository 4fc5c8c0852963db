"""Checks masks against parameters and splits them into rings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .groups import Ring
from .hosts import gathered
from .names import NamedLeaves, is_array, listed, named_leaves


def split_rings(params: NamedLeaves, masks: Sequence[PyTree]) -> list[Ring]:
    """Checks masks against parameters and splits them into rings.

    Args:
        params: the named leaves that the masks are for.
        masks: mask 1..M, nested. A leaf of a mask is a boolean that broadcasts against the
            parameter leaf; a plain ``False`` or ``True`` stands for a whole leaf or subtree.

    Returns:
        The non-empty rings, ordered by leaf, then by level.

    Raises:
        ValueError: a path that one of the trees lacks; a mask that does not broadcast, selects a
            leaf that is not an array of numbers, or is not contained in the next one.
        TypeError: the masks are traced or not boolean.
    """
    if isinstance(masks, Mapping) or not isinstance(masks, Sequence):
        raise TypeError(
            f"masks: expected a sequence of one mask per level, got {type(masks).__name__}. "
            "For a single level pass (mask,)."
        )
    whole = [checked_mask(params, mask, f"masks[{index}]") for index, mask in enumerate(masks)]
    found: list[Ring] = []
    for name, leaf in params.arrays.items():  # all other masks are False, see _fit_leaf
        previous = np.zeros((1,) * leaf.ndim, bool)
        for index, mask in enumerate(whole):
            lost = previous > mask[name]
            if lost.any():
                where = tuple(int(i) for i in np.argwhere(lost)[0])
                raise ValueError(
                    f"masks: {name!r}: masks[{index}] lacks group {where}, which "
                    f"masks[{index - 1}] has. Expected nested masks: each level may decrypt "
                    "everything that the levels below it may. See nested_masks."
                )
            added = mask[name] > previous
            if added.any() and math.prod(leaf.shape):  # nothing to hide in an empty leaf
                found.append(Ring(name, index + 1, added))
            previous = mask[name]
    return found


def checked_mask(params: NamedLeaves, mask: PyTree, what: str) -> dict[str, np.ndarray]:
    """The mask as a dict by the names of ``params``, each with as many axes as its leaf.

    Raises:
        ValueError, TypeError: the mask does not fit; ``what`` names it in messages.
    """
    given = named_leaves(mask, what).leaves
    result: dict[str, np.ndarray] = {}
    used: dict[str, bool] = {}  # whether any array lies under this entry of the mask
    for name, leaf in params.leaves.items():
        prefix = _prefix(name, given)
        if prefix is None:
            raise ValueError(
                f"{what}: {name!r}: expected a mask for this leaf of params, got none. The mask "
                f"has {listed(given)}. Masks and params must have the same paths; a plain False "
                "excludes a leaf or a subtree."
            )
        used[prefix] = used.get(prefix, False) or is_array(leaf)
        result[name] = _fit_leaf(leaf, given[prefix], prefix == name, f"{what}: {name!r}")
    extra = [name for name in given if name not in used]
    if extra:
        raise ValueError(
            f"{what}: expected only paths of params, got also {listed(extra)}. Params have "
            f"{listed(params.leaves)}. Make the mask from the same tree."
        )
    for name, has_arrays in used.items():
        if given[name] is True and not has_arrays:
            raise ValueError(
                f"{what}: {name!r}: expected arrays in params here, since the mask selects them, "
                "got none. Convert numbers to arrays (jnp.asarray), or pass a pytree of parameters."
            )
    return result


def _prefix(name: str, given: Mapping[str, Any]) -> str | None:
    """The name itself, or the closest subtree above it that ``given`` holds."""
    if name in given:
        return name
    while name:
        name = name.rpartition("/")[0]
        if name in given:
            return name
    return None


def _fit_leaf(leaf: Any, mask: Any, exact: bool, what: str) -> np.ndarray:
    if not is_array(mask) and not isinstance(mask, bool):
        if is_array(leaf):
            raise TypeError(
                f"{what}: expected a boolean array or a plain bool, got {type(mask).__name__}. "
                "Make masks with nested_masks."
            )
        return np.asarray(False)  # a leaf of params itself (a function, a string), copied over
    array = concrete(mask, what) if is_array(mask) else np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(
            f"{what}: expected booleans, got {array.dtype}. Make masks with nested_masks."
        )
    if not is_array(leaf):
        if not exact:  # a plain True for the subtree above, which selects its arrays
            return np.asarray(False)
        if array.any():
            raise ValueError(
                f"{what}: expected False, since this leaf of params is a {type(leaf).__name__} and "
                "not an array, got a mask that selects it. Pass False there."
            )
        return array
    if array.ndim == 0:
        return array.reshape((1,) * leaf.ndim)
    fits = array.ndim == leaf.ndim and all(
        size in (1, full) for size, full in zip(array.shape, leaf.shape, strict=True)
    )
    if not exact:
        raise ValueError(
            f"{what}: expected a mask for this leaf, got an array of shape {array.shape} for the "
            "whole subtree above it. Only a plain True or False stands for a subtree. For a "
            "single level pass (mask,)."
        )
    if not fits:
        raise ValueError(
            f"{what}: expected a mask that broadcasts against shape {tuple(leaf.shape)}, each axis "
            f"of size 1 or the leaf's, got shape {array.shape}. Make it from the same tree, in the "
            "same layout."
        )
    return array


class LeafCount(NamedTuple):
    """The numbers of groups and weights that a mask selects in a leaf.

    Attributes:
        groups: the number of selected groups.
        weights: the number of weights in them.
        total: the number of weights in the leaf.
    """

    groups: int
    weights: int
    total: int


def mask_counts(params: PyTree, mask: PyTree) -> dict[str, LeafCount]:
    """Counts the groups and weights that a mask selects, leaf by leaf.

    Args:
        params: parameters.
        mask: one mask for ``params``.

    Returns:
        name → counts, for the array leaves. The encrypted share of the model is
        ``sum(c.weights) / sum(c.total)`` over the leaves to be counted.

    Raises:
        ValueError, TypeError: the mask does not fit, see `encrypt`.

    Examples:
        >>> counts = mask_counts(params, masks[-1]).values()
        >>> share = sum(c.weights for c in counts) / sum(c.total for c in counts)
    """
    tree = named_leaves(params)
    counts = {n: LeafCount(0, 0, math.prod(leaf.shape)) for n, leaf in tree.arrays.items()}
    for ring in split_rings(tree, (mask,)):
        groups, total = int(ring.mask.sum()), counts[ring.name].total
        counts[ring.name] = LeafCount(groups, groups * total // ring.mask.size, total)
    return counts


def concrete(leaf: Any, what: str) -> np.ndarray:
    """A leaf of scores or masks on this host.

    Raises:
        TypeError: the leaf is traced.
    """
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{what}: expected a concrete array, got a traced one. Masks determine the compiled "
            "shapes: make them outside jit, vmap and grad, and close over them."
        )
    return gathered(leaf)
