"""Pretrained ONNX networks, protected, opened, and run by onnxruntime."""

import importlib
import json
from pathlib import Path

import jax
import pytest

TRAIN = Path(__file__).parent.parent.parent / "train"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packages"), [("vad", ["silero-vad", "pyannote.audio"])])
def test_an_onnx_network_is_measured_at_every_level(name, packages, monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(TRAIN))
    script = importlib.import_module("networks")
    packaged = importlib.import_module("_networks").packaged
    for package in packages:
        try:
            packaged(package, "")
        except FileNotFoundError:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(script, "ATTEMPTS", 8)  # one search in eight finds no release
    # As users have it; a permuted network may overflow.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        script.main(script.Config(out=tmp_path, names=(name,), repeats=1))
    row = json.loads((tmp_path / f"{name}.json").read_text())
    values = [level["all"] for level in row["levels"]]
    assert values[-1] == row["original"] > 95  # and check_exact compared every byte
    assert len(values) == 6
    assert min(values[:2]) < values[-1]  # by how much is a matter of keys
    assert 0.07 < row["graded"] < 0.1
    assert [
        abs(a["calibration"] - b) <= 3
        for a, b in zip(row["targets"]["levels"][2:-1], row["targets"]["targets"][1:], strict=True)
    ] == [True] * 2
    assert {"as it is", "zero-fill", "average and zero-fill"} <= set(row["attacks"])
    assert all(0 <= value <= 100 for value in row["attacks"].values())
