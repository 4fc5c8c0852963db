"""The sentences of a report, and the format of its numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from .._io.errors import counted
from ._records import NARROW, Advantage, Best, Holder, KeySearch, Protection, SubjectReport

TARGET = 0.1
"""The advantage that counts as "hardly more than the architecture"."""
_TRACE = 0.05  # AUC that a cipher may add
_MISSING = "–"
_SECONDS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
# Said above this advantage.
_GIVES = {
    0.9: "gives them nearly all of what it should protect",
    0.5: "gives them most of what it should protect",
    TARGET: "still gives them part of what it should protect",
}
# Said up to this AUC.
_FOUND = {
    0.55: "No better than guessing",
    0.7: "A little better than guessing",
    0.9: "Clearly better than guessing",
    math.inf: "Tells most of them apart",
}


class Rated(NamedTuple):
    """A protection against the strongest attacker tried: most data, then most steps."""

    protection: Protection
    best: Best
    advantage: Advantage

    def __str__(self) -> str:
        one = len(self.best.recovered) == 1
        spread = "one key only" if one else f"interval {interval(self.advantage)}"
        return f"advantage {number(self.advantage.mean)}, {spread}"

    def doubt(self, target: float = TARGET) -> str:
        """Why a low advantage may be wrong; "" if there is no doubt."""
        return doubt(len(self.best.recovered), self.advantage, target)


def doubt(keys: int, found: Advantage, target: float) -> str:
    """Why an advantage may exceed a target after all; "" if there is no doubt."""
    if keys == 1:
        return "one key is too few to be sure"  # its interval has no width
    return "" if found.high <= target else "the interval is too wide to be sure"


def _attacker(subject: SubjectReport) -> Best | None:
    """One row of the strongest attacker."""
    every = (best for protection in subject.protections for best in protection.best)
    return max(every, key=lambda row: (row.data, row.steps), default=None)


def _same(rows: Iterable[Best], attacker: Best) -> Best | None:
    of = attacker.data, attacker.steps
    return next((row for row in rows if (row.data, row.steps) == of), None)


def _named(attacker: Best) -> str:
    return f"{data_name(attacker.data)}, {counted(attacker.steps, 'step')}"


def by_advantage(subject: SubjectReport) -> list[Rated]:
    """Protections with a finite advantage, sorted by advantage, then by share."""
    attacker, found = _attacker(subject), []
    if attacker is None:
        return []
    for protection in subject.protections:
        best = _same(protection.best, attacker)
        if best and best.advantage and math.isfinite(best.advantage.mean):
            found.append(Rated(protection, best, best.advantage))
    return sorted(found, key=lambda each: (each.advantage.mean, each.protection.share))


def _margin(subject: SubjectReport, attacker: Best) -> float:
    """How much better the original is than a network trained without the file."""
    baseline = _same(subject.baseline, attacker)
    return subject.clean - float(np.mean(baseline.recovered)) if baseline else math.inf


def _is_narrow(subject: SubjectReport, attacker: Best) -> bool:
    """Whether that difference is too small to judge a protection by."""
    whole = subject.clean - subject.worthless
    return math.isfinite(whole) and _margin(subject, attacker) <= NARROW * whole


def verdict(subject: SubjectReport) -> str:
    """How well the best protection holds, in one or two sentences."""
    attacker = _attacker(subject)
    if attacker is None:
        return "No attack was tried on this network, so what an attacker gets is unknown."
    baseline = _same(subject.baseline, attacker)
    alone = f"the {subject.alone} alone was not tried"
    if baseline:
        recovered = quality(baseline.recovered, subject)
        alone = f"the same attack on the {subject.alone} alone gives {recovered}"
    original = f"the original has {quality([subject.clean], subject)}"
    margin = _margin(subject, attacker)
    if margin > 0 and _is_narrow(subject, attacker):
        return (
            f"There is hardly anything to steal: {original}, and {alone}. Anyone with as much data "
            f"({_named(attacker)}) comes so close that the remaining difference is too small to "
            "judge a protection by. Consider an attacker with less data or fewer steps."
        )
    if margin <= 0:
        return (
            f"There is nothing to steal: {original}, and {alone}. Anyone with as much data "
            f"({_named(attacker)}) can train an equally good network, whatever is encrypted."
        )
    rated = by_advantage(subject)
    if not rated:
        return (
            "No advantage could be computed for the strongest attacker tried "
            f"({_named(attacker)}): {original}, and {alone}."
        )
    least = rated[0]
    return (
        f"The strongest attacker tried ({_named(attacker)}) repairs the network with the best "
        f"protection, “{least.protection.name}” ({share(least.protection.share)} of all weights "
        f"encrypted), to {quality(least.best.recovered, subject)}; {original}, and {alone}. "
        f"{_judgement(least, subject)}"
    )


def _judgement(rated: Rated, subject: SubjectReport) -> str:
    for above, words in _GIVES.items():
        if rated.advantage.mean > above:
            return f"The file {words} ({rated})."
    doubt = rated.doubt()
    verb, but = ("seems to be", f", but {doubt}") if doubt else ("is", "")
    return f"To them the file {verb} worth hardly more than its {subject.alone} ({rated}){but}."


def rates(subject: SubjectReport) -> str:
    """A warning if a learning rate outside the range tried might do better; "" if not."""
    attacker = _attacker(subject)
    tried = {a.rate for p in subject.protections for a in p.attempts if a.rate}
    if attacker is None or not tried:
        return ""
    if len(tried) == 1:
        return f"Only one learning rate was tried ({min(tried):g}). Others may do better."
    ends = {min(tried), max(tried)}
    found = {}
    for where, rows in {
        "without the file": [subject.baseline],
        "with it": [protection.best for protection in subject.protections],
    }.items():
        best = [_same(each, attacker) for each in rows]
        found |= {f"{b.rate:g} {where}": None for b in best if b and b.rate in ends}
    if not found:
        return ""
    return (
        f"The best learning rate is at the end of the range tried ({min(ends):g} to {max(ends):g}):"
        f" {', '.join(found)}. Try rates beyond it."
    )


def how_much(subject: SubjectReport, advice: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on how much to encrypt: the requested advice, or the result of the shares tried."""
    rated, attacker = by_advantage(subject), _attacker(subject)
    asked = [row for row in advice if row["subject"] == subject.name]
    if subject.protections and subject.sealed:
        return [
            "In a sealed file no weight is plain without a key, however many are graded. How many "
            "to grade depends on how far key holders get above their level."
        ]
    if attacker is not None and _is_narrow(subject, attacker):
        return [
            f"An attacker with as much data ({_named(attacker)}) comes so close to the original "
            "without the file that no share can be judged. Consider an attacker with less data or "
            "fewer steps."
        ]
    if asked:
        return [_advised(row, rated) for row in asked]
    if not rated or attacker is None:
        return ["No advantage was measured, so this audit gives no advice."]
    keeps = f"the advantage of the strongest attacker ({_named(attacker)}) at or below {TARGET:g}"
    reached = [each for each in rated if each.advantage.mean <= TARGET]
    if not reached:
        shares = sorted(each.protection.share for each in rated)
        tried = " to ".join(share(each) for each in sorted({shares[0], shares[-1]}))
        return [
            f"None of the shares tried ({tried} of all weights) keeps {keeps}. "
            f"“{rated[0].protection.name}” comes closest: {rated[0]}. Encrypt more, or use "
            "another selection, and measure again."
        ]
    least = min(reached, key=lambda each: each.protection.share)
    sentences = [
        f"The smallest share tried that keeps {keeps} is {share(least.protection.share)} of all "
        f"weights (“{least.protection.name}”): {least}."
    ]
    if least.doubt():
        sentences.append(f"However, {least.doubt()}: try more keys before you rely on it.")
    return sentences


