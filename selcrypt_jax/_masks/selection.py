"""From scores to rings: all commands and functions that select weights use this module."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from .._ciphers.blocks import order_bits
from .._ciphers.lossless import MINIMUM_HIDING, LosslessCipher
from .._io.errors import counted
from .._tree.ahead import ahead
from .._tree.dtypes import SAFETENSORS, Dtype, known_dtype
from .._tree.groups import Ring
from .._tree.names import NamedLeaves, listed
from .._tree.shares import check_share, exact
from .levels import Levels
from .packed import code_tables
from .ranks import Ranked, Scope, Scores, ranked

MAX_WEIGHTS = 2**31 - 1  # in a leaf: positions are 32-bit numbers


class Leaf(NamedTuple):
    """The properties of a leaf that selection needs."""

    dtype: Dtype
    shape: tuple[int, ...]


Ranks = list[tuple[int, int]]
"""Ranges of ranks: the first rank, and the one past the last."""

Cut = Callable[[Sequence[int], int, LosslessCipher], list[Ranks]]
"""Counts of a leaf's levels, weights in a group, cipher → the ranks of each level's ring."""


def leaves_of_tensors(tensors: Mapping[str, Any]) -> dict[str, Leaf]:
    """Leaves from tensors with safetensors' names of dtypes."""
    return {n: Leaf(SAFETENSORS[info.dtype], tuple(info.shape)) for n, info in tensors.items()}


def leaves_of_tree(tree: NamedLeaves) -> dict[str, Leaf]:
    """The arrays of a tree whose dtype is numeric."""
    return {
        name: Leaf(dtype, tuple(leaf.shape))
        for name, leaf in tree.arrays.items()
        if (dtype := known_dtype(leaf.dtype)) is not None
    }


