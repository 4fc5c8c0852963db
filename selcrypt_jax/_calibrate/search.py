"""The search for levels that meet their targets, in the mean over keys."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np

from .._masks.levels import check_share
from .curve import Curve, Point, isotonic
from .network import Network, Sampled, is_precise
from .targets import Evaluation

NetworkT = TypeVar("NetworkT", bound=Network)


def most_evaluations(levels: int) -> int:
    """How many evaluations `calibrate_levels` takes at most, for so many targets."""
    return 8 * levels + 8


class Targets(ABC, Generic[NetworkT]):
    """What is looked for, and what is known of it.

    Args:
        network: that is measured.
        targets: see `calibrate_levels`; higher is better.
        budget: see there.
        tolerance: see there.
        progress: see there.
        limit: how many evaluations may be taken; `most_evaluations` by default.
    """

    _near = 0.5
    """How many tolerances from the first target are near enough, with all of the budget."""

    def __init__(
        self,
        network: NetworkT,
        targets: Sequence[float | None],
        budget: float,
        tolerance: float | None,
        progress: Callable[[Evaluation], None] | None,
        limit: int | None = None,
    ) -> None:
        self._network, self._targets, self._progress = network, targets, progress
        self._levels = len(targets)
        self._limit = most_evaluations(self._levels) if limit is None else limit
        self.evaluations = 0
        check_share("budget", budget)
        self._most = math.floor(Fraction(str(budget)) * network.groups)
        if self._most < self._levels:
            raise ValueError(
                f"budget: expected room for {self._levels} levels of one group at least, got "
                f"{self._most} of {network.groups} groups. Raise the budget, or use smaller groups."
            )
        self.untouched = network.measure(network.params)
        self._said(self._levels, network.groups, self.untouched)
        worst = min(target for target in targets if target is not None)
        if tolerance is None:
            tolerance = 0.02 * abs(self.untouched - worst)
        if not (math.isfinite(tolerance) and tolerance > 0):
            raise ValueError(f"tolerance: expected a number above 0, got {tolerance}.")
        self._tolerance = tolerance
        for level, target in enumerate(targets):
            if target is not None and target > self.untouched + tolerance:
                raise ValueError(
                    f"targets[{level}]: cannot reach {self._show(target)}: the untouched network "
                    f"gives {self._show(self.untouched)}. Ask for less, or say that lower is "
                    "better (higher_is_better=False, --lower-is-better)."
                )
        # Level m opens counts[m - 1] groups; counts[-1] is all that is encrypted.
        self.counts = [self._most * level // self._levels for level in range(1, self._levels + 1)]
        self._curves = [
            Curve(rising=level > 0, power=0.5 if level else 0) for level in range(self._levels)
        ]

    def _reach(self) -> None:
        """Tries all of the budget, and less of it where that does not break the network enough."""
        curve, target, count = self._curves[0], self._targets[0], self._most
        curve.expect(0, self.untouched, self._network.keys)
        worst = self.untouched
        while True:
            count = self._allowed(0, count, self._levels, self._most)
            value = self._measure(0, count)
            worst = min(worst, value)
            if target is None or value <= target + self._near * self._tolerance:
                break
            # A network that is shuffled as a whole may be less wrong than one that is in part.
            if count // 4 < self._levels or self.evaluations >= 6:
                flat = abs(worst - self.untouched) <= 1e-9 * abs(self.untouched)
                raise ValueError(
                    f"targets[0]: cannot reach {self._show(target)}: encrypting up to "
                    f"{self._network.fraction(self._most)} of the groups leaves "
                    f"{self._show(worst)} of {self._show(self.untouched)}. "
                    + (
                        "The metric is flat: does eval_fn look at its argument?"
                        if flat
                        else "Raise the budget, take other scores, encrypt small leaves too "
                        "(small=0.02), or ask for no less than that."
                    )
                )
            count //= 4
        curve.forget_beyond(count)
        self.counts = self._scaled(count)

    def _check_little(self) -> None:
        """Refuses a first target that is passed already where next to nothing is encrypted."""
        curve, target = self._curves[0], self._targets[0]
        if target is None or any(curve.at(n) >= target - self._tolerance for n in curve.fresh):
            return
        if self.evaluations >= self._limit:
            return  # less may not have been tried
        least = min(curve.fresh)
        raise ValueError(
            f"targets[0]: cannot reach {self._show(target)}: encrypting as little as "
            f"{self._network.fraction(least)} of the groups leaves {self._show(curve.at(least))}. "
            "Leave small leaves alone (small=0), let the first target be None, use smaller groups "
            "or scores that spread the damage, such as random ones, or ask for no more than that."
        )

    def _scaled(self, count: int) -> list[int]:
        """The counts of all levels, as large parts of the whole as now."""
        scaled = [max(round(n * count / self.counts[-1]), i) for i, n in enumerate(self.counts, 1)]
        for index in range(self._levels - 2, -1, -1):
            scaled[index] = min(scaled[index], scaled[index + 1] - 1)
        return scaled

    def _allowed(
        self, level: int, count: int, low: int, high: int, without: Collection[int] = ()
    ) -> int:
        """A count nearby of which the cipher takes every ring: the nearest, or nearly so."""
        reason, refusals, distance = None, 0, 0
        while distance <= max(high - count, count - low) and refusals < 129:
            for near in dict.fromkeys((count + distance, count - distance)):
                if low <= near <= high and near not in without:
                    refused = self._network.refusal(self._rings(level, near)[1])
                    if refused is None:
                        return near
                    reason, refusals = reason or refused, refusals + 1
            # Rings may be too small by far.
            distance = max(distance + 1, round(1.2 * distance) if refusals > 16 else 0)
        raise ValueError(
            f"targets[{level}]: no groups left to choose from: {(reason or 'none').rstrip('.')}. "
            "Use smaller groups, scope='leaf', fewer levels, or scores without the leaves that are "
            "too small."
        )

    @abstractmethod
    def _rings(self, level: int, count: int) -> tuple[int, list[int]]:
        """A level with so many groups, as it is measured: its number there, and all counts."""

    @abstractmethod
    def _measure(self, level: int, count: int) -> float:
        """What a level of so many groups gives."""

    def _said(self, level: int, count: int, value: float) -> None:
        self.evaluations += 1
        if self._progress is not None:
            fraction = self._network.fraction(count)
            sign = self._network.sign
            self._progress(Evaluation(self.evaluations, level, fraction, sign * value))

    def _show(self, value: float) -> str:
        return f"{self._network.sign * value:.6g}"


class Search(Targets[Sampled]):
    """Finds the count of each level, from the top down; then checks and corrects all of them."""

    def run(self) -> tuple[np.ndarray, tuple[float, ...], bool]:
        """Mean and deviation of what each level gives, and whether the top one is exact."""
        order = [0, *range(self._levels - 1, 0, -1)]
        self._reach()
        for level in order:
            self._solve(level, 10 if level == 0 else 6)
            if level == 0:
                self._check_little()
        found: dict[tuple[int, ...], np.ndarray] = {}
        exact = True
        while True:
            if reason := self._network.refusal(self.counts):
                raise ValueError(
                    f"targets: no levels between what was found: {reason}. Use smaller groups, "
                    "scope='leaf', fewer levels or targets further apart."
                )
            drawn, same = self._network.check(self.counts, self._tolerance / 3)
            exact &= same
            for level, value in enumerate(drawn.mean(0)):
                self._said(level, self.counts[level - 1], float(value))
            known = tuple(self.counts)
            found[known] = np.concatenate([found[known], drawn]) if known in found else drawn
            self.counts = list(min(found, key=lambda counts: self._worst(found[counts])))
            values = found[tuple(self.counts)]
            met = self._worst(values) <= self._tolerance
            if met or self.evaluations + self._levels > self._limit:
                break
            self.counts = list(known)
            self._correct(order, drawn, _means(found[known]))
        if not met:
            raise ValueError(self._missed(values))
        spreads = values.std(0, ddof=1) if len(values) > 1 else np.full(self._levels, np.nan)
        return _means(values), tuple(map(float, spreads)), exact

    def _rings(self, level: int, count: int) -> tuple[int, list[int]]:
        """A level with so many groups among all counts; those below keep their parts.

        Where that leaves no room for lower levels, they are left out.
        """
        if not level:
            scaled = self._scaled(count)
            return 0, [count] if self._network.refusal(scaled) else scaled
        above, lower = self.counts[level:], self.counts[: level - 1]
        parts = [max(round(n * count / self.counts[level - 1]), i) for i, n in enumerate(lower, 1)]
        whole = [*parts, count, *above]
        return (1, [count, *above]) if self._network.refusal(whole) else (level, whole)

    def _measure(self, level: int, count: int) -> float:
        target, values = self._targets[level], []
        masks = self._network.closed(*self._rings(level, count))
        while len(values) < self._network.keys:
            values.append(self._network.sample(masks))
            if is_precise(np.array(values), self._tolerance / 3):
                break
            # Far from the target no more is needed than on which side it is.
            if target is not None and len(values) > 1:
                doubt = 3 * np.std(values, ddof=1) / math.sqrt(len(values))
                if abs(np.mean(values) - target) > 4 * self._tolerance + doubt:
                    break
        mean = float(np.mean(values))
        self._curves[level].add(count, mean, len(values))
        self._said(level, count, mean)
        return mean

    def _solve(self, level: int, most: int) -> None:
        """Looks for the count of one level, with those above it as they are."""
        curve, target = self._curves[level], self._targets[level]
        if target is None:
            return
        low = level or self._levels
        high = self.counts[level] - 1 if level else self._most
        fresh = not curve.known  # levels below are guesses
        if level and fresh:
            above = self._targets[level + 1] if level + 1 < self._levels else self.untouched
            assert above is not None
            curve.expect(0, min(self._curves[0].at(self.counts[-1]), target), 0.1)
            curve.expect(high + 1, above, 0.1)
        ends: list[tuple[Point | None, Point | None]] = []
        for _ in range(most):
            if self.evaluations >= self._limit - self._levels:
                break
            here = self.counts[level - 1]
            if here in curve.fresh and abs(curve.at(here) - target) <= self._tolerance / 2:
                break
            ends.append(curve.around(target))
            count = curve.between(target, ends, low, high)
            count = self._allowed(level, count, low, high)
            if count in curve.fresh:
                break
            self._measure(level, count)
            if abs(curve.at(count) - target) <= self._tolerance / 2:
                break
        best = curve.nearest(target, low, high)
        if best is None:
            best = min(max(self.counts[level - 1], low), high)
        if level:
            below = self.counts[: level - 1]
            for index, count in enumerate(below):
                part = round(count * best / self.counts[level - 1]) if fresh else count
                self.counts[index] = max(part, index + 1)
            self.counts[level - 1] = best
            for index in range(level - 2, -1, -1):
                self.counts[index] = min(self.counts[index], self.counts[index + 1] - 1)
        else:
            self.counts = self._scaled(best)

    def _correct(self, order: Sequence[int], drawn: np.ndarray, means: np.ndarray) -> None:
        """Moves the levels that are off, and those below which they moved."""
        moved = False
        for level in order:
            curve, before = self._curves[level], list(self.counts)
            if moved:
                curve.outdate()
                if self.evaluations < self._limit - self._levels:
                    high = self.counts[level] - 1
                    place = min(max(self.counts[level - 1], level), high)
                    self._measure(level, self._allowed(level, place, level, high))
            else:
                # The search knew the levels below, and the rings that they leave, by guess only.
                value, doubt = float(drawn[:, level].mean()), 0.0
                if len(drawn) > 1:
                    doubt = 3 * float(drawn[:, level].std(ddof=1)) / math.sqrt(len(drawn))
                if abs(value - curve.at(self.counts[level - 1])) > doubt + self._tolerance / 2:
                    curve.outdate()
                curve.add(self.counts[level - 1], value, len(drawn))
            # One that is off because it cannot come nearer to the level above moves that one.
            pushed = level - 1 > 0 and self.counts[level - 2] == self.counts[level - 1] - 1
            off = self._error(level, means) > self._tolerance
            off |= pushed and self._error(level - 1, means) > self._tolerance
            if moved or off:
                self._solve(level, 3)
            moved |= before != self.counts

    def _error(self, level: int, values: np.ndarray) -> float:
        target = self._targets[level]
        return 0.0 if target is None else abs(float(values[level]) - target)

    def _worst(self, values: np.ndarray) -> float:
        return max(self._error(level, _means(values)) for level in range(self._levels))

    def _missed(self, values: np.ndarray) -> str:
        means = _means(values)
        level = max(range(self._levels), key=lambda level: self._error(level, means))
        target = self._targets[level]
        assert target is not None
        curve = self._curves[level]
        if not curve.fresh:
            curve.fresh.add(self.counts[level - 1])
        tried = sorted((curve.at(count), count) for count in curve.fresh)
        ends = [
            *[end for end in tried if end[0] <= target][-1:],
            *[end for end in tried if end[0] > target][:1],
        ]
        between = " and ".join(
            f"{self._show(value)} at {self._network.fraction(count)}" for value, count in ends
        )
        noise = ""
        if len(values) > 1:
            error = values[:, level].std(ddof=1) / math.sqrt(len(values))
            noise = f" (a mean that is known to ±{error:.2g} after {len(values)} keys)"
        return (
            f"targets[{level}]: cannot reach {self._show(target)} within {self._tolerance:.3g}: "
            f"the levels that came closest give {self._show(float(means[level]))}{noise}; by "
            f"itself, over fewer keys, it gave {between}. Use an order with smaller steps "
            "(smaller groups, scope='leaf', scores that spread the damage, such as random ones), "
            "more keys, a larger tolerance, or other targets; or calibrate a release under its own "
            "key (protect_calibrated, selcrypt protect --targets)."
        )


def _means(values: np.ndarray) -> np.ndarray:
    """Over keys; of levels in the wrong order, which is chance, over these levels too."""
    return isotonic(values.mean(0), np.ones(values.shape[1]))
