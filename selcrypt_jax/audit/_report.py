"""``audit.json``, the pictures, and a page for those who decide."""

import importlib.resources
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from .._io.atomic import new_file
from ._json_report import plain, report_bytes
from ._plots import data_name, draw_advantage, draw_curves, draw_levels, inline_svg
from ._records import Advantage, AuditReport, Best, KeySearch, Protection, SubjectReport

_TARGET = 0.1  # the advantage that counts as "hardly more than the architecture"
_TRACE = 0.05  # AUC that a cipher may add
_DRAW = {"curves": draw_curves, "advantage": draw_advantage, "levels": draw_levels}
_MISSING = "–"
_SECONDS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def write_report(report: AuditReport, folder: Path) -> None:
    """Writes ``audit.json``, three pictures of each network, and ``report.html``.

    Args:
        report: what was found out.
        folder: is made if it is missing; files of these names are replaced. The pictures are
            called ``NAME_curves.png``, ``NAME_advantage.png`` and ``NAME_levels.png``, where
            characters of NAME that are no letters, digits, dots or hyphens become underscores.

    Raises:
        OSError: the folder cannot be made or written to.
        TypeError: settings or advice that JSON cannot express.
    """
    content = report_bytes(report)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "audit.json", content)
    views = []
    for number, (subject, name) in enumerate(
        zip(report.subjects, _file_names(report.subjects), strict=True), 1
    ):
        figures = {}
        for kind, draw in _DRAW.items():
            figure = draw(subject)
            image = io.BytesIO()
            figure.savefig(image, format="png")
            _write(folder / f"{name}_{kind}.png", image.getvalue())
            svg = inline_svg(figure, f"s{number}-{kind}", _describe(kind, subject))
            figures[kind] = Markup(svg)
        views.append(_view(subject, f"s{number}", figures, report.advice))
    page = _template().render(
        report=report,
        subjects=views,
        failed=[check for check in report.cipher if not check.passed],
        skipped=[check for check in report.cipher if check.passed and math.isnan(check.found)],
        settings=dict(_settings(report.settings)),
    )
    _write(folder / "report.html", page.encode())


# --- files ----------------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    with new_file(path, force=True) as file:
        file.write(content)


def _file_names(subjects: Iterable[SubjectReport]) -> list[str]:
    """Names that no file system refuses, all different."""
    names: list[str] = []
    for subject in subjects:
        name = re.sub(r"[^\w.-]", "_", subject.name)[:80].lstrip(".") or "network"
        same = sum(each.casefold() == name.casefold() for each in names)
        names.append(f"{name}_{len(names) + 1}" if same else name)
    return names


