"""The training scripts, run as a user runs them, on tiny data."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from selcrypt_jax.models import VGG19, DnCNN, from_torch, model_of, to_torch

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("SELCRYPT_DATA", "")).absolute()
needs_data = pytest.mark.skipif(
    "SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set"
)


def run(*args, script: str = "dncnn.py") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the scripts, to call functions that a script reaches slowly."""
    monkeypatch.syspath_prepend(ROOT / "train")
    # The scripts run with JAX's defaults, not with the tests' strict ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module


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
    assert rows[0]["ssim"] < rows[-1]["ssim"] < 1
    model = DnCNN(4, 8, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    nnx.update(model, from_torch(model, load_file(out)))
    best = max(rows, key=lambda row: row["psnr"])
    with safe_open(out, framework="np") as file:
        assert file.metadata() == {
            "psnr": f"{best['psnr']:.4f}", "sigma": "25", "step": str(best["step"])
        }  # fmt: skip


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
    assert "the checkpoints are from a run with other settings: --width was 8 and is 16." in (
        other.stderr
    )
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_dncnn_stops_where_the_loss_does(images):
    out = ("--out", images / "x.safetensors", "--images", images / "train", "--rate", "1e30")
    sizes = ("--depth", 3, "--width", 8, "--steps", 60, "--every", 20, "--batch", 8, "--patch", 24)
    result = run(*out, *sizes, "--test", images / "test")
    assert result.returncode == 1
    assert "expected a finite loss" in result.stderr


def test_dncnn_ends_with_a_message(images):
    folders = ("--images", images / "train", "--test", images / "test")
    result = run(*folders, "--sigma", 30, 20, "--out", images / "x.safetensors")
    assert result.returncode == 1
    assert result.stderr == (
        "--sigma: expected a number in (0, 255], or a range of two, got 30 20.\n"
    )
    assert not (images / "x.safetensors").exists()


@pytest.mark.parametrize("sigma", [(), (0,), (-1,), (256,), (30, 20), (0, 0), (1, 2, 3)])
def test_deviations_out_of_range(module, sigma):
    got = " ".join(map(str, sigma)) or "none"
    with pytest.raises(ValueError, match=rf"--sigma: expected a number in .*, got {got}\."):
        module("_images").checked_sigma(tuple(map(float, sigma)))
    with pytest.raises(ValueError, match="got nan"):
        module("_images").checked_sigma((float("nan"),))


@pytest.mark.parametrize("sigma", [(25,), (0, 55), (10, 10)])
def test_each_patch_has_a_deviation_of_its_own(module, sigma):
    low, high = module("_images").checked_sigma(sigma)
    assert (low, high) == (sigma[0] / 255, sigma[-1] / 255)
    clean = jnp.full((200, 32, 32, 1), 0.5)
    noise = module("_images").add_noise(clean, (low, high), jax.random.key(0)) - clean
    found = np.std(np.asarray(noise, np.float64), axis=(1, 2, 3))
    # 1,024 pixels each: the deviation of a deviation is 1/45 of it.
    assert low * 0.9 <= found.min() <= low + 0.05 * (high - low) + 0.02 * low
    assert high * 0.9 <= found.max() <= high * 1.1
    assert found.mean() == pytest.approx((low + high) / 2, rel=0.1)


@dataclass(frozen=True)
class Numbers:
    """The options of a script's command line."""

    steps: int = 1
    every: int = 1
    patch: int = 1
    seed: int = 0
    batch: int = 8
    rate: float = 0.1
    decay: float = 0.0


def test_batches_that_the_devices_cannot_share(module):
    assert jax.device_count() == 8
    module("_loop").check_numbers(Numbers(batch=16))
    for batch in (0, -8, 12):
        with pytest.raises(SystemExit, match=rf"--batch: .*multiple of the 8 .*got {batch}\."):
            module("_loop").check_numbers(Numbers(batch=batch))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("every", -1), ("patch", 0), ("seed", -1),
        ("rate", np.nan), ("rate", 0.0), ("rate", np.inf), ("decay", np.nan), ("decay", -1.0),
    ],
)  # fmt: skip
def test_numbers_that_no_step_can_be_made_with(module, name, value):
    with pytest.raises(
        SystemExit, match=rf"--{name}: expected .*, got {re.escape(f'{value:g}')}\."
    ):
        module("_loop").check_numbers(Numbers(**{name: value}))


@dataclass(frozen=True)
class Settings:
    """A script's command line."""

    weight_decay: float
    out: Path
    every: int
    checkpoints: Path