def _advised(row: dict[str, Any], rated: Sequence[Rated]) -> str:
    target, name = row["target"], row["protection"]
    if name is None:
        return f"With “{row['strategy']}”, no share tried keeps the advantage at or below {target}."
    start = f"For an advantage of at most {target}, “{name}” is enough"
    found = next((each for each in rated if each.protection.name == name), None)
    if found is None:
        return f"{start}."
    doubt = found.doubt(target)
    but = f" However, {doubt}." if doubt else ""
    # Not the row's own share, which is a share of the selected groups.
    return f"{start}: it encrypts {share(found.protection.share)} of all weights ({found}).{but}"


def detected(detection: dict[str, float]) -> str:
    """How well encrypted groups are detected, and how much of that the cipher causes."""
    more = detection["auc"] - detection["baseline"]
    if not math.isfinite(more):
        return "The test gave no finite number."
    found = next(words for most, words in _FOUND.items() if detection["auc"] <= most)
    if more > _TRACE:
        return f"{found}; encryption itself leaves a trace."
    if more < -_TRACE:
        return f"{found}; encryption hides some of what the selection shows."
    return f"{found}; encryption itself adds next to nothing."


def held(holder: Holder) -> str:
    """How far a key holder gets above their level, in words."""
    if holder.is_worthless:
        text = "Worthless as opened: anyone with this data gets as far without the file"
        found = holder.best.advantage
        if found is None or not found.mean > TARGET:
            return text
        part = f"{100 * min(found.mean, 1):.0f}\u00a0%"
        return f"{text}. With an attack, {part} of the way from there to the original"
    if holder.gain is None:
        return "Nothing to gain: the next level is no better"
    if holder.gain <= 0.05:
        return "Barely gets above their level"
    part = (
        "Gets" if holder.gain >= 0.95 else f"Gets {100 * min(holder.gain, 1):.0f} % of the way to"
    )
    return f"{part} the next level"


