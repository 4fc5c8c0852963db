"""The training scripts, run as a user runs them, on tiny data."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from selcrypt_jax.models import VGG19, DnCNN, from_torch

ROOT = Path(__file__).parent.parent


def run(*args, script: str = "dncnn.py") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("train", 4), ("test", 2)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            # Smooth, so that there is something to learn.
            image = np.kron(rng.integers(0, 255, (6, 7)), np.ones((8, 8))).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{index}.png")
    return tmp_path


@pytest.mark.slow
def test_dncnn_learns_and_its_weights_load(images):
    out = images / "new" / "weights.safetensors"
    result = run(
        *("--images", images / "train", "--test", images / "test", "--out", out),
        *("--depth", 4, "--width", 8, "--steps", 60, "--every", 20, "--batch", 8, "--patch", 24),
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["psnr"] > 20.2  # the noisy images: 20·log10(255/25) = 20.17
    model = DnCNN(4, 8, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    nnx.update(model, from_torch(model, load_file(out)))


def command_of(images: Path, name: str, width: int = 8) -> list:
    return [
        *("--images", images / "train", "--test", images / "test"),
        *("--out", images / name / "weights.safetensors", "--checkpoints", images / name / "kept"),
        *("--depth", 4, "--width", width, "--steps", 60, "--every", 3),
        *("--batch", 8, "--patch", 24),
    ]


@pytest.mark.slow
def test_dncnn_killed_at_random_ends_as_an_unbroken_run(images):
    whole = run(*command_of(images, "whole"))
    assert whole.returncode == 0, whole.stderr
    rng = np.random.default_rng(0)
    killed = 0
    for _ in range(10):
        command = [sys.executable, str(ROOT / "train" / "dncnn.py")]
        process = subprocess.Popen(
            [*command, *map(str, command_of(images, "broken"))],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        # After some measurements; at any point of a step, or of a checkpoint.
        for _ in range(int(rng.integers(1, 5)) + 2 * killed):
            if not process.stdout.readline():
                break
        time.sleep(rng.uniform(0, 0.05))
        killed += process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
    assert killed >= 5
    broken = run(*command_of(images, "broken"))
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout == whole.stdout
    # Not the files' bytes: safetensors writes metadata in any order.
    first, second = (load_file(images / n / "weights.safetensors") for n in ("whole", "broken"))
    assert {n: leaf.tobytes() for n, leaf in first.items()} == {
        n: leaf.tobytes() for n, leaf in second.items()
    }
    other = run(*command_of(images, "broken", width=16))
    assert other.returncode == 1
    assert "is of another network or optimizer" in other.stderr


@pytest.mark.slow
def test_dncnn_stops_where_the_loss_does(images):
    out = ("--out", images / "x.safetensors", "--images", images / "train", "--rate", "1e30")
    sizes = ("--depth", 3, "--width", 8, "--steps", 60, "--every", 20, "--batch", 8, "--patch", 24)
    result = run(*out, *sizes, "--test", images / "test")
    assert result.returncode == 1
    assert "expected a finite loss" in result.stderr


def test_dncnn_names_what_is_wrong_with_its_images(images):
    common = ("--test", images / "test", "--out", images / "x.safetensors")
    empty = run("--images", ROOT / "selcrypt_jax", *common)
    assert empty.returncode == 1
    assert "expected images" in empty.stderr
    small = run("--images", images / "train", "--patch", 64, *common)
    assert small.returncode == 1
    assert "expected at least 64×64 pixels, got 56×48" in small.stderr
    loud = run("--images", images / "train", "--sigma", -1, *common)
    assert "--sigma: expected a number in (0, 255], got -1" in loud.stderr


# --- VGG19 on CIFAR -----------------------------------------------------------------------------

DATA = Path(os.environ.get("SELCRYPT_DATA", "")).absolute()
needs_data = pytest.mark.skipif(
    "SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set"
)


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_vgg19_goes_on_after_a_stop(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")

    def train(name: str, steps: int) -> subprocess.CompletedProcess:
        return run(
            *("--data", DATA / "tfds", "--out", tmp_path / name / "x.safetensors"),
            *("--checkpoints", tmp_path / name / "kept", "--steps", steps, "--every", 2),
            *("--width", 0.05, "--batch", 16, "--tests", 100),
            script="vgg19.py",
        )

    whole = train("whole", 6)
    assert whole.returncode == 0, whole.stderr
    rows = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    shutil.copytree(tmp_path / "whole" / "kept", tmp_path / "broken" / "kept")
    shutil.rmtree(tmp_path / "broken" / "kept" / "6")  # as if it had been stopped before
    broken = train("broken", 6)
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout == whole.stdout
    model = VGG19(width=0.05, rngs=nnx.Rngs(0))
    nnx.update(model, from_torch(model, load_file(tmp_path / "whole" / "x.safetensors")))


def test_vgg19_names_data_that_are_missing(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")
    result = run("--data", tmp_path, "--out", tmp_path / "x", script="vgg19.py")
    assert result.returncode == 1
    assert "expected a data set that TFDS prepared" in result.stderr
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").write_text("{}")
    result = run("--data", tmp_path, "--out", tmp_path / "x", script="vgg19.py")
    assert result.returncode == 1
    assert "expected cifar10 in ArrayRecord files" in result.stderr


# --- the paper's experiments --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_levels_of_dncnn_are_near_those_of_the_release(tmp_path):
    result = run("--data", DATA, "--out", tmp_path, "--keys", 1, script="reproduce/dncnn_levels.py")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "dncnn_levels.json").read_text())
    np.testing.assert_allclose(report["untouched"], [27.84, 39.59, 27.03, 25.53], atol=0.01)
    assert report["selected_weights"] == 2214
    for name in ("gaussian", "lossless"):
        found = [entry["mean"] for entry in report[name]["psnr"]]
        # A single key: its spread is about 2 dB at the levels in between.
        np.testing.assert_allclose(found[1:5], report["release"][1:5], atol=5)
        np.testing.assert_allclose(found[::5], report["release"][::5], atol=0.6)
    assert report["lossless"]["bit_identical_weights_at_the_top"] == [2214, 2214]
    assert (tmp_path / "dncnn_levels.png").stat().st_size > 10_000
