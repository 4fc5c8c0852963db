"""The search for levels that meet their targets: averaged over keys, or those of one release."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import numpy as np

from .._io.errors import counted
from .._tree.shares import check_share
from .curve import Curve, isotonic
from .network import Network
from .places import Places
from .targets import Evaluation, Targets


class Search:
    """Finds the counts of each level, from the top down.

    Near the place where a level's curve crosses its target, counts are tried until one is within
    the tolerance. When averaging over keys, all levels are then checked under keys that the search
    has not used, and it continues for those that are off.

    Under the keys of one release (`Network.steady`) a level's quality follows from its own counts
    and those above it, so a result stays valid; and nearby counts are as good as other keys: they
    permute the ring differently. If none is within the tolerance, the search restarts with another
    release.

    Args:
        network: the network to measure.
        wanted: see `checked_targets`.
        asked: supplies the tolerance and, for a release, the number of evaluations.
        budget: see `Select`.
    """

    def __init__(
        self,
        network: Network,
        wanted: Sequence[float | None],
        asked: Targets,
        budget: float | None,
    ) -> None:
        self._network, self._targets, self._progress = network, wanted, asked.progress
        self._levels, self._steady = len(wanted), network.steady
        self._limit = 8 * self._levels + 8
        if not self._steady:
            self._limit -= self._levels  # reserved for the check
        elif asked.evaluations is not None:
            self._limit = asked.evaluations
        # By default it continues while a level has values on both sides of its target: one between
        # them is likely to come.
        on = self._steady and asked.evaluations is None
        self._most_evaluations = 4 * self._limit if on else self._limit
        self._bracketed = False
        self.evaluations, self._given = 0, [[] for _ in range(self._levels + 1)]
        budget = 1.0 if budget is None else budget
        check_share("budget", budget)
        self._most = math.floor(Fraction(str(budget)) * network.groups)
        if self._most < self._levels:
            raise ValueError(
                f"budget: expected at least {counted(self._levels, 'group')}, one per level, got "
                f"{self._most} of {network.groups}. Raise the budget, or use smaller groups."
            )
        self.untouched = network.measure(network.params)
        self._said(self._levels, network.groups, self.untouched)
        tolerance = asked.tolerance
        if tolerance is None:
            worst = min(target for target in wanted if target is not None)
            tolerance = 0.02 * abs(self.untouched - worst)
        if not (math.isfinite(tolerance) and tolerance > 0):
            raise ValueError(f"tolerance: expected a number above 0, got {tolerance}.")
        for level, target in enumerate(wanted):
            if target is not None and target > self.untouched + tolerance:
                raise ValueError(
                    f"targets[{level}]: cannot reach {self._show(target)}: the untouched network "
                    f"gives {self._show(self.untouched)}. Choose a worse target, or declare that "
                    "lower is better (lower_is_better=True, --lower-is-better)."
                )
        # An average is not exact, and has to be as close again when it is checked.
        self._tolerance, self._near = tolerance, tolerance if self._steady else tolerance / 2
        self._aims = list(wanted)
        self._places = Places(network, self._levels, self._most)
        # The curve of level 0 by how much is encrypted; and the curve of the level being searched.
        self._whole = self._curve = Curve(rising=False, power=0)

    @property
    def bounds(self) -> list[int]:
        """The counts that were found: M, or 2M for a release."""
        return self._places.bounds

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """The quality of levels 0 to M-1: mean and standard deviation over keys."""
        self._reach()
        again, checked, slack = False, None, np.zeros(self._levels)
        while True:
            before, values = self.evaluations, self._settle_all(again, checked, slack)
            if isinstance(values, str):
                missing = values
            elif self._steady:
                return values, np.zeros(self._levels)
            else:
                drawn = self._network.check(self.bounds, self._tolerance / 3)
                for level, value in enumerate(drawn.mean(0)):
                    self._said(level, self.bounds[level - 1], float(value))
                # Levels in the wrong order, which is chance, are averaged too.
                checked = isotonic(drawn.mean(0), np.ones(self._levels))
                alone = len(drawn) == 1
                spreads = np.full(self._levels, np.nan) if alone else drawn.std(0, ddof=1)
                errors = [
                    0.0 if target is None else abs(value - target)
                    for value, target in zip(checked, self._targets, strict=True)
                ]
                if max(errors) <= self._tolerance:
                    return checked, spreads
                missing = self._missed(int(np.argmax(errors)))
                # Levels that may be off by chance stay where they are.
                slack = self._tolerance + np.nan_to_num(spreads) / math.sqrt(len(drawn))
            limit = self._most_evaluations if self._bracketed else self._limit
            if self.evaluations >= limit or self.evaluations == before:
                raise ValueError(missing)
            self._network.renew()
            again = True

    def _settle_all(
        self, again: bool, checked: np.ndarray | None, slack: np.ndarray
    ) -> np.ndarray | str:
        """Searches all levels once, or until one has nothing to find.

        Args:
            again: whether the counts come from an earlier attempt.
            checked: their quality under fresh keys.
            slack: how far from the target a level may be and keep its count.

        Returns:
            The quality of levels 0 to M-1, or a message about the one that misses its target.
        """
        places, order = self._places, [0, *range(self._levels - 1, 0, -1)]
        places.begin(steered=False)
        if self._steady and self._levels > 1:
            # Level 0 depends on all others, so it is last. The others take less than it needs.
            low, high = self._targets[:2]
            if low is not None and high is not None:
                room = (high - low) / 2
                self._settle(0, low + room, max(room * 2 / 3, self._near), strict=False)
                self._check_little()
            places.begin(steered=True)
            order = [*order[1:], 0]
        values, moved = np.full(self._levels + 1, self.untouched), False
        for level in order:
            aim, place = self._aims[level], places.counts[level - 1]
            given = None if moved or checked is None else float(checked[level])
            if aim is None and not places.steered:
                continue
            near, stays = self._near, slack[level]
            if aim != self._targets[level]:  # a level that meets another halfway has no slack
                near = stays = self._near / 4
            if aim is not None and given is not None and abs(given - aim) <= stays:
                values[level] = given
                continue
            found = self._settle(
                level, aim, near, values[level + 1], strict=self._steady,
                first=place if again else None, given=given,
            )  # fmt: skip
            if isinstance(found, str):
                return found
            values[level] = found
            moved |= place != places.counts[level - 1]
            if not level and not places.steered:
                self._check_little()
        return values[:-1]

    def _settle(
        self,
        level: int,
        aim: float | None,
        near: float,
        above: float = math.inf,
        *,
        strict: bool,
        first: int | None = None,
        given: float | None = None,
    ) -> float | str:
        """Tries places for one level until its quality is close enough to the target.

        Args:
            level: 0 to M-1.
            aim: the target; None for any quality.
            near: the largest distance from it.
            above: the quality of the next higher level.
            strict: whether the closest place is useless if it is not near enough.
            first: where to begin; None for where the target is expected.
            given: the quality there, if known.

        Returns:
            The level's quality, or a message about the target it misses.
        """
        places = self._places
        curve, (low, high) = self._expect(level, above), places.room(level)
        if not level and places.steered:
            first = high if aim is None else low
        values: dict[int, float] = {}
        known = {high + 1: above} if level else {}
        out: set[int] = set()
        while self._goes_on(aim, values):
            if first is not None and not values:
                wanted = first
            else:
                wanted = high if aim is None else self._next(aim, values, known, out, low, high)
            try:
                place = places.allowed(level, wanted, out)
            except ValueError as error:
                if not values and not strict:
                    raise
                if not values:
                    return str(error)
                break
            if aim is not None and self._is_hopeless(aim, values, wanted, place, (low, high)):
                break
            if given is not None:
                curve.add(place, given, self._network.keys)
                value, given = given, None
            elif not strict and place in curve.measured:
                value = curve.at(place)
            else:
                value = self._measure(level, place)
                value = value if self._steady else curve.at(place)
            values[place] = value
            error = 0.0 if aim is None else value - aim
            # In a release, no level is better than a higher one.
            if abs(error) <= near and (value <= above or not strict):
                places.put(level, place)
                # Evaluations beyond the limit are not taken from lower levels.
                more = min(self.evaluations + 8, self._most_evaluations)
                self._limit = max(self._limit, more)
                return value
            # The mean does not change faster than this, and closer places often give the same draw.
            wide = max(place, places.end) if level or places.steered else place
            wide = min(wide, high + 1 - place) if level else wide
            skip = math.ceil(wide * abs(error) / self._span / 8)
            out.update(range(place - skip + 1, place + skip), [place])
        if strict or aim is None:
            return self._missed(level)
        place = min(values, key=lambda place: abs(values[place] - aim), default=None)
        if place is None:
            return curve.at(places.counts[level - 1])
        places.put(level, place)
        if level and abs(values[place] - aim) > self._tolerance:
            # It cannot come closer to an adjacent level: the others meet it halfway.
            lean = float(np.clip((values[place] - aim) / 2, -self._near, self._near))
            for index, target in enumerate(self._targets):
                if index != level and target is not None:
                    self._aims[index] = target - lean
        return values[place]

    def _goes_on(self, aim: float | None, values: Mapping[int, float]) -> bool:
        """Whether a level with these values may take another evaluation."""
        if aim is None and not values:
            return True  # only its quality is asked for
        sides = {value > aim for value in values.values()} if aim is not None else set()
        both = self._bracketed or len(sides) == 2  # in an earlier release too
        limit = self._most_evaluations if both else self._limit
        return self.evaluations < limit

    def _next(
        self,
        aim: float,
        values: Mapping[int, float],
        known: Mapping[int, float],
        out: Collection[int],
        low: int,
        high: int,
    ) -> int:
        """Between two neighbours on different sides of the target, or where the curve crosses."""
        curve, found, points = self._curve, [], {**known, **values}
        sides = [value > aim for value in list(values.values())[-3:]]
        stuck = len(sides) == 3 and len(set(sides)) == 1
        for one, other in itertools.pairwise(sorted(points)):
            before, behind = points[one] - aim, points[other] - aim
            if before * behind < 0:
                share = 0.5 if stuck else min(max(before / (before - behind), 0.1), 0.9)
                place = (1 - share) * curve.place(one) + share * curve.place(other)
                if (count := curve.count(place)) not in out:
                    found.append((abs(before) + abs(behind), count))
        return min(found)[1] if found else curve.crossing(aim, low, high)

    def _is_hopeless(
        self,
        aim: float,
        values: Mapping[int, float],
        wanted: int,
        place: int,
        room: tuple[int, int],
    ) -> bool:
        """Whether values stay on one side, or no place is left near the target."""
        if len(values) < 4:
            return False
        errors = np.array(list(values.values())) - aim
        if errors.min() > 0 or errors.max() < 0:
            gap = min(min(values) - room[0], room[1] - max(values))
            at_end = gap <= (room[1] - room[0]) / 100
            far = abs(errors.mean()) > 3 * errors.std(ddof=1)
            return len(errors) >= 10 or (bool(far) and at_end)
        noise = np.std([value - self._curve.at(n) for n, value in values.items()], ddof=1)
        far = abs(self._curve.at(place) - aim) > 2 * self._tolerance + 3 * noise
        return place != wanted and bool(far)

    def _expect(self, level: int, above: float) -> Curve:
        """The curve of a level, starting with what is known of it."""
        places = self._places
        if not level and not places.steered:
            self._curve = self._whole
            return self._whole
        curve = self._curve = Curve(rising=level > 0, power=0.5 if level else 0)
        closed, target = self._whole.at(places.end), self._targets[level]
        if not level:
            curve.expect(places.end, max(closed, target or closed), 0.1)
            for count in self._whole.measured:
                if count > places.end:
                    curve.expect(count, self._whole.at(count), 0.1)
            return curve
        assert target is not None
        low, floor = places.room(level)[0], places.floor(level)
        curve.expect(low, self._worst, 0.1)
        if places.behind or not self._steady:
            curve.expect(floor, min(closed, target), 0.1)
        curve.expect(places.counts[level], above, 1)
        return curve

    def _measure(self, level: int, place: int) -> float:
        bounds, target = self._places.rings(level, place), self._targets[level]
        value, weight = self._network.sample(level, bounds, target, self._tolerance)
        self._curve.add(place, value, weight)
        self._said(level, bounds[level - 1], value)
        return value

    def _reach(self) -> None:
        """Tries the whole budget, and less of it if that does not break the network enough."""
        curve, target, count = self._whole, self._targets[0], self._most
        curve.expect(0, self.untouched, self._network.keys)
        self._worst = self.untouched
        while True:
            count = self._places.allowed(0, count)
            value = self._measure(0, count)
            self._worst = min(self._worst, value)
            if target is None or value <= target + self._near:
                break
            # A network that is permuted as a whole may be less wrong than one permuted in part.
            if count // 4 < self._levels or self.evaluations >= 6:
                if abs(self._worst - self.untouched) <= 1e-9 * abs(self.untouched):
                    remedy = "The metric is flat: does it use its argument?"
                else:
                    remedy = (
                        "Raise the budget, use other scores, encrypt small leaves too "
                        "(small=0.02), or choose a better target."
                    )
                raise ValueError(
                    f"targets[0]: cannot reach {self._show(target)}: encrypting up to "
                    f"{self._network.fraction(self._most)} of the groups leaves "
                    f"{self._show(self._worst)} of {self._show(self.untouched)}. {remedy}"
                )
            count //= 4
        curve.forget_beyond(count)
        self._places.put(0, count)
        self._span = max(self.untouched - value, self._tolerance)

    def _check_little(self) -> None:
        """Refuses a first target that is missed even if next to nothing is encrypted."""
        curve, target = self._whole, self._targets[0]
        if target is None or any(curve.at(n) >= target - self._tolerance for n in curve.measured):
            return
        if self.evaluations >= self._limit:
            return  # less may not have been tried
        least = min(curve.measured)
        raise ValueError(
            f"targets[0]: cannot reach {self._show(target)}: encrypting as little as "
            f"{self._network.fraction(least)} of the groups leaves {self._show(curve.at(least))}. "
            "Do not encrypt small leaves (small=0), make the first target None, use smaller groups "
            "or scores that spread the damage, such as random ones, or choose a worse target."
        )

    def _missed(self, level: int) -> str:
        """A message about a level that misses its target: the closest values on each side."""
        target = self._targets[level]
        if target is None:
            return (
                f"targets[{level}]: expected no more than the level above gives, got more in "
                f"{counted(self.evaluations, 'evaluation')}, though all of the budget is "
                "encrypted. Raise the budget, encrypt small leaves too (small=0.02), or raise the "
                "next target."
            )
        # Without values that were near enough, in a release where another level failed.
        given = sorted(e for e in self._given[level] if abs(e[0] - target) > self._near)
        ends = [end for end in given if end[0] <= target][-1:]
        ends += [end for end in given if end[0] > target][:1]
        shown = [f"{self._show(value)} at {self._network.fraction(n)}" for value, n in ends]
        self._bracketed = len({value > target for value, _ in given}) == 2
        return (
            f"targets[{level}]: cannot reach {self._show(target)} within {self._tolerance:.3g} in "
            f"{counted(self.evaluations, 'evaluation')}: it gave "
            f"{' and '.join(shown) or 'nothing yet'}. " + self._remedy(given)
        )

    def _remedy(self, given: Sequence[tuple[float, int]]) -> str:
        """The remedy for a level that misses its target."""
        groups = self._network.groups
        steps = (
            "an order with smaller steps (smaller groups, scope='leaf', scores that spread the "
            "damage, such as random ones, without small first layers)"
        )
        if not self._steady:
            return (
                f"Allow more keys or a larger tolerance, or use {steps}; or calibrate a release "
                "under its own keys (selcrypt protect --targets)."
            )
        if self._bracketed:
            # Other rings have other steps.
            other = 0.3 if self._most > groups / 2 else min(round(3 * self._most / groups, 2), 1)
            return (
                f"It jumps over the target: try a budget such as {other:g}, another strategy, a "
                f"larger tolerance, or {steps}."
            )
        if not given:
            return "Allow more evaluations."
        return "Allow more evaluations, or try another budget, other scores or another strategy."

    def _said(self, level: int, count: int, value: float) -> None:
        self.evaluations += 1
        self._given[level].append((value, count))
        if self._progress is not None:
            fraction, value = self._network.fraction(count), self._network.sign * value
            self._progress(Evaluation(self.evaluations, level, fraction, value))

    def _show(self, value: float) -> str:
        return f"{self._network.sign * value:.6g}"
