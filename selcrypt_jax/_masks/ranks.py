"""The most important groups: ranks of scores, tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from .._tree.ahead import ahead

Scope = Literal["leaf", "model"]
CountsOf = Callable[[int], tuple[int, ...]]
"""Number of groups → how many of them level 1..M may decrypt, see `Levels.counts`."""


class Scores(NamedTuple):
    """Importance of the groups of tensors, computed one tensor at a time.

    Attributes:
        shapes: tensor → shape of its scores, for the scored tensors.
        of: tensor → its scores.
    """

    shapes: Mapping[str, tuple[int, ...]]
    of: Callable[[str], np.ndarray]


def _last(size: int) -> np.ndarray:
    """Ranks of ``size`` groups, all after the ranked ones."""
    return np.full(size, size, np.int64 if size >= 2**31 else np.int32)


def _descending(scores: np.ndarray) -> np.ndarray:
    """The same as ``np.argsort(-scores, kind="stable")``, which takes ten times as long."""
    if scores.dtype != np.float32 or len(scores) >= 2**32:
        return np.argsort(-scores, kind="stable")
    bits = (scores + np.float32(0)).view(np.uint32)  # makes the two zeros equal
    keys = np.where(bits >> 31, bits, ~bits ^ np.uint32(1 << 31)).astype(np.uint64)
    keys <<= 32
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= 2**32 - 1
    return keys.astype(np.intp)


def _rank(scores: np.ndarray, best: int) -> np.ndarray:
    """0 for the most important group, and so on; among equals the lower index comes first.

    The first ``best`` ranks are exact; the other groups have any rank from there on.
    """
    flat = scores.reshape(-1)
    ranks = _last(flat.size)
    if best:
        # Sorting all of them would take ten times the memory of the weights.
        best = min(best, flat.size)
        least = np.partition(flat, -best)[-best] if flat.size else 0
        chosen = np.flatnonzero(flat >= least).astype(ranks.dtype)
        order = chosen[_descending(flat[chosen])]
        ranks[order] = np.arange(len(order), dtype=ranks.dtype)
    return ranks.reshape(scores.shape)


Ranked = tuple[str, np.ndarray, tuple[int, ...]]
"""A tensor, the ranks of its groups, and how many of them each level may decrypt."""


def _rank_leaves(scores: Scores, counts_of: CountsOf) -> Iterator[Ranked]:
    """Ranks each tensor by itself."""

    def rank(given: tuple[str, np.ndarray]) -> Ranked:
        name, score = given
        counts = counts_of(score.size)
        return name, _rank(score, counts[-1]), counts

    # Scores are made in this thread: JAX's configuration is thread-local.
    given = ((name, scores.of(name)) for name in scores.shapes)
    return ahead(rank, given, lambda item: item[1].nbytes)


def _rank_model(scores: Scores, counts_of: CountsOf) -> Iterator[Ranked]:
    """Ranks all tensors together; only the best scores are held in memory at a time."""
    names = sorted(scores.shapes)  # so that ties do not depend on the order in the file
    sizes = {name: math.prod(scores.shapes[name]) for name in names}
    total = counts_of(sum(sizes.values()))
    best = np.zeros(0, np.float32)
    leaf, index = np.zeros(0, np.int32), np.zeros(0, np.intp)
    least = -np.inf
    for number, name in enumerate(names):
        score = scores.of(name).reshape(-1)
        chosen = np.flatnonzero(score >= least)
        best = np.concatenate([best, score[chosen]])
        leaf = np.concatenate([leaf, np.full(len(chosen), number, np.int32)])
        index = np.concatenate([index, chosen])
        if len(best) > 2 * total[-1] > 0:
            least = np.partition(best, -total[-1])[-total[-1]]
            kept = best >= least
            best, leaf, index = best[kept], leaf[kept], index[kept]
    order = _descending(best)[: total[-1]]
    for number, name in enumerate(names):
        (places,) = np.nonzero(leaf[order] == number)
        ranks = _last(sizes[name])
        ranks[index[order[places]]] = np.arange(len(places))
        counts = tuple(int(np.searchsorted(places, count)) for count in total)
        yield name, ranks.reshape(scores.shapes[name]), counts


def ranked(scores: Scores, counts_of: CountsOf, scope: Scope) -> Iterator[Ranked]:
    """Ranks of all tensors; groups that no level may decrypt only rank after the others.

    Among equal scores the lower index comes first; over the model, by name of the tensor, then
    index.

    Args:
        scores: without NaN.
        counts_of: how many groups each level may decrypt.
        scope: whether the counts hold in every tensor, or over all of them.
    """
    return (_rank_leaves if scope == "leaf" else _rank_model)(scores, counts_of)
