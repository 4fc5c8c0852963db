"""Ways to publish a network, and which of them hold against the attacks tried."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .._format.manifest import Rest
from ._advantage import Advantage, advantage
from ._records import Protection, SubjectReport, Way
from ._words import TARGET, Rated, by_advantage, doubt

CLIMB = 0.5
"""Levels hold if no key holder gets more than this share of the way to the next level."""
SERVICE = "no file: a hosted service"


def ways_to_publish(subject: SubjectReport, target: float = TARGET, *, rest: Rest) -> list[Way]:
    """Ways to publish a network, the most useful first.

    Args:
        subject: the audited network.
        target: the advantage that the owner accepts.
        rest: whether the other weights were sealed or plain in the audit.
    """
    return list(_ways(subject, target, rest))


def recommended(ways: Sequence[Way]) -> Way | None:
    """The most useful way that holds."""
    return next((way for way in ways if way.holds), None)


def without_cipher(ways: Sequence[Way]) -> list[Way]:
    """The ways after the cipher failed a check: no file is safe, whatever the attacks found."""
    why = "The cipher failed a check: do not ship files encrypted with it."
    return [way if way.name == SERVICE else replace(way, holds=False, why=why) for way in ways]


class _Judged(NamedTuple):
    """Whether a way holds, why, and how far it is from holding."""

    holds: bool | None
    why: str
    measure: float = math.inf

    def rank(self) -> tuple[int, float]:
        return (True, None, False).index(self.holds), self.measure


def _ways(subject: SubjectReport, target: float, rest: Rest) -> Iterator[Way]:
    graded = [_levels(each) for each in subject.protections]
    levels = min(graded, key=_Judged.rank, default=_Judged(None, "No protection was tried"))
    if rest == "plain":
        plain = _plain(subject, graded, target)
    else:
        plain = _both(_Judged(None, "Only a sealed rest was tried"), levels)
    yield Way("plain rest, graded", plain.holds, f"{plain.why}.")
    sealed = "Without a key, only names, shapes and exponent ranges are readable"
    yield Way("sealed rest, graded", levels.holds, f"{sealed}. {levels.why}.")
    yield Way("sealed rest, one level", True, f"{sealed}. A key opens the whole network.")
    if subject.base:
        yield Way(
            "sealed adapters for the public base",
            None,
            "As safe as one level, and a smaller file, provided that only adapters were trained.",
        )
    yield Way(SERVICE, True, "The only way if even key holders must not have the weights.")


def _both(first: _Judged, second: _Judged) -> _Judged:
    either = (first.holds, second.holds)
    holds = False if False in either else None if None in either else True
    return _Judged(holds, f"{first.why}. {second.why}", first.measure)


def _plain(subject: SubjectReport, graded: Sequence[_Judged], target: float) -> _Judged:
    """The best single protection with a plain rest: a file has one protection, not a mixture."""
    rated = {id(each.protection): each for each in by_advantage(subject)}

    def judged(protection: Protection) -> _Judged:
        found = rated.get(id(protection))
        if found is None:
            return _Judged(None, f"No advantage was measured for “{protection.name}” without a key")
        return _without_key(found, target)

    both = [
        _both(judged(each), levels)
        for each, levels in zip(subject.protections, graded, strict=True)
    ]
    return min(both, key=_Judged.rank, default=_Judged(None, "No protection was tried"))


def _without_key(rated: Rated, target: float) -> _Judged:
    """Whether a file with a plain rest holds against an attacker who has no key."""
    mean = rated.advantage.mean
    why = f"Without a key, from “{rated.protection.name}”: {rated}"
    if mean > target:
        return _Judged(False, why, mean)
    unsure = rated.doubt(target)
    return _Judged(None, f"{why}; {unsure}", mean) if unsure else _Judged(True, why, mean)


def _levels(protection: Protection) -> _Judged:
    """Whether the levels of a protection hold against holders of lower ones."""
    name = f"“{protection.name}”"
    if len(protection.levels) == 2:
        return _Judged(None, f"{name} has a single level: no graded file was tried")
    if not protection.holders:
        return _Judged(None, f"Attacks by key holders of {name} were not tried")
    quality, reference = _quality(protection), protection.holders[0].reference
    if sum(metric > reference for metric in quality.values()) < 2:
        return _Judged(
            False,
            f"In {name}, only the top level is better than training on the same data without the "
            "file",
        )
    climb = _climb(protection)
    if climb is None:
        return _Judged(False, f"In {name}, no level is better than those below it")
    gain, level, above = climb
    part = "all" if gain.mean >= 1 else f"{100 * max(gain.mean, 0):.0f} %"
    why = f"In {name}, a level {level} key holder gets {part} of the way to level {above}"
    if gain.mean > CLIMB:
        return _Judged(False, why, gain.mean)
    unsure = doubt(len(protection.holders[0].best.recovered), gain, CLIMB)
    return _Judged(None, f"{why}; {unsure}", gain.mean) if unsure else _Judged(True, why, gain.mean)


def _quality(protection: Protection) -> dict[int, float]:
    """Level → metric, for levels that need a key; NaN counts as worthless."""
    every = {level.level: level.metric for level in protection.levels if level.level}
    return {level: -math.inf if math.isnan(metric) else metric for level, metric in every.items()}


def _climb(protection: Protection) -> tuple[Advantage, int, int] | None:
    """The largest gain of any key holder, their level, and the level that it is relative to.

    That is the next level that is better than both their own and training on the same data without
    the file. None if no holder has such a level above.
    """
    quality, found = _quality(protection), []
    for holder in protection.holders:
        floor = max(quality[holder.level], holder.reference)
        better = [n for n, metric in quality.items() if n > holder.level and metric > floor]
        reached = np.asarray(holder.best.recovered, float)
        if better and np.isfinite(reached).all():
            above = min(better)
            gain = advantage(reached.tolist(), [floor], quality[above])
            found.append((gain, holder.level, above))
    return max(found, default=None, key=lambda each: each[0].mean)
