"""CIFAR, as VGG19 sees it."""

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from _tfds import read_split

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
PADDING = 4  # pixels, of a random crop


def normalised(images: jax.Array | np.ndarray) -> jax.Array:
    """Pixels of 0..255 as the network sees them."""
    return (jnp.asarray(images).astype(jnp.float32) / 255 - MEAN) / STD


def _crop(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A random crop of the padded image, flipped or not."""
    image = np.pad(example["image"], ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    top, left = rng.integers(2 * PADDING + 1, size=2)
    image = image[top : top + 32, left : left + 32]
    return {
        "image": image[:, ::-1] if rng.integers(2) else image,
        "label": np.int32(example["label"]),
    }


def _as_is(example: dict[str, Any]) -> dict[str, Any]:
    return {"image": example["image"], "label": np.int32(example["label"])}


def batches(folder: Path, batch: int, *, seed: int, augment: bool = True) -> grain.MapDataset:
    """Shuffled batches of the training images, by index, so that those of a step are known.

    Args:
        folder: that TFDS prepared, as ``data_dir/cifar10``.
        batch: images in each.
        seed: of order and crops.
        augment: crop and flip at random.

    Returns:
        Endless; an item is ``{"image": uint8 [batch, 32, 32, 3], "label": int32 [batch]}``.
    """
    shuffled = grain.MapDataset.source(read_split(folder, "train")).seed(seed).shuffle().repeat()
    return (shuffled.random_map(_crop) if augment else shuffled.map(_as_is)).batch(batch)


def read_test(folder: Path, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The test images, uint8 ``[n, 32, 32, 3]``, and labels, or the first ones of them."""
    if most is not None and most < 1:
        raise SystemExit(f"--tests: expected at least 1, got {most}.")
    source = read_split(folder, "test")
    examples = [source[index] for index in range(min(most or len(source), len(source)))]
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples])
