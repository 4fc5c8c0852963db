"""The page, the pictures and the file of an audit, from records made by hand."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from selcrypt_jax.audit import _plots, _report, _words
from selcrypt_jax.audit._records import (
    Advantage,
    Attempt,
    AuditReport,
    Best,
    CipherCheck,
    Holder,
    KeySearch,
    Level,
    Protection,
    SubjectReport,
)
from selcrypt_jax.audit._ways import recommended, ways_to_publish, without_cipher

NASTY = '<b>&"$x_1$'
KINDS = ("curves", "advantage", "levels")


def best(data, steps, recovered, mean=None, attack="fine-tune", width=0.04):
    known = None if mean is None else Advantage(mean, mean - width, mean + width)
    return Best(data, steps, recovered, attack, known)


def protection(name="pss 8 %", strategy="pss", share=0.08, mean=0.3, **changes):
    rows = [
        best(data, steps, [24 + mean + data, 25 + mean + steps / 1000], mean + data / 10)
        for data in (0.05, 0.2)
        for steps in (50, 200, 2000)
    ]
    kept = Protection(
        name,
        strategy,
        share,
        shipped=[11.1, 12.2],
        levels=[Level(0, 0.0, 11.6), Level(1, share / 2, 22.2), Level(2, share, 29.06)],
        attempts=[Attempt("fine-tune", 0.05, 1e-3, {50: [24.0, 25.0], 200: [24.5, 25.5]})],
        best=rows,
        detection={"auc": 0.71, "baseline": 0.69},
    )
    return dataclasses.replace(kept, **changes)


def subject(*protections, **changes):
    made = SubjectReport(
        "dncnn",
        "DnCNN, photographs",
        "dB",
        clean=29.06,
        worthless=20.2,
        weights=556_097,
        examples=400,
        protections=list(protections),
        baseline=[best(d, s, [23.0 + d, 23.5]) for d in (0.05, 0.2) for s in (50, 200, 2000)],
        seconds=90.0,
    )
    return dataclasses.replace(made, **changes)


def report(*subjects, **changes):
    made = AuditReport(
        "1.2.3",
        {"seed": 0, "steps": [50, 2000], "nested": {"rate": 1e-3}},
        list(subjects),
        [CipherCheck("rings differ", True, 0.001, "nothing in common")],
        [KeySearch("random secret", 256.0, 120_000.0, 1.6e64), KeySearch("pin", 13.3, 3.1, 2.5e-5)],
    )
    return dataclasses.replace(made, **changes)


def one_key():
    rows = [best(0.1, 100, [27.0], 0.05, width=0.0)]
    only = protection(shipped=[11.0], best=rows, levels=[], attempts=[], detection={})
    return subject(only, baseline=[best(0.1, 100, [26.0])])


def nasty():
    rows = [best(0.2, 2000, [24.0, 25.0], 0.3, attack=NASTY)]
    bad = [protection(NASTY, NASTY, best=rows), protection("_x", "_y", 0.5, best=rows)]
    return subject(*bad, name=NASTY, title=f"</title><script>1</script>{NASTY}")


def not_finite():
    nan, inf = math.nan, math.inf
    failed = protection(
        "failed",
        "other",
        0.5,
        shipped=[nan, 1.0],
        levels=[Level(0, 0.0, nan), Level(1, 0.5, -inf)],
        attempts=[Attempt("fine-tune", 0.2, 1.0, {50: [-inf, nan]})],
        best=[Best(0.2, 2000, [nan, -inf], "fine-tune", Advantage(nan, -inf, inf))],
        detection={"auc": nan, "baseline": 0.5},
    )
    return subject(protection(), failed, worthless=-inf)


def nothing():
    bare = protection(levels=[], attempts=[], best=[], detection={}, shipped=[])
    return subject(bare, baseline=[])


def without_data():
    """Attacks that need no data and no steps beside those that do."""
    rows = [best(0.0, 0, [12.0, 13.0], -1.5), best(0.05, 50, [24.0, 25.0], 0.3)]
    alone = [best(0.0, 0, [15.0, 16.0]), best(0.05, 50, [23.0, 23.5])]
    return subject(protection(best=rows), baseline=alone)


def many():
    name = "a protection whose name is so long that no table and no legend has a line for it"
    made = [protection(f"{name} {i}", f"{name} {i}", 0.01 * i, mean=i / 10) for i in range(1, 9)]
    return subject(*made, title=f"{name}, {name}")


CASES = {
    "typical": report(
        subject(protection(), protection("l2 8 %", "l2", 0.08, 0.8), protection("l2 2 %", "l2")),
        subject(protection("pss 1 %", "pss", 0.01, 0.05), name="vgg19", unit="%"),
    ),
    "one key": report(one_key(), keys=[], cipher=[], settings={}),
    "failing check": report(
        subject(protection()),
        cipher=[
            CipherCheck("rings differ", True, 0.001, "nothing in common"),
            CipherCheck("keystream", False, 0.75, NASTY),
        ],
    ),
    "nasty names": report(nasty(), settings={NASTY: [NASTY]}, keys=[KeySearch(NASTY, 1, 1, 1)]),
    "not finite": report(
        not_finite(),
        cipher=[
            CipherCheck("rings differ", True, 0.5, "nothing"),
            CipherCheck("fine bits", None, math.nan, "does not apply: there are none"),
        ],
        keys=[KeySearch("random secret", math.inf, math.nan, math.inf)],
        settings={"limit": math.inf},
    ),
    "nothing": report(nothing()),
    "without data": report(without_data()),
    "many": report(many()),
    "no network": report(),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Case → the folder with its report, which is written once: drawing takes its time."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("audit") / "new" / "folder"
            _report.write_report(CASES[case], made[case])
        return made[case]

    return folder


@pytest.fixture(params=CASES)
def written(request, folder_of):
    return CASES[request.param], folder_of(request.param)


class Page(HTMLParser):
    """Elements, text and tables of a page; fails where tags are not balanced."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.drawn: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(str(dict(attrs)["aria-labelledby"]), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "text" in self.open:  # of a picture
            self.drawn.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += f"\n{data}" if "small" in self.open else data


