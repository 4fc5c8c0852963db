"""The training scripts, run as a user runs them, on tiny data."""

import json
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

from selcrypt_jax.models import DnCNN, from_torch

ROOT = Path(__file__).parent.parent


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / "dncnn.py"), *map(str, args)]
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
