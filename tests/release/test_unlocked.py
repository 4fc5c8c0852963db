"""A file below the top level says what it is: it is not the original."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from protected_files import SECRET

import selcrypt_jax as sj
from selcrypt_jax import Grant, LevelKey, Select
from selcrypt_jax.cli import main

ENTRY = "selcrypt-unlocked"
RNG = np.random.default_rng(0)
TENSORS = {"a.weight": RNG.standard_normal((16, 16, 3, 3)).astype("f4"), "b": np.ones(16, "f4")}


def plain(path: Path, metadata: dict[str, str] | None) -> Path:
    safetensors.numpy.save_file(TENSORS, path, metadata)
    return path


def protected(source: Path, output: Path, levels: int = 3) -> LevelKey:
    done = sj.protect_file(
        source, output, secret=SECRET, levels=levels, selection=Select(budget=0.5)
    )
    return sj.level_key(SECRET, done.model_id, levels=levels)


def metadata_of(path: Path) -> dict[str, str] | None:
    with safetensors.safe_open(path, "numpy") as file:  # pyright: ignore
        return file.metadata()


@pytest.mark.parametrize("own", [None, {}, {"format": "pt", "note": "ü"}], ids=str)
def test_what_each_level_says(tmp_path, own):
    source, public = plain(tmp_path / "plain", own), tmp_path / "public"
    key = protected(source, public)
    stock = metadata_of(source)
    for level in (1, 2):
        sj.unlock_file(public, tmp_path / f"{level}", key, level=level)
        found = metadata_of(tmp_path / f"{level}")
        if own is None:  # loaders refuse metadata that name no framework
            assert found is None
        else:
            assert found is not None
            said = json.loads(found.pop(ENTRY))
            assert said == {"model_id": key.model_id.hex(), "level": level, "levels": 3}
            assert found == own
        sj.unlock_file(public, tmp_path / "exact", key, level=level, exact_bytes=True, force=True)
        assert metadata_of(tmp_path / "exact") == stock
        tensors = [safetensors.numpy.load_file(tmp_path / n) for n in ("exact", f"{level}")]
        assert all((tensors[0][n] == tensors[1][n]).all() for n in TENSORS)
    sj.unlock_file(public, tmp_path / "3", key)
    assert (tmp_path / "3").read_bytes() == source.read_bytes()


def test_a_level_is_not_protected_instead_of_the_original(tmp_path):
    source = plain(tmp_path / "plain", {"format": "pt"})
    first = protected(source, tmp_path / "public")
    level1, exact = tmp_path / "level1", tmp_path / "exact"
    sj.unlock_file(tmp_path / "public", level1, first, level=1)
    words = rf"expected the original, got level 1 of 3 of model {first.model_id.hex()}, unlocked"
    with pytest.raises(ValueError, match=f"level1: {words}.* with exact_bytes=True"):
        protected(level1, tmp_path / "again", levels=2)
    with pytest.raises(ValueError, match=f"params: {words}"):
        sj.protect(TENSORS, secret=SECRET, levels=2, metadata=metadata_of(level1))
    assert not (tmp_path / "again").exists()
    # The remedy: without the entry it comes back as it was.
    sj.unlock_file(tmp_path / "public", exact, first, level=1, exact_bytes=True)
    again = protected(exact, tmp_path / "again", levels=2)
    sj.unlock_file(tmp_path / "again", tmp_path / "top", again)
    assert (tmp_path / "top").read_bytes() == exact.read_bytes()
    sj.unlock_file(tmp_path / "again", tmp_path / "low", again, level=1)
    said = json.loads((metadata_of(tmp_path / "low") or {})[ENTRY])
    assert said == {"model_id": again.model_id.hex(), "level": 1, "levels": 2}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "1", "{", '{"model_id":1,"level":1,"levels":2}',
             '{"model_id":"\\u001b[31m","level":1,"levels":2}',
             f'{{"model_id":"{"0" * 32}","level":true,"levels":2}}',
             f'{{"model_id":"{"0" * 32}","level":{"9" * 5000},"levels":2}}', "[" * 10000],
)  # fmt: skip
def test_what_others_write_there_says_nothing(tmp_path, text):
    source = plain(tmp_path / "plain", {ENTRY: text})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key = protected(source, tmp_path / "public")
    with pytest.raises(ValueError, match="is not a protected file: its metadata has no entry"):
        sj.inspect_file(source)
    sj.unlock_file(tmp_path / "public", tmp_path / "top", key)
    assert (tmp_path / "top").read_bytes() == source.read_bytes()


def test_the_commands_name_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    key = protected(plain(tmp_path / "plain", {"format": "pt"}), tmp_path / "public")
    Grant(key).write("g")
    SECRET.write("s")
    assert main(["unlock", "public", "-g", "g", "--level", "2", "-o", "two"]) == 0
    assert main(["unlock", "public", "-g", "g", "--level", "2", "-o", "bare", "--exact-bytes"]) == 0
    capsys.readouterr()
    named = f"it is level 2 of 3 of model {key.model_id.hex()}, unlocked"
    for line in ("inspect two", "verify two", "unlock two -g g -o x"):
        assert main(line.split()) == 1
        assert named in capsys.readouterr().err
    assert main(["inspect", "bare"]) == 1
    assert named not in capsys.readouterr().err
    assert main(["protect", "two", "--secret", "s", "-o", "again"]) == 1
    assert "two: expected the original, got level 2 of 3" in capsys.readouterr().err
    assert not Path("again").exists()
    assert main(["protect", "bare", "--secret", "s", "-o", "other"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_help_says_which_files_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Grant(protected(plain(tmp_path / "plain", None), tmp_path / "public")).write("g")
    line = ["unlock", "public", "-g", "g", "--level", "1", "-o"]
    assert main([*line, "one"]) == main([*line, "exact", "--exact-bytes"]) == 0
    assert Path("one").read_bytes() == Path("exact").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["unlock", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A file whose original had no metadata never gets it" in words


def test_folders_say_it_too(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", TENSORS)
    key = protected(tmp_path / "plain", tmp_path / "public")
    sj.unlock_file(tmp_path / "public", tmp_path / "one", key, level=1)
    sj.unlock_file(tmp_path / "public", tmp_path / "top", key)
    with pytest.raises(ValueError, match="one: is not a protected file: it is level 1 of 3"):
        sj.inspect_file(tmp_path / "one")
    assert not (tmp_path / "top" / "selcrypt.json").exists()
    assert (tmp_path / "one").stat().st_mode & 0o077 == 0
    (tmp_path / "sharded").mkdir()
    plain(tmp_path / "sharded" / "1.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(TENSORS, "1.safetensors")}
    (tmp_path / "sharded" / "m.safetensors.index.json").write_text(json.dumps(index))
    key = protected(tmp_path / "sharded", tmp_path / "public2")
    sj.unlock_file(tmp_path / "public2", tmp_path / "two", key, level=2)
    assert ENTRY in (metadata_of(tmp_path / "two" / "1.safetensors") or {})
    assert (tmp_path / "two").stat().st_mode & 0o077 == 0
    assert (tmp_path / "two" / "1.safetensors").stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match=r"1\.safetensors: expected the original, got level 2"):
        protected(tmp_path / "two", tmp_path / "public3")
