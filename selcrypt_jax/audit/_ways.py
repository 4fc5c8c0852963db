"""Ways to publish a network, and which of them hold against what was tried."""

from collections.abc import Iterator, Sequence

import numpy as np

from .._format.manifest import Rest
from ._records import Protection, SubjectReport, Way
from ._words import by_advantage

CLIMB = 0.5
"""Share of the way to the next level that a holder may get for levels to be told apart."""


def ways_to_publish(subject: SubjectReport, target: float, *, rest: Rest) -> list[Way]:
    """Ways to publish a network, the most useful first.

    Args:
        subject: audited.
        target: the advantage that the owner puts up with.
        rest: what became of the other weights in the audit.
    """
    return list(_ways(subject, target, rest))


def recommended(ways: Sequence[Way]) -> Way | None:
    """The most useful way that holds."""
    return next((way for way in ways if way.holds), None)


def _ways(subject: SubjectReport, target: float, rest: Rest) -> Iterator[Way]:
    graded = _graded(subject.protections)
    plain = _plain(subject, target) if rest == "plain" else (None, "Tried with a sealed rest only")
    yield Way("plain rest, graded", _both(plain[0], graded[0]), f"{plain[1]}. {graded[1]}.")
    sealed = "Without a key there are names, shapes and ranges of exponents"
    yield Way("sealed rest, graded", graded[0], f"{sealed}. {graded[1]}.")
    yield Way("sealed rest, one level", True, f"{sealed}. A key opens the whole network.")
    if subject.base:
        yield Way(
            "sealed adapters beside the public base",
            None,
            "As safe as one level, in a smaller file, if adapters are all that was trained.",
        )
    yield Way(
        "not at all: a service",
        True,
        "The only way where key holders must not have the weights either.",
    )


def _both(first: bool | None, second: bool | None) -> bool | None:
    if False in (first, second):
        return False
    return None if None in (first, second) else True


def _plain(subject: SubjectReport, target: float) -> tuple[bool | None, str]:
    """Whether a file holds whose rest is plain."""
    found = by_advantage(subject)
    if not found:
        return None, "No advantage was measured for who has no key"
    least = found[0]
    why = f"Without a key, out of “{least.protection.name}”: {least}"
    if least.advantage.mean > target:
        return False, why
    doubt = least.doubt(target)
    return (None, f"{why}; {doubt}") if doubt else (True, why)


def _graded(protections: Sequence[Protection]) -> tuple[bool | None, str]:
    """Whether levels hold against holders of lower ones, in the protection that does best."""
    tried = [each for each in protections if each.holders]
    if not tried:
        return None, "What key holders make of their level was not tried"
    found = {each.name: _climb(each) for each in tried}
    judged = {name: climb for name, climb in found.items() if climb is not None}
    if not judged:
        return False, "No level is worth more than what the same data gives without the file"
    name = min(judged, key=lambda each: judged[each][0])
    gain, level, above = judged[name]
    part = "all" if gain >= 1 else f"{100 * max(gain, 0):.0f} %"
    why = f"In “{name}” a holder of level {level} gets {part} of the way to level {above}"
    return gain <= CLIMB, why


def _climb(protection: Protection) -> tuple[float, int, int] | None:
    """How far the holder gets who gets furthest, their level, and the one that they climb to.

    That is the next level that is worth more than what the same data gives without the file; None
    if there is none but the top.
    """
    quality = {level.level: level.metric for level in protection.levels}
    reference = protection.holders[0].reference
    worth = [level for level, metric in quality.items() if metric > reference]
    if len(worth) < 2:
        return None
    found = []
    for holder in protection.holders:
        above = min(level for level in worth if level > holder.level)
        floor = max(quality[holder.level], reference)
        gain = (float(np.mean(holder.best.recovered)) - floor) / (quality[above] - floor)
        found.append((gain, holder.level, above))
    return max(found)