def _settings(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Names with dots, and values as JSON has them."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _settings(each, f"{name}.{key}" if name else str(key))
    elif name:
        text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
        yield name, text


def _describe(kind: str, subject: SubjectReport) -> str:
    if kind == "levels":
        return f"Line chart: quality in {subject.unit} by level. The table above has the numbers."
    what = {
        "curves": f"quality in {subject.unit} against the training steps of the thief",
        "advantage": "advantage against the share of weights that is encrypted",
    }[kind]
    return f"Line chart: {what}, for each share of data. {_verdict(subject)}"


class _Thief(NamedTuple):
    """The strongest who was tried: most data, then most steps."""

    data: float
    steps: int

    def __str__(self) -> str:
        return f"{data_name(self.data)}, {self.steps:,} steps"


def _strongest(subject: SubjectReport) -> _Thief | None:
    every = [best for protection in subject.protections for best in protection.best]
    return max((_Thief(best.data, best.steps) for best in every), default=None)


def _find(rows: Iterable[Best], data: float, steps: int) -> Best | None:
    return next((row for row in rows if (row.data, row.steps) == (data, steps)), None)


def _rated(subject: SubjectReport, thief: _Thief) -> list[tuple[Protection, Best, Advantage]]:
    """Protections with a finite advantage of this thief, the least first, then the least share."""
    found = []
    for protection in subject.protections:
        best = _find(protection.best, *thief)
        if best and best.advantage and math.isfinite(best.advantage.mean):
            found.append((protection, best, best.advantage))
    return sorted(found, key=lambda each: (each[2].mean, each[0].share))


def _verdict(subject: SubjectReport) -> str:
    thief = _strongest(subject)
    if thief is None:
        return "No attack was tried on this network, so nothing is known of what a thief gets."
    rated = _rated(subject, thief)
    baseline = _find(subject.baseline, *thief)
    alone = (
        f"his attack on the architecture alone gives {_quality(baseline.recovered, subject)}"
        if baseline
        else "the architecture alone was not tried"
    )
    original = f"the original has {_quality([subject.clean], subject)}"
    if baseline and np.mean(baseline.recovered) >= subject.clean:
        return (
            f"There is nothing to steal: {original}, and {alone}. Whoever has as much data "
            f"({thief}) trains as good a network himself, whatever is encrypted."
        )
    if not rated:
        return (
            f"No advantage could be computed for the strongest thief tried ({thief}): {original}, "
            f"and {alone}."
        )
    protection, best, advantage = rated[0]
    return (
        f"The strongest thief tried ({thief}) gets {_quality(best.recovered, subject)} out of the "
        f"best protection, “{protection.name}” ({_share(protection.share)} of all weights "
        f"encrypted), where {original} and {alone}: {_judgement(advantage, best)}"
    )


def _judgement(advantage: Advantage, best: Best) -> str:
    number = f"({_in_words(advantage, best)})"
    if advantage.mean > 0.9:
        return f"the file gives him nearly all that was to be protected {number}."
    if advantage.mean > 0.5:
        return f"the file gives him most of what was to be protected {number}."
    if advantage.mean > _TARGET:
        return f"the file still gives him a part of what was to be protected {number}."
    if advantage.mean < -_TARGET:
        return f"the file holds him back: without it he gets further {number}."
    doubt = _doubt(advantage, best)
    verb, but = ("seems to be", f", but {doubt}") if doubt else ("is", "")
    return f"the file {verb} worth hardly more to him than its architecture {number}{but}."


def _in_words(advantage: Advantage, best: Best) -> str:
    spread = "one key only" if len(best.recovered) == 1 else f"interval {_interval(advantage)}"
    return f"advantage {_number(advantage.mean)}, {spread}"


def _doubt(advantage: Advantage, best: Best, target: float = _TARGET) -> str:
    """Why a low advantage need not be one; "" if nothing speaks against it."""
    if len(best.recovered) == 1:
        return "one key is too few to be sure"  # its interval has no width
    return "the interval is too wide to be sure" if not advantage.high <= target else ""


def _how_much(subject: SubjectReport, advice: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences: the advice that was asked for, or what those that were tried show."""
    names = [None, *(protection.name for protection in subject.protections)]
    asked = [
        row
        for row in advice
        if row.get("subject", subject.name) == subject.name
        and ("subject" in row or row.get("protection") in names)
    ]
    thief = _strongest(subject)
    rated = _rated(subject, thief) if thief else []
    if asked:
        return [_advised(row, rated) for row in asked]
    if not rated:
        return ["No advantage was measured, so this audit cannot say."]
    reached = [each for each in rated if each[2].mean <= _TARGET]
    if not reached:
        protection, best, advantage = rated[0]
        shares = sorted(each[0].share for each in rated)
        tried = _share(shares[0])
        if shares[0] < shares[-1]:
            tried += f" to {_share(shares[-1])}"
        return [
            f"None of the shares tried ({tried} of all weights) keeps the advantage of the "
            f"strongest thief ({thief}) at or below {_TARGET:g}. “{protection.name}” comes "
            f"closest: {_in_words(advantage, best)}. Encrypt more, or select otherwise, and "
            "measure again."
        ]
    protection, best, advantage = min(reached, key=lambda each: each[0].share)
    doubt = _doubt(advantage, best)
    return [
        f"Of the shares tried, {_share(protection.share)} of all weights (“{protection.name}”) is "
        f"the smallest that keeps the advantage of the strongest thief ({thief}) at or below "
        f"{_TARGET:g}: {_in_words(advantage, best)}.",
        *([f"But {doubt}: try more keys before you rely on it."] if doubt else []),
    ]


def _advised(row: dict[str, Any], rated: Sequence[tuple[Protection, Best, Advantage]]) -> str:
    target, name = row["target"], row.get("protection")
    if name is None:
        way = f"With “{row['strategy']}”, no" if "strategy" in row else "No"
        return f"{way} share that was tried keeps the advantage at or below {target}."
    start = f"For an advantage of at most {target}, “{name}” is enough"
    for protection, best, advantage in rated:
        if protection.name == name:
            doubt = _doubt(advantage, best, target)
            # Not the row's own share, which is of the groups that take part.
            return (
                f"{start}: it encrypts {_share(protection.share)} of all weights "
                f"({_in_words(advantage, best)}).{f' But {doubt}.' if doubt else ''}"
            )
    return f"{start}."


def _detected(detection: dict[str, float]) -> dict[str, str]:
    """How well he finds what is encrypted, and how much of it is the cipher's doing."""
    auc, before = detection["auc"], detection["baseline"]
    more = auc - before
    if not math.isfinite(more):
        words = "No number came out of the test."
    else:
        found = (
            "No better than guessing"
            if auc <= 0.55
            else "A little better than guessing"
            if auc <= 0.7
            else "Clearly better than guessing"
            if auc <= 0.9
            else "Tells most of them apart"
        )
        trace = (
            "encryption itself leaves a trace."
            if more > _TRACE
            else "encryption hides some of what the selection shows."
            if more < -_TRACE
            else "encryption itself adds next to nothing."
        )
        words = f"{found}; {trace}"
    return {
        "auc": _number(auc),
        "before": _number(before),
        "difference": _number(more),
        "words": words,
    }


def _view(
    subject: SubjectReport,
    anchor: str,
    figures: dict[str, Markup],
    advice: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What the template shows of a network: text, in the order of the page."""
    every = [best for p in subject.protections for best in p.best] + subject.baseline
    stops: dict[float, list[int]] = {}
    # The strongest thief first, since not all columns may have room.
    for data in sorted({best.data for best in every}, reverse=True):
        steps = {best.steps for best in every if best.data == data}
        stops[data] = sorted({min(steps), max(steps)})
    rows = [
        (_kept(p.name), _share(p.share), _quality(p.shipped, subject, unit=False), p.best)
        for p in subject.protections
    ]
    rows.append(("Architecture alone", "all", _MISSING, subject.baseline))
    with_levels = [p for p in subject.protections if p.levels]
    numbers = sorted({level.level for p in with_levels for level in p.levels})
    return {
        "anchor": anchor,
        "name": subject.name,
        "title": subject.title,
        "unit": subject.unit,
        "weights": f"{subject.weights:,}",
        "examples": f"{subject.examples:,}",
        "minutes": f"{subject.seconds / 60:.1f}",
        "clean": _quality([subject.clean], subject),
        "clean_number": _quality([subject.clean], subject, unit=False),
        "worthless": _quality([subject.worthless], subject),
        "key_count": max((len(p.shipped) for p in subject.protections), default=0),
        "verdict": _kept(_verdict(subject)),
        "stops": [
            {
                "name": data_name(data),
                "examples": f"{max(1, round(data * subject.examples)):,}" if data else "",
                "steps": [f"{each:,}" for each in steps],
            }
            for data, steps in stops.items()
        ],
        "thief": [
            {
                "name": name,
                "share": share,
                "shipped": shipped,
                "cells": [
                    [_cell(_find(best, data, each), subject) for each in steps]
                    for data, steps in stops.items()
                ],
            }
            for name, share, shipped, best in rows
        ],
        "with_levels": [_kept(p.name) for p in with_levels],
        "levels": [
            {
                "name": f"{number} (no key)" if number == 0 else str(number),
                "cells": [
                    next(
                        (
                            (_quality([each.metric], subject, unit=False), _share(each.share))
                            for each in p.levels
                            if each.level == number
                        ),
                        None,
                    )
                    for p in with_levels
                ],
            }
            for number in numbers
        ],
        "detection": [
            {"name": _kept(p.name), **_detected(p.detection)}
            for p in subject.protections
            if p.detection
        ],
        "climbing": [
            {
                "name": _kept(p.name),
                "level": climb.level,
                "opened": _quality(climb.opened, subject, unit=False),
                "recovered": _quality(climb.recovered, subject, unit=False),
                "without": _quality(climb.without, subject, unit=False),
            }
            for p in subject.protections
            for climb in p.climbing
        ],
        "advice": [_kept(sentence) for sentence in _how_much(subject, advice)],
        "figures": figures,
    }


def _cell(best: Best | None, subject: SubjectReport) -> dict[str, str]:
    if best is None:
        return {"metric": _MISSING, "advantage": _MISSING, "interval": "", "attack": ""}
    return {
        "metric": _quality(best.recovered, subject, unit=False),
        "advantage": _number(best.advantage.mean) if best.advantage else _MISSING,
        "interval": _interval(best.advantage) if best.advantage else "",
        "attack": best.attack,
    }


def _quality(values: Sequence[float], subject: SubjectReport, *, unit: bool = True) -> str:
    """Mean over keys. Tenths of a percent; hundredths of anything else."""
    if not values:
        return _MISSING
    text = _number(float(np.mean(values)), 1 if subject.unit == "%" else 2)
    return f"{text}\u00a0{subject.unit}" if unit else text


def _number(value: float, digits: int = 2) -> str:
    # "z": no minus before a zero.
    return f"{value:z,.{digits}f}".replace("-", "−") if math.isfinite(value) else "n/a"


def _interval(advantage: Advantage) -> str:
    return f"{_number(advantage.low)} to {_number(advantage.high)}"


def _kept(text: str) -> str:
    """The same on a page, with no line break between a number and its percent sign."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text)


def _share(share: float) -> str:
    if not math.isfinite(share):
        return "n/a"
    percent = 100 * share
    text = f"{percent:.3g}" if percent >= 1e-3 or not percent else f"{percent:.1e}"
    return f"{text}\u00a0%"  # which no line break separates


def _time(search: KeySearch) -> str | Markup:
    """Many years as a power of ten; less than years in words."""
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


def _measured(value: float) -> str:
    """Numbers of any size."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", "−")


def _template() -> jinja2.Template:
    text = (
        importlib.resources.files("selcrypt_jax.audit")
        .joinpath("report.html.jinja")
        .read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "share": _share,
        "time": _time,
        "measured": _measured,
    }
    return environment.from_string(text)
