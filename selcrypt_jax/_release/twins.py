"""Weights that a checkpoint holds more than once: each copy has to be encrypted alike."""

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .._ciphers.lossless import LosslessCipher
from .._format.boxes import SealedRing
from .._format.manifest import Rest, byte_count
from .._format.rings import ring_groups, seal_mask
from .._format.tensors import StoredTensors
from .._tree.dtypes import SAFETENSORS
from .._tree.groups import unit_places
from .copies import Contents, Copy

_NOTED = 0.05  # share of a tensor's encrypted weights from which a similar tensor is reported


class Similar(NamedTuple):
    """A tensor that is similar to another one, such as its moving average.

    Attributes:
        name: name of the tensor.
        like: name of the tensor whose weights are encrypted.
        share: share of the weights encrypted there that are plain here, or opened by a lower level.
    """

    name: str
    like: str
    share: float

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the weights encrypted in {self.like!r} are plain, or opened by a "
            f"lower level, in {self.name!r}, which is very similar. Leave one of them out of the "
            "file, or give both the same scores."
        )


class Scattered(NamedTuple):
    """A tensor that holds much of another one in another order, such as with rows permuted."""

    name: str
    like: str

    def __str__(self) -> str:
        return (
            f"Much of {self.like!r} is also in {self.name!r}, in another order: weights encrypted "
            "in one may be plain in the other, or opened by a lower level. Leave one of them out "
            "of the file, or give the same weights the same scores."
        )


class Spread(NamedTuple):
    """Rings that cover every copy of their weights.

    Attributes:
        rings: tensor → its sealed rings.
        similar: tensors that are similar, but not copies.
    """

    rings: dict[str, list[tuple[int, SealedRing]]]
    similar: tuple[Similar | Scattered, ...]


def with_twins(
    rings: Mapping[str, Sequence[tuple[int, SealedRing]]],
    files: Iterable[StoredTensors],
    cipher: LosslessCipher,
    rest: Rest,
    *,
    given: bool,
) -> Spread:
    """Extends rings to every copy of the weights that they encrypt, see `Copy`.

    A weight whose copies have different levels gets the lowest one, which opens it anyway.

    Args:
        rings: the rings as selected.
        files: the files that hold the tensors.
        cipher: the cipher, which has to hide the added weights.
        rest: the rest of the release.
        given: whether the caller chose every ring explicitly, so that none may be dropped.
            Otherwise, the first of several identical tensors decides for the others.

    Raises:
        ValueError: a copy has too few weights to hide.
    """
    sources = {name: file for file in files for name in file.tensors}
    found = {name: list(own) for name, own in rings.items()}
    alike = twins_of(sources, found)
    for names in alike:
        first = next(name for name in names if name in found)
        for name in names:
            if not (given and name in found):
                found[name] = [(m, ring._replace(tensor=name)) for m, ring in found[first]]
    contents = Contents(sources, found)
    copies = contents.copies()
    levels = _Levels(sources, found)
    while sum(levels.join(copy) for copy in copies):  # again, for copies of copies
        pass
    for name, other in levels.changed.items():
        found[name] = []
        level_of = levels.of(name)
        for level in range(1, int(level_of.max()) + 1):
            mask = (level_of == level).reshape(contents.shapes[name])
            if count := int(mask.sum()):
                cipher.check_size(
                    f"tensor {name!r}, level {level}, a copy of weights encrypted in {other!r}",
                    SAFETENSORS[sources[name].tensors[name].dtype],
                    groups=count,
                    weights=count,
                )
                found[name].append((level, seal_mask(name, mask)))
    kin = {name: {name} for name in sources}  # tensors that are copies of each other
    for names in [*alike, *((copy.inner, copy.outer) for copy in copies)]:
        joined = set().union(*(kin[name] for name in names))
        kin |= dict.fromkeys(joined, joined)
    similar: list[Similar | Scattered] = [
        Scattered(*sorted((one, two), key=found.__contains__))
        for one, two in contents.scattered
        if two not in kin[one] and (one in found or two in found)
    ]
    most: dict[str, Similar] = {}  # each tensor is named once, however many are similar
    for one, two in contents.similar():
        if two not in kin[one]:
            for name, like in ((one, two), (two, one)):
                share = levels.share_below(name, like, 1 if rest == "sealed" else 0)
                if share > max(_NOTED, most[name].share if name in most else 0):
                    most[name] = Similar(name, like, share)
    similar += most.values()
    return Spread(found, tuple(similar))


