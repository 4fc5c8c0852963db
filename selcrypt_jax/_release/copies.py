"""Tensors that hold another one: whole or in part, transposed, reshaped, or fused with others.

A weight that is encrypted in one tensor and plain in a copy of it is plain. Copies are found by
matching runs of eight neighbours along each axis across all tensors at once. Where runs start
depends on the values alone, so a copy has the same runs wherever it lies. One match then fixes
where all other weights of a copy must be.
"""

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._format.tensors import StoredTensors
from .._tree.dtypes import SAFETENSORS

_RUN = 8  # neighbours that have to agree
_SAMPLES = 1024  # runs in a small tensor; in a large one, runs start at a 256th of the positions
_MATCHES = 12  # matches examined for each pair of tensors
_ALIKE = 0.25  # share of equal weights that makes a copy: an average may keep half of the old ones
_SCATTERED = 0.15  # share of runs found in another tensor that makes it a scattered copy
_VALUES = 64  # distinct values that a tensor needs for `_SCATTERED` to mean anything
_SIMILAR = 0.9  # correlation that makes two tensors similar
_FEWEST = 32  # weights below which a correlation means little
_ROWS = 1024  # tensors compared with all others at once
_POINTS = 1024  # sampled weights for the correlation
_AT_ONCE = 1 << 16  # positions examined at once


