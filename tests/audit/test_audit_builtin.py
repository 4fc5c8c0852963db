"""The networks that can be audited by name, on tiny ones."""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.audit._config import SubjectConfig, make_subject
from selcrypt_jax.audit._structure import check_chain
from selcrypt_jax.audit._subject import example_batches, normalisation_leaves
from selcrypt_jax.models import VGG19, DnCNN, to_torch


def checked(subject):
    """What every subject must be."""
    names = named_leaves(subject.params).leaves.keys()
    assert named_leaves(subject.fresh(jax.random.key(1))).leaves.keys() == names
    count, batch = example_batches(subject, 0.5, 0)
    assert count == max(1, round(0.5 * subject.examples))
    assert np.isfinite(subject.metric(subject.params))
    np.testing.assert_allclose(subject.loss_fn(subject.params, batch(1)) >= 0, True)
    for a, b in zip(jax.tree.leaves(batch(2)), jax.tree.leaves(batch(2)), strict=True):
        np.testing.assert_array_equal(a, b)  # a step has its batch
    if subject.training_loss_fn is None:
        return subject
    loss, after = subject.training_loss_fn(subject.params, batch(1))
    assert np.isfinite(loss)
    before, after = named_leaves(subject.params).leaves, named_leaves(after).leaves
    moved = {name for name in names if (np.asarray(before[name]) != after[name]).any()}
    norms = normalisation_leaves(subject.params, subject.normalisation)
    assert moved == {name for name in norms if name.endswith(("mean", "var"))}
    return subject


def save(model, path):
    tensors = {name: np.asarray(leaf) for name, leaf in to_torch(model).items()}
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = rng.integers(256, size=(20, 24, 3)[: 2 + number % 2], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_dncnn_from_files(tmp_path, images):
    model = DnCNN(depth=4, width=8, rngs=nnx.Rngs(0))
    save(model, tmp_path / "dncnn.safetensors")
    options = {"weights": str(tmp_path / "dncnn.safetensors"), "images": str(images)}
    options |= {"tests": str(images), "batch": 2, "patch": 16, "sigma": 15.0}
    subject = checked(make_subject(SubjectConfig("a", "dncnn", options)))
    assert subject.examples == 3
    assert subject.worthless == pytest.approx(-20 * np.log10(15 / 255), abs=0.3)
    noisy, clean = example_batches(subject, 1.0, 0)[1](1)
    assert noisy.shape == clean.shape == (2, 16, 16, 1)
    assert np.std(noisy - clean) == pytest.approx(15 / 255, rel=0.15)
    model.eval()
    expected = np.square(np.asarray(model(noisy)) - clean).mean()
    np.testing.assert_allclose(subject.loss_fn(subject.params, (noisy, clean)), expected, rtol=1e-4)
    crops = make_subject(SubjectConfig("a", "dncnn", options | {"crop": 12}))
    assert np.isfinite(crops.metric(crops.params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "none"}, "none: expected images"),
        ({"patch": 21}, "expected at least 21×21 pixels, got 24×20"),
        ({"crop": 22}, "expected at least 22×22 pixels"),
        ({"weights": "vgg"}, "expected a checkpoint of DnCNN, got one of VGG19"),
        ({"weights": "odd"}, "odd: "),
    ],
)
def test_what_is_wrong_with_files_is_named(tmp_path, images, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    save(DnCNN(depth=3, width=8, rngs=nnx.Rngs(0)), "dncnn")
    save(VGG19(width=1 / 64, rngs=nnx.Rngs(params=0, dropout=0)), "vgg")
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, "odd")
    options = {"weights": "dncnn", "images": str(images), "tests": str(images), "patch": 16}
    with pytest.raises(ValueError, match=message):
        make_subject(SubjectConfig("a", "dncnn", options | change))


UNLINKED = {  # with no convolution behind, or no matrix before
    "demo-vgg19": {"norms/15/scale"},
    "demo-dncnn": set(),
    "demo-transformer": {"blocks/0/norm1/scale"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        ("demo-vgg19", {"width": 0.0625, "steps": 2}),
        ("demo-dncnn", {"depth": 4, "width": 8, "steps": 2, "crop": 48, "batch": 3}),
        ("demo-transformer", {"steps": 2}),
    ],
)
def test_those_of_the_demo(make, options):
    with jax.numpy_dtype_promotion("standard"):  # of its training, optax mixes dtypes
        subject = make_subject(SubjectConfig("a", make, options))
    subject = checked(subject)
    assert subject.unit == ("dB" if make == "demo-dncnn" else "%")
    shapes = {n: leaf.shape for n, leaf in named_leaves(subject.params).arrays.items()}
    norms = {n for n in normalisation_leaves(subject.params) if n.endswith("scale")}
    check_chain(subject.chain, shapes, subject.layout or "HWIO", make)
    assert norms - {link.scale for link in subject.chain} == UNLINKED[make]
    leaves = jax.tree.leaves(example_batches(subject, 0.01, 0)[1](1))
    assert len(leaves[0]) == options.get("batch", 32)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not os.environ.get("SELCRYPT_DATA") or not importlib.util.find_spec("tensorflow_datasets"),
    reason="needs SELCRYPT_DATA and TFDS",
)
def test_vgg19_on_cifar(tmp_path):
    save(VGG19(width=1 / 16, rngs=nnx.Rngs(params=0, dropout=0)), tmp_path / "vgg.safetensors")
    options = {"weights": str(tmp_path / "vgg.safetensors"), "tests": 100}
    options |= {"data": str(Path(os.environ["SELCRYPT_DATA"]) / "tfds"), "batch": 8}
    subject = checked(make_subject(SubjectConfig("a", "vgg19", options)))
    assert subject.examples == 50_000
    assert subject.worthless == 10
    pixels, labels = example_batches(subject, 0.1, 0)[1](1)
    assert pixels.shape == (8, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert labels.max() < 10
