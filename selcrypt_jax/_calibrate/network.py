"""A network whose levels are encrypted by counts of groups, and measured."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._ciphers.dprm import decrypt, encrypt
from .._ciphers.lossless import LosslessCipher
from .._keys.chacha import chacha20_key
from .._keys.keys import Secret, level_key, new_model_id, ring_keys
from .._masks.levels import as_levels
from .._masks.options import Select
from .._masks.ranks import Scope, Scores
from .._masks.selection import (
    Cut,
    Ranks,
    is_few,
    leaves_of_tree,
    masks_of_rings,
    merge_upwards,
    select_rings,
)
from .._tree.groups import Ring
from .._tree.hosts import from_first, is_spread
from .._tree.names import listed, named_leaves
from .targets import Targets


class Given(NamedTuple):
    """The network to measure, and how.

    Attributes:
        params: the parameters to encrypt.
        scores: importance, by the names of the leaves.
        selection: supplies the budget and scope.
        whole: leaves that are encrypted as a whole.
        cipher: the cipher.
        targets: supplies the metric.
    """

    params: PyTree
    scores: Scores
    selection: Select
    whole: Sequence[str]
    cipher: LosslessCipher
    targets: Targets


class Network(ABC):
    """A network that is encrypted by counts of its most important groups, and measured.

    A *count* is a number of groups of the whole model; with scope "leaf" it stands for the same
    share of every leaf. Metrics are multiplied by ``sign``, so that higher is better.

    Args: see `calibrate_levels`.
    """

    keys = 1
    """The largest number of protections that a value is averaged over."""
    steady = False
    """Whether the keys are fixed, so that the measured network is the released one."""

    def __init__(self, given: Given) -> None:
        self.params, scores, selection, whole, self.cipher, targets = given
        self.tree, self.sign = named_leaves(self.params), targets.sign
        self.scope: Scope = selection.scope
        self._evaluate, self.calls = targets.evaluate, 0
        # An empty leaf has nothing to rank and nothing to hide; one that is encrypted as a whole
        # takes no part in the ranking.
        shapes = {
            name: shape
            for name, shape in scores.shapes.items()
            if math.prod(shape) and name not in whole
        }
        self._whole = whole
        arrays = {name: scores.of(name) for name in shapes}
        self._scores = Scores(shapes, arrays.__getitem__)
        self._leaves = leaves_of_tree(self.tree)
        self.groups = sum(math.prod(shape) for shape in shapes.values())
        if not self.groups:
            raise ValueError(
                "scores: expected at least one leaf with groups, got "
                f"{listed(scores.shapes)}, all of them empty."
            )

    def fraction(self, count: int) -> float:
        """The shortest decimal for which ``nested_masks`` takes this many groups."""
        share = Fraction(count, self.groups)
        for digits in itertools.count(1):
            number = Fraction(math.ceil(share * 10**digits), 10**digits)
            if math.floor(number * self.groups) == count:
                return float(number)
        raise AssertionError

    _cut: Cut = staticmethod(merge_upwards)

    def rings(self, counts: Sequence[int]) -> list[Ring]:
        """The ring of each level, and leaves that are encrypted as a whole.

        Raises:
            ValueError: these counts make no rings.
        """
        levels = as_levels([self.fraction(count) for count in counts])
        rings = select_rings(
            self._scores, levels, scope=self.scope, leaves=self._leaves, cipher=self.cipher,
            whole=self._whole, cut=self._cut,
        )  # fmt: skip
        return list(rings)

    def refusal(self, counts: Sequence[int]) -> str | None:
        """The reason why these counts make no rings, or None."""
        try:
            self.rings(counts)
        except ValueError as error:
            return str(error)
        return None

    def masks(self, counts: Sequence[int], level: int = 0) -> tuple[PyTree, ...]:
        """Nested masks of what a level leaves encrypted; rings are merged as for all levels."""
        rings = self.rings(counts)
        above = [r._replace(level=r.level - level) for r in rings if r.level > level]
        levels = max(ring.level for ring in rings)
        return masks_of_rings(above, levels - level, self.tree)

    def measure(self, params: PyTree) -> float:
        """The metric; higher is better."""
        self.calls += 1
        # In new containers: a metric may fuse layers in them, or drop some.
        value = self._evaluate(jax.tree.map(lambda leaf: leaf, params))
        number = number_of(value)
        check_finite(number, f"at call {self.calls}")
        return self.sign * number

    @abstractmethod
    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """The keys of the last rings."""

    def renew(self) -> None:  # noqa: B027
        """Starts another release, if this is one."""

    def opened(self, counts: Sequence[int]) -> Sequence[int]:
        """How many groups levels 1 to M open."""
        return counts

    def draw(self, level: int, counts: Sequence[int]) -> float:
        """One measurement of a level."""
        # No frame holds the keys while the metric runs, which may raise: their repr shows them.
        return self.measure(self._drawn(level, counts))

    def _drawn(self, level: int, counts: Sequence[int]) -> PyTree:
        masks = self.masks(counts, level)
        keys = self.ring_keys(len(masks))
        return encrypt(self.params, masks, keys, cipher=self.cipher)

    def sample(
        self, level: int, counts: Sequence[int], target: float | None, tolerance: float
    ) -> tuple[float, int]:
        """A level's quality averaged over as few keys as suffice, and how many they were."""
        values: list[float] = []
        while len(values) < self.keys and not is_precise(np.array(values), tolerance / 3):
            values.append(self.draw(level, counts))
            # Far from the target, only the side matters.
            if target is not None and len(values) > 1:
                doubt = 3 * np.std(values, ddof=1) / math.sqrt(len(values))
                if abs(np.mean(values) - target) > 4 * tolerance + doubt:
                    break
        return float(np.mean(values)), len(values)

    def check(self, counts: Sequence[int], precision: float) -> np.ndarray:
        """The quality of levels 0 to M-1, ``[keys, levels]``.

        Args:
            counts: the levels' counts.
            precision: see `is_precise`.
        """
        masks = self.masks(counts)
        rows: list[list[float]] = []
        while len(rows) < self.keys and not is_precise(np.array(rows), precision):
            rows.append(list(map(self.measure, self._opened(masks))))
        return np.array(rows)

    def _opened(self, masks: Sequence[PyTree]) -> Iterator[PyTree]:
        """The parameters at levels 0 to M-1, one after the other."""
        keys = self.ring_keys(len(masks))
        protected = encrypt(self.params, masks, keys, cipher=self.cipher)
        for level in range(len(masks)):
            yield decrypt(protected, masks[:level], keys[:level], cipher=self.cipher)

    def is_exact(self, counts: Sequence[int]) -> bool:
        """Whether the top level restores every bit."""
        masks = self.masks(counts)
        keys = self.ring_keys(len(masks))
        protected = encrypt(self.params, masks, keys, cipher=self.cipher)
        opened = named_leaves(decrypt(protected, masks, keys, cipher=self.cipher)).leaves
        return all(
            leaf is opened[name] or np.asarray(leaf).tobytes() == np.asarray(opened[name]).tobytes()
            for name, leaf in self.tree.arrays.items()
        )