class Copy(NamedTuple):
    """A tensor inside another one.

    Attributes:
        inner: name of the tensor.
        outer: name of the tensor that holds it.
        start: flat position of its first weight in `outer`.
        strides: for each axis of `inner`, the step in `outer`, in weights.
        share: share of `inner` that agrees, beyond chance.
    """

    inner: str
    outer: str
    start: int
    strides: tuple[int, ...]
    share: float

    def view(self, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A view, in the shape of `inner`, of `outer` or of anything with one entry per weight."""
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.start :], shape, steps)


class _Found(NamedTuple):
    """The runs of a tensor: hashes, first positions, and strides."""

    keys: np.ndarray
    places: np.ndarray
    strides: np.ndarray


class Contents:
    """Compares tensors by content.

    Args:
        sources: name of a tensor → the file that holds it; read in order, one tensor at a time.
        among: tensors that may be encrypted; similar pairs without any of these are left out.
    """

    def __init__(self, sources: Mapping[str, StoredTensors], among: Container[str]) -> None:
        self._sources, self._among = sources, among
        self.shapes = {n: tuple(s.tensors[n].shape) for n, s in sources.items()}
        self._dtypes = {n: SAFETENSORS[s.tensors[n].dtype] for n, s in sources.items()}
        self._names = [
            name
            for name, dtype in self._dtypes.items()
            if dtype.kind != "other" and dtype.bits >= 8 and math.prod(self.shapes[name]) >= _RUN
        ]
        self._points: dict[str, np.ndarray] = {}
        self.scattered: list[tuple[str, str]] = []
        """Pairs that share much in another order; set once `copies` has read all tensors."""

    def bits(self, name: str) -> np.ndarray:
        """A tensor as flat unsigned integers."""
        return np.frombuffer(self._sources[name].read(name), f"<u{self._dtypes[name].bits // 8}")

    def copies(self) -> list[Copy]:
        """Every tensor that lies in another one; identical tensors pair up one after the other."""
        if len(self._names) < 2:
            self._names = []
            return []
        found = []
        for name in self._names:
            bits = self.bits(name)
            self._points[name] = self._sampled(name, bits)
            found.append(_runs(bits, self.shapes[name]))
        result = []
        for pair, count, matches in self._matches(found):
            first, second = self._names[pair[0]], self._names[pair[1]]
            if self._dtypes[first] != self._dtypes[second]:
                continue
            placed = self._placed(first, second, matches)
            result += placed
            fewer = min(len(found[number].keys) for number in pair)
            if placed or count < _SCATTERED * fewer:
                continue
            # Tensors with few distinct values, such as integers, share runs by chance.
            if len(np.unique(self._points[first])) >= _VALUES:
                self.scattered.append((first, second))
        return result

    def similar(self) -> Iterator[tuple[str, str]]:
        """Pairs of similar tensors of the same shape, once `copies` has read all tensors."""
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in self._names:
            shape = self.shapes[name]
            if (
                self._dtypes[name].kind == "float"
                and len(shape) > 1
                and math.prod(shape) >= _FEWEST
            ):
                by_shape.setdefault(shape, []).append(name)
        for names in by_shape.values():
            points = np.stack([self._points[name] for name in names]).astype(np.float64)
            points -= points.mean(1, keepdims=True)
            size = np.linalg.norm(points, axis=1)
            points /= np.where(size > 0, size, 1)[:, None]
            for start in range(0, len(names), _ROWS):  # there may be tens of thousands of experts
                alike = points[start : start + _ROWS] @ points[start:].T
                for first, second in np.argwhere(np.triu(alike, 1) > _SIMILAR) + start:
                    one, two = names[first], names[second]
                    if one in self._among or two in self._among:
                        yield one, two

    def _sampled(self, name: str, bits: np.ndarray) -> np.ndarray:
        places = np.linspace(0, bits.size - 1, min(_POINTS, bits.size)).astype(np.intp)
        if self._dtypes[name].kind != "float":
            return np.zeros(len(places), np.float32)
        from .._io.arrays import as_array

        code: Any = self._dtypes[name].code
        few = np.ascontiguousarray(bits[places])
        with np.errstate(all="ignore"):
            values = as_array(few.data.cast("B"), code, few.shape).astype(np.float32)
        return np.where(np.isfinite(values), values, 0)

    def _matches(self, found: list[_Found]) -> Iterator[tuple[tuple[int, int], int, np.ndarray]]:
        """Pairs of tensors, their number of matches, and some matches: positions and strides."""
        keys = np.concatenate([each.keys for each in found])
        tensor = np.repeat(np.arange(len(found)), [len(each.keys) for each in found])
        places = np.concatenate([each.places for each in found])
        strides = np.concatenate([each.strides for each in found])
        order = np.argsort(keys, kind="stable")
        first, second = order[:-1], order[1:]
        same = (keys[first] == keys[second]) & (tensor[first] != tensor[second])
        first, second = first[same], second[same]
        pairs = tensor[first] * len(found) + tensor[second]
        order = np.argsort(pairs, kind="stable")
        pairs, first, second = pairs[order], first[order], second[order]
        _, starts, counts = np.unique(pairs, return_index=True, return_counts=True)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            here = start + np.unique(np.linspace(0, count - 1, _MATCHES).astype(np.intp))
            one, two = first[here], second[here]
            rows = np.stack([places[one], strides[one], places[two], strides[two]], 1)
            yield (int(tensor[one[0]]), int(tensor[two[0]])), count, rows

    def _placed(self, first: str, second: str, matches: np.ndarray) -> list[Copy]:
        """The copies of one of two tensors in the other."""
        if math.prod(self.shapes[first]) > math.prod(self.shapes[second]):
            first, second, matches = second, first, matches[:, [2, 3, 0, 1]]
        inner, outer = self.bits(first), self.bits(second)
        shape, found = self.shapes[first], {}
        for match in matches.tolist():
            where = _affine(inner, shape, outer, self.shapes[second], *match)
            if where is None or where in found:
                continue
            copy = Copy(first, second, *where, 0.0)
            found[where] = copy._replace(share=_share(copy.view(outer, shape).ravel(), inner))
        return [copy for copy in found.values() if copy.share >= _ALIKE]


def _share(one: np.ndarray, two: np.ndarray) -> float:
    """The share of two flat arrays that agrees, beyond chance.

    Tensors with few distinct values, such as pruned or ternary ones, agree in many positions.
    """
    same, chance = np.mean(one == two), np.mean(one[1:] == two[:-1])
    return float((same - chance) / (1 - chance)) if chance < 1 else 0.0


def _steps(shape: tuple[int, ...]) -> list[int]:
    """Strides of an array in C order."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _runs(bits: np.ndarray, shape: tuple[int, ...]) -> _Found:
    """Runs along each axis, which start where the hash of the first value says so."""
    mixed = bits.astype(np.uint64) if bits.itemsize == 8 else bits.astype(np.uint32)
    if bits.itemsize == 8:
        mixed = (mixed ^ (mixed >> np.uint64(32))).astype(np.uint32)
    mixed *= np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x85EBCA77)
    rarity = min(max(bits.size // _SAMPLES, 1).bit_length() - 1, 8)
    chosen = np.flatnonzero((mixed >> np.uint32(24)) < (256 >> rarity))
    # If a value that fills much of the tensor was chosen, keep correspondingly fewer runs.
    usual = (bits.size >> rarity) * 4
    thinned = min((len(chosen) // max(usual, 1)).bit_length(), 8)
    factors = np.random.default_rng(0).integers(1, 2**63, _RUN, np.uint64) | np.uint64(1)
    keys, places, strides = [], [], []
    directions = {(1, 1, bits.size)}  # stride, stride of the axis, size of the axis
    directions |= {(s, s, n) for s, n in zip(_steps(shape), shape, strict=True) if n >= _RUN}
    for stride, _, size in sorted(directions):
        if stride == 1 and size != bits.size:
            continue  # part of the flat direction
        for start in range(0, len(chosen), _AT_ONCE):
            here = chosen[start : start + _AT_ONCE]
            here = here[here // stride % size <= size - _RUN]
            here = here[bits[here] != bits[here + stride]]  # drops most of a mostly zero tensor
            runs = bits[here[:, None] + stride * np.arange(_RUN)].astype(np.uint64)
            here = here[different := (runs[:, :-1] != runs[:, 1:]).sum(1) >= _RUN // 2]
            hashes = (runs[different] * factors).sum(1, dtype=np.uint64)
            kept = (hashes >> np.uint64(56)) < (256 >> thinned)
            keys.append(hashes[kept])
            places.append(here[kept])
            strides.append(np.full(len(keys[-1]), stride))
    if not keys:
        return _Found(np.zeros(0, np.uint64), np.zeros(0, np.intp), np.zeros(0, np.intp))
    return _Found(np.concatenate(keys), np.concatenate(places), np.concatenate(strides))


def _affine(
    inner: np.ndarray,
    shape: tuple[int, ...],
    outer: np.ndarray,
    outer_shape: tuple[int, ...],
    place: int,
    stride: int,
    outer_place: int,
    outer_stride: int,
) -> tuple[int, tuple[int, ...]] | None:
    """Where a tensor must lie in another one, given one run that they share.

    Args:
        inner: the tensor, flat.
        shape: its shape.
        outer: the other tensor, flat.
        outer_shape: its shape.
        place: position of the run in `inner`.
        stride: stride of the run in `inner`.
        outer_place: position of the run in `outer`.
        outer_stride: stride of the run in `outer`.

    Returns:
        Start and strides, see `Copy`; None if nothing fits.
    """
    steps = _steps(shape)
    index = [place // step % size for step, size in zip(steps, shape, strict=True)]
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    known = [axis for axis in axes if steps[axis] == stride]
    if not known:
        return None
    found = {known[0]: outer_stride}
    behind = outer_stride * shape[known[0]]
    others = {step for step, size in zip(_steps(outer_shape), outer_shape, strict=True) if size > 1}
    for axis in sorted(axes, reverse=True):  # last axis first: earlier ones may be contiguous to it
        if axis in found:
            behind = found[axis] * shape[axis]
            continue
        line = np.arange(shape[axis])
        mine = inner[place + (line - index[axis]) * steps[axis]]
        best, best_share = None, 0.0
        for step in sorted({*others, behind} - set(found.values())):
            theirs = outer_place + (line - index[axis]) * step
            if theirs[0] < 0 or theirs[-1] >= outer.size:
                continue
            share = float(np.mean(outer[theirs] == mine))
            if share > best_share:
                best, best_share = step, share
        if best is None:
            return None
        found[axis] = best
        behind = best * shape[axis]
    start = outer_place - sum(index[axis] * found[axis] for axis in axes)
    stop = start + sum((shape[axis] - 1) * found[axis] for axis in axes)
    if start < 0 or stop >= outer.size:
        return None
    return start, tuple(found.get(axis, 0) for axis in range(len(shape)))
