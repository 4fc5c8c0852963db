"""Nested permission masks from scores, and small leaves as a whole."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._ciphers.lossless import LosslessCipher
from .._tree.names import NamedLeaves, Selector, is_array, listed, named_leaves, select_leaves
from .._tree.rings import checked_mask, concrete
from .levels import Levels, as_levels, check_share, exact
from .ranks import Scope, Scores, ranked


def nested_masks(
    scores: PyTree, fractions: Sequence[float] | Levels, *, scope: Scope = "leaf"
) -> tuple[PyTree, ...]:
    """Selects the most important groups for each level.

    Args:
        scores: pytree of importance, one float a group (see `selcrypt_jax.importance`), each
            leaf broadcastable to its parameter leaf; ``False`` for what takes no part.
        fractions: share of the groups that level 1..M may decrypt, ascending, each in (0, 1].
            The last one is the share that is encrypted. ``floor(fraction * groups)`` groups are
            taken, computed exactly. Or a `Levels`, such as ``PaperLevels(0.08, levels=5)``.
        scope: ``"leaf"``: the shares hold in every leaf (the paper), and a leaf of fewer than
            ``1 / fraction`` groups gets none; ``"model"``: over all groups of the model, so that
            a leaf gets what its groups are worth. `mask_counts` shows what each leaf got.

    Returns:
        M pytrees of the structure of ``scores``, with NumPy booleans of each score leaf's shape
        and ``False`` where there is no score. Mask m is contained in mask m + 1. Of equal scores
        the lower index is taken first (over the model: by name of the leaf, then index).

    Raises:
        ValueError: fractions out of range or not ascending; a level that adds nothing to the
            one below; a score that is NaN; no scores at all.
        TypeError: scores that are traced (masks decide shapes, so they must be concrete), or
            that are no arrays of numbers.
    """
    levels = as_levels(fractions)
    if scope not in ("leaf", "model"):
        raise ValueError(f"scope: expected 'leaf' or 'model', got {scope!r}.")

    tree = named_leaves(scores, "scores")
    arrays = {
        name: score
        for name, leaf in tree.leaves.items()
        if (score := checked_score(name, leaf)) is not None
    }
    if not any(array.size for array in arrays.values()):
        raise ValueError(
            f"scores: expected at least one leaf with groups, got {listed(tree.leaves)}."
        )

    shapes = {name: array.shape for name, array in arrays.items()}
    masks: list[dict[str, np.ndarray]] = []
    for name, ranks, counts in ranked(Scores(shapes, arrays.__getitem__), levels.counts, scope):
        masks = masks or [{} for _ in counts]
        for mask, count in zip(masks, counts, strict=True):
            mask[name] = ranks < count
    steps = len(masks)
    selected = [0] + [sum(int(leaf.sum()) for leaf in mask.values()) for mask in masks]
    for level in range(1, steps + 1):
        if selected[level] <= selected[level - 1]:
            below = f"level {level - 1}" if level > 1 else "no key at all"
            raise ValueError(
                f"fractions: level {level} selects {selected[level]} groups, no more than {below} "
                f"({selected[level - 1]}). Expected every level to add at least one of the "
                f"{sum(array.size for array in arrays.values())} groups: use larger or fewer "
                "fractions, or scope='model'."
            )
    return tuple(tree.rebuild_only(mask) for mask in masks)


def checked_score(name: str, leaf: Any) -> np.ndarray | None:
    """The scores of a leaf as float64, or None for ``False``, which takes no part.

    Raises:
        ValueError: NaN.
        TypeError: traced, or no array of numbers.
    """
    array = concrete(leaf, f"scores {name!r}") if is_array(leaf) else None
    kind = type(leaf).__name__ if array is None else f"an array of {array.dtype}"
    number = isinstance(leaf, int | float) and leaf is not False
    if number or (array is not None and array.dtype == bool):
        raise TypeError(
            f"scores {name!r}: expected an array of numbers, or False for no part, got "
            f"{kind}. Pass scores, as importance.l2(params) returns them, not masks."
        )
    if array is None:
        return None
    # Exact for every float of up to 64 bits, and knows how to sort.
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize <= 4
    array = array.astype(np.float32 if narrow else np.float64, copy=False)
    if np.isnan(array).any():
        first = np.unravel_index(int(np.isnan(array).argmax()), array.shape)
        raise ValueError(
            f"scores {name!r}: expected numbers, got NaN in {int(np.isnan(array).sum())} of "
            f"{array.size} groups, first at index {tuple(map(int, first))}. Its weights are "
            "not finite, or the loss was not: repair them or leave the leaf out with `select`."
        )
    return array


def smallest(shapes: Mapping[str, Sequence[int]], share: float) -> list[str]:
    """The smallest leaves, as many as together have no more than a share of all weights.

    Args:
        shapes: name → shape.
        share: in [0, 1].

    Returns:
        Their names, from the smallest on; of equal ones by name.

    Raises:
        ValueError: a share out of range.
    """
    check_share("small", share, of="all weights", or_none=True)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    room = exact(share) * sum(sizes.values())
    found = []
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        room -= sizes[name]
        if room < 0:
            break
        found.append(name)
    return found


def with_small_leaves(
    params: PyTree, masks: Sequence[PyTree], *, share: float = 0.02, select: Selector = None
) -> tuple[PyTree, ...]:
    """Adds small leaves as a whole to every level.

    Normalisation parameters, biases, the first and the last layer of a convolutional network are
    its smallest leaves, and all of its features pass through them. Encrypting them stops simple
    attacks by fine-tuning, but not an attacker who uses the structure of the plain weights or has
    a public base model; see docs/security.md. Level 1 opens them.

    Args:
        params: that the masks are for.
        masks: M nested masks, see `nested_masks`.
        share: the smallest leaves are taken as long as together they have no more than this share
            of all floats of `params`.
        select: leaves that may be taken, see `nested_masks`'s scores; None for all floats. Those
            that `LosslessCipher` refuses, of 6 weights or fewer in float32, are too small to hide
            in.

    Returns:
        M nested masks.

    Raises:
        ValueError, TypeError: masks that do not fit, or a share out of range.

    Examples:
        >>> masks = with_small_leaves(params, nested_masks(l2(params), [0.05, 0.08]))
    """
    tree = named_leaves(params)
    floats = {
        name: leaf.shape
        for name, leaf in tree.leaves.items()
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    chosen = floats if select is None else select_leaves(params, select)
    names = [
        name
        for name in smallest(floats, share)
        if name in chosen and LosslessCipher().hides(tree.leaves[name].dtype, floats[name])
    ]
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
