"""Nested permission masks from scores, and small leaves that are encrypted whole."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._ciphers.lossless import LosslessCipher
from .._tree.names import NamedLeaves, Selector, is_array, listed, named_leaves, select_leaves
from .._tree.rings import checked_mask, concrete
from .levels import LevelsLike, as_levels
from .ranks import Scope, Scores
from .selection import leaves_of_tree, masks_of_rings, select_rings, small_leaves


def nested_masks(
    scores: PyTree,
    levels: LevelsLike,
    *,
    budget: float | None = None,
    scope: Scope = "leaf",
    params: PyTree | None = None,
    cipher: LosslessCipher | None = None,
) -> tuple[PyTree, ...]:
    """Selects the most important groups for each level.

    Args:
        scores: pytree of importance, one float per group (see `selcrypt_jax.importance`), each
            leaf broadcastable to its parameter leaf; ``False`` for leaves that are not scored.
        levels: share of the groups that level 1..M may decrypt, ascending, each in (0, 1].
            The last one is the share that is encrypted. ``floor(share * groups)`` groups are
            taken, computed exactly. Or a number of levels, each opening an equal part of
            `budget`. Or a `Levels`, such as ``PaperLevels(0.08, levels=5)``.
        budget: share of the groups that is encrypted, for a number of levels; 0.08 by default.
        scope: ``"leaf"``: the shares hold in every leaf (the paper), and a leaf with fewer than
            ``1 / share`` groups gets none; ``"model"``: the shares hold over all groups of the
            model, so that a leaf gets as many as its scores merit. `mask_counts` shows each leaf's.
        params: the parameters that the scores are for. With them, rings that are too small to
            hide in are merged upwards, leaf by leaf, as in `protect`: a low level may then get
            nothing in a leaf. Without them every share is used unchanged.
        cipher: with `params`: the cipher that will encrypt them; `LosslessCipher()` by default.

    Returns:
        M pytrees of the structure of ``scores``, with NumPy booleans of each score leaf's shape
        and ``False`` where there is no score. Mask m is contained in mask m + 1. Among equal scores
        the lower index is taken first (over the model: by name of the leaf, then index).

    Raises:
        ValueError: shares out of range or not ascending; a level that adds nothing to the
            one below; a score that is NaN; no scores at all; with `params`, a leaf that the cipher
            refuses.
        TypeError: scores that are traced (masks decide shapes, so they must be concrete), or
            that are not arrays of numbers.

    Examples:
        >>> masks = nested_masks(importance.l2(params), [0.3, 0.5])
        >>> masks = nested_masks(importance.l2(params), 5, budget=0.5, params=params)
    """
    levels = as_levels(levels, budget)
    tree = named_leaves(scores, "scores")
    arrays = {
        name: score
        for name, leaf in tree.leaves.items()
        if (score := checked_score(name, leaf)) is not None
    }
    if not any(array.size for array in arrays.values()):
        raise ValueError(
            f"scores: expected at least one leaf with groups, got {listed(tree.leaves)}. Score "
            "a tree that has arrays."
        )
    leaves = None
    if params is not None:
        given = named_leaves(params)
        fits = {name: np.ones(array.shape, bool) for name, array in arrays.items()}
        checked_mask(given, tree.rebuild_only(fits), "scores")
        leaves = leaves_of_tree(given)
    shapes = {name: array.shape for name, array in arrays.items()}
    rings = select_rings(
        Scores(shapes, arrays.__getitem__), levels, scope=scope, leaves=leaves, cipher=cipher
    )
    return masks_of_rings(rings, len(levels.counts(1)), tree, shapes)


def checked_score(name: str, leaf: Any) -> np.ndarray | None:
    """The scores of a leaf as float64, or None for ``False`` (not scored).

    Raises:
        ValueError: there is NaN.
        TypeError: the leaf is traced, or not an array of numbers.
    """
    array = concrete(leaf, f"scores {name!r}") if is_array(leaf) else None
    kind = type(leaf).__name__ if array is None else f"an array of {array.dtype}"
    number = isinstance(leaf, int | float) and leaf is not False
    if number or (array is not None and array.dtype == bool):
        raise TypeError(
            f"scores {name!r}: expected an array of numbers, or False for no score, got "
            f"{kind}. Pass scores, as importance.l2(params) returns them, not masks."
        )
    if array is None:
        return None
    # Exact for every float of up to 64 bits, and sortable.
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize <= 4
    array = array.astype(np.float32 if narrow else np.float64, copy=False)
    if np.isnan(array).any():
        first = np.unravel_index(int(np.isnan(array).argmax()), array.shape)
        raise ValueError(
            f"scores {name!r}: expected numbers, got NaN in {int(np.isnan(array).sum())} of "
            f"{array.size} groups, first at index {tuple(map(int, first))}. Its weights or the "
            "loss were not finite: repair them, or exclude the leaf by naming the others with "
            "`select`."
        )
    return array


def with_small_leaves(
    params: PyTree,
    masks: Sequence[PyTree],
    *,
    small: float = 0.02,
    select: Selector = None,
    cipher: LosslessCipher | None = None,
) -> tuple[PyTree, ...]:
    """Adds small leaves as a whole to every level.

    Normalisation parameters, biases, and the first and last layer of a convolutional network are
    its smallest leaves, and all of its features pass through them. Encrypting them stops simple
    attacks by fine-tuning, but not an attacker who uses the structure of the plain weights or has
    a public base model; see docs/security.md. Level 1 opens them.

    Args:
        params: the parameters that the masks are for.
        masks: M nested masks, see `nested_masks`.
        small: the smallest leaves are taken that together have at most this share of all floats of
            `params`.
        select: leaves that may be taken, see `selcrypt_jax.importance`; None for all floats.
        cipher: the cipher that will encrypt them; `LosslessCipher()` by default. Leaves that it
            refuses (6 weights or fewer in float32) are too small to hide in and stay plain.

    Returns:
        M nested masks.

    Raises:
        ValueError, TypeError: masks that do not fit, or a share out of range.

    Examples:
        >>> masks = with_small_leaves(params, nested_masks(importance.l2(params), [0.3, 0.5]))
    """
    tree = named_leaves(params)
    among = None if select is None else select_leaves(params, select)
    names = small_leaves(leaves_of_tree(tree), small, among=among, cipher=cipher)
    return with_whole_leaves(tree, masks, names)


def with_whole_leaves(
    params: NamedLeaves, masks: Sequence[PyTree], names: Iterable[str]
) -> tuple[PyTree, ...]:
    """Adds leaves as a whole to every level.

    Raises:
        ValueError, TypeError: masks that do not fit.
    """
    whole = {name: np.ones(np.shape(params.leaves[name]), bool) for name in names}
    new = []
    for index, mask in enumerate(masks):
        fitted = checked_mask(params, mask, f"masks[{index}]")
        kept = {name: leaf for name, leaf in fitted.items() if leaf.any()}
        new.append(params.rebuild_only(kept | whole))
    return tuple(new)
