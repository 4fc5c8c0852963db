"""The scripts for importance and the quality of levels, run as a user runs them, on tiny data."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import skimage.metrics
from flax import nnx
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch_oracle import dncnn_checkpoint, torch_checkpoint, vgg_layers, without_counters

import selcrypt_jax as sj
from selcrypt_jax import cli
from selcrypt_jax._importance.gates import probability_open
from selcrypt_jax.models import VGG19, model_of, to_torch
from selcrypt_jax.models._files import read_cifar

# Nobody trained the networks of these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*is no better than with noise")

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("SELCRYPT_DATA", "")).absolute()
needs_data = pytest.mark.skipif(
    "SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set"
)


def run(script: str, *args, fails: str | None = None) -> list[dict]:
    """Rows of a script; or checks that it ends with a message."""
    command = [sys.executable, str(ROOT / "train" / script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == (fails is not None), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert (fails or "") in result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the scripts, to call functions that a script reaches slowly."""
    monkeypatch.syspath_prepend(ROOT / "train")
    # The scripts run with JAX's defaults, not with the tests' strict ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module


def trained():
    """Tensors of a small network, as if it were trained: its estimate is a small part."""
    tensors = without_counters(dncnn_checkpoint(3, 16, 1))
    return tensors | {"dncnn.5.weight": tensors["dncnn.5.weight"] * np.float32(0.2)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Images, and tiny networks of random weights, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("images").mkdir()
    for index in range(2):
        # Smooth, so that SSIM is neither 0 nor 1.
        image = np.kron(rng.integers(0, 255, (6, 7)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(image).save(f"images/{index}.png")
    save_file(trained(), "dncnn.safetensors")
    return tmp_path


# --- importance ---------------------------------------------------------------------------------

LEARN = (
    *("dncnn", "--weights", "dncnn.safetensors", "--images", "images"),
    *("--sigma", 5, 40, "--patch", 24),
)


@pytest.mark.slow
def test_scores_say_what_is_encrypted(capsys):
    rows = run("importance.py", *LEARN, "--steps", 8, "--every", 4, "--out", "new/s.safetensors")
    assert [row["step"] for row in rows] == [4, 8]
    assert all(sorted(row) == ["loss", "open", "step"] for row in rows)
    scores, tensors = load_file("new/s.safetensors"), load_file("dncnn.safetensors")
    # The kernels of the convolutions, a score each.
    assert {name: score.shape for name, score in scores.items()} == {
        "dncnn.0.weight": (16, 1, 1, 1),
        "dncnn.2.weight": (16, 16, 1, 1),
        "dncnn.5.weight": (1, 16, 1, 1),
    }
    assert len(np.unique(scores["dncnn.2.weight"])) > 100
    expected = sum(float(probability_open(score).sum()) for score in scores.values())
    assert rows[-1]["open"] == pytest.approx(expected, rel=1e-5)
    with safe_open("new/s.safetensors", framework="np") as file:
        assert file.metadata() == {
            "importance": "PSS, break, kernel", "steps": "8", "penalty": "0.001", "seed": "0",
        }  # fmt: skip

    secret = sj.Secret.generate()
    secret.write("secret.key")
    chosen = sj.protect_file(
        "dncnn.safetensors",
        "public.safetensors",
        secret=secret,
        levels=[0.25, 0.5],
        selection=sj.Select(importance="new/s.safetensors", small=0),
        rest="plain",
    )
    assert chosen.groups == {"dncnn.0.weight": 8, "dncnn.2.weight": 128, "dncnn.5.weight": 8}
    options = "--secret secret.key --importance new/s.safetensors --budget 0.5 --levels 2 --small 0"
    options += " --rest plain"
    assert cli.main(f"protect dncnn.safetensors -o cli.safetensors {options}".split()) == 0
    capsys.readouterr()
    for path in ("public.safetensors", "cli.safetensors"):
        opened = sj.open_model(path)
        for name, count in chosen.groups.items():
            # Which kernels are not what they were.
            changed = (opened[name] != tensors[name]).any((2, 3), keepdims=True)
            assert changed.sum() == count
            assert scores[name][changed].min() >= scores[name][~changed].max()
        for name in tensors.keys() - scores.keys():
            np.testing.assert_array_equal(opened[name], tensors[name])
    # The first level gives back the most important ones.
    first = sj.open_model(
        "public.safetensors",
        sj.issue_grant("public.safetensors", level=1, secret=secret, signer="unsigned"),
    )
    closed = (first["dncnn.2.weight"] != tensors["dncnn.2.weight"]).any((2, 3), keepdims=True)
    assert closed.sum() == 64
    score = scores["dncnn.2.weight"]
    assert np.sort(score[~closed])[-64:].min() >= score[closed].max()


@pytest.mark.slow
def test_importance_at_shares():
    options = ("--shares", 0.01, 0.1, "--steps", 8, "--every", 4, "--out", "scores.safetensors")
    rows = run("importance.py", *LEARN, *options)
    groups = 16 + 16 * 16 + 16
    assert [row["included"] for row in rows] == [groups // 100, groups // 10]
    scores = np.concatenate([s.ravel() for s in load_file("scores.safetensors").values()])
    assert (scores > 1.5).sum() == groups // 100
    assert (scores > 0.5).sum() == groups // 10
    with safe_open("scores.safetensors", framework="np") as file:
        assert file.metadata() == {
            "importance": "PSS, 0.01, 0.1, kernel", "steps": "8", "scope": "model", "seed": "0",
        }  # fmt: skip


@pytest.mark.slow
def test_importance_killed_at_random_ends_as_an_unbroken_run():
    """Killed at any point of a step or checkpoint, with checkpoints at varying intervals."""

    def command(name: str, every: int) -> list[str]:
        out = ("--out", f"{name}.safetensors", "--checkpoints", f"{name}.kept")
        command = [*LEARN, "--steps", 60, "--every", every, "--seed", 3, *out]
        return [sys.executable, str(ROOT / "train" / "importance.py"), *map(str, command)]

    def end(command: list[str]) -> dict[int, str]:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return {json.loads(line)["step"]: line for line in result.stdout.splitlines()}

    whole = end(command("whole", 1))
    assert list(whole) == list(range(1, 61))
    rng = np.random.default_rng(0)
    killed, seen = 0, 0
    for _ in range(10):
        process = subprocess.Popen(
            command("broken", int(rng.integers(1, 4))),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        # Until some measurements that are new; those before are told again at the start.
        new = int(rng.integers(0, 4))
        while new and (line := process.stdout.readline()):
            step = json.loads(line)["step"]
            assert line.strip() == whole[step]
            if step > seen:
                seen, new = step, new - 1
        time.sleep(rng.uniform(0, 0.05))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert killed >= 8
    assert not Path("broken.safetensors").exists()
    broken = end(command("broken", 2))
    assert broken.items() <= whole.items()
    assert list(broken)[-1] == 60
    # Not the files' bytes: safetensors writes metadata in any order.
    first, second = load_file("whole.safetensors"), load_file("broken.safetensors")
    assert {name: score.tobytes() for name, score in first.items()} == {
        name: score.tobytes() for name, score in second.items()
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--batch", "12"), "and a multiple of the 8 devices, got 12"),
        (("--rate", "nan"), "--rate: expected a number above 0, got nan"),
        (("--out", "dncnn.safetensors"), "is also an input, which would be lost"),
        (("--weights", "."), ".: expected one .safetensors file, got a folder"),
        (("--steps", "0"), "steps: expected at least 1, got 0"),
        (("--every", "0"), "--every: expected at least 1, got 0"),
        (("--penalty", "-1"), "penalty: expected at least 0, got -1.0"),
        (("--cap", "0"), "cap: expected a positive loss, got 0"),
        (("--select", "("), "--select: expected a regular expression, got '('"),
        (("--select", "classifier"), "matches no leaf"),
        (("--patch", "64"), "expected at least 64×64 pixels, got 56×48"),
        (("--sigma", "0"), "--sigma: expected a number in (0, 255]"),
        (("--weights", "images/0.png"), "images/0.png: expected a .safetensors file: "),
        (("--weights", "nothing"), "nothing: expected a .safetensors file: "),
        (("--weights", "public.safetensors"), "public.safetensors: expected a trained network, "),
    ],
)
def test_what_is_wrong_with_importance_is_named(module, option, message):
    importance = module("importance")
    tensors = load_file("dncnn.safetensors")
    save_file(tensors, "public.safetensors", metadata={"selcrypt": "{}"})
    arguments = {
        "weights": Path("dncnn.safetensors"), "images": Path("images"), "out": Path("x"),
        "patch": 24, "steps": 2,
    }  # fmt: skip
    name, value = option[0].removeprefix("--"), option[1]
    kinds = {
        "weights": Path,
        "out": Path,
        "rate": float,
        "select": str,
        "sigma": lambda text: (float(text),),
        "penalty": float,
    }
    arguments[name] = kinds.get(name, int)(value)
    with pytest.raises(SystemExit) as caught:
        importance.main(importance.Dncnn(**arguments))
    assert message in str(caught.value)
    assert not Path("x").exists()


def test_batches_of_patches_follow_from_seed_and_number(module):
    tasks = module("_tasks")
    save_file(dncnn_checkpoint(3, 4, 3), "colour.safetensors")

    def batch(number, *, seed=0, **options):
        options = {"batch": 4, "patch": 16, "sigma": (0.0, 50.0)} | options
        task = tasks.DncnnTask(weights=Path("colour.safetensors"), images=Path("images"), **options)
        return jax.tree.map(np.asarray, task.task(seed).batch(number))

    first = batch(5)
    assert {name: array.shape for name, array in first.items()} == {
        "clean": (4, 16, 16, 3), "noisy": (4, 16, 16, 3)
    }  # fmt: skip
    for name, array in batch(5).items():
        np.testing.assert_array_equal(array, first[name])
    assert all((batch(*number)["clean"] != first["clean"]).any() for number in ((4,), (6,)))
    assert (batch(5, seed=1)["clean"] != first["clean"]).any()
    Path("images/0.png").unlink()
    red = np.zeros((48, 48, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save("images/1.png")
    assert batch(1)["clean"][0, 0, 0].tolist() == [1, 0, 0]
    assert batch(1, bgr=True)["clean"][0, 0, 0].tolist() == [0, 0, 1]


# --- importance of a network of your own --------------------------------------------------------

MINE = """
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(1)
# Whatever a batch is made of; the last input is always zero.
batches = {"x": rng.standard_normal((3, 16, 4)).astype(np.float32) * [1, 1, 1, 0],
           "y": rng.integers(0, 5, (3, 16)), "scale": np.linspace(1, 2, 3, dtype=np.float32)}
batches["x"] = batches["x"].astype(np.float32)


def batch(number):
    return jax.tree.map(lambda leaf: leaf[(number - 1) % 3], batches)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["hidden"].T) * batch["scale"]
    logits = jax.nn.log_softmax(hidden @ params["out.weight"].T + params["out.bias"])
    return -jnp.mean(logits[jnp.arange(16), batch["y"]])


def scanned(params, batch):
    def one(total, example):
        hidden = params["hidden"] @ example.reshape(2, 2).reshape(4)
        return total + jnp.sum(jnp.tanh(hidden)), None

    total, _ = jax.lax.scan(one, jnp.float32(0), batch["x"][:3])
    return total**2 + jnp.sum(params["out.bias"])
"""


@pytest.fixture
def mine():
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.standard_normal((8, 4)).astype(np.float32),
        "out.weight": rng.standard_normal((5, 8)).astype(np.float32),
        "out.bias": np.ones(5, np.float32),
        "classes": np.arange(5),
    }
    save_file(params, "mine.safetensors")
    Path("my_losses.py").write_text(MINE)
    names: dict = {}
    exec(MINE, names)
    np.savez("batches.npz", **names["batches"])
    return params, names


CUSTOM = ("custom", "--weights", "mine.safetensors", "--loss", "my_losses:loss_fn")


def learned_directly(mine, **options):
    """Computed by the library, without the script."""
    params, names = mine
    penalty = options.pop("penalty", 1e-3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return sj.pss(
            names["loss_fn"],
            params,
            names["batches"],
            config=sj.PSSConfig(
                options.pop("objective", "break"),
                steps=10,
                penalty=penalty,
                optimizer=optax.adam(0.05, eps=penalty / 10),
            ),
            **options,
        )


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["my_losses:batch", "my_losses:batches", "batches.npz"])
def test_scores_of_a_network_of_ones_own_are_those_of_the_library(mine, batches):
    out = ("--out", "s.safetensors", "--steps", 10, "--rate", 0.05, "--seed", 7)
    rows = run("importance.py", *CUSTOM, "--batches", batches, *out)
    assert [row["step"] for row in rows] == [10]
    found = load_file("s.safetensors")
    scores = learned_directly(mine, key=jax.random.key(7), layout="OIHW")
    assert set(found) == {"hidden", "out.weight"}
    assert (scores["out.bias"], scores["classes"]) == (False, False)
    for name, score in found.items():
        assert score.shape == mine[0][name].shape
        # The script's batches lie on several devices: sums are in another order.
        np.testing.assert_allclose(score, scores[name], atol=1e-4)
    # An input that is always zero has nothing to break: the price of its gates alone moves them,
    # all alike, and by less than Adam's rate a step. What matters has moved away from there.
    unused, used = found["hidden"][:, 3], found["hidden"][:, :3]
    assert np.ptp(unused) == 0
    assert -3.5 - 10 * 0.05 <= unused[0] < -3.5
    assert used.max() > unused[0] + 0.2


@pytest.mark.slow
def test_options_for_a_network_of_ones_own(mine):
    """In JAX's layout a row is an input, and a filter is a column."""
    options = ("--select", "^hidden$", "--granularity", "filter", "--layout", "HWIO")
    out = ("--out", "s.safetensors", "--steps", 10, "--rate", 0.05, "--objective", "keep")
    run("importance.py", *CUSTOM, "--batches", "batches.npz", *out, *options)
    found = load_file("s.safetensors")
    scores = learned_directly(
        mine,
        key=jax.random.key(0),
        select="^hidden$",
        granularity="filter",
        layout="HWIO",
        objective="keep",
        penalty=1e-6,
    )
    assert {name: score.shape for name, score in found.items()} == {"hidden": (1, 4)}
    np.testing.assert_allclose(found["hidden"], scores["hidden"], atol=1e-4)


def test_batches_of_ones_own_come_in_turn(module, mine, monkeypatch):
    tasks = module("_tasks")
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    _, names = mine
    for batches in ("batches.npz", "my_losses:batches", "my_losses:batch"):
        task = tasks.CustomTask(
            weights=Path("mine.safetensors"), loss="my_losses:loss_fn", batches=batches
        ).task(0)
        assert task.model is None
        assert set(task.params) == {"hidden", "out.weight", "out.bias", "classes"}
        for number in range(1, 8):
            found = task.batch(number)
            for name, array in names["batches"].items():
                np.testing.assert_array_equal(found[name], array[(number - 1) % 3])


def test_losses_may_do_what_jax_can(module, mine, monkeypatch):
    """Index, reshape and scan, although batches are spread over the devices."""
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    importance = module("importance")
    importance.main(
        importance.Custom(
            weights=Path("mine.safetensors"), loss="my_losses:scanned",
            batches="my_losses:batches", steps=1, out=Path("s.safetensors"),
        )
    )  # fmt: skip
    assert set(load_file("s.safetensors")) == {"hidden", "out.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "loss_fn"}, "--loss: expected an import path module:function, got 'loss_fn'"),
        ({"loss": "./my_losses:loss_fn"}, "--loss: expected an import path .*, got './my_losses:l"),
        ({"loss": "no_such_module:f"}, "expected 'no_such_module:f' to import, got ModuleNotFound"),
        (
            {"loss": "my_losses:nothing"},
            "AttributeError: module 'my_losses' has no attribute 'nothing'",
        ),
        (
            {"loss": "my_losses:batches"},
            "--loss: expected a function, got 'my_losses:batches', which is dict",
        ),
        ({"batches": "batches"}, "--batches: expected an import path .*, got 'batches'"),
        ({"batches": "my_losses:rng"}, "--batches: expected arrays .*, got first axes"),
        ({"batches": "none.npz"}, "--batches: none.npz: .*No such file"),
        ({"batches": "empty.npz"}, "--batches: empty.npz: "),
        ({"batches": "short.npz"}, "--batches: short.npz: "),
        ({"batches": "array.npz"}, "--batches: array.npz: "),
        ({"batches": "uneven.npz"}, r"got first axes \[\(2,\), \(3,\)\]"),
        ({"batches": "nothing.npz"}, "got first axes of nothing"),
        ({"batches": "none_of_it.npz"}, r"got first axes \[\(0,\)\]"),
        ({"weights": Path("batches.npz")}, "batches.npz: expected a .safetensors file"),
    ],
)
def test_what_is_wrong_with_a_network_of_ones_own_is_named(
    module, mine, monkeypatch, options, message
):
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    Path("empty.npz").write_bytes(b"")
    Path("short.npz").write_bytes(Path("batches.npz").read_bytes()[:100])
    with Path("array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    np.savez("uneven.npz", x=np.ones((2, 3)), y=np.ones(3))
    np.savez("nothing.npz")
    np.savez("none_of_it.npz", x=np.ones((0, 3)))
    given = {
        "weights": Path("mine.safetensors"),
        "loss": "my_losses:loss_fn",
        "batches": "my_losses:batches",
    }
    with pytest.raises(ValueError, match=message):
        module("_tasks").CustomTask(**given | options).task(0)


# --- what each level gives ----------------------------------------------------------------------


SECRET = sj.Secret(bytes(range(32)))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with a file, its secret and a grant; and what is wrong with each of them."""
    folder = tmp_path_factory.mktemp("released")
    save_file(trained(), folder / "plain")
    for name, shares in (("public", [0.2, 0.5]), ("other", [0.5])):
        path = folder / f"{name}.safetensors"
        sj.protect_file(folder / "plain", path, secret=SECRET, levels=shares)
        grant = sj.issue_grant(path, level=1, secret=SECRET, signer="unsigned")
        grant.write(folder / ("1.grant" if name == "public" else "other.grant"))
    SECRET.write(folder / "secret.key")
    sj.Secret.generate().write(folder / "other.key")
    whole = (folder / "public.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    # A bit of a weight, and it is not what the owner released.
    (folder / "changed.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    save_file(torch_checkpoint(vgg_layers((1, 1, 1, 1), 1, True)), folder / "vgg.safetensors")
    (folder / "tiny").mkdir()
    Image.new("L", (10, 12)).save(folder / "tiny" / "0.png")
    return folder


@pytest.fixture
def protected(here, released):
    shutil.copytree(released, here, dirs_exist_ok=True)
    return SECRET


EVALUATE = ("evaluate.py", "dncnn", "--images", "images", "--sigma", 20, "--seed", 4)


def by_hand(path: str, *, grant: str | None = None) -> dict[str, float]:
    """PSNR by NumPy and SSIM by scikit-image, with the same noise."""
    tensors = load_file(path) if grant is None else sj.open_model(path, grant)
    model = model_of(tensors)
    model.eval()
    rows = []
    for index in range(2):
        clean = np.asarray(Image.open(f"images/{index}.png")) / np.float32(255)
        key = jax.random.fold_in(jax.random.key(4), index)
        noise = np.asarray(jax.random.normal(key, (1, *clean.shape, 1)))
        noisy = clean[None, ..., None] + np.float32(20 / 255) * noise
        output = np.asarray(model(jnp.asarray(noisy)))[0, ..., 0].astype(np.float64)
        similarity = skimage.metrics.structural_similarity(
            clean.astype(np.float64),
            output.clip(0, 1),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        rows.append((-10 * np.log10(np.mean((output - clean) ** 2)), similarity))
    psnr, ssim = np.mean(rows, axis=0)
    return {"psnr": psnr, "ssim": ssim}


@pytest.mark.slow
def test_every_level_is_measured(module, protected, capsys):
    rows = run(*EVALUATE, "--file", "public.safetensors", "--secret", "secret.key", "--out", "a/b")
    assert [row["level"] for row in rows] == [0, 1, 2]
    assert len({row["psnr"] for row in rows}) == 3
    for row, options in zip(
        rows, ({}, {"grant": "1.grant"}, {"path": "dncnn.safetensors"}), strict=True
    ):
        expected = by_hand(**{"path": "public.safetensors"} | options)
        assert row["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
        assert row["ssim"] == pytest.approx(expected["ssim"], abs=1e-4)
        assert 0.1 < row["ssim"] < 0.95
    # The same of all files, in words too.
    assert json.loads(Path("a/b/levels.json").read_text()) == rows
    table = Path("a/b/levels.md").read_text().splitlines()
    assert table[:2] == ["| level | PSNR / dB | SSIM |", "|---|---|---|"]
    for name, row, line in zip(("0, no key", "1", "2"), rows, table[2:], strict=True):
        assert line == f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} |"
    with Image.open("a/b/levels.png") as figure:
        assert min(figure.size) > 300

    def measured(**options):
        evaluate = module("evaluate")
        config = evaluate.Dncnn(images=Path("images"), sigma=20.0, seed=4, **options)
        found = evaluate.measured(config)
        told = capsys.readouterr().out.splitlines()
        assert [json.loads(line) for line in told] == found
        return found

    # One process with all of them, so that the same weights give the same bits.
    public = Path("public.safetensors")
    every = measured(file=public, secret=Path("secret.key"))
    assert measured(file=public, grant=Path("1.grant")) == every[:2]
    assert measured(file=public) == every[:1]
    plain = measured(file=Path("dncnn.safetensors"))
    assert plain == [every[2] | {"level": None}]
    assert measured(file=Path("dncnn.safetensors"), tests=1) != plain
    for row, other in zip(rows, every, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_file_that_is_not_protected_has_one_row(module):
    evaluate = module("evaluate")
    file, images = Path("dncnn.safetensors"), Path("images")
    evaluate.main(evaluate.Dncnn(file=file, images=images, sigma=20.0, seed=4, out=Path("out")))
    (row,) = json.loads(Path("out/levels.json").read_text())
    expected = by_hand("dncnn.safetensors")
    assert row["level"] is None
    assert row["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
    assert row["ssim"] == pytest.approx(expected["ssim"], abs=1e-4)
    assert "| not protected | " in Path("out/levels.md").read_text()


def test_levels_of_a_checkpoint_in_several_files(module):
    tensors = load_file("dncnn.safetensors")
    names = sorted(tensors)
    Path("parts").mkdir()
    where = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in
             enumerate(names)}  # fmt: skip
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, f"parts/{file}")
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    Path("parts/model.safetensors.index.json").write_text(json.dumps(index))
    secret = sj.Secret.generate()
    secret.write("secret.key")
    sj.protect_file(
        "parts",
        "public",
        secret=secret,
        levels=[0.2, 0.5],
        selection=sj.Select(small=0),
        rest="plain",
    )
    evaluate = module("evaluate")
    config = evaluate.Dncnn(file=Path("public"), secret=Path("secret.key"), images=Path("images"))
    levels = evaluate.levels_of(config)
    assert [level for level, _ in levels] == [0, 1, 2]
    assert all(set(opened) == set(names) for _, opened in levels)
    for name in names:
        np.testing.assert_array_equal(levels[2][1][name], tensors[name])
        assert ((levels[0][1][name] != tensors[name]).any()) == (tensors[name].ndim == 4)


def test_a_locked_secret_opens_with_its_passphrase(module, protected):
    evaluate = module("evaluate")
    protected.write("locked.key", passphrase="open sesame")
    Path("words").write_text("open sesame\n")
    config = evaluate.Dncnn(
        file=Path("public.safetensors"), images=Path("images"), secret=Path("locked.key"),
        passphrase_file=Path("words"),
    )  # fmt: skip
    assert [level for level, _ in evaluate.levels_of(config)] == [0, 1, 2]


def test_what_is_not_finite_is_null(module, capsys):
    evaluate = module("evaluate")
    tensors = load_file("dncnn.safetensors")
    tensors["dncnn.0.weight"] = tensors["dncnn.0.weight"] * np.float32(np.nan)
    save_file(tensors, "nan.safetensors")
    config = evaluate.Dncnn(file=Path("nan.safetensors"), images=Path("images"))
    with pytest.raises(ValueError, match=r"'dncnn\.0\.weight': expected finite weights, got NaN"):
        evaluate.measured(config)
    # Broken by encryption it may be: that is a result.
    secret = sj.Secret.generate()
    sj.protect_file(
        "nan.safetensors",
        "public.safetensors",
        secret=secret,
        levels=[0.5],
        selection=sj.Select(select="dncnn.2"),
        rest="plain",
    )
    config = evaluate.Dncnn(
        file=Path("public.safetensors"), images=Path("images"), out=Path("levels")
    )
    evaluate.main(config)
    assert json.loads(capsys.readouterr().out) == {"level": 0, "psnr": None, "ssim": None}
    assert "| 0, no key | not finite | not finite |" in Path("levels/levels.md").read_text()


def test_what_cannot_be_written_is_told_before_measuring(module, protected):
    evaluate = module("evaluate")
    Path("file").write_text("x")
    Path("folder/levels.md").mkdir(parents=True)
    for out in ("file", "file/x", "folder"):
        config = evaluate.Dncnn(
            file=Path("public.safetensors"), images=Path("images"), out=Path(out)
        )
        with pytest.raises(SystemExit, match="--out: "):
            evaluate.main(config)
    assert [path.name for path in Path("folder").iterdir()] == ["levels.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret": "secret.key", "grant": "1.grant"}, "--secret, --grant: expected one of them"),
        ({"secret": "other.key"}, "does not open"),
        ({"secret": "1.grant"}, "1.grant: expected a secret, .* got a grant"),
        ({"grant": "secret.key"}, "secret.key: expected a grant, .* got a secret"),
        ({"secret": "nothing.key"}, "nothing.key"),
        ({"grant": "other.grant"}, "public.safetensors: .*but the grant is for model"),
        ({"file": "dncnn.safetensors", "secret": "secret.key"}, "expected a protected file, got a"),
        ({"file": "dncnn.safetensors", "grant": "1.grant"}, "expected a protected file, got a pla"),
        ({"file": "nothing.safetensors"}, "nothing.safetensors: expected a .safetensors file: "),
        ({"file": "images/0.png"}, "images/0.png"),
        (
            {"file": "vgg.safetensors"},
            "vgg.safetensors: expected a checkpoint of DnCNN, got one of",
        ),
        ({"file": "cut.safetensors"}, "cut.safetensors"),
        ({"file": "changed.safetensors", "secret": "secret.key"}, "changed.safetensors"),
        ({"images": "nothing"}, "nothing: expected images"),
        ({"images": "tiny"}, "at least 11×11 pixels, got 10×12"),
        ({"sigma": -1.0}, "--sigma: expected a number in"),
        ({"eps": 0.0}, "public.safetensors: DnCNN: expected .* eps > 0"),
        ({"tests": 0}, "tests: expected at least 1, got 0"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_named(module, protected, options, message):
    evaluate = module("evaluate")
    given = {"file": "public.safetensors", "images": "images"} | options
    paths = {name: Path(v) for name, v in given.items() if isinstance(v, str)}
    with pytest.raises(SystemExit, match=message):
        evaluate.main(evaluate.Dncnn(**given | paths))


# --- VGG19 on CIFAR -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_importance_and_levels_of_vgg19(module, capsys):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")
    data = DATA / "tfds"
    model = VGG19(width=0.1, rngs=nnx.Rngs(jax.random.key(1, impl="rbg")))
    save_file(to_torch(model), "vgg.safetensors")
    weights = ("--weights", "vgg.safetensors", "--data", data, "--batch", 16)
    out = ("--steps", 3, "--every", 1, "--out", "s.safetensors")
    rows = run("importance.py", "vgg19", *weights, *out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # About log 10, of a network that was never trained.
    assert all(1 < row["loss"] < 10 for row in rows)
    scores, tensors = load_file("s.safetensors"), load_file("vgg.safetensors")
    convolutions = {name for name, tensor in tensors.items() if tensor.ndim == 4}
    assert len(convolutions) == 16
    assert {name: score.shape for name, score in scores.items()} == {
        name: (*tensors[name].shape[:2], 1, 1) for name in convolutions
    }
    run(
        *("importance.py", "vgg19", *weights, "--steps", 1, "--out", "head.safetensors"),
        *("--select", r"^classifier\.\d\.weight", "--granularity", "filter"),
    )
    assert {name: score.shape for name, score in load_file("head.safetensors").items()} == {
        "classifier.1.weight": (51, 1), "classifier.4.weight": (51, 1),
        "classifier.6.weight": (10, 1),
    }  # fmt: skip

    secret = sj.Secret.generate()
    secret.write("secret.key")
    chosen = sj.protect_file(
        "vgg.safetensors",
        "public.safetensors",
        secret=secret,
        levels=[0.1, 0.3],
        selection=sj.Select(importance="s.safetensors", scope="model", small=0),
    )
    assert set(chosen.groups) <= convolutions
    found = run(
        *("evaluate.py", "vgg19", "--file", "public.safetensors", "--secret", "secret.key"),
        *("--data", data, "--tests", 50, "--out", "out"),
    )
    assert [row["level"] for row in found] == [0, 1, 2]
    images, labels = read_cifar(data / "cifar10", "test", 50)
    model.eval()
    logits = model(jnp.asarray((images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
                               jnp.float32))  # fmt: skip
    expected = float(np.mean(np.asarray(logits).argmax(-1) == labels))
    assert found[-1] == {"level": 2, "accuracy": pytest.approx(expected)}
    lines = Path("out/levels.md").read_text().splitlines()
    assert lines[-1] == f"| 2 | {100 * expected:.2f} % |"
    (plain,) = run(
        *("evaluate.py", "vgg19", "--file", "vgg.safetensors", "--data", data, "--tests", 50)
    )
    assert plain == {"level": None, "accuracy": found[-1]["accuracy"]}
    run(
        *("evaluate.py", "vgg19", "--file", "dncnn.safetensors", "--data", data),
        fails="dncnn.safetensors: expected a checkpoint of VGG19, got one of DnCNN",
    )
