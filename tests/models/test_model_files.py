"""Checkpoints, CIFAR and images, read from files."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from torch_oracle import dncnn_checkpoint, torch_checkpoint, vgg_layers

from selcrypt_jax.models import VGG19, DnCNN
from selcrypt_jax.models._files import (
    normalised,
    prepared,
    read_cifar,
    read_images,
    read_model,
    read_split,
    read_tensors,
)

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("SELCRYPT_DATA", "")).absolute()
needs_data = pytest.mark.skipif(
    "SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set"
)


def test_a_checkpoint_of_another_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(torch_checkpoint(vgg_layers((1, 1, 1, 1), 1, True)), "vgg.safetensors")
    save_file(dncnn_checkpoint(3, 2, 1), "dncnn.safetensors")
    for path, kind, message in (
        ("vgg.safetensors", DnCNN, "vgg.safetensors: expected a checkpoint of DnCNN, got one of V"),
        ("dncnn.safetensors", VGG19, "dncnn.safetensors: expected a checkpoint of VGG19, got one"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(Path(path), kind)
    save_file({"conv1.weight": np.zeros((4, 1, 3, 3), np.float32)}, "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: tensors: expected those of VGG19"):
        read_model(Path("other.safetensors"), DnCNN)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "expected one .safetensors file, got a folder"),
        ("nothing", "nothing: expected a .safetensors file: "),
        ("text", "text: expected a .safetensors file: "),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("text")
    with pytest.raises(ValueError, match=message):
        read_tensors(Path(path))


def test_images_of_16_bits_keep_their_greys(tmp_path):
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    for channels in (1, 3):
        (image,) = read_images(tmp_path, split="train", channels=channels)
        np.testing.assert_array_equal(image[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", None])
def test_files_that_are_no_images_are_named(tmp_path, content):
    if content is None:
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "x.jpg")
        content = (tmp_path / "x.jpg").read_bytes()[:300]
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jpg: expected an image, got .* Repair or remove it"):
        read_images(tmp_path, split="train", channels=1)


def test_images_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for index, colour in enumerate(colours):
        Image.new("RGB", (5 + index, 4), colour).save(tmp_path / f"{2 - index}.PNG")
    Image.new("L", (9, 9), 77).save(tmp_path / "z.bmp")
    (tmp_path / "0.txt").write_text("no image")
    found = read_images(tmp_path, split="any", channels=3)
    assert [image.shape for image in found] == [(4, 7, 3), (4, 6, 3), (4, 5, 3), (9, 9, 3)]
    assert [tuple(image[0, 0]) for image in found] == [*colours[::-1], (77, 77, 77)]
    grey = read_images(tmp_path, split="any", channels=1, most=2)
    assert [image.shape for image in grey] == [(4, 7, 1), (4, 6, 1)]
    assert grey[0].dtype == np.uint8
    # Rec. 601: what Pillow calls L.
    assert [int(image[0, 0, 0]) for image in grey] == [29, 150]


def test_what_is_wrong_with_images_is_named(tmp_path):
    for folder in (ROOT / "selcrypt_jax", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"expected images .*or a data set that TFDS prepared"):
            read_images(folder, split="train", channels=1)
    Image.fromarray(np.zeros((48, 56), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: expected at least 64×64 pixels, got 56×48"):
        read_images(tmp_path, split="train", channels=1, smallest=64)


@pytest.mark.data
@needs_data
def test_images_of_a_data_set():
    pytest.importorskip("tensorflow_datasets")
    folder = DATA / "tfds" / "cifar10"
    colour, grey = (read_images(folder, split="test", channels=c, most=7) for c in (3, 1))
    assert (len(colour), len(grey)) == (7, 7)
    assert [image.shape for image in colour] == [(32, 32, 3)] * 7
    for first, second in zip(colour, grey, strict=True):
        expected = first @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(second[..., 0], expected, atol=1)
    for index in (-1, 7):
        with pytest.raises(IndexError):
            colour[index]
    assert len(read_images(folder / "3.0.2", split="test", channels=3)) == 10_000
    assert len(read_images(folder, split="train", channels=3)) == 50_000
    small = read_images(folder, split="train", channels=1, smallest=40)
    with pytest.raises(ValueError, match=r"image 5: expected at least 40×40 pixels, got 32×32"):
        small[5]
    with pytest.raises(ValueError, match=r"with a split 'validation', got "):
        read_images(folder, split="validation", channels=3)


def test_vgg19_names_data_that_are_missing(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    message = r"cifar10: expected a data set that TFDS prepared .*got none\. Prepare it"
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path / "cifar10", "train")
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"3\.0\.2: expected cifar10 in ArrayRecord files"):
        read_split(tmp_path / "cifar10", "train")


def test_the_newest_version_of_a_data_set_is_taken(tmp_path):
    assert prepared(tmp_path) == []
    for version in ("3.0.2", "10.0.0", "9.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    assert [folder.name for folder in prepared(tmp_path)] == ["3.0.2", "9.1.0", "10.0.0"]
    assert prepared(tmp_path / "9.1.0") == [tmp_path / "9.1.0"]


@pytest.mark.data
@needs_data
def test_cifar():
    pytest.importorskip("tensorflow_datasets")
    images, labels = read_cifar(DATA / "tfds" / "cifar10", "test", 20)
    assert (images.shape, images.dtype, labels.shape) == ((20, 32, 32, 3), np.uint8, (20,))
    assert set(labels) <= set(range(10))
    with pytest.raises(ValueError, match="tests: expected at least 1, got 0"):
        read_cifar(DATA / "tfds" / "cifar10", "test", 0)


def test_pixels_of_the_mean_are_zero():
    # ImageNet's mean and deviation, as PyTorch's models have them.
    images = np.full((1, 2, 2, 3), 255, np.uint8)
    expected = (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalised(images)[0, 0, 0], expected, rtol=1e-5)