class _Levels:
    """The level of every weight, one tensor at a time; 0 for weights that are not graded."""

    def __init__(
        self,
        sources: Mapping[str, StoredTensors],
        rings: Mapping[str, Sequence[tuple[int, SealedRing]]],
    ) -> None:
        self._sources, self._rings = sources, rings
        self._known: dict[str, np.ndarray] = {}
        self.changed: dict[str, str] = {}  # tensor → the one that it got levels from

    def of(self, name: str) -> np.ndarray:
        if name in self._known:
            return self._known[name]
        shape = tuple(self._sources[name].tensors[name].shape)
        levels = np.zeros(math.prod(shape), np.uint16)
        for level, ring in self._rings.get(name, ()):
            groups = ring_groups(ring, level, name)
            places = unit_places(shape, ring.mask_shape, groups, "weight")
            levels.reshape(-1, places.size)[places.runs] = level
        return levels

    def join(self, copy: Copy) -> bool:
        """Gives both sides of a copy the levels of either; returns whether any changed."""
        if not any(name in self._rings or name in self._known for name in (copy.inner, copy.outer)):
            return False
        inner, outer = self.of(copy.inner), self.of(copy.outer)
        shape = tuple(self._sources[copy.inner].tensors[copy.inner].shape)
        mine, theirs = inner.reshape(shape), copy.view(outer, shape)
        both = np.where(mine == 0, theirs, np.where(theirs == 0, mine, np.minimum(mine, theirs)))
        changed = False
        for name, other, levels, part in (
            (copy.inner, copy.outer, inner, mine),
            (copy.outer, copy.inner, outer, theirs),
        ):
            if (part != both).any():
                part[...] = both
                self._known[name] = levels
                self.changed.setdefault(name, other)
                changed = True
        return changed

    def share_below(self, name: str, like: str, least: int) -> float:
        """Share of the weights encrypted in ``like`` that a lower level opens in ``name``."""
        here, there = self.of(name), self.of(like)
        encrypted = there > 0
        lower = np.maximum(here, least)[encrypted] < np.maximum(there, least)[encrypted]
        return float(lower.mean()) if lower.size else 0.0


def twins_of(source: Mapping[str, StoredTensors], among: Container[str]) -> list[list[str]]:
    """Names of tensors that are identical bit for bit, such as tied weights that were saved twice.

    The same weights have to be encrypted in all of them: a weight that is plain in one is plain.

    Args:
        source: name of a tensor → the file that holds it.
        among: tensors that may be encrypted; groups without any of these are left out.
    """
    like: dict[object, list[str]] = {}
    for name, file in source.items():
        info = file.tensors[name]
        if math.prod(info.shape):
            like.setdefault((info.dtype, tuple(info.shape)), []).append(name)
    found: list[list[str]] = []
    for names in like.values():
        if len(names) == 1 or not any(name in among for name in names):
            continue
        # The first bytes tell most tensors apart.
        for alike in _groups(names, lambda name: bytes(_start(source[name], name))):
            found += _groups(alike, lambda name: hashlib.sha256(source[name].read(name)).digest())
    return [names for names in found if any(name in among for name in names)]


def _groups(names: Sequence[str], key: Callable[[str], bytes]) -> list[list[str]]:
    """Groups of two or more names with the same key."""
    groups: dict[bytes, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _start(source: StoredTensors, name: str) -> memoryview:
    info = source.tensors[name]
    buffer = memoryview(bytearray(min(64, byte_count(info.dtype, info.shape))))
    source.read_into(name, 0, buffer)
    return buffer