def page_of(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text("utf-8")
    return text, Page(text)


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def without_nan(value):
    """The same, where all that is not finite is equal."""
    if isinstance(value, Advantage):
        return without_nan(value._asdict())
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- audit.json -----------------------------------------------------------------------------------


def refuse(constant):
    raise AssertionError(constant)


def test_the_json_is_the_record(written):
    made, folder = written
    text = (folder / "audit.json").read_text("utf-8")
    content = json.loads(text, parse_constant=refuse)
    # JSON has names of keys and null where a record has numbers of steps and NaN.
    assert content == json.loads(json.dumps(without_nan(dataclasses.asdict(made))))
    failed = content["subjects"][0]["protections"][1:] if made is CASES["not finite"] else []
    for protection in failed:
        assert protection["best"][0]["advantage"] == {"mean": None, "low": None, "high": None}
        assert protection["attempts"][0]["steps"] == {"50": [None, None]}


def test_settings_may_be_of_numpy_and_paths():
    settings = {"rate": np.float32(0.5), "steps": (1, np.int64(2)), "data": Path("a") / "b"}
    assert _report.plain(settings) == {"rate": 0.5, "steps": [1, 2], "data": str(Path("a") / "b")}


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_can_be_read(written):
    made, folder = written
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 3 * len(made.subjects)
    for path in pictures:
        pixels = matplotlib.image.imread(path)
        height, width = pixels.shape[:2]
        assert 600 <= width <= 1000
        assert height >= 400
        assert pixels[..., :3].std() > 0.01, "nothing was drawn"


def test_names_of_files_are_safe_and_differ(tmp_path):
    names = ["../up", ".._up", "VGG", "vgg", "..", "x" * 300]
    expected = ["_up", "_up_2", "VGG", "vgg_4", "network", "x" * 80]
    assert _report._file_names([subject(name=name) for name in names]) == expected
    _report.write_report(report(subject(name="../up")), tmp_path / "in")
    assert {path.name for path in (tmp_path / "in").glob("*.png")} == {
        f"_up_{kind}.png" for kind in KINDS
    }
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_older_report_is_replaced(tmp_path):
    _report.write_report(report(subject(), cipher=CASES["failing check"].cipher), tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "failed" in page_of(tmp_path)[1].text
    _report.write_report(report(subject()), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert "failed" not in page_of(tmp_path)[1].text


def lines(axis, style=None):
    return [
        list(map(tuple, line.get_xydata()))
        for line in axis.lines
        if len(line.get_xydata()) and (style is None or line.get_linestyle() == style)
    ]


def test_curves_are_the_means_of_the_best():
    made = subject(protection(), protection("l2 8 %", "l2", 0.08, 0.8))
    panels = _plots.draw_curves(made).axes
    assert [axis.get_title().replace("\u00a0", " ") for axis in panels] == [
        "20 % of the training data",
        "5 % of the training data",
    ]
    for axis, data in zip(panels, (0.2, 0.05), strict=True):
        assert axis.get_xscale() == "log"
        drawn = lines(axis)
        for rows in (*(each.best for each in made.protections), made.baseline):
            expected = [(row.steps, np.mean(row.recovered)) for row in rows if row.data == data]
            assert expected in drawn
        (dashed,) = lines(axis, "--")
        assert dashed == [(r.steps, np.mean(r.recovered)) for r in made.baseline if r.data == data]
        assert [(0, 29.06), (1, 29.06)] in drawn
        spans = [each.get_datalim(axis.transData).intervaly for each in axis.collections]
        shaded = [value for row in made.protections[0].best[:1] for value in row.recovered]
        if data == 0.05:
            assert spans[0][0] == pytest.approx(min(shaded))


def test_advantages_are_those_of_the_most_steps():
    made = subject(
        protection("l2 2 %", "l2", 0.02, 0.9),
        protection("l2 8 %", "l2", 0.08, 0.7),
        protection("pss 8 %", "pss", 0.08, 0.3),
    )
    figure = _plots.draw_advantage(made)
    for axis, data in zip(figure.axes, (0.2, 0.05), strict=True):
        assert axis.get_title().endswith("2,000 steps")
        assert axis.get_xscale() == "log"
        l2, pss = (bars(container) for container in axis.containers)
        aside = 0.02  # so that intervals do not overlap
        assert [x for x, *_ in l2] == pytest.approx([0.02, 0.08], rel=aside)
        assert [x for x, *_ in pss] == pytest.approx([0.08], rel=aside)
        means = [0.9 + data / 10, 0.7 + data / 10, 0.3 + data / 10]
        for (_, mean, low, high), expected in zip([*l2, *pss], means, strict=True):
            assert mean == pytest.approx(expected)
            assert (low, high) == pytest.approx((expected - 0.04, expected + 0.04))
        assert [(0, 0), (1, 0)] in lines(axis)
        assert [(0, 0.1), (1, 0.1)] in lines(axis)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["l2", "pss"]


def bars(container) -> list[tuple[float, float, float, float]]:
    """Position, mean and interval of each point."""
    points, _, (spans,) = container.lines
    return [
        (x, y, *ends[:, 1])
        for (x, y), ends in zip(points.get_xydata(), spans.get_segments(), strict=True)
    ]


def test_levels_are_drawn():
    made = subject(protection(), protection("bare", levels=[]))
    (axis,) = _plots.draw_levels(made).axes
    assert [(0, 11.6), (1, 22.2), (2, 29.06)] in lines(axis)
    assert not [line for line in lines(axis) if line[0] == (0, 29.06) and len(line) > 2]
    # What the strongest attacker reaches without the file: levels below are worth nothing to them.
    heights = {line.get_ydata()[0]: line for line in axis.lines if line.get_linestyle() == "--"}
    assert list(heights) == [pytest.approx((23.0 + 0.2 + 23.5) / 2)]
    (legend,) = axis.figure.legends
    assert "architecture alone, trained" in [text.get_text() for text in legend.texts]
    (axis,) = _plots.draw_levels(one_key()).axes
    assert [text.get_text() for text in axis.texts] == ["not measured"]


@pytest.mark.parametrize("strategies", [1, 2, 7, 8])
def test_protections_can_be_told_apart(strategies):
    made = [protection(f"p{i}", f"s{i % strategies}", 0.01 * i) for i in range(1, 9)]
    axis = _plots.draw_curves(subject(*made)).axes[0]
    marked = [line for line in axis.lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker()) for line in marked}) == 8 + 1
    axis = _plots.draw_advantage(subject(*made)).axes[0]
    points = [container.lines[0] for container in axis.containers]  # pyright: ignore
    assert len({(line.get_color(), line.get_marker()) for line in points}) == strategies


# --- the page -------------------------------------------------------------------------------------


def test_ids_are_unique_and_references_lead_somewhere(written):
    text, page = page_of(written[1])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    referred = re.findall(r"url\(#([^)]*)\)", text)
    for _, attributes in page.elements:
        for name in ("href", "xlink:href"):
            if name in attributes:
                assert attributes[name].startswith("#"), "only places on this page"
                referred.append(attributes[name][1:])
        referred += attributes.get("aria-labelledby", "").split()
    assert "how-to-read" in referred
    assert set(referred) <= set(ids)


def test_nothing_is_loaded_or_run(written):
    text, page = page_of(written[1])
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert text.count("<!DOCTYPE") == 1
    assert "<?xml" not in text
    used = {tag for tag, _ in page.elements}
    assert not used & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {"src", "srcset", "data", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name.startswith("xmlns") or "://" not in (value or "")


def test_the_page_is_accessible(written):
    made, folder = written
    _, page = page_of(folder)
    assert ("html", {"lang": "en"}) in page.elements
    assert {"title", "main", "header", "footer"} <= {tag for tag, _ in page.elements}
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    figures = [tag for tag, _ in page.elements if tag in ("figure", "figcaption")]
    assert len(figures) == 2 * len(pictures)
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
        assert "viewBox" in attributes or "viewbox" in attributes
        assert "width" not in attributes
    if made is CASES["typical"]:
        assert len(pictures) == 6
    for rows in page.tables.values():
        # The head may have two rows with cells over several columns.
        assert len({len(row) for row in rows[2:]}) <= 1


def test_names_are_escaped(folder_of):
    text, page = page_of(folder_of("nasty names"))
    assert not {"b", "script"} & {tag for tag, _ in page.elements}
    assert "<b>" not in text
    assert page.elements.count(("title", {})) == 1
    rows = page.tables["s1-attack-table"]
    assert [row[0] for row in rows[2:]] == [NASTY, "_x", "Architecture alone", "Original"]
    assert rows[2][5].split("\n")[-1] == NASTY, "the attack"
    assert [NASTY, json.dumps([NASTY])] in page.tables["settings"]
    assert page.tables["keys-table"][1][0] == NASTY
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert any(f"“{NASTY}”" in label for label in labels)
    # Dollars are no mathematics, and an underscore hides no line of a legend.
    assert page.drawn.count(NASTY) == 3
    assert [text.lstrip("\u200b") for text in page.drawn].count("_x") == 2
    assert f"expected {NASTY}" in page_of(folder_of("failing check"))[1].text


def test_numbers_of_the_table_are_those_of_the_record(folder_of):
    made = CASES["typical"]
    _, page = page_of(folder_of("typical"))
    for index, network in enumerate(made.subjects, 1):
        head, stops, *rows = page.tables[f"s{index}-attack-table"]
        assert [cell.replace("\u00a0", " ") for cell in head[3:]] == [
            "With 20 % of the training data\n80 examples",
            "With 5 % of the training data\n20 examples",
        ]
        assert [re.findall("[0-9,]+", cell) for cell in stops] == [["50"], ["2,000"], ["2,000"]] * 2
        *attacked, baseline, original = rows
        digits = 1 if network.unit == "%" else 2
        for kept, row in zip(network.protections, attacked, strict=True):
            assert row[0].replace("\u00a0", " ") == kept.name
            assert number(row[1].removesuffix("\u00a0%")) == pytest.approx(100 * kept.share)
            assert number(row[2]) == round(np.mean(kept.shipped), digits)
            for data, cells in zip((0.2, 0.05), (row[3:6], row[6:9]), strict=True):
                first, last = (
                    next(each for each in kept.best if (each.data, each.steps) == (data, steps))
                    for steps in (50, 2000)
                )
                assert number(cells[0]) == pytest.approx(np.mean(first.recovered), abs=0.051)
                assert number(cells[1]) == pytest.approx(np.mean(last.recovered), abs=0.051)
                mean, interval, attack = cells[2].split("\n")
                assert last.advantage is not None
                assert number(mean) == round(last.advantage.mean, 2)
                low, high = interval.split(" to ")
                assert number(low) == round(last.advantage.low, 2)
                assert number(high) == round(last.advantage.high, 2)
                assert attack == last.attack
        assert baseline[:3] == ["Architecture alone", "all", "–"]
        expected = [
            np.mean(each.recovered)
            for each in sorted(network.baseline, key=lambda each: -each.data)
            if each.steps != 200
        ]
        found = [number(baseline[column]) for column in (3, 4, 6, 7)]
        assert found == pytest.approx(expected, abs=0.051)
        assert baseline[5].split("\n")[0] == "0"
        assert number(original[2]) == round(network.clean, digits)
        assert original[5].split("\n")[0] == "1"


def test_numbers_of_the_other_tables(folder_of):
    text, page = page_of(folder_of("typical"))
    levels = page.tables["s1-levels-table"]
    cells = [[cell.replace("\u00a0", " ") for cell in row[:2]] for row in levels]
    assert cells == [
        ["Level", "pss 8 %"],
        ["0 (no key)", "11.60\n0 %"],
        ["1", "22.20\n4 %"],
        ["2", "29.06\n8 %"],
        ["Original", "29.06"],
    ]
    found = page.tables["s1-detection"][1]
    assert found[2:] == ["0.71", "0.69", "0.02"]
    assert "Clearly better than guessing; encryption itself adds next to nothing." in found[1]
    assert page.tables["cipher-table"][1] == [
        "rings differ",
        "passed",
        "0.001",
        "nothing in common",
    ]
    assert page.tables["keys-table"][1:] == [
        ["random secret", "256", "120,000", "1064 years"],
        ["pin", "13", "3.1", "13 minutes"],
    ]
    assert "10<sup>64</sup> years" in text
    assert ["nested.rate", "0.001"] in page.tables["settings"]
    assert ["steps", "[50, 2000]"] in page.tables["settings"]
    assert "1.2.3" in page.text


def test_a_failing_check_is_the_first_that_is_said(folder_of):
    text, page = page_of(folder_of("failing check"))
    body = text[text.index("<body>") :]
    alarm = re.sub(r"<[^>]*>", "", body[: body.index("<h1>")])
    assert "The cipher failed 1 of 2 checks" in alarm
    assert "keystream" in alarm
    assert "found 0.75," in alarm
    assert "rings differ" not in alarm
    assert [row[1] for row in page.tables["cipher-table"][1:]] == ["passed", "FAILED"]
    assert "<title>FAILED: " in text
    assert "1 of 2 checks failed" in page.text
    assert "checks passed" not in page.text
    text, page = page_of(folder_of("typical"))
    assert "FAILED" not in text
    assert "1 of 1 checks passed." in page.text


def test_what_was_not_measured_is_said(folder_of):
    _, page = page_of(folder_of("nothing"))
    assert "No attack was tried on this network" in page.text
    assert "Levels were not measured." in page.text
    assert "This was not tried." in page.text
    assert "this audit gives no advice" in page.text
    _, page = page_of(folder_of("one key"))
    assert "The cipher was not checked." in page.text
    assert "one key is too few to be sure" in page.text
    assert "s1-detection" not in page.tables


def test_what_is_not_finite_is_said(folder_of):
    _, page = page_of(folder_of("not finite"))
    row = page.tables["s1-attack-table"][3]
    assert row[2] == "n/a"
    assert row[3:5] == ["–", "n/a"], "it has no row for few steps"
    assert row[5].startswith("n/a\nn/a to n/a")
    assert page.tables["cipher-table"][2][1:3] == ["does not apply", "–"]
    assert "1 of 1 checks passed." in page.text
    assert "1 does not apply." in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)
    # It is not the best protection because it failed.
    assert "“pss 8\u00a0%”" in page.text


# --- words ----------------------------------------------------------------------------------------

JUDGEMENTS = {
    0.95: "gives them nearly all of what it should protect",
    0.6: "gives them most of what it should protect",
    0.2: "still gives them part of what it should protect",
    0.05: "To them the file is worth hardly more than its architecture (advantage 0.05, interval "
    "0.01 to 0.09).",
    0.08: "seems to be worth hardly more than its architecture (advantage 0.08, interval "
    "0.04 to 0.12), but the interval is too wide to be sure.",
}


@pytest.mark.parametrize("mean", JUDGEMENTS)
def test_verdict(mean):
    rows = [best(0.2, 2000, [26.0, 27.0], mean), best(0.05, 2000, [1.0, 1.0], 0.99)]
    worse = protection("worse", best=[best(0.2, 2000, [28.0, 28.0], 0.99)])
    alone = [best(0.2, 2000, [25.0, 25.5])]
    words = _words.verdict(subject(worse, protection(best=rows), baseline=alone))
    words = words.replace("\u00a0", " ")
    assert words.startswith(
        "The strongest attacker tried (20 % of the training data, 2,000 steps) repairs the network "
        "with the best protection, “pss 8 %” (8 % of all weights encrypted), to 26.50 dB; the "
        "original has 29.06 dB, and the same attack on the architecture alone gives 25.25 dB. "
    )
    assert JUDGEMENTS[mean] in words
    assert sum(each in words for each in JUDGEMENTS.values()) == 1


def test_where_the_original_is_hardly_better_nothing_is_judged():
    rows = [dataclasses.replace(best(0.2, 2000, [28.9, 28.95]), advantage=None)]
    near = subject(protection(best=rows), baseline=[best(0.2, 2000, [28.7, 28.8])])
    assert _words.verdict(near).startswith("There is hardly anything to steal: the original has")
    assert "too close" in _report_page(near)


@pytest.mark.parametrize(
    ("tried", "alone", "with_file", "said"),
    [
        ([1e-3], 1e-3, 1e-3, "Only one learning rate was tried (0.001)."),
        ([1e-3, 3e-3, 6e-3], 3e-3, 3e-3, ""),
        ([3e-3, 1e-3, 6e-3], 1e-3, 3e-3, "(0.001 to 0.006): 0.001 without the file. Try rates"),
        ([1e-3, 3e-3, 6e-3], 6e-3, 6e-3, ": 0.006 without the file, 0.006 with it. Try rates"),
        ([1e-3, 3e-3, 6e-3], 0.0, 0.0, ""),  # nothing that was trained is best
    ],
)
def test_a_best_rate_at_the_end_of_those_tried(tried, alone, with_file, said):
    attempts = [Attempt("fine-tune", 0.2, rate, {2000: [24.0, 25.0]}) for rate in (0.0, *tried)]
    weaker = dataclasses.replace(best(0.2, 50, [20.0, 20.0], 0.1), rate=tried[0])
    rows = [weaker, dataclasses.replace(best(0.2, 2000, [26.0, 27.0], 0.3), rate=with_file)]
    baseline = [dataclasses.replace(best(0.2, 2000, [25.0, 25.5]), rate=alone)]
    found = _words.rates(subject(protection(best=rows, attempts=attempts), baseline=baseline))
    assert said in found
    assert bool(found) == bool(said)


def test_a_file_in_which_everything_is_encrypted_has_a_row():
    row = "Everything encrypted, with the same cipher"
    rows = [best(d, s, [24.0, 24.5], 0.2) for d in (0.05, 0.2) for s in (50, 2000)]
    assert row in _report_page(subject(protection(), everything=rows))
    assert row not in _report_page(subject(protection()))
    untrained = protection(best=[best(0.2, 0, [21.0]), best(0.2, 2000, [26.0])])
    assert "Without training" in _report_page(subject(untrained))


def _report_page(made):
    return _report._template().render(
        report=report(made), failed=[], skipped=[], settings={},
        subjects=[
            {
                "anchor": "s1", "report": made,
                "figures": dict.fromkeys(("levels", "curves", "advantage"), ""),
                "verdict": "", "rates": "", "advice": [], "recommended": None,
                "stops": _report._stops(made),
            }
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("opened", "gain", "words"),
    [
        (19.0, 0.0, "Worthless as opened: anyone with this data"),
        (19.0, None, "With an attack, 30 % of the way from there to the original"),
        (25.0, None, "Nothing to gain"),
        (25.0, 0.01, "Barely gets above their level"),
        (25.0, 0.4, "Gets 40 % of the way to the next level"),
        (25.0, 0.99, "Gets the next level"),
        (25.0, 1.2, "Gets the next level"),
    ],
)
def test_a_key_holder_is_judged(opened, gain, words):
    row = best(0.2, 2000, [26.0], 0.3)
    holder = Holder(2, [opened, opened], row, reference=23.0, above=27.0, gain=gain)
    assert words in _words.held(holder).replace("\u00a0", " ")
    page = _report_page(subject(protection(holders=[holder])))
    assert words in page.replace("\u00a0", " ")
    assert "Without the file\nthe same effort gives 23.00" in page


def test_how_much_to_encrypt():
    def said(*protections, advice=()):
        text = " ".join(_words.how_much(subject(*protections), advice))
        return text.replace("\u00a0", " ")

    def reached(share, mean):
        return protection(f"p{share}", share=share, best=[best(0.2, 2000, [25.0, 26.0], mean)])

    several = (reached(0.01, 0.5), reached(0.02, 0.05), reached(0.08, 0.01))
    assert "is 2 % of all weights (“p0.02”): adv" in said(*several)
    assert "more keys" not in said(*several)
    assert "try more keys before you rely on it" in said(reached(0.02, 0.09))
    none = said(reached(0.01, 0.5), reached(0.08, 0.3))
    assert "None of the shares tried (1 % to 8 % of all weights)" in none
    assert "“p0.08” comes closest: advantage 0.30" in none

    # The share of an advice is of the groups that take part, and no share of all weights.
    found = {
        "subject": "dncnn", "strategy": "pss", "target": 0.1, "protection": "p0.02", "share": 0.034
    }  # fmt: skip
    assert said(*several, advice=[found]) == (
        "For an advantage of at most 0.1, “p0.02” is enough: it encrypts 2 % of all weights "
        "(advantage 0.05, interval 0.01 to 0.09)."
    )
    assert "However, the interval is too wide" in said(*several, advice=[{**found, "target": 0.06}])
    other = {**found, "subject": "another network"}
    assert "The smallest share tried that keeps" in said(*several, advice=[other])
    missing = {**found, "strategy": "l2", "protection": None, "share": None}
    assert said(*several, advice=[missing, found]).startswith(
        "With “l2”, no share tried keeps the advantage at or below 0.1. For an advantage"
    )


LOW, HIGH = [best(0.2, 2000, [25.0, 26.0], 0.02)], [best(0.2, 2000, [28.0, 28.5], 0.6)]
# Quality of levels 1 to 3 and what holders of 1 and 2 reach; 23 without the file.
APART = (19, 26, 29), (23.5, 27)
ALIKE = (24, 25, 29), (24.9, 26)
CLIMBING = (19, 24, 29), (25, 25)  # level 1 is worthless, and brings as much as level 2
BELOW = (19, 22, 29), (25, 25)
WAYS = [
    # no key, key holders, rest → which of the first three hold, and what is recommended
    (LOW, APART, "plain", [True, True, True], "plain rest, graded"),
    (HIGH, APART, "plain", [False, True, True], "sealed rest, graded"),
    (LOW, APART, "sealed", [None, True, True], "sealed rest, graded"),
    (LOW, ALIKE, "plain", [False, False, True], "sealed rest, one level"),
    (LOW, CLIMBING, "plain", [False, False, True], "sealed rest, one level"),
    (LOW, BELOW, "plain", [False, False, True], "sealed rest, one level"),
    (LOW, ((19, 26, 29), ()), "plain", [None, None, True], "sealed rest, one level"),
    ([best(0.2, 2000, [26.0], 0.02)], APART, "plain", [None, True, True], "sealed rest, graded"),
    # What gives no number is worth nothing; no level is better than the one below; none is graded.
    (LOW, ((math.nan, 26, 29), (23.5, 27)), "plain", [True, True, True], "plain rest, graded"),
    (
        LOW,
        ((19, 26, math.nan), (23.5, 27)),
        "plain",
        [False, False, True],
        "sealed rest, one level",
    ),
    (LOW, ((29, 29, 29), (29, 29)), "plain", [False, False, True], "sealed rest, one level"),
    (LOW, ((26, 29.1, 29), (26.5, 29.1)), "plain", [True, True, True], "plain rest, graded"),
    (LOW, ((20, 26, 22), (24, 26)), "plain", [False, False, True], "sealed rest, one level"),
    (LOW, ((29,), ()), "plain", [None, None, True], "sealed rest, one level"),
]


def held(rows, qualities, reached, keys=2, spread=0.0):
    holders = [
        Holder(
            level,
            [opened] * keys,
            best(0.2, 2000, [found - spread, found + spread][:keys]),
            reference=23.0,
            above=above,
            gain=None,
        )
        for level, (opened, found, above) in enumerate(
            zip(qualities, reached, qualities[1:], strict=False), 1
        )
    ]
    levels = [Level(level, 0.1, quality) for level, quality in enumerate((11.0, *qualities))]
    return subject(protection(best=rows, holders=holders, levels=levels))


@pytest.mark.parametrize(("rows", "holders", "rest", "holds", "name"), WAYS)
def test_ways_to_publish(rows, holders, rest, holds, name):
    made = held(rows, *holders)
    ways = ways_to_publish(made, 0.1, rest=rest)
    assert [way.holds for way in ways[:3]] == holds
    assert recommended(ways).name == name
    with_base = ways_to_publish(dataclasses.replace(made, base=True), 0.1, rest=rest)
    assert with_base[3].name == "sealed adapters for the public base"


@pytest.mark.parametrize(
    ("keys", "spread", "words"),
    [(1, 0.0, "one key is too few to be sure"), (2, 2.0, "the interval is too wide to be sure")],
)
def test_levels_may_be_in_doubt(keys, spread, words):
    ways = ways_to_publish(held(LOW, *APART, keys, spread), 0.1, rest="plain")
    assert [way.holds for way in ways[:3]] == [None, None, True]
    assert words in ways[1].why
    assert recommended(ways).name == "sealed rest, one level"


def test_one_protection_must_do_all_that_a_way_promises():
    """One whose file is worth nothing and another whose levels hold are no file that does both."""
    closed, apart = (held(a, *b).protections[0] for a, b in ((LOW, ALIKE), (HIGH, APART)))
    both = subject(
        dataclasses.replace(closed, name="closed"), dataclasses.replace(apart, name="apart")
    )
    ways = ways_to_publish(both, 0.1, rest="plain")
    assert [way.holds for way in ways[:3]] == [False, True, True]
    assert ways[0].why.count("“closed”") in (0, 2), ways[0].why
    assert "“apart”" in ways[1].why


def test_where_the_cipher_failed_no_file_is_recommended():
    ways = without_cipher(ways_to_publish(held(LOW, *APART), 0.1, rest="plain"))
    assert [way.holds for way in ways] == [False, False, False, True]
    assert recommended(ways).name == "no file: a hosted service"


def test_where_no_share_can_be_judged_none_is_advised():
    rows = [dataclasses.replace(best(0.2, 2000, [28.9, 28.95]), advantage=None)]
    near = subject(protection(best=rows), baseline=[best(0.2, 2000, [28.7, 28.8])])
    missing = {"subject": "dncnn", "strategy": "l2", "target": 0.1, "protection": None}
    for advice in ([], [missing]):
        (words,) = _words.how_much(near, advice)
        assert "no share can be judged" in words


def test_of_a_sealed_file_no_share_is_advised():
    found = {"subject": "dncnn", "strategy": "l2", "target": 0.1, "protection": "l2 2 %"}
    (words,) = _words.how_much(subject(protection(), sealed=True), [found])
    assert "depends on how far key holders get" in words


def test_ways_are_on_the_page(tmp_path):
    made = held(HIGH, *APART)
    ways = ways_to_publish(made, 0.1, rest="plain")
    _report.write_report(report(dataclasses.replace(made, ways=ways)), tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    rows = page.tables["s1-ways"]
    assert [row[1] for row in rows[1:]] == ["no", "yes", "yes", "yes"]
    assert (
        "In “pss 8\u00a0%”, a level 2 key holder gets 33\u00a0% of the way to level 3."
        in rows[2][2]
    )
    assert "holds against the attacks tried: sealed rest, graded" in page.text
    written = json.loads((tmp_path / "audit.json").read_text("utf-8"))
    assert [way["holds"] for way in written["subjects"][0]["ways"]] == [False, True, True, True]


@pytest.mark.parametrize(
    ("auc", "baseline", "words"),
    [
        (0.52, 0.5, "No better than guessing; encryption itself adds next to nothing."),
        (0.65, 0.5, "A little better than guessing; encryption itself leaves a trace."),
        (0.98, 0.97, "Tells most of them apart; encryption itself adds next to nothing."),
        (0.7, 0.9, "hides some of what the selection shows."),
        (math.nan, 0.5, "The test gave no finite number."),
    ],
)
def test_detection_in_words(auc, baseline, words):
    assert words in _words.detected({"auc": auc, "baseline": baseline})


@pytest.mark.parametrize(
    ("years", "text"),
    [
        (1.6e64, "10<sup>64</sup> years"),
        (100.0, "100 years"),
        (40 / 365.25, "40 days"),
        (5 / 24 / 365.25, "5 hours"),
        (30 / 86400 / 365.25, "30 seconds"),
        (1e-12, "less than a second"),
        (0.0, "less than a second"),
        (math.inf, "n/a"),
    ],
)
def test_time_to_guess(years, text):
    assert str(_words.time(KeySearch("key", 1, 1, years))) == text


def test_numbers_as_people_write_them():
    assert _words.number(-0.001) == "0.00"
    assert _words.number(-1234.5) == "−1,234.50"
    assert _words.measured(-0.00012) == "−0.00012"
    assert _words.measured(12345.6) == "12,346"
    assert _words.share(0.00024) == "0.024\u00a0%"
    assert _words.share(1) == "100\u00a0%"
    assert _words.share(0.999) == "99.9\u00a0%"
