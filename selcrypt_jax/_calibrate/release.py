"""The search for levels that meet their targets in one release, under its own keys."""

import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np

from .curve import Curve, Point
from .network import Release
from .search import Targets

_Ends = list[tuple[Point | None, Point | None]]


class ReleaseSearch(Targets[Release]):
    """Finds the counts of each level, from the top down; what is found stays.

    Under keys that stay, what a level gives follows from its own counts and those above it, and
    other counts nearby are as good as other keys: they shuffle the ring anew. So near the place
    where the mean crosses the target, counts are tried until one is within the tolerance.

    The *place* of a level is how many groups it opens of those that all levels take from the
    beginning of the order. Below `_floor` it is no more than a number: as many groups as are
    missing there, ring m + 1 takes from behind the end. The place of level 0, which opens nothing,
    is where all that is encrypted ends.
    """

    _near = 1.0

    def run(self) -> tuple[float, ...]:
        """What levels 0 to M-1 give."""
        self._ends: list[int] = []  # where what rings M, M-1, ... take from behind the end ends
        self._steered = False  # whether there are levels above, which level 0 has to leave alone
        self._missing = ""
        self._reach()
        self._mean = self._curves[0]  # of level 0, by how much is encrypted
        self._worst = min(map(self._mean.at, self._mean.fresh))
        self._span = max(self.untouched - self._worst, self._tolerance)
        self._begin()
        again = False
        while True:
            before = self.evaluations
            values = self._release(again)
            if values is not None:
                return values
            if self.evaluations >= self._limit or self.evaluations == before:
                raise ValueError(self._missing)
            self._network.renew()
            self._begin()
            again = True

    @property
    def bounds(self) -> list[int]:
        """The 2M counts, see `Release`."""
        return [*self.counts, *self._ends]

    def _begin(self) -> None:
        """Finds roughly how many groups level M opens: less than level 0 wants to be encrypted."""
        self._ends, self._steered = [], False
        self._curves[0] = curve = self._mean
        target, low, high = self._targets[0], self._levels, self._most
        if self._levels == 1 or target is None:
            return
        assert self._targets[1] is not None
        room = (self._targets[1] - target) / 2
        ends: _Ends = []
        for _ in range(10):
            ends.append(curve.around(target + room))
            count = self._allowed(0, curve.between(target + room, ends, low, high), low, high)
            self.counts = self._scaled(count)
            if count in curve.fresh or self.evaluations >= self._limit:
                break
            if abs(self._measure(0, count) - target - room) <= max(room * 2 / 3, self._tolerance):
                break
        self._check_little()

    def _release(self, again: bool) -> tuple[float, ...] | None:
        """Goes through the levels once, or as far as there is something to find."""
        self._steered = self._levels > 1
        values = [self.untouched]
        for level in [*range(self._levels - 1, 0, -1), 0]:
            value = self._settle(level, values[0], self.counts[level - 1] if again else None)
            if value is None:
                return None
            values.insert(0, value)
        return tuple(values[:-1])

    def _settle(self, level: int, above: float, first: int | None) -> float | None:
        """Tries places of one level until what it gives is as near to the target as it shall be.

        Args:
            level: 0 to M-1.
            above: what the next higher level gives.
            first: where to begin; None for where the target is expected.
        """
        target = self._targets[level]
        low, high = self._expect(level, above)
        if not level and self._steered:
            first = high if target is None else low
        values: dict[int, float] = {}
        known = {high + 1: above} if level else {}
        out: set[int] = set()
        ends: _Ends = []
        while self.evaluations < self._limit:
            place = first
            if place is None or values:
                place = self._next(level, known | values, out, ends, low, high)
            try:
                place = self._allowed(level, place, low, high, out)
            except ValueError as error:
                if not values:
                    self._missing = str(error)
                    return None
                break
            if target is not None and self._is_hopeless(level, target, values, place):
                break
            value = values[place] = self._measure(level, place)
            error = 0.0 if target is None else value - target
            if abs(error) <= self._tolerance and value <= above:  # no better than a higher level
                bounds = self._rings(level, place)[1]
                self.counts = bounds[: self._levels]
                self._ends = bounds[self._levels : 2 * self._levels - level]
                return value
            # The mean does not change faster than this, and nearer by is often the same draw.
            wide = max(place, self._end)
            wide = min(wide, high + 1 - place) if level else wide
            skip = math.ceil(wide * abs(error) / self._span / 8)
            out.update(range(place - skip + 1, place + skip), [place])
        if target is not None:
            near = min(values.values(), key=lambda value: abs(value - target), default=above)
            self._missing = (
                f"targets[{level}]: cannot reach {self._show(target)} within "
                f"{self._tolerance:.3g}: no release was found in {self.evaluations} evaluations; "
                f"the closest of the last attempt gave {self._show(near)}. Allow more evaluations "
                "or a larger tolerance, or use an order with smaller steps, with which keys matter "
                "less (smaller groups, scope='leaf', scores that spread the damage, such as random "
                "ones, without small first layers)."
            )
        return None

    def _next(
        self,
        level: int,
        values: Mapping[int, float],
        out: Collection[int],
        ends: _Ends,
        low: int,
        high: int,
    ) -> int:
        """Between two neighbours on different sides of the target, or where the mean crosses it."""
        target, curve = self._targets[level], self._curves[level]
        if target is None:
            return high
        found: list[tuple[float, int]] = []
        for one, other in itertools.pairwise(sorted(values)):
            before, behind = values[one] - target, values[other] - target
            if before * behind < 0:
                share = min(max(before / (before - behind), 0.2), 0.8)
                place = (1 - share) * curve.place(one) + share * curve.place(other)
                if (count := curve.count(place)) not in out:
                    found.append((abs(before) + abs(behind), count))
        if found:
            return min(found)[1]
        ends.append(curve.around(target))
        return curve.between(target, ends, low, high)

    def _is_hopeless(
        self, level: int, target: float, values: Mapping[int, float], place: int
    ) -> bool:
        """Whether values stay on one side, or there is no place left where the mean is near."""
        if len(values) < 4:
            return False
        errors, curve = np.array(list(values.values())) - target, self._curves[level]
        if errors.min() > 0 or errors.max() < 0:
            return len(errors) >= 10 or abs(errors.mean()) > 3 * errors.std(ddof=1)
        noise = np.std([value - curve.at(n) for n, value in values.items()], ddof=1)
        return bool(abs(curve.at(place) - target) > 2 * self._tolerance + 3 * noise)

    @property
    def _end(self) -> int:
        """Of what rings above take."""
        return self._ends[-1] if self._ends else self.counts[-1]

    def _floor(self, level: int) -> int:
        """What is left to the rings below in any case."""
        return max(level, self.counts[level] * level // (2 * self._levels))

    def _expect(self, level: int, above: float) -> tuple[int, int]:
        """The first and last place of a level; its curve begins with what is known of it."""
        if not level and not self._steered:  # the only one there is
            return self._levels, self._most
        curve = self._curves[level] = Curve(rising=level > 0, power=0.5 if level else 0)
        closed = self._mean.at(self._end)
        if not level:
            curve.expect(self._end, max(closed, self._targets[0] or closed), 0.1)
            for count in self._mean.fresh:
                if count > self._end:
                    curve.expect(count, self._mean.at(count), 0.1)
            return self._end, self._most
        target, floor, high = self._targets[level], self._floor(level), self.counts[level]
        assert target is not None
        low = floor - (self._most - self._end)
        curve.expect(low, self._worst, 0.1)
        if low < floor:
            curve.expect(floor, min(closed, target), 0.1)
        curve.expect(high, above, 1)
        return low, high - 1

    def _rings(self, level: int, count: int) -> tuple[int, list[int]]:
        """See `Targets._rings`; lower levels keep their parts of what is below."""
        if level:
            floor = self._floor(level)
            end, count = self._end + max(floor - count, 0), max(count, floor)
            lower = enumerate(self.counts[: level - 1], 1)
            parts = [max(round(n * count / self.counts[level - 1]), i) for i, n in lower]
            ends = [*self._ends, *[end] * (level + 1)]
            return level, [*parts, count, *self.counts[level:], *ends]
        if self._steered:
            return 0, [*self.counts, *self._ends, count]
        whole = [*self._scaled(count), *[count] * self._levels]
        # Roughly, and where there is no room for all levels: as one ring.
        return 0, [count, count] if self._network.refusal(whole) else whole

    def _measure(self, level: int, count: int) -> float:
        bounds = self._rings(level, count)[1]
        value = self._network.sample(level, bounds)
        self._curves[level].add(count, value, 1)
        self._said(level, bounds[level - 1], value)
        return value
