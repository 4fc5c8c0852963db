"""What `selcrypt levels` measures, and how `protect` reports levels and tensors."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import selcrypt_jax as sj
from selcrypt_jax.cli import main
from selcrypt_jax.cli._tables import selected_rows

KEYS = "--secret keys/secret.key --signing keys/signing.key"
METRIC = """
import numpy
from safetensors.numpy import load_file
TRUE = load_file("model.safetensors")
def psnr(tensors):
    error = [numpy.mean((numpy.asarray(tensors[n]) - TRUE[n]) ** 2) for n in TRUE]
    with numpy.errstate(all="ignore"):
        return -10 * numpy.log10(numpy.mean(error) + 1e-6)
def text(tensors):
    return "good"
def fails(tensors):
    return tensors["no such tensor"]
def nothing(tensors):
    return float("nan")
def loss(tensors):
    return -psnr(tensors)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Imported anew by each test, from its own folder.
    monkeypatch.delitem(__import__("sys").modules, "metrics_of_levels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    Path("metrics_of_levels.py").write_text(METRIC)
    rng = np.random.default_rng(0)
    tensors = {f"conv{i}.weight": rng.standard_normal((32, 16, 3, 3), "f4") for i in range(2)}
    tensors["conv0.bias"] = rng.standard_normal(32).astype("f4")
    safetensors.numpy.save_file(tensors, "model.safetensors")
    assert main(["keygen", "-o", "keys"]) == 0
    return tmp_path


def protect(options: str = "--levels 3 --budget 0.3", out: str = "public.safetensors") -> None:
    assert main(f"protect model.safetensors -o {out} {KEYS} {options}".split()) == 0


def measured(capsys, file: str = "public.safetensors") -> dict:
    capsys.readouterr()
    line = f"levels {file} --secret keys/secret.key --evaluate metrics_of_levels:psnr --json"
    assert main(line.split()) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("rest", ["sealed", "plain"])
def test_every_level_is_measured_as_its_customer_gets_it(rest, capsys):
    protect(f"--levels 3 --budget 0.3 --rest {rest}")
    found = measured(capsys)
    assert [row["level"] for row in found["levels"]] == [0, 1, 2, 3]
    shares = [level.share for level in sj.inspect_file("public.safetensors").levels]
    assert [row["share"] for row in found["levels"]] == [0.0, *shares]
    import metrics_of_levels  # pyright: ignore[reportMissingImports]

    secret = sj.Secret.read("keys/secret.key")
    for row in found["levels"][1:]:
        grant = sj.issue_grant(
            "public.safetensors", level=row["level"], secret=secret, signer="keys/signing.pub"
        )
        arrays = sj.open_model("public.safetensors", grant)
        assert row["value"] == metrics_of_levels.psnr(arrays)
    values = [row["value"] for row in found["levels"]]
    assert values[-1] == pytest.approx(60)
    assert values[1:] == sorted(values[1:])
    direct = sj.measure_levels("public.safetensors", metrics_of_levels.psnr, secret=secret)
    assert [level.value for level in direct] == values


def test_levels_below_what_is_reached_without_the_file_are_marked(capsys):
    protect("--levels 3 --budget 0.3 --rest plain")
    values = [row["value"] for row in measured(capsys)["levels"]]
    assert [row["worthless"] for row in measured(capsys)["levels"]] == [None] * 4
    line = "levels public.safetensors --secret keys/secret.key --evaluate metrics_of_levels:"
    assert main(f"{line}psnr --reference {values[2]}".split()) == 0
    out = capsys.readouterr().out
    assert f"\nwithout the file  {values[2]:.4g}\n" in out
    assert re.findall(r"\n +(\d) .* worth nothing", out) == ["0", "1", "2"]  # 2: as good, no better
    assert out.endswith("\nTo someone who reaches that, these levels are worth nothing: 0, 1, 2.\n")
    # Of a loss, the same levels.
    assert main(f"{line}loss --reference={-values[2]} --lower-is-better --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == -values[2]
    assert [row["worthless"] for row in found["levels"]] == [True, True, True, False]
    # A reference below all levels, and one above the original.
    assert main(f"{line}psnr --reference -1000".split()) == 0
    assert "worth nothing" not in capsys.readouterr().out
    assert main(f"{line}psnr --reference 1000 --json".split()) == 0
    assert all(row["worthless"] for row in json.loads(capsys.readouterr().out)["levels"])
    assert main(f"{line}psnr --reference nan".split()) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "selcrypt: --reference: expected a finite number, got nan. Give the metric"
    )


def test_targets_are_what_it_measures(capsys):
    protect("--targets any 8 --evaluate metrics_of_levels:psnr --tolerance 2")
    said = capsys.readouterr()
    assert "not measured" not in said.err
    table = [line.split() for line in said.out.split("\n\n")[-1].splitlines()]
    found = measured(capsys)
    shown = [float(row[-1]) for row in table[1:]]
    assert [float(f"{row['value']:.4g}") for row in found["levels"][1:]] == shown


def test_protect_says_that_nothing_was_measured_and_what_does_it(capsys):
    capsys.readouterr()
    protect(out="some where.safetensors".replace(" ", "_"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("The quality of these levels was not measured. To measure it: ")
    command = re.search("selcrypt (levels .*)$", last)
    assert command
    line = command[1].replace("module:function", "metrics_of_levels:psnr")
    assert main(shlex.split(line)) == 0
    out = capsys.readouterr().out
    assert "metric  metrics_of_levels:psnr\n" in out
    assert re.search(r"\nlevel +of all weights +gives\n +0 +0.000% ", out)


MISTAKES = {
    "metrics_of_levels": "--evaluate: expected an import path module:function, got",
    "metrics_of_levels:no": "--evaluate: expected 'metrics_of_levels:no' to import, got Attrib",
    "metrics_of_levels:text": "metrics_of_levels:text: --evaluate: expected a number, got str",
    "metrics_of_levels:fails": "--evaluate: metrics_of_levels:fails raised KeyError in line ",
    "metrics_of_levels:nothing": "--evaluate: expected a finite number, got nan, at level 3. ",
}


def test_a_metric_is_read_as_protect_reads_it(capsys):
    protect()
    capsys.readouterr()
    start = "levels public.safetensors --secret keys/secret.key --evaluate"
    other = f"protect model.safetensors -o x {KEYS} --targets 5 8 --evaluate"
    for metric, error in MISTAKES.items():
        for line in (start, other):
            assert main([*line.split(), metric]) == 1
            said = capsys.readouterr().err
            expected = error.replace("at level 3", "at call 1") if line == other else error
            assert said.startswith(f"selcrypt: {expected}"), said


def test_what_is_not_the_owners_is_refused(capsys):
    protect()
    assert main(["keygen", "-o", "other"]) == 0
    capsys.readouterr()
    metric = "--evaluate metrics_of_levels:psnr"
    for line, error in {
        f"levels public.safetensors --secret other/secret.key {metric}": "does not open",
        f"levels model.safetensors --secret keys/secret.key {metric}": "not a protected file",
    }.items():
        assert main(line.split()) == 1
        assert error in capsys.readouterr().err
    data = bytearray(Path("public.safetensors").read_bytes())
    data[-1] ^= 1
    Path("public.safetensors").write_bytes(data)
    assert main(f"levels public.safetensors --secret keys/secret.key {metric}".split()) == 1
    assert "expected SHA-256" in capsys.readouterr().err
    with pytest.raises(TypeError, match="evaluate: expected a function of params, got str"):
        sj.measure_levels("public.safetensors", "psnr", secret=sj.Secret.generate())  # pyright: ignore


def test_level_0_of_a_sealed_file_may_be_no_number(capsys):
    protect("--levels 1 --budget 0.3")
    secret, values = sj.Secret.read("keys/secret.key"), iter([1.0, math.nan])
    found = sj.measure_levels("public.safetensors", lambda _: next(values), secret=secret)
    assert math.isnan(found[0].value)
    values = iter([1.0, math.nan])
    found = sj.measure_levels(
        "public.safetensors", lambda _: next(values), secret=secret, reference=0.5
    )
    assert [level.worthless for level in found] == [True, False]
    Path("odd.py").write_text("VALUES = iter([1.0, float('inf')])\ndef m(_): return next(VALUES)")
    capsys.readouterr()
    line = "levels public.safetensors --secret keys/secret.key --evaluate odd:m --json"
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["levels"][0]["value"] is None


def test_many_tensors_are_shown_by_kind(capsys):
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(6):
        for name in ("query", "key", "value"):
            tensors[f"encoder.layer.{i}.{name}.weight"] = rng.standard_normal((64, 64), "f4")
            tensors[f"encoder.layer.{i}.{name}.bias"] = rng.standard_normal(64, "f4")
    tensors["head.weight"] = rng.standard_normal((256, 64), "f4")
    safetensors.numpy.save_file(tensors, "model.safetensors")
    capsys.readouterr()
    protect()
    text = capsys.readouterr().out
    assert "\nselected  27,0" not in text
    counts = (
        r"\nselected +([\d,]+) groups in 37 tensors, 18 of them whole, .*; level 1 opens ([\d,]+) "
    )
    found = re.search(counts, text)
    assert found
    selected, first = (int(count.replace(",", "")) for count in found.groups())
    assert re.search(r"\nname +tensors +groups +largest +whole\n", text)
    level_1, *rows = re.findall(r"\n +\d  +([\d,]+|the rest) ", text)
    assert level_1 == "the rest"
    assert sum(int(row.replace(",", "")) for row in rows) == selected - first > 0
    assert re.search(
        r"\nencoder.layer.\*.query.weight +6 +7,3\d\d +encoder.layer.\d.query.weight \(1,2", text
    )
    assert re.search(r"\nencoder.layer.\*.key.bias +6 +384 .*\) +6\n", text)
    assert re.search(r"\nhead.weight +1 +4,9\d\d\n", text)
    assert "encoder.layer.3.key.bias" not in text
    protect("--levels 3 --budget 0.3 --verbose", out="other.safetensors")
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in tensors)
    assert re.search(r"\ntensor +groups +whole\n", text)
    assert re.search(r"\nencoder.layer.3.key.bias +64 +yes\n", text)
    protect("--levels 3 --budget 0.3 --rest plain", out="plain.safetensors")
    text = capsys.readouterr().out
    found = re.search(r"\nselected +([\d,]+) groups in 37 tensors, 18 of them whole, layout", text)
    rows = re.findall(r"\n +\d  +([\d,]+) ", text)
    assert found
    assert sum(int(row.replace(",", "")) for row in rows) == int(found[1].replace(",", ""))


def test_kinds_beyond_the_largest_are_counted():
    groups = {f"{letter}.{n}": 10 + ord(letter) + n for letter in "abcdefghij" for n in range(2)}
    rows = selected_rows(groups, ["a.0", "b.0", "b.1", "j.0"], verbose=False)
    assert rows[1] == ("j.*", "2", "233", "j.1 (117)", "1")
    assert rows[-1][:3] == ("2 more kinds, --verbose lists all", "4", "432")
    assert rows[-1][4] == "3"
    assert sum(int(row[1]) for row in rows[1:]) == 20
