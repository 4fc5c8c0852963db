"""Printed text is never truncated, and contains nothing that a terminal obeys."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from selcrypt_jax.cli import main
from selcrypt_jax.cli._tables import print_levels
from selcrypt_jax.cli._text import printable

KEYS = "--secret keys/secret.key --signing keys/signing.key"
HOSTILE = {
    "title of the window": "w\x1b]0;pwned\x07",
    "colours": "w\x1b[31;8mhidden\x1b[0m",
    "8-bit escape": "w\x9b2J",
    "another line": "w\nselcrypt: all is well",
    "back to the start": "w\rselcrypt: all is well",
    "right to left": "w\u202egnp.evil\u202c",
    "isolated": "w\u2066\u2069",
    "no width": "w\u200b\ufeff",
    "line separator": "w\u2028x",
    "tags": "w\U000e0041",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["keygen", "-o", "keys"]) == 0
    return tmp_path


def save(name: str, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, name)


def kernels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((32, 16, 3, 3)).astype("f4")


def ask(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = main(line)
    out, err = capsys.readouterr()
    return status, out + err


def assert_plain(text: str) -> None:
    bad = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
    assert not bad, text
    assert not any(line.startswith("selcrypt: all is well") for line in text.split("\n"))


@pytest.mark.parametrize("columns", ["1", "40", "80", "1000"])
def test_nothing_is_cut_or_folded(columns, capsys, monkeypatch):
    folder = Path("a" * 60, "b" * 60)
    folder.mkdir(parents=True)
    path, name = folder / "model [bold].safetensors", "block." * 20 + "weight"
    save("model.safetensors", {name: kernels()})
    made = ["protect", "model.safetensors", "-o", str(path), *KEYS.split(), "--budget", "0.3"]
    monkeypatch.setenv("COLUMNS", columns)
    status, protected = ask(made, capsys)
    assert status == 0
    found = json.loads(ask(["inspect", str(path), "--json"], capsys)[1])
    _, text = ask(["inspect", str(path)], capsys)
    for whole in (found["model_id"], found["signer"], str(path)):
        assert whole in [line[9:] for line in text.split("\n")]
    assert f"\n{name}     153\n\n" in protected
    assert "…" not in protected + text
    assert not any(line.endswith(" ") for line in (protected + text).split("\n"))
    _, verified = ask(["verify", str(path)], capsys)
    assert verified.count("\n") == 1
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ask(["inspect", str(path)], capsys)[1] == text


def test_the_table_of_levels_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    rows = [{"level": 0, "share": 0.0, "target": 8.0, "value": 7.91, "spread": 0.02}]
    rows += [{"level": 1, "share": 0.5, "target": None, "value": 30.0, "spread": None}]
    print_levels({"levels": rows})
    assert capsys.readouterr().out == (
        "level     opens  target  gives  ± over keys\n"
        "    0   0.0000%       8   7.91         0.02\n"
        "    1  50.0000%             30\n"
    )


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_of_tensors_cannot_command_a_terminal(name, capsys):
    save("model.safetensors", {name: kernels(), "plain": np.ones((4, 4), "f4")})
    line = ["protect", "model.safetensors", "-o", "p", *KEYS.split(), "--budget", "0.3"]
    status, text = ask(line, capsys)
    assert status == 0
    assert f"\n{printable(name)} " in text
    assert_plain(text)
    said = ask([*line, "--force", "--json"], capsys)[1]
    found, _ = json.JSONDecoder().raw_decode(said)  # notes come behind it
    assert name in found["selected"]
    broken = Path("p").read_bytes()
    Path("p").write_bytes(broken[:-1] + bytes([broken[-1] ^ 1]))
    failing = [["verify", "p"], [*line, "--force", "--select", "nothing"]]
    save("scores.safetensors", {name + "x": kernels()})
    failing.append([*line, "--force", "--importance", "scores.safetensors"])
    save("model.safetensors", {name: kernels() * np.nan, "plain": np.ones((4, 4), "f4")})
    failing.append([*line, "--force"])
    for each in failing:
        status, text = ask(each, capsys)
        assert status == 1
        assert text.count("\n") == 1
        assert_plain(text)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_neither_can_names_of_files_and_metadata(name, capsys):
    save(name, {"w": kernels()})
    line = ["protect", name, "-o", f"{name}.out", *KEYS.split(), "--budget", "0.3"]
    status, text = ask(line, capsys)
    assert status == 0
    assert_plain(text)
    grant = ["grant", "NAME.out", "--level", "1", "--secret", "keys/secret.key", "-o", "NAMEg"]
    grant = [word.replace("NAME", name) for word in grant]
    unlock = ["unlock", f"{name}.out", "-g", f"{name}g", "-o", f"{name}u"]
    for each in (grant, unlock, ["inspect", f"{name}.out"], ["verify", f"{name}.out"]):
        status, text = ask(each, capsys)
        assert status == 0
        assert printable(name) in text
        assert_plain(text)
    Path(f"{name}g").chmod(0o644)
    for each in (unlock, [*unlock, "--force"], ["inspect", name], ["inspect", name + "nowhere"]):
        _, text = ask(each, capsys)
        assert printable(name) in text or name.replace("\n", " ") in text  # an error is one line
        assert_plain(text)


SEEN = ["naïve file", "模型\u3000重み.safetensors", "a\u00a0b", "e\u0301", "😀"]


@pytest.mark.parametrize("text", SEEN)
def test_what_can_be_seen_stays(text):
    assert printable(text) == text
