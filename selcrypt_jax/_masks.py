"""From scores to nested permission masks: budgets, selection, checks and counts."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from ._groups import Ring
from ._lossless import LosslessCipher
from ._multihost import gathered
from ._ranks import Scope, Scores, ranked
from ._tree import NamedLeaves, Selector, is_array, listed, named_leaves, select_leaves


@runtime_checkable
class Levels(Protocol):
    """How many groups each level may decrypt."""

    def counts(self, groups: int) -> tuple[int, ...]:
        """Non-decreasing counts for levels 1..M, out of ``groups``."""
        ...


@dataclass(frozen=True)
class PaperLevels:
    """The levels of the paper's published release.

    Of ``groups`` groups ``n = floor(ratio * groups) + 1`` are selected, and level m of M may
    decrypt the ``floor((0.6 + 0.4 * m / M) * n)`` most important ones of them.

    Attributes:
        ratio: share of the groups that is encrypted, in (0, 1].
        levels: M, the number of levels.

    References:
        Tian, Zhou, Duan, CVPR 2021, section 3.3, and its published code.
    """

    ratio: float
    levels: int = 5

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if operator.index(self.levels) < 1:
            raise ValueError(f"levels: expected at least 1, got {self.levels}.")

    def counts(self, groups: int) -> tuple[int, ...]:
        """See `Levels.counts`."""
        total = min(groups, math.floor(_exact(self.ratio) * groups) + 1)
        return tuple(
            math.floor((Fraction(3, 5) + Fraction(2, 5) * Fraction(m, self.levels)) * total)
            for m in range(1, self.levels + 1)
        )


@dataclass(frozen=True)
class _Fractions:
    fractions: tuple[Fraction, ...]

    def counts(self, groups: int) -> tuple[int, ...]:
        return tuple(math.floor(fraction * groups) for fraction in self.fractions)


def _exact(fraction: float) -> Fraction:
    # What its author wrote, so that 0.29 of 100 groups is 29 and not floor(28.999999999999996).
    # str() of a NumPy or JAX scalar is in its own precision, so np.float32(0.29) is 0.29 too.
    return Fraction(str(fraction))


def check_share(what: str, share: Any, *, of: str = "the groups", or_none: bool = False) -> None:
    """Refuses what is no share; whoever writes 8 means 8 %.

    Args:
        what: it is of, for messages.
        share: in (0, 1].
        of: what is shared.
        or_none: allow 0 too.

    Raises:
        TypeError: no number.
        ValueError: out of range.
    """
    if share is None or isinstance(share, str | bool) or np.ndim(share):
        raise TypeError(
            f"{what}: expected a number in (0, 1], got {type(share).__name__}. Pass a share of "
            f"{of}, such as 0.08; or one a level, such as [0.02, 0.08], where levels are asked for."
        )
    if not 0 <= share <= 1 or (share == 0 and not or_none):  # also catches NaN
        number = float(share)
        remedy = f"For {number:g} % pass {number / 100:g}." if 1 < number <= 100 else "0.08 is 8 %."
        raise ValueError(
            f"{what}: expected a share of {of} in {'[' if or_none else '('}0, 1], got {share!r}. "
            + remedy
        )


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) == 0:
        raise ValueError("fractions: expected one a level, got none. Pass some: [0.02, 0.08].")
    for index, fraction in enumerate(fractions):
        check_share(f"fractions[{index}]", fraction)
        if index and fraction < fractions[index - 1]:
            raise ValueError(
                f"fractions: expected ascending shares, level by level, got {fraction!r} after "
                f"{fractions[index - 1]!r}. Sort them."
            )


def as_levels(fractions: Sequence[float] | Levels) -> Levels:
    """Checks shares, one a level.

    Raises:
        ValueError: out of range or not ascending.
        TypeError: neither shares nor `Levels`.
    """
    if isinstance(fractions, Sequence | np.ndarray | jax.Array) and not isinstance(fractions, str):
        fractions = list(fractions)
        _check_fractions(fractions)
        return _Fractions(tuple(map(_exact, fractions)))
    if isinstance(fractions, Levels):
        return fractions
    raise TypeError(
        f"fractions: expected one share a level or Levels such as PaperLevels(0.08), got "
        f"{type(fractions).__name__}. For a single level pass [fraction]."
    )


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
    array = _concrete(leaf, f"scores {name!r}") if is_array(leaf) else None
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


def _concrete(leaf: Any, what: str) -> np.ndarray:
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{what}: expected a concrete array, got a traced one. Masks decide which shapes are "
            "compiled: make them outside jit, vmap and grad, and close over them."
        )
    return gathered(leaf)


def split_rings(params: NamedLeaves, masks: Sequence[PyTree]) -> list[Ring]:
    """Checks masks against parameters and takes them apart.

    Args:
        params: the named leaves that the masks are for.
        masks: mask 1..M, nested. A leaf of a mask is a boolean that broadcasts against the
            parameter leaf; a plain ``False`` or ``True`` stands for a whole leaf or subtree.

    Returns:
        The rings that select anything, by leaf, then by level.

    Raises:
        ValueError: a path that one of the trees lacks; a mask that does not broadcast, selects
            in something that is no number array, or is not contained in the next one.
        TypeError: traced masks, or masks that are not boolean.
    """
    if isinstance(masks, Mapping) or not isinstance(masks, Sequence):
        raise TypeError(
            f"masks: expected a sequence of one mask a level, got {type(masks).__name__}. "
            "For a single level pass (mask,)."
        )
    whole = [checked_mask(params, mask, f"masks[{index}]") for index, mask in enumerate(masks)]
    found: list[Ring] = []
    for name, leaf in params.leaves.items():
        if not is_array(leaf):
            continue  # its masks are False: _fit has seen to that
        previous = np.zeros((1,) * leaf.ndim, bool)
        for index, mask in enumerate(whole):
            lost = previous > mask[name]
            if lost.any():
                where = tuple(int(i) for i in np.argwhere(lost)[0])
                raise ValueError(
                    f"masks: {name!r}: masks[{index}] lacks group {where}, which "
                    f"masks[{index - 1}] has. Expected nested masks: a level may decrypt all "
                    "that the levels below may. See nested_masks."
                )
            added = mask[name] > previous
            if added.any() and math.prod(leaf.shape):  # nothing to hide in an empty leaf
                found.append(Ring(name, index + 1, added))
            previous = mask[name]
    return found


def checked_mask(params: NamedLeaves, mask: PyTree, what: str) -> dict[str, np.ndarray]:
    """The mask by the names of ``params``, each with as many axes as its leaf.

    Raises:
        ValueError, TypeError: it does not fit; ``what`` it is, for messages.
    """
    given = named_leaves(mask, what).leaves
    result: dict[str, np.ndarray] = {}
    used: dict[str, bool] = {}  # whether there is an array that it is for
    for name, leaf in params.leaves.items():
        prefix = _prefix(name, given)
        if prefix is None:
            raise ValueError(
                f"{what}: {name!r}: expected a mask for this leaf of params, got none. The mask "
                f"has {listed(given)}. Masks and params must have the same paths; a plain False "
                "leaves a leaf or a subtree out."
            )
        used[prefix] = used.get(prefix, False) or is_array(leaf)
        result[name] = _fit_leaf(leaf, given[prefix], prefix == name, f"{what}: {name!r}")
    extra = [name for name in given if name not in used]
    if extra:
        raise ValueError(
            f"{what}: expected only paths of params, got also {listed(extra)}. Params have "
            f"{listed(params.leaves)}. The mask comes from another tree."
        )
    for name, has_arrays in used.items():
        if given[name] is True and not has_arrays:
            raise ValueError(
                f"{what}: {name!r}: expected arrays in params here, since the mask selects them, "
                "got none. Turn numbers into arrays (jnp.asarray), or pass a pytree of parameters."
            )
    return result


def _prefix(name: str, given: Mapping[str, Any]) -> str | None:
    """The name itself, or the subtree above it, that ``given`` holds."""
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
                f"{what}: expected a boolean array or a plain bool, got {type(mask).__name__}."
            )
        return np.asarray(False)  # the params' own leaf (a function, a string) copied over
    array = _concrete(mask, what) if is_array(mask) else np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(
            f"{what}: expected booleans, got {array.dtype}. Make masks with nested_masks."
        )
    if not is_array(leaf):
        if not exact:  # a plain True for the subtree above: all of its arrays
            return np.asarray(False)
        if array.any():
            raise ValueError(
                f"{what}: expected False, since the leaf of params is no array but "
                f"{type(leaf).__name__}, got a mask that selects it."
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
            f"{what}: expected a mask that broadcasts against shape {tuple(leaf.shape)}, axis by "
            f"axis of size 1 or the leaf's, got shape {array.shape}. It comes from another tree "
            "or another layout."
        )
    return array


class LeafCount(NamedTuple):
    """What a mask selects in a leaf.

    Attributes:
        groups: number of selected groups.
        weights: number of weights in them.
        total: number of weights of the leaf.
    """

    groups: int
    weights: int
    total: int


def mask_counts(params: PyTree, mask: PyTree) -> dict[str, LeafCount]:
    """Counts what a mask selects, leaf by leaf.

    Args:
        params: parameters.
        mask: one mask that fits them.

    Returns:
        name → counts, for the array leaves. The share of the model that is encrypted is
        ``sum(c.weights) / sum(c.total)`` over the leaves that one means to count.

    Raises:
        ValueError, TypeError: the mask does not fit, see `encrypt`.
    """
    leaves = named_leaves(params)
    counts = {
        name: LeafCount(0, 0, math.prod(leaf.shape))
        for name, leaf in leaves.leaves.items()
        if is_array(leaf)
    }
    for ring in split_rings(leaves, (mask,)):
        shape = leaves.leaves[ring.name].shape
        groups = int(ring.mask.sum())
        size = math.prod(shape) // max(ring.mask.size, 1)
        counts[ring.name] = LeafCount(groups, groups * size, math.prod(shape))
    return counts


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
    room = _exact(share) * sum(sizes.values())
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