def test_a_run_goes_on_with_its_own_settings_only(module, tmp_path, capsys):
    @jax.jit
    def step(carry, batch, key):
        total, own = carry
        own, now = jax.random.split(own)
        return (total + batch.mean() + jax.random.normal(now), own), jax.random.uniform(key)

    def train(folder, steps, *, decay=0.1, every=1, out="a"):
        settings = Settings(decay, Path(out), every, tmp_path / folder)
        return module("_loop").train(
            (jnp.float32(0), jax.random.key(7)),  # a key is an array like any other
            step,
            lambda number: np.full(16, number, np.float32),
            key=jax.random.key(0),
            steps=steps,
            every=every,
            measure=lambda number, carry, rows: {"rows": len(rows)},
            checkpoints=tmp_path / folder,
            config=settings,
        )

    def same(first, second):
        assert jax.tree.map(lambda a, b: bool((a == b).all()), first, second) == (True, True)

    (whole, rows) = train("whole", 5)
    told = capsys.readouterr().out
    assert [json.loads(line) for line in told.splitlines()] == rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["rows"] for row in rows] == [0, 1, 2, 3, 4]
    train("broken", 3)
    # How often, and where to, is free.
    (broken, more) = train("broken", 5, every=2, out="b")
    same(whole, broken)
    assert [row["step"] for row in more] == [1, 2, 3, 4, 5]
    assert more == rows
    (again, _) = train("broken", 5)  # nothing is left to do
    same(whole, again)
    message = r"broken: .*other settings: --weight-decay was 0\.1 and is 0\.2\. Use another folder"
    with pytest.raises(SystemExit, match=message):
        train("broken", 9, decay=0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_step_whose_loss_is_not_finite_is_named(module, tmp_path, value):
    with pytest.raises(SystemExit, match=rf"step 3: expected a finite loss, got {value}\. Not"):
        module("_loop").train(
            jnp.float32(0),
            lambda carry, batch, key: (carry, batch.mean()),
            lambda number: np.full(8, value if number == 3 else 1, np.float32),
            key=jax.random.key(0),
            steps=8,
            every=2,
            measure=lambda *_: {},
            checkpoints=None,
            config=Settings(0.0, tmp_path, 2, tmp_path),
        )


def counted(module, tmp_path, steps, *, out="best", weights=lambda number: number, best=True):
    """A run whose weights are a number, written by each measurement."""
    loop = module("_loop")

    def measure(number, carry, rows):
        loop.write_tensors({"w": np.asarray(carry)}, tmp_path / out, {})
        return {}

    return loop.train(
        jnp.float32(0),
        lambda carry, batch, key: (jnp.float32(weights(float(batch.mean()))), batch.mean()),
        lambda number: np.full(8, number, np.float32),
        key=jax.random.key(0),
        steps=steps,
        every=1,
        measure=measure,
        checkpoints=tmp_path / "kept",
        config=Settings(0.0, tmp_path / out, 1, tmp_path / "kept"),
        best=tmp_path / out if best else None,
    )


def test_weights_that_went_wrong_in_the_last_step_are_not_kept(module, tmp_path):
    def last(number):
        return np.nan if number == 3 else number

    with pytest.raises(SystemExit, match="step 3: expected finite weights, got NaN"):
        counted(module, tmp_path, 3, weights=last)
    assert float(load_file(tmp_path / "best")["w"]) == 2
    assert not (tmp_path / "kept" / "3").exists()


def test_a_run_goes_on_with_the_weights_that_were_best(module, tmp_path):
    counted(module, tmp_path, 2)
    with pytest.raises(SystemExit, match=r"other settings: --out was .*best and is .*other"):
        counted(module, tmp_path, 3, out="other")
    (tmp_path / "best").unlink()
    with pytest.raises(SystemExit, match="best: expected the best weights of the run that"):
        counted(module, tmp_path, 3)


@pytest.mark.parametrize("what", ["rows/metadata", "carry", "rows"])
def test_a_damaged_checkpoint_is_named(module, tmp_path, what):
    counted(module, tmp_path, 2)
    path = tmp_path / "kept" / "2" / what
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text("{")
    with pytest.raises(SystemExit, match=r"kept/2: expected a checkpoint .* Remove that folder"):
        counted(module, tmp_path, 3)


def test_what_cannot_be_written_is_told_before_the_work(module, tmp_path):
    check = module("_loop").check_output
    (tmp_path / "file").write_text("x")
    check(tmp_path / "new" / "x")
    check(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for path, inputs, message in (
        (tmp_path, (), "expected a file to write, got something else"),
        (tmp_path / "pipe", (), "expected a file to write, got something else"),
        (tmp_path / "file" / "x", (), r"--out: .*file: (Not a directory|File exists)"),
        (tmp_path / "file", (tmp_path / "file",), "is also an input, which would be lost"),
    ):
        with pytest.raises(SystemExit, match=message):
            check(path, *inputs)
    folder = tmp_path / "file"
    with pytest.raises(SystemExit, match=r"--checkpoints: .*file: expected a folder"):
        module("_loop")._manager(folder)


def test_outputs_are_for_everybody_and_links_stay(module, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    module("_loop").write_tensors({"w": np.zeros(1, np.float32)}, tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(SystemExit, match="expected finite numbers to write, got NaN or Inf in 'w'"):
        module("_loop").write_tensors({"w": np.array([np.inf])}, tmp_path / "link", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


# --- images ---------------------------------------------------------------------------------------


def test_patches_are_pieces_of_the_images_turned_and_flipped(module):
    image = np.arange(20, dtype=np.uint8).reshape(4, 5, 1)
    patches = module("_images").random_patches([image], 400, 3, np.random.default_rng(0))
    assert patches.shape == (400, 3, 3, 1)
    pieces = [image[top : top + 3, left : left + 3, 0] for top in range(2) for left in range(3)]
    turned = [np.rot90(piece, turns) for piece in pieces for turns in range(4)]
    expected = {m.tobytes() for piece in turned for m in (piece.copy(), piece[:, ::-1].copy())}
    found = {np.round(patch[..., 0] * 255).astype(np.uint8).tobytes() for patch in patches}
    assert found == expected


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_dncnn_learns_blind_denoising_from_a_data_set(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder, out = DATA / "tfds" / "cifar10", tmp_path / "blind.safetensors"
    result = run(
        *("--images", folder, "--test", folder, "--tests", 8, "--colour", "--sigma", 0, 55),
        *("--patch", 32, "--depth", 3, "--width", 8, "--steps", 40, "--every", 20, "--batch", 8),
        *("--out", out),
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sorted(row) for row in rows] == [["loss", "psnr", "ssim", "step"]] * 2
    # Tests have the middle of the range: noisy images 20·log10(255/27.5) = 19.34.
    assert 19 < rows[-1]["psnr"] < 25
    assert 0 < rows[-1]["ssim"] < 1
    model = model_of(load_file(out))
    assert (len(model.convs), model.channels) == (3, 3)
    with safe_open(out, framework="np") as file:
        assert file.metadata()["sigma"] == "0 55"


# --- VGG19 on CIFAR -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_vgg19_goes_on_after_a_stop(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")

    def train() -> subprocess.CompletedProcess:
        return run(
            *("--data", DATA / "tfds", "--out", tmp_path / "x.safetensors"),
            *("--checkpoints", tmp_path / "kept", "--steps", 6, "--every", 2),
            *("--width", 0.05, "--batch", 16, "--tests", 100),
            script="vgg19.py",
        )

    whole = train()
    assert whole.returncode == 0, whole.stderr
    rows = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    weights = load_file(tmp_path / "x.safetensors")
    shutil.rmtree(tmp_path / "kept" / "6")  # as if it had been stopped before
    again = train()
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(tensor, weights[name])
    model = VGG19(width=0.05, rngs=nnx.Rngs(0))
    nnx.update(model, from_torch(model, weights))


@pytest.mark.data
@needs_data
def test_batches_of_cifar_follow_from_seed_and_number(module):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")
    cifar = module("_cifar")

    def batches(seed, augment):
        return cifar.batches(DATA / "tfds" / "cifar10", 16, seed=seed, augment=augment)

    first, again, other = (batches(seed, True)[40_000] for seed in (0, 0, 1))
    assert (first["image"].shape, first["image"].dtype) == ((16, 32, 32, 3), np.uint8)
    assert first["label"].dtype == np.int32
    np.testing.assert_array_equal(first["image"], again["image"])
    assert (first["image"] != other["image"]).any()
    # The same images, as they are.
    plain = batches(0, False)[40_000]
    np.testing.assert_array_equal(plain["label"], first["label"])
    assert (plain["image"] != first["image"]).any()


def small_dncnn(seed: int, *, depth: int = 3) -> DnCNN:
    return DnCNN(depth, 4, channels=1, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))


@pytest.mark.slow
def test_training_starts_from_a_checkpoint(tmp_path, module):
    started, public = module("_loop").started, small_dncnn(0)
    module("_loop").write_tensors(to_torch(public), tmp_path / "public.safetensors", {})
    untouched = small_dncnn(1)
    assert started(untouched, None) is untouched
    found = to_torch(started(small_dncnn(1), tmp_path / "public.safetensors"))
    for name, tensor in to_torch(public).items():
        np.testing.assert_array_equal(found[name], tensor)
    with pytest.raises(ValueError, match=r"--start: .*expected the network that the other options"):
        started(small_dncnn(1, depth=4), tmp_path / "public.safetensors")
    with pytest.raises(ValueError, match="expected a checkpoint of VGG19"):
        started(VGG19(10, width=0.02, rngs=nnx.Rngs(0)), tmp_path / "public.safetensors")
    with pytest.raises((ValueError, OSError), match="missing"):
        started(small_dncnn(1), tmp_path / "missing.safetensors")
