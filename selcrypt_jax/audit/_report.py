"""The results of an audit: ``audit.json``, plots, and a page for decision makers."""

import dataclasses
import datetime
import importlib.resources
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from .._io.atomic import new_file
from .._io.errors import counted
from . import _words as words
from ._plots import draw_advantage, draw_curves, draw_levels, inline_svg
from ._records import Advantage, AuditReport, SubjectReport
from ._ways import recommended

_DRAW = {"curves": draw_curves, "advantage": draw_advantage, "levels": draw_levels}


def write_report(report: AuditReport, folder: Path) -> None:
    """Writes ``audit.json``, three plots for each network, and ``report.html``.

    Args:
        report: the results.
        folder: created if it does not exist; existing files of these names are replaced. The plots
            are ``NAME_curves.png``, ``NAME_advantage.png`` and ``NAME_levels.png``, where
            characters of NAME other than letters, digits, dots and hyphens become underscores.

    Raises:
        OSError: the folder cannot be created or written to.
        TypeError: JSON cannot express the settings or the advice.
    """
    content = json.dumps(
        plain(dataclasses.asdict(report)), allow_nan=False, indent=1, ensure_ascii=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "audit.json", f"{content}\n".encode())
    views = []
    names = _file_names(report.subjects)
    for number, (subject, name) in enumerate(zip(report.subjects, names, strict=True), 1):
        figures = {}
        for kind, draw in _DRAW.items():
            figure = draw(subject)
            image = io.BytesIO()
            figure.savefig(image, format="png")
            _write(folder / f"{name}_{kind}.png", image.getvalue())
            label = words.description(kind, subject)
            figures[kind] = Markup(inline_svg(figure, f"s{number}-{kind}", label))
        views.append(
            {
                "anchor": f"s{number}",
                "report": subject,
                "figures": figures,
                "verdict": words.verdict(subject),
                "rates": words.rates(subject),
                "advice": words.how_much(subject, report.advice),
                "stops": _stops(subject),
                "recommended": recommended(subject.ways),
            }
        )
    page = _template().render(
        report=report,
        subjects=views,
        failed=[check for check in report.cipher if check.passed is False],
        skipped=[check for check in report.cipher if check.passed is None],
        settings=dict(_settings(report.settings)),
    )
    _write(folder / "report.html", page.encode())


def plain(value: Any) -> Any:
    """A value as JSON can hold it: without tuples, NaN and dates."""
    if isinstance(value, Advantage):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, content: bytes) -> None:
    with new_file(path, force=True) as file:
        file.write(content)


def _file_names(subjects: Iterable[SubjectReport]) -> list[str]:
    """File names that are valid on every file system, all different."""
    names: list[str] = []
    for subject in subjects:
        name = re.sub(r"[^\w.-]", "_", subject.name)[:80].lstrip(".") or "network"
        same = sum(each.casefold() == name.casefold() for each in names)
        names.append(f"{name}_{len(names) + 1}" if same else name)
    return names


def _settings(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Dotted names of settings, and their values as JSON."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _settings(each, f"{name}.{key}" if name else str(key))
    elif name:
        text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
        yield name, text


def _stops(subject: SubjectReport) -> dict[float, list[int]]:
    """Share of data → fewest and most steps; most data first, as not all columns may be visible."""
    every = [best for p in subject.protections for best in p.best] + subject.baseline
    stops = {}
    for data in sorted({best.data for best in every}, reverse=True):
        steps = {best.steps for best in every if best.data == data}
        stops[data] = sorted({min(steps), max(steps)})
    return stops


def _template() -> jinja2.Template:
    page = importlib.resources.files("selcrypt_jax.audit").joinpath("report.html.jinja")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in (
        "data_name", "detected", "held", "interval", "kept", "measured", "number", "quality",
        "share", "time",
    ):  # fmt: skip
        environment.filters[name] = getattr(words, name)
    environment.filters["counted"] = counted
    return environment.from_string(page.read_text("utf-8"))
