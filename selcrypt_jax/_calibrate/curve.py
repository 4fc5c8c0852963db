"""A noisy monotone curve, and where it crosses a target."""

import math

import numpy as np
from jaxtyping import Float


def isotonic(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The non-decreasing values closest to the given ones, by weighted least squares.

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


class Curve:
    """The quality of a level as a function of its count of groups, from all measurements so far.

    Args:
        rising: whether quality rises with the count; otherwise it falls.
        power: interpolation and bisection are linear in this power of the count, or in its
            logarithm for 0.
    """

    def __init__(self, *, rising: bool, power: float) -> None:
        self._power = power
        self._direction = 1.0 if rising else -1.0
        self._points: dict[int, tuple[float, float]] = {}  # count → mean, how many samples
        self._ends: list[tuple[int | None, int | None]] = []  # the intervals that `crossing` used
        self.measured: set[int] = set()

    def place(self, count: float) -> float:
        """The position of a count on the scale of interpolation."""
        return math.copysign(abs(count) ** self._power, count) if self._power else math.log1p(count)

    def count(self, place: float) -> int:
        """The inverse of `place`."""
        power = 1 / self._power if self._power else 0
        return round(math.copysign(abs(place) ** power, place) if power else math.expm1(place))

    def expect(self, count: int, value: float, weight: float) -> None:
        """Adds a point that is known without measuring; a measurement replaces it."""
        self._points[count] = (value, weight)

    def add(self, count: int, mean: float, weight: float) -> None:
        """Adds a measurement, averaged with others of the same count."""
        old, mass = self._points[count] if count in self.measured else (0.0, 0.0)
        self._points[count] = ((old * mass + mean * weight) / (mass + weight), mass + weight)
        self.measured.add(count)

    def forget_beyond(self, count: int) -> None:
        """Removes all points of larger counts: far out, the metric may recover."""
        self._points = {n: point for n, point in self._points.items() if n <= count}
        self.measured = {n for n in self.measured if n <= count}

    def _fitted(self) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array(sorted(self._points))
        means, weights = np.array([self._points[n] for n in counts]).T
        return counts, self._direction * isotonic(self._direction * means, weights)

    def at(self, count: int) -> float:
        """The fitted curve, linear in the count's `place` between points."""
        counts, fitted = self._fitted()
        return float(np.interp(self.place(count), [self.place(n) for n in counts], fitted))

    def crossing(self, target: float, low: int, high: int) -> int:
        """The next count to try, from ``low`` to ``high``: where the curve should cross the target.

        It interpolates between the points on either side, or bisects if one of them has stayed for
        long.
        """
        counts, fitted = self._fitted()
        behind = int((self._direction * (fitted - target) < 0).sum())
        first = int(counts[behind - 1]) if behind else None
        last = int(counts[behind]) if behind < len(counts) else None
        self._ends.append((first, last))
        if first is None or last is None:
            return low if first is None else high
        recent = self._ends[-3:]
        sides = zip(*recent, strict=True) if len(recent) == 3 else ()
        stuck = [side[0] for side in sides if len(set(side)) == 1]
        for end in stuck:
            # An end that was only expected would be approached for ever if it is wrong.
            if end not in self.measured and low <= end <= high:
                return end
        below, above = fitted[behind - 1], fitted[behind]
        share = 0.5 if stuck or below == above else (target - below) / (above - below)
        share = min(max(share, 0.05), 0.95)
        count = self.count((1 - share) * self.place(first) + share * self.place(last))
        if last - first > 1:  # neither endpoint again
            count = min(max(count, first + 1), last - 1)
        return min(max(count, low), high)