def description(kind: str, subject: SubjectReport) -> str:
    """Alternative text for a plot."""
    if kind == "levels":
        return f"Line chart: quality in {subject.unit} by level. The table above has the numbers."
    what = {
        "curves": f"quality in {subject.unit} against the attacker's training steps",
        "advantage": "advantage against the share of weights that is encrypted",
    }[kind]
    return f"Line chart: {what}, for each share of data. {verdict(subject)}"


# --- numbers --------------------------------------------------------------------------------------


def data_name(data: float) -> str:
    """A share of the training data in words."""
    return f"{100 * data:.3g}\u00a0% of the training data" if data else "no training data"


def quality(values: Sequence[float], subject: SubjectReport, *, unit: bool = True) -> str:
    """The average over keys, to a tenth of a percent or a hundredth of any other unit."""
    if not values:
        return _MISSING
    text = number(float(np.mean(values)), 1 if subject.unit == "%" else 2)
    return f"{text}\u00a0{subject.unit}" if unit else text


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign and thousands separators."""
    # "z": no minus sign before zero.
    return f"{value:z,.{digits}f}".replace("-", "−") if math.isfinite(value) else "n/a"


def interval(advantage: Advantage) -> str:
    """For example ``"0.10 to 0.20"``."""
    return f"{number(advantage.low)} to {number(advantage.high)}"


def kept(text: str) -> str:
    """The same text without a line break between a number and its percent sign."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text)


def share(share: float) -> str:
    """A share in percent, to three significant digits."""
    if not math.isfinite(share):
        return "n/a"
    percent = 100 * share
    text = f"{percent:.3g}" if percent >= 1e-3 or not percent else f"{percent:.1e}"
    return f"{text}\u00a0%"  # without a line break


def time(search: KeySearch) -> str | Markup:
    """A search time: many years as a power of ten, shorter times in words."""
    if not math.isfinite(search.years):
        return "n/a"
    if search.years >= 1e4:
        return Markup("10<sup>{}</sup> years").format(round(math.log10(search.years)))
    if search.years >= 2:
        return f"{search.years:,.0f} years"
    seconds = search.years * 365.25 * _SECONDS["days"]
    for name, length in _SECONDS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {name}"
    return "a second or two" if seconds >= 1 else "less than a second"


def measured(value: float) -> str:
    """A number of any size."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", "−")