def select_rings(
    scores: Scores,
    levels: Levels,
    *,
    scope: Scope = "leaf",
    leaves: Mapping[str, Leaf] | None = None,
    cipher: LosslessCipher | None = None,
    whole: Collection[str] = (),
    cut: Cut | None = None,
) -> Iterator[Ring]:
    """Ranks groups, takes the best for each level, and checks that the rings can be encrypted.

    Args:
        scores: the scores of the selected leaves, without NaN; read one leaf at a time.
        levels: how many groups each level may decrypt.
        scope: whether the counts hold in every leaf, or over all of them.
        leaves: the leaves that the scores are for. Without them every count is used unchanged.
        cipher: with `leaves`: rings that it cannot hide are merged with others of their leaf.
        whole: leaves that are encrypted as a whole and opened by level 1. They take no part in
            the ranking.
        cut: how a leaf's rings follow from its counts; `merge_upwards` by default.

    Yields:
        The rings, leaf by leaf and then by level.

    Raises:
        ValueError: after all rings have been yielded: leaves that the cipher refuses, or a level
            that adds nothing to the one below. Before: an unknown scope or dtype.
    """
    if scope not in ("leaf", "model"):
        raise ValueError(f"scope: expected 'leaf' or 'model', got {scope!r}.")
    shapes = {name: shape for name, shape in scores.shapes.items() if name not in whole}
    cipher = LosslessCipher() if cipher is None else cipher
    if leaves is not None:
        for name in shapes:  # before any of them is read
            try:
                cipher.fine_mask(leaves[name].dtype)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}. Exclude it with `select`.") from None
        for name in whole:
            yield Ring(name, 1, np.ones(leaves[name].shape, bool))

    def cut_leaf(item: Ranked) -> tuple[str, int, int, list[tuple[int, Ring]]]:
        """Its name and size, the number of levels, and its rings with their numbers of groups."""
        name, ranks, counts = item
        size = ranks.size if leaves is None else math.prod(leaves[name].shape)
        if leaves is None:
            rings = _between(counts)
        else:
            rings = (cut or merge_upwards)(counts, size // max(ranks.size, 1), cipher)
        if not size or (leaves is not None and size > MAX_WEIGHTS):
            return name, size, len(rings), []  # an empty leaf has nothing to hide
        ranks = ranks.reshape(-1)
        best = np.flatnonzero(ranks < max(stop for own in rings for _, stop in own))
        ranks = ranks[best]
        found = []
        for level, own in enumerate(rings, 1):
            inside = np.zeros(len(ranks), bool)
            for start, stop in own:
                inside |= (ranks >= start) & (ranks < stop)
            if groups := int(np.count_nonzero(inside)):
                mask = np.zeros(scores.shapes[name], bool)
                mask.reshape(-1)[best[inside]] = True
                found.append((groups, Ring(name, level, mask)))
        return name, size, len(rings), found

    added: list[int] = []
    given: dict[str, dict[int, int]] = {}  # leaf → level → groups
    refused: dict[str, str] = {}
    in_order = ranked(Scores(shapes, scores.of), levels.counts, scope)
    for name, size, count, found in ahead(cut_leaf, in_order, lambda given: given[1].nbytes):
        if leaves is not None and size > MAX_WEIGHTS:
            refused[name] = (
                f"tensor {name!r}: expected at most {MAX_WEIGHTS} weights in a tensor, got "
                f"{size}. Split it, or exclude it with `select`."
            )
            continue
        added = added or [0] * count
        given[name] = {ring.level: groups for groups, ring in found}
        for groups, ring in found:
            if leaves is not None:
                try:
                    cipher.check_size(
                        f"tensor {name!r}, level {ring.level}",
                        leaves[name].dtype,
                        groups=groups,
                        weights=groups * size // ring.mask.size,
                    )
                except ValueError as error:
                    refused.setdefault(name, str(error))
            added[ring.level - 1] += groups
            yield ring
    if refused:
        more = f" The same for {listed(list(refused)[1:])}." if len(refused) > 1 else ""
        raise ValueError(next(iter(refused.values())) + more)
    for level, groups in enumerate(added, 1):
        if not groups:
            among = listed(shapes, 2, lambda name: _what_of(shapes[name], given[name]))
            remedy = _MORE if any(map(math.prod, shapes.values())) else _OTHERS
            raise ValueError(
                f"level {level} adds no groups to those below it, expected at least one in {among}"
                f"{_left_out(leaves or {}, shapes, whole)}. {remedy}"
            )


_MORE = (
    "Encrypt a larger share, use fewer levels, a finer granularity or scope 'model', or select "
    "larger tensors."
)
_OTHERS = "Select tensors that have weights."


def _what_of(shape: Sequence[int], given: Mapping[int, int]) -> str:
    """The groups that levels open in a leaf. A ring too small to hide in is opened one level up."""
    if not (groups := math.prod(shape)):
        return "no weights"
    since = f", from level {min(given)}" if given else ""
    return f"{sum(given.values()) or 'none'} of {counted(groups, 'group')}{since}"


def _left_out(leaves: Mapping[str, Leaf], shapes: Mapping[str, Any], whole: Collection[str]) -> str:
    """Leaves that are left out, with dtype and shape."""
    rest = [name for name in leaves if name not in shapes and name not in whole]

    def kind(name: str) -> str:
        return f"{leaves[name].dtype.name}{list(leaves[name].shape)}"

    return f"; left out: {listed(rest, 2, kind)}" if rest else ""


def masks_of_rings(
    rings: Iterable[Ring],
    levels: int,
    tree: NamedLeaves,
    shapes: Mapping[str, Sequence[int]] = {},
) -> tuple[PyTree, ...]:
    """Nested masks: what each level may decrypt.

    Args:
        rings: the rings of levels 1 to M.
        levels: M.
        tree: the tree that the masks match.
        shapes: leaf → shape of its mask, for leaves that get an array even if nothing is selected.
    """
    masks: list[dict[str, np.ndarray]] = [
        {name: np.zeros(shape, bool) for name, shape in shapes.items()} for _ in range(levels)
    ]
    for ring in rings:
        for mask in masks[ring.level - 1 :]:
            before = mask.get(ring.name)
            same = before is not None and before.shape == ring.mask.shape
            mask[ring.name] = before | ring.mask if same else ring.mask
    return tuple(tree.rebuild_only(mask) for mask in masks)


def small_leaves(
    leaves: Mapping[str, Leaf],
    share: float,
    *,
    among: Collection[str] | None = None,
    cipher: LosslessCipher | None = None,
) -> list[str]:
    """The smallest floats that together have at most a share of all of them.

    Args:
        leaves: the leaves of a checkpoint or tree.
        share: share of all floats, in [0, 1].
        among: names that may be taken; None for all but the tables of packed weights.
        cipher: the cipher to hide them: it refuses a leaf of a few weights, and those stay plain.

    Returns:
        Their names, smallest first; equal ones by name.

    Raises:
        ValueError, TypeError: the share is out of range or not a number.
    """
    check_share("small", share, of="all weights", or_none=True)
    cipher = LosslessCipher() if cipher is None else cipher
    sizes = {n: math.prod(leaf.shape) for n, leaf in leaves.items() if leaf.dtype.kind == "float"}
    rest = exact(share) * sum(sizes.values())
    if among is None:
        among = sizes.keys() - code_tables({name: leaf.dtype for name, leaf in leaves.items()})
    found = []
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        rest -= sizes[name]
        if rest < 0:
            break
        if name in among and cipher.hides(*leaves[name]):
            found.append(name)
    return found


def _between(counts: Sequence[int]) -> list[Ranks]:
    return [[pair] for pair in itertools.pairwise((0, *counts))]


def merge_upwards(counts: Sequence[int], weights: int, cipher: LosslessCipher) -> list[Ranks]:
    """The rings of a leaf; a ring with too few orders is opened by the next higher level.

    Masked fine bits change a weight by less than an eighth, so the order alone must give a ring
    128 bits. A low level whose ring would be smaller gets nothing in this leaf.
    """
    return _between(merged_counts(counts, weights, cipher))


def merged_counts(counts: Sequence[int], weights: int, cipher: LosslessCipher) -> list[int]:
    """The counts of a leaf's levels after rings with few orders have moved up."""
    if not cipher.permute:
        return list(counts)
    result: list[int] = []
    kept = 0
    for count in counts:
        if not is_few(count - kept, weights, cipher):
            kept = count
        result.append(kept)
    if kept < counts[-1]:
        # A remainder at the top cannot stand alone: the ring below moves up with it.
        below = max((count for count in result if count < kept), default=0)
        result = [below if count == kept else count for count in result]
        result[-1] = counts[-1]
    return result


def is_few(groups: int, weights: int, cipher: LosslessCipher) -> bool:
    """Whether a ring of so many groups, with so many weights each, has too few orders."""
    units = 1 if cipher.unit == "group" else weights
    return cipher.permute and order_bits(groups * units) < MINIMUM_HIDING
