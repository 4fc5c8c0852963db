"""A network that is encrypted in levels by counts, and measured."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._ciphers.dprm import decrypt, encrypt
from .._ciphers.lossless import LosslessCipher
from .._keys.chacha import chacha20_key
from .._keys.keys import Secret, level_key, new_model_id, ring_keys
from .._masks.levels import as_levels
from .._masks.masks import checked_score, with_small_leaves
from .._masks.ranks import Scope, Scores, ranked
from .._release.plan import is_few, merged_counts, settled_counts
from .._tree.groups import Ring
from .._tree.hosts import from_first, is_spread
from .._tree.names import Selector, is_array, listed, named_leaves
from .._tree.rings import checked_mask

Masks = list[dict[str, np.ndarray]]
"""What levels 1 to M open, leaf by leaf."""


class Network(ABC):
    """A network that is encrypted by counts of its most important groups, and measured.

    A *count* is a number of groups of the whole model; with scope "leaf" it stands for the same
    share of every leaf. Metrics are such that higher is better: times ``sign``.

    Args: see `calibrate_levels`.
    """

    keys = 1
    """How many protections a value is averaged over, at most."""
    steady = False
    """Whether the keys stay, so that what is measured is what is released."""

    def __init__(
        self,
        eval_fn: Callable[[PyTree], Any],
        params: PyTree,
        scores: PyTree,
        scope: Scope,
        small: float,
        select: Selector,
        cipher: LosslessCipher | None,
        sign: float,
    ) -> None:
        if scope not in ("leaf", "model"):
            raise ValueError(f"scope: expected 'leaf' or 'model', got {scope!r}.")
        self.cipher = LosslessCipher() if cipher is None else cipher
        self.tree, self.params, self.sign = named_leaves(params), params, sign
        self.scope: Scope = scope
        self._eval_fn, self.calls = eval_fn, 0
        given = named_leaves(scores, "scores")
        arrays = {
            name: score
            for name, leaf in given.leaves.items()
            if (score := checked_score(name, leaf)) is not None
        }
        groups = {name: np.ones(score.shape, bool) for name, score in arrays.items()}
        checked_mask(self.tree, given.rebuild_only(groups), "scores")
        none = self.tree.rebuild_only({})
        (small_mask,) = with_small_leaves(params, [none], share=small, select=select)
        self._small = {n: m for n, m in named_leaves(small_mask).leaves.items() if is_array(m)}
        # A leaf without weights has nothing to rank, and nothing to hide; one that is encrypted as
        # a whole needs no place in the order, unless there is no other: as in `protect_file`.
        shapes = {name: score.shape for name, score in arrays.items() if score.size}
        shapes = {n: shape for n, shape in shapes.items() if n not in self._small} or shapes
        self._scores = Scores(shapes, arrays.__getitem__)
        self.groups = sum(math.prod(shape) for shape in shapes.values())
        if not self.groups:
            raise ValueError(
                f"scores: expected at least one leaf with groups, got {listed(given.leaves)}."
            )

    def fraction(self, count: int) -> float:
        """The shortest decimal of which ``nested_masks`` takes so many groups."""
        share = Fraction(count, self.groups)
        for digits in itertools.count(1):
            number = Fraction(math.ceil(share * 10**digits), 10**digits)
            if math.floor(number * self.groups) == count:
                return float(number)
        raise AssertionError

    def _cumulative(self, counts: Sequence[int]) -> Masks:
        """What each level opens, without small leaves; rings of few orders merged upwards."""
        levels = as_levels([self.fraction(count) for count in counts])
        masks: Masks = [{} for _ in counts]
        for name, ranks, opened in ranked(self._scores, levels.counts, self.scope):
            weights = math.prod(self.tree.leaves[name].shape) // ranks.size
            for mask, count in zip(masks, merged_counts(opened, weights, self.cipher), strict=True):
                mask[name] = ranks < count
        return masks

    def _whole(self, counts: Sequence[int]) -> Masks:
        """What each level opens of the leaves that take part."""
        return [
            {n: m for n, m in mask.items() if m.any()} | self._small
            for mask in self._cumulative(counts)
        ]

    def masks(self, counts: Sequence[int]) -> tuple[PyTree, ...]:
        """Nested masks of all levels."""
        return tuple(map(self.tree.rebuild_only, self._whole(counts)))

    def closed(self, level: int, counts: Sequence[int]) -> tuple[PyTree, ...]:
        """Masks of what a level leaves encrypted; rings are merged as all levels want it."""
        masks = self._whole(counts)
        opened = masks[level - 1] if level else {}
        return tuple(
            self.tree.rebuild_only(
                {n: m & ~opened[n] if n in opened else m for n, m in mask.items()}
            )
            for mask in masks[level:]
        )

    def refusal(self, counts: Sequence[int]) -> str | None:
        """Why these counts make no rings, or None."""
        masks = self._cumulative(counts)
        below = {name: np.zeros_like(mask) for name, mask in masks[0].items()}
        for level, mask in enumerate(masks, 1):
            added = {name: mask[name] & ~below[name] for name in mask}
            if not any(ring.any() for ring in added.values()):
                return "a level adds no groups, or too few to hide in, to those below it"
            for name, ring in added.items():
                if ring.any() and name not in self._small:
                    try:
                        self.cipher.check(Ring(name, level, ring), self.tree.leaves[name])
                    except ValueError as error:
                        return str(error)
            below = mask
        return None

    def measure(self, params: PyTree) -> float:
        """The metric; higher is better."""
        self.calls += 1
        # In containers of its own: a metric may fuse layers in them, or leave some out.
        value = self._eval_fn(jax.tree.map(lambda leaf: leaf, params))
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"eval_fn: expected a number, got {type(value).__name__}. Return the metric alone."
            ) from None
        if not math.isfinite(number):
            raise ValueError(
                f"eval_fn: expected a finite number, got {number}, at call {self.calls}. Encrypted "
                "weights may overflow: return the worst finite value, such as chance, instead."
            )
        return self.sign * number

    @abstractmethod
    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """Keys of the last rings."""

    def renew(self) -> None:  # noqa: B027
        """Begins another release, if it is one."""

    def opened(self, counts: Sequence[int]) -> Sequence[int]:
        """How many groups levels 1 to M open."""
        return counts

    def draw(self, level: int, counts: Sequence[int]) -> float:
        """What a level gives, once."""
        masks = self.closed(level, counts)
        keys = self.ring_keys(len(masks))
        return self.measure(encrypt(self.params, masks, keys, cipher=self.cipher))

    def sample(
        self, level: int, counts: Sequence[int], target: float | None, tolerance: float
    ) -> tuple[float, int]:
        """What a level gives, averaged over keys, and over how many: as few as will do."""
        values: list[float] = []
        while len(values) < self.keys and not is_precise(np.array(values), tolerance / 3):
            values.append(self.draw(level, counts))
            # Far from the target no more is needed than on which side it is.
            if target is not None and len(values) > 1:
                doubt = 3 * np.std(values, ddof=1) / math.sqrt(len(values))
                if abs(np.mean(values) - target) > 4 * tolerance + doubt:
                    break
        return float(np.mean(values)), len(values)

    def check(self, counts: Sequence[int], precision: float) -> np.ndarray:
        """What levels 0 to M-1 give, ``[keys, levels]``.

        Args:
            counts: of the levels.
            precision: see `is_precise`.
        """
        masks = self.masks(counts)
        rows: list[list[float]] = []
        while len(rows) < self.keys and not is_precise(np.array(rows), precision):
            keys = self.ring_keys(len(masks))
            protected = encrypt(self.params, masks, keys, cipher=self.cipher)
            opened = (
                decrypt(protected, masks[:level], keys[:level], cipher=self.cipher)
                for level in range(len(masks))
            )
            rows.append(list(map(self.measure, opened)))
        return np.array(rows)

    def is_exact(self, counts: Sequence[int]) -> bool:
        """Whether the top level gives back every bit."""
        masks = self.masks(counts)
        keys = self.ring_keys(len(masks))
        protected = encrypt(self.params, masks, keys, cipher=self.cipher)
        opened = named_leaves(decrypt(protected, masks, keys, cipher=self.cipher)).leaves
        return all(
            leaf is opened[name] or np.asarray(leaf).tobytes() == np.asarray(opened[name]).tobytes()
            for name, leaf in self.tree.leaves.items()
            if is_array(leaf)
        )


class Sampled(Network):
    """Under fresh keys each time.

    Args: see `calibrate_levels`, and `Network`.
    """

    def __init__(self, *args: Any, key: PRNGKeyArray, keys: int) -> None:
        super().__init__(*args)
        self._key, self.keys = key, keys

    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """Keys that were never used."""
        self._key, drawn = jax.random.split(self._key)
        words = np.asarray(jax.random.bits(drawn, (count, 8), "uint32"))
        return [chacha20_key(row.tobytes()) for row in words]


class Release(Network):
    """Under the keys of one release.

    There are 2M counts, in ascending order: of what levels 1 to M open, where all levels take from
    the beginning of the order, and where what rings M to 1 take from behind that ends. So level m
    can be steered by both sides of ring m + 1 without a change to those above it: what it leaves
    encrypted follows from its own counts and theirs.

    The keys encrypt many selections here. That is no reuse, since one of them leaves this process.

    Args:
        args: see `Network`.
        secret: the owner's.
        levels: M.
        alike: names of leaves that are bit for bit alike, in which the same is encrypted.
    """

    steady = True

    def __init__(
        self, *args: Any, secret: Secret, levels: int, alike: Sequence[Sequence[str]] = ()
    ) -> None:
        super().__init__(*args)
        self._secret, self._levels, self._alike = secret, levels, alike
        self.renew()

    def renew(self) -> None:
        """Begins another release."""
        spread = any(map(is_spread, self.tree.leaves.values()))
        self.model_id = from_first(new_model_id()) if spread else new_model_id()
        self._ring_keys = ring_keys(level_key(self._secret, self.model_id, levels=self._levels))

    def _cumulative(self, counts: Sequence[int]) -> Masks:
        levels = as_levels([self.fraction(count) for count in counts])
        half = len(counts) // 2
        masks: Masks = [{} for _ in range(half)]
        for name, ranks, bounds in ranked(self._scores, levels.counts, self.scope):
            weights = math.prod(self.tree.leaves[name].shape) // ranks.size
            behind = np.zeros(ranks.shape, bool)
            below = 0
            for level, count in enumerate(settled_counts(bounds[:half], weights, self.cipher)):
                start, end = bounds[-level - 2 :][:2]
                if not is_few(count - below + end - start, weights, self.cipher):
                    behind |= (ranks >= start) & (ranks < end)
                masks[level][name] = (ranks < count) | behind
                below = count
        return masks

    def _whole(self, counts: Sequence[int]) -> Masks:
        masks = super()._whole(counts)
        for names in self._alike:
            first = next((name for name in names if name in masks[-1]), None)
            for mask, name in itertools.product(masks, names if first else ()):
                if first in mask:
                    mask[name] = mask[first]
                else:
                    mask.pop(name, None)
        return masks

    def opened(self, counts: Sequence[int]) -> list[int]:
        """See `Network.opened`."""
        levels = len(counts) // 2
        ends = [counts[-1 - level] for level in range(levels)] + [counts[levels - 1]]
        return [counts[level] + ends[0] - ends[level + 1] for level in range(levels)]

    def ring_keys(self, count: int) -> list[PRNGKeyArray]:
        """Those of the release."""
        return list(self._ring_keys[-count:])


def is_precise(values: np.ndarray, precision: float) -> bool:
    """Whether the means of three values or more, over the first axis, are known as precisely."""
    count = len(values)
    return count >= 3 and bool((values.std(0, ddof=1) <= precision * math.sqrt(count)).all())