class Sampled(Network):
    """Uses fresh keys for each measurement.

    Args: see `calibrate_levels`, and `Network`.
    """

    def __init__(self, given: Given, *, key: PRNGKeyArray, keys: int) -> None:
        super().__init__(given)
        self._key, self.keys = key, keys

    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """Keys that have never been used."""
        self._key, drawn = jax.random.split(self._key)
        words = np.asarray(jax.random.bits(drawn, (count, 8), "uint32"))
        return [chacha20_key(row.tobytes()) for row in words]


class Release(Network):
    """Uses the keys of one release.

    There are 2M counts, in ascending order. The first M say what levels 1 to M open, as long as all
    levels take groups from the beginning of the order; the others say what rings M to 1 take from
    behind that part. So level m can be steered by both sides of ring m + 1 without changing the
    levels above it: what it leaves encrypted follows from its own counts and theirs.

    The keys encrypt many selections here. That is no reuse: only one of them leaves this process.

    Args:
        given: see `Network`.
        secret: the owner's secret.
        twins: names of leaves that are bit for bit equal, in which the same is encrypted.
        first: the level of the first ring.
    """

    steady = True

    def __init__(
        self, given: Given, *, secret: Secret, twins: Sequence[Sequence[str]], first: int = 1
    ) -> None:
        super().__init__(given)
        self._secret, self._twins = secret, twins
        self._levels = len(given.targets.targets) + first - 1
        self.renew()

    def renew(self) -> None:
        """Starts another release."""
        spread = any(map(is_spread, self.tree.leaves.values()))
        self.model_id = from_first(new_model_id()) if spread else new_model_id()
        self._ring_keys = ring_keys(level_key(self._secret, self.model_id, levels=self._levels))

    @staticmethod
    def _cut(bounds: Sequence[int], weights: int, cipher: LosslessCipher) -> list[Ranks]:
        half = len(bounds) // 2
        rings: list[Ranks] = []
        below = 0
        for level, count in enumerate(settled_counts(bounds[:half], weights, cipher)):
            start, end = bounds[-level - 2 :][:2]
            own = [(below, count)]
            if not is_few(count - below + end - start, weights, cipher):
                own.append((start, end))
            rings.append(own)
            below = count
        return rings

    def rings(self, counts: Sequence[int]) -> list[Ring]:
        """See `Network.rings`; twins have equal rings."""
        rings = super().rings(counts)
        for names in self._twins:
            first = next((ring.name for ring in rings if ring.name in names), None)
            if first is not None:
                own = [ring for ring in rings if ring.name == first]
                rings = [ring for ring in rings if ring.name not in names]
                rings += [ring._replace(name=name) for name in names for ring in own]
        return rings

    def opened(self, counts: Sequence[int]) -> list[int]:
        """See `Network.opened`."""
        levels = len(counts) // 2
        ends = [counts[-1 - level] for level in range(levels)] + [counts[levels - 1]]
        return [counts[level] + ends[0] - ends[level + 1] for level in range(levels)]

    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """The keys of the release."""
        return list(self._ring_keys[-count:])


def number_of(value: Any) -> float:
    """What a metric returned, as a number.

    Raises:
        TypeError: it is not a number.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"evaluate: expected a number, got {type(value).__name__}. Return the metric alone."
        ) from None


def check_finite(number: float, where: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        ValueError: the number is one of these.
    """
    if not math.isfinite(number):
        raise ValueError(
            f"evaluate: expected a finite number, got {number}, {where}. "
            "Encrypted weights may overflow: return the worst finite value, such as chance, "
            "instead."
        )


def is_precise(values: np.ndarray, precision: float) -> bool:
    """Whether the means of three values or more, over the first axis, are known to a precision."""
    count = len(values)
    return count >= 3 and bool((values.std(0, ddof=1) <= precision * math.sqrt(count)).all())


def settled_counts(counts: Sequence[int], weights: int, cipher: LosslessCipher) -> list[int]:
    """Like `merged_counts`, but decided from the top down, not affected by lower levels.

    A ring with few orders moves down here, and a remainder below it moves up.
    """
    result = [counts[-1]]
    for count in reversed(counts[:-1]):
        above = result[0]
        if is_few(count, weights, cipher):
            count = 0
        elif is_few(above - count, weights, cipher):
            count = above
        result.insert(0, count)
    return result
