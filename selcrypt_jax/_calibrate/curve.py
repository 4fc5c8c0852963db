"""A noisy monotone curve, and where it crosses a target."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def isotonic(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The non-decreasing values that are nearest to given ones, in weighted squares.

    References:
        Ayer et al., An empirical distribution function for sampling with incomplete information,
        1955 (pool adjacent violators).
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, mass, length = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.repeat([mean for mean, _, _ in blocks], [length for *_, length in blocks])


Point = tuple[int, float]


class Curve:
    """What a level gives, by the count of groups that it is made with; everything tried counts.

    Args:
        rising: whether more groups give more; they give less if not.
        power: what interpolation and bisection are linear in: this power of the count, or its
            logarithm for 0.
    """

    def __init__(self, *, rising: bool, power: float) -> None:
        self._power = power
        self._direction = 1.0 if rising else -1.0
        self._points: dict[int, tuple[float, float]] = {}  # count → mean, how many samples
        self.fresh: set[int] = set()
        self._outdated = False

    def place(self, count: float) -> float:
        """Where a count is on the scale of interpolation."""
        return math.copysign(abs(count) ** self._power, count) if self._power else math.log1p(count)

    def count(self, place: float) -> int:
        """The inverse of `place`."""
        power = 1 / self._power if self._power else 0
        return round(math.copysign(abs(place) ** power, place) if power else math.expm1(place))

    @property
    def known(self) -> bool:
        """Whether there are any points."""
        return bool(self._points)

    def expect(self, count: int, value: float, weight: float) -> None:
        """What is known without a measurement."""
        self._points[count] = (value, weight)

    def add(self, count: int, mean: float, weight: float) -> None:
        """A new measurement; the first one after `outdate` moves older ones along."""
        if self._outdated:
            shift = mean - self.at(count)
            self._points = {n: (old + shift, mass) for n, (old, mass) in self._points.items()}
            self._points.pop(count, None)
            self._outdated = False
        old, mass = self._points.get(count, (0.0, 0.0)) if count in self.fresh else (0.0, 0.0)
        self._points[count] = ((old * mass + mean * weight) / (mass + weight), mass + weight)
        self.fresh.add(count)

    def forget_beyond(self, count: int) -> None:
        """Takes out all points of larger counts: far out the metric may come back."""
        self._points = {n: point for n, point in self._points.items() if n <= count}
        self.fresh = {n for n in self.fresh if n <= count}

    def outdate(self) -> None:
        """Other levels have changed: the shape of the curve still holds, but not its height."""
        self.fresh.clear()
        self._outdated = True

    def _fitted(self) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array(sorted(self._points))
        means, weights = np.array([self._points[n] for n in counts]).T
        return counts, self._direction * isotonic(self._direction * means, weights)

    def at(self, count: int) -> float:
        """The fitted curve, linear in the count's `place` between points."""
        counts, fitted = self._fitted()
        return float(np.interp(self.place(count), [self.place(n) for n in counts], fitted))

    def nearest(self, target: float, low: int, high: int) -> int | None:
        """Of the fresh points in a range the one that is nearest to the target."""
        return min(
            (count for count in self.fresh if low <= count <= high),
            key=lambda n: (abs(self.at(n) - target), abs(self._points[n][0] - target)),
            default=None,
        )

    def around(self, target: float) -> tuple[Point | None, Point | None]:
        """The last point before the target and the first behind it, as counts grow.

        Returns:
            Count and fitted value, twice; None where there is nothing on that side.
        """
        counts, fitted = self._fitted()
        behind = int((self._direction * (fitted - target) < 0).sum())
        points = [(int(count), float(value)) for count, value in zip(counts, fitted, strict=True)]
        return (
            points[behind - 1] if behind else None,
            points[behind] if behind < len(points) else None,
        )

    def between(
        self,
        target: float,
        ends: Sequence[tuple[Point | None, Point | None]],
        low: int,
        high: int,
    ) -> int:
        """Where to look next: by interpolation, or halfway if one end has stayed for long.

        Args:
            target: that is looked for.
            ends: what `around` said, now at the end.
            low: least count.
            high: largest one.
        """
        first, last = ends[-1]
        if first is None or last is None:
            return low if first is None else high
        stuck = any(len({pair[side] for pair in ends[-3:]}) == 1 for side in (0, 1))
        halfway = (len(ends) >= 3 and stuck) or first[1] == last[1]
        share = 0.5 if halfway else (target - first[1]) / (last[1] - first[1])
        share = min(max(share, 0.05), 0.95)
        count = self.count((1 - share) * self.place(first[0]) + share * self.place(last[0]))
        if last[0] - first[0] > 1:  # neither of the two again
            count = min(max(count, first[0] + 1), last[0] - 1)
        return min(max(count, low), high)
