"""The training scripts, run as a user runs them, on tiny data."""

import json
import subprocess
import sys
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


def test_dncnn_names_what_is_wrong_with_its_images(images):
    common = ("--test", images / "test", "--out", images / "x.safetensors")
    empty = run("--images", ROOT / "selcrypt_jax", *common)
    assert empty.returncode == 1
    assert "expected images" in empty.stderr
    small = run("--images", images / "train", "--patch", 64, *common)
    assert small.returncode == 1
    assert "expected at least 64×64 pixels, got 56×48" in small.stderr
