"""Sealed files: level 1 removes the seal, and the other levels build on it."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from torch_oracle import dncnn_checkpoint, torch_checkpoint, vgg_layers

from selcrypt_jax import (
    IntegrityError,
    LazyModel,
    LosslessCipher,
    Secret,
    Select,
    SigningKey,
    Targets,
    WindowCipher,
    decrypt,
    inspect_file,
    level_key,
    open_model,
    protect,
    protect_file,
    ring_keys,
    rotate_file,
    unlock,
    unlock_file,
    verify_file,
)
from selcrypt_jax._io.safetensors import SafetensorsFile
from selcrypt_jax.models import model_of

SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(32))
LEVELS = [0.1, 0.2, 0.3]
rng = np.random.default_rng(0)
TENSORS = {
    "conv.weight": (0.1 * rng.standard_normal((32, 16, 3, 3))).astype(np.float32),
    "large": rng.standard_normal((1200, 1000)).astype(np.float32),  # more than one digest
    "norm.running_var": rng.uniform(0.1, 9, 16).astype(np.float32),
    "half": rng.standard_normal((64, 40)).astype(np.float16),
    "steps": np.array(7, np.int64),
    "flags": rng.random(50) < 0.5,
    "empty": np.zeros((0, 3), np.float32),
}
SELECT = Select(select="weight|large", layout="OIHW")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    safetensors.numpy.save_file(TENSORS, tmp_path / "plain")
    return tmp_path / "plain"


def keys(path: Path, levels: int = 3):
    model_id = bytes.fromhex(inspect_file(path).model_id)
    return [level_key(SECRET, model_id, level=m, levels=levels) for m in range(1, levels + 1)]


@pytest.mark.parametrize(
    "cipher", [LosslessCipher(), LosslessCipher("group"), LosslessCipher(permute=False)], ids=str
)
def test_nothing_is_plain_and_the_top_level_is_the_original(plain, tmp_path, cipher):
    protect_file(
        plain, tmp_path / "p", secret=SECRET, levels=LEVELS, selection=SELECT, cipher=cipher
    )
    shipped = open_model(tmp_path / "p")
    for name, leaf in TENSORS.items():
        assert shipped[name].dtype == leaf.dtype
        if leaf.size > 1 and leaf.dtype != bool:
            same = shipped[name] == leaf
            assert same.mean() < 0.01, name
            assert np.isfinite(shipped[name]).all()
    assert (shipped["norm.running_var"] > 0).all()
    assert set(np.unique(shipped["flags"].view(np.uint8))) <= {0, 1}
    opened = [open_model(tmp_path / "p", key) for key in keys(tmp_path / "p")]
    for name, leaf in TENSORS.items():
        assert opened[2][name].tobytes() == leaf.tobytes()
        if name not in ("conv.weight", "large"):
            assert opened[0][name].tobytes() == leaf.tobytes()
    wrong = [int((found["large"] != TENSORS["large"]).sum()) for found in opened]
    assert wrong[0] == pytest.approx(0.2 * 1_200_000, rel=0.02)
    assert wrong[1] == pytest.approx(0.1 * 1_200_000, rel=0.02)


needs_data = pytest.mark.skipif("SELCRYPT_DATA" not in os.environ, reason="no SELCRYPT_DATA")
NETWORKS = {
    "VGG19 of 16 channels": lambda: torch_checkpoint(vgg_layers((2, 4, 8, 16), 16, True)),
    "DnCNN of 6 channels": lambda: dncnn_checkpoint(17, 6, 1, batch_norm=True),
}
TRAINED = ("vgg19_cifar10", "dncnn_color_paper/dncnn_color_sigma50", "dncnn_gray/dncnn_s25")


@pytest.mark.parametrize(
    "network",
    [*NETWORKS, *(pytest.param(name, marks=[needs_data, pytest.mark.slow]) for name in TRAINED)],
)
def test_a_sealed_network_runs_without_a_key(tmp_path, network):
    """Useless, but finite: a program that expects finite numbers does not stop."""
    if network in NETWORKS:
        plain, size = tmp_path / "plain", 32 if "VGG" in network else 40
        safetensors.numpy.save_file(NETWORKS[network](), plain)
    else:
        plain = Path(os.environ["SELCRYPT_DATA"]) / f"{network}.safetensors"
        size = 32 if "vgg" in network else 40
    options = {"levels": 1 if network in NETWORKS else 5, "selection": Select(layout="OIHW")}
    for number in range(3):
        secret = Secret(bytes([number]) * 32)
        protect_file(plain, tmp_path / "p", secret=secret, force=True, **options)
        sealed = open_model(tmp_path / "p")
        wide = {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in sealed.items()}
        model = model_of(wide)
        model.eval()
        channels = next(array for array in wide.values() if array.ndim == 4).shape[1]
        images = rng.standard_normal((8, size, size, channels)).astype(np.float32)
        assert np.isfinite(np.asarray(model(images))).all()


def test_levels_are_those_of_a_plain_rest(plain, tmp_path):
    """The same weights stay encrypted at level 1 and above, whether the rest is sealed or not."""
    for rest in ("sealed", "plain"):
        protect_file(
            plain, tmp_path / f"{rest}.st", secret=SECRET, levels=LEVELS, selection=SELECT,
            rest=rest,
        )  # fmt: skip
    for level in range(3):
        paths = [tmp_path / "sealed.st", tmp_path / "plain.st"]
        found = [open_model(path, keys(path)[level]) for path in paths]
        for name, leaf in TENSORS.items():
            if leaf.size:
                assert ((found[0][name] != leaf) == (found[1][name] != leaf)).mean() > 0.99


def test_one_level_is_the_seal_alone(plain, tmp_path):
    protect_file(plain, tmp_path / "p", secret=SECRET, levels=1, signing=SIGNING)
    found = inspect_file(tmp_path / "p")
    assert found.rest == "sealed"
    assert [(level.groups, level.share) for level in found.levels] == [(0, 1.0)]
    opened = open_model(tmp_path / "p", keys(tmp_path / "p", 1)[0])
    assert all(opened[name].tobytes() == leaf.tobytes() for name, leaf in TENSORS.items())


@pytest.mark.parametrize("cut", [(0, 1200), (0, 0), (3, 5), (1040, 1060), (1199, 1200)])
@pytest.mark.parametrize("select", ["weight|large", "weight"], ids=["graded", "sealed"])
def test_rows_and_tensors_alone(plain, tmp_path, cut, select):
    """Rows, even across two digests; with and without rings in the tensor."""
    selection = Select(select=select, layout="OIHW")
    protect_file(plain, tmp_path / "p", secret=SECRET, levels=LEVELS, selection=selection)
    for key in (None, *keys(tmp_path / "p")):
        whole = open_model(tmp_path / "p", key)
        with LazyModel(tmp_path / "p", key) as model:
            assert sorted(model) == sorted(TENSORS)
            rows = model.rows("large", *cut)
            assert rows.shape == (cut[1] - cut[0], 1000)
            assert rows.tobytes() == whole["large"][slice(*cut)].tobytes()
            assert model["half"].tobytes() == whole["half"].tobytes()
            assert model.rows("flags", 3, 9).tobytes() == whole["flags"][3:9].tobytes()
        some = open_model(tmp_path / "p", key, names=["half", "empty"])
        assert some.keys() == {"half", "empty"}


def test_only_what_is_asked_for_is_checked_and_all_of_it(plain, tmp_path):
    protect_file(plain, tmp_path / "p", secret=SECRET, levels=1)
    with SafetensorsFile(tmp_path / "p") as file:
        last = file.tensors["large"].stop - 1
    data = bytearray((tmp_path / "p").read_bytes())
    data[last] ^= 1
    (tmp_path / "p").write_bytes(data)
    (key,) = keys(tmp_path / "p", 1)
    with LazyModel(tmp_path / "p", key) as model:
        assert model.rows("large", 0, 9).tobytes() == TENSORS["large"][:9].tobytes()
        for bad in (lambda: model.rows("large", 1199, 1200), lambda: model["large"]):
            with pytest.raises(IntegrityError, match="tensor 'large': expected SHA-256") as caught:
                bad()
            assert caught.value.reason == "digest"
    with pytest.raises(ValueError, match="expected rows within shape"):
        LazyModel(tmp_path / "p", key).rows("large", 0, 1201)
    with pytest.raises(ValueError, match=r"has no tensor 'none'\. There are: .*'conv\.weight'"):
        open_model(tmp_path / "p", key, names=["none"])
    with pytest.raises(ValueError, match="names: expected none with like"):
        open_model(tmp_path / "p", key, names=["half"], like=TENSORS)


def test_an_open_model_is_a_mapping(plain, tmp_path, monkeypatch):
    protect_file(plain, tmp_path / "p", secret=SECRET, levels=1)
    (key,) = keys(tmp_path / "p", 1)
    with LazyModel(tmp_path / "p", key) as model:
        with monkeypatch.context() as patch:
            patch.setattr(LazyModel, "load", None)  # nothing is read to tell what there is
            assert "half" in model
            assert "none" not in model
            assert 3 not in model
            assert sorted(model) == sorted(TENSORS)
            assert len(model) == len(TENSORS)
        assert model.get("none") is None
        with pytest.raises(KeyError, match="none"):
            model["none"]
        assert {name: leaf.tobytes() for name, leaf in model.items()} == {
            name: leaf.tobytes() for name, leaf in TENSORS.items()
        }
        with pytest.raises(TypeError, match=r"got the text 'half'. Write \['half'\]"):
            model.load("half")
    for closed in (lambda: model["half"], lambda: model.rows("large", 0, 1), model.values):
        with pytest.raises(ValueError, match="is closed, expected an open model"):
            list(closed())
    model.close()  # again
    with pytest.raises(TypeError, match="got the text 'half'"):
        open_model(tmp_path / "p", key, names="half")


def test_rotation_keeps_the_seal(plain, tmp_path):
    protect_file(plain, tmp_path / "p", secret=SECRET, levels=LEVELS, selection=SELECT)
    rotate_file(tmp_path / "p", tmp_path / "q", secret=SECRET)
    assert inspect_file(tmp_path / "q").rest == "sealed"
    one, other = open_model(tmp_path / "p"), open_model(tmp_path / "q")
    assert (one["half"] != other["half"]).mean() > 0.99
    unlock_file(tmp_path / "q", tmp_path / "out", keys(tmp_path / "q")[2])
    assert (tmp_path / "out").read_bytes() == plain.read_bytes()
    verify_file(tmp_path / "q", grant=keys(tmp_path / "q")[0])


def test_in_memory_and_by_the_public_functions():
    """The seal is `WindowCipher` on top of the result of `encrypt` for rings above level 1."""
    params = {name: leaf for name, leaf in TENSORS.items() if name in ("conv.weight", "half")}
    released = protect(params, secret=SECRET, levels=LEVELS, selection=SELECT)
    top = level_key(SECRET, released.model_id, levels=3)
    opened = unlock(released, top)
    assert all(opened[name].tobytes() == leaf.tobytes() for name, leaf in params.items())
    first = unlock(released, top.lower(1))
    windows = WindowCipher.fit(first)  # rings keep signs and exponents
    by_hand = decrypt(released.params, [True], ring_keys(top)[:1], cipher=windows)
    for name in params:
        assert np.asarray(by_hand[name]).tobytes() == first[name].tobytes()
    assert isinstance(jax.tree.leaves(released.params)[0], np.ndarray)


def test_targets_begin_at_level_one():
    weights = {"w": np.random.default_rng(1).standard_normal((100, 100)).astype(np.float32)}

    def intact(params) -> float:
        return 100 * float((np.asarray(params["w"]) == weights["w"]).mean())

    released = protect(
        weights,
        secret=SECRET,
        levels=Targets([60, 80], intact, tolerance=2),
        selection=Select(granularity="weight", small=0),
    )
    assert released.calibration
    top = level_key(SECRET, released.model_id, levels=3)
    values = [intact(unlock(released, top.lower(level))) for level in (1, 2, 3)]
    assert values == [*released.calibration.values, 100]
    assert values[:2] == pytest.approx([60, 80], abs=2)
    assert intact(released.params) < 1


def test_another_rest_is_refused(plain, tmp_path):
    for make in (
        lambda: protect_file(plain, tmp_path / "p", secret=SECRET, rest="open"),
        lambda: protect({"w": np.ones((64, 64))}, secret=SECRET, rest="open"),
    ):
        with pytest.raises(ValueError, match="rest: expected 'sealed' or 'plain', got 'open'"):
            make()
    assert not (tmp_path / "p").exists()
