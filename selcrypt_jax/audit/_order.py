"""The permutation of a cipher, traced with marked weights: does each move, and never alike?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .._ciphers.blocks import block_count
from .._tree.dtypes import DTYPES
from ._chosen import ALARM, Chosen, Where, pairs, skipped
from ._records import CipherCheck

_LARGE = 1024  # units in a ring from which it is checked in pieces
_PIECES = 8
_LAGS = 2048
_DIGIT = 4  # bits of a position that one exponent can hold
_COARSE = 0b101  # the top three mantissa bits of a marked weight


def _marked(digits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats in 2⁻¹⁵..2 with the digit in the exponent; integers with it in the top bits."""
    width, mantissa = 8 * dtype.itemsize, DTYPES[dtype.name].mantissa
    if mantissa:
        words = digits << mantissa | 0b0111 << (mantissa + _DIGIT) | _COARSE << (mantissa - 3)
    else:
        words = digits << (width - _DIGIT)
    return words.astype(f"uint{width}").view(dtype)


def _orders(network: Chosen, keys: Any) -> tuple[dict[Where, np.ndarray], bool]:
    """Where the weight at each position of a ring came from, for rings whose order can be read.

    Also whether exponents stay in place while the other coarse bits are masked: such a cipher
    permutes nothing, by design.
    """
    dtype = network.dtype
    mantissa = DTYPES[dtype.name].mantissa
    sizes = {where: groups.size for where, groups in network.groups.items()}
    found = {where: np.zeros(size, np.int64) for where, size in sizes.items()}
    survive = True
    for shift in range(0, max(sizes.values()).bit_length(), _DIGIT):
        chosen = {
            where: _marked(np.arange(size) >> shift & (1 << _DIGIT) - 1, dtype)
            for where, size in sizes.items()
        }
        for where, words in network.encrypt_with(chosen, keys).items():
            digit = mantissa or 8 * dtype.itemsize - _DIGIT
            found[where] |= (words.astype(np.int64) >> digit & (1 << _DIGIT) - 1) << shift
            if mantissa:
                survive = survive and bool((words >> (mantissa - 3) & 7 == _COARSE).all())
    places = {where: np.arange(size) for where, size in sizes.items()}
    in_place = all(np.array_equal(found[where], places[where]) for where in found)
    sources = {
        where: _as_units(network, where, source)
        for where, source in found.items()
        if np.array_equal(np.sort(source), places[where])
    }
    return sources, in_place and not survive


def _as_units(network: Chosen, where: Where, source: np.ndarray) -> np.ndarray:
    """The same for groups, if they move as a whole; and else for weights, unchanged."""
    groups = np.searchsorted(network.weights(where), network.groups[where])
    number = np.empty(source.size, np.int64)
    number[groups] = np.arange(len(groups))[:, None]
    from_group = number[source[groups]]
    whole = (from_group == from_group[:, :1]).all()
    if whole and (source[groups] == groups[from_group[:, 0]]).all():
        return from_group[:, 0]
    return source


class _Count(NamedTuple):
    """The number of units, ``agreeing`` out of ``of``, on which two orders agree."""

    agreeing: int
    of: int
    blocks: int

    def log_chance(self) -> float:
        """Log-probability of so many or more by chance: E[C(X, k)] is at most b**k / k!."""
        if self.agreeing <= self.blocks:
            return 0.0
        return self.agreeing * math.log(self.blocks) - math.lgamma(self.agreeing + 1)


def _few(name: str, counts: Sequence[_Count], what: str) -> CipherCheck:
    """Whether all agree in few units only, as by chance; `found` as in `_near_half`."""
    if not counts:
        return skipped(name, "no ring is large enough")
    worst = min(counts, key=_Count.log_chance)
    passed = worst.log_chance() >= math.log(ALARM / len(counts))
    shown = counts if passed else [worst]
    share = sum(count.agreeing for count in shown) / sum(count.of for count in shown)
    text = f"share of {what}: no more than by chance, in {len(counts):,} comparisons"
    return CipherCheck(name, passed, share, text)


def order_checks(network: Chosen, models: Sequence[Any]) -> Iterator[CipherCheck]:
    """Checks of the order of a ring's weights, under the keys of two model ids."""
    (first, stream), (second, _) = (_orders(network, keys) for keys in models)
    places = {where: np.arange(len(source)) for where, source in first.items()}
    large = {where: source for where, source in first.items() if len(source) >= _LARGE}
    pieces = [
        _Count(int(piece.sum()), len(piece), block_count(len(source)))
        for where, source in large.items()
        for piece in np.array_split(source == places[where], _PIECES)
    ]
    same = "units from the same position"

    in_place = [_same(first[where], places[where]) for where in first]
    other_id = [_same(first[where], second[where]) for where in first if where in second]
    rings, leaves = ([_same(first[a], first[b]) for a, b in pairs(first, k)] for k in (0, 1))
    checks = [
        _few("weights move", in_place, "units in place"),
        _few("every part is permuted", pieces, "units of an eighth of a ring in place"),
        _spread("weights spread over the ring", list(large.values())),
        _few("different in every block", _displacements(first), "pairs that moved equally far"),
        _few("different in every ring", rings, same),
        _few("different in every leaf", leaves, same),
        _few("different for every model id", other_id, same),
    ]
    why = "exponents do not survive"
    if stream:
        why = "exponents stay in place: each weight is known to a factor of two"
    for check in checks:
        check = replace(check, name=f"order: {check.name}")
        yield skipped(check.name, why) if stream or not first else check


def _same(one: np.ndarray, other: np.ndarray) -> _Count:
    count = min(len(one), len(other))
    return _Count(int((one[:count] == other[:count]).sum()), count, block_count(count))


def _spread(name: str, sources: Sequence[np.ndarray]) -> CipherCheck:
    """Pearson's χ² test: is the piece that a unit comes from independent of where it is now?"""
    if not sources:
        return skipped(name, "no ring is large enough")
    degrees = (_PIECES - 1) ** 2
    x = math.log(len(sources) / ALARM)
    limit = degrees + 2 * math.sqrt(degrees * x) + 2 * x  # Laurent and Massart, 2000, lemma 1
    worst = 0.0
    for source in sources:
        piece = np.arange(len(source)) * _PIECES // len(source)
        table = np.bincount(piece * _PIECES + piece[source], minlength=_PIECES**2)
        expected = np.outer(np.bincount(piece), np.bincount(piece)).ravel() / len(source)
        worst = max(worst, float((np.square(table - expected) / expected).sum()))
    text = f"χ² of about {degrees}, at most {limit:.0f}, between eighths of a ring"
    return CipherCheck(name, worst <= limit, worst, text)


def _displacements(sources: Mapping[Where, np.ndarray]) -> list[_Count]:
    """For each distance, the pairs that moved equally far: all of them if blocks are alike."""
    counts = []
    for source in sources.values():
        moved, blocks = source - np.arange(len(source)), 2 * block_count(len(source))
        doubling = {1 << power for power in range(len(source).bit_length())}
        for lag in sorted({*range(1, _LAGS), *doubling}):
            if lag < len(moved):
                equal = int(np.count_nonzero(moved[lag:] == moved[:-lag]))
                counts.append(_Count(equal, len(moved) - lag, blocks))
    return counts
