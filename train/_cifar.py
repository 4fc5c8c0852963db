"""CIFAR in endless batches, for training VGG19."""

from pathlib import Path
from typing import Any

import grain
import numpy as np

from selcrypt_jax.models._files import read_split

PADDING = 4  # pixels around a random crop


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
    """Shuffled batches of the training images, in an order fixed by the step's index.

    Args:
        folder: prepared by TFDS, such as ``data_dir/cifar10``.
        batch: images per batch.
        seed: for order and crops.
        augment: crop and flip at random.

    Returns:
        An endless iterator over ``{"image": uint8 [batch, 32, 32, 3], "label": int32 [batch]}``.
    """
    shuffled = grain.MapDataset.source(read_split(folder, "train")).seed(seed).shuffle().repeat()
    return (shuffled.random_map(_crop) if augment else shuffled.map(_as_is)).batch(batch)
