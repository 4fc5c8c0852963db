"""Data installed with the packages: scikit-learn's digits, scikit-image's photographs."""

from typing import Any, NamedTuple

import numpy as np
import skimage.color
import skimage.data
import skimage.transform
import skimage.util
import sklearn.datasets
from jaxtyping import Float, Int

from ..models._network import random_patch

TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "rocket",
    "stereo_motorcycle",
)
# Never used for training; with the row and column of a face, around which they are cropped.
TEST_PHOTOGRAPHS = {"camera": (160, 256), "chelsea": (130, 235)}


class Digits(NamedTuple):
    """Images ``[n, 32, 32, 1]`` in [0, 1] and their labels ``[n]``."""

    images: Float[np.ndarray, "n 32 32 1"]
    labels: Int[np.ndarray, " n"]


def digits(seed: int, trained_on: float = 0.8) -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 handwritten digits, scaled from 8×8 to 32×32.

    Args:
        seed: seed of the split.
        trained_on: the share to train on.

    Returns:
        The digits to train on, and the others.
    """
    data: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    images = skimage.transform.resize(data.images[order] / 16, (len(order), 32, 32), order=1)
    images = np.asarray(images, np.float32)[..., None]
    labels = data.target[order].astype(np.int32)
    split = int(len(order) * trained_on)
    return Digits(images[:split], labels[:split]), Digits(images[split:], labels[split:])


def _photograph(name: str) -> Float[np.ndarray, "h w"]:
    image = getattr(skimage.data, name)()
    image = image[0] if isinstance(image, tuple) else image
    grey = skimage.color.rgb2gray(image) if image.ndim == 3 else skimage.util.img_as_float(image)
    return grey.astype(np.float32)


def _smaller(image: np.ndarray) -> Float[np.ndarray, "h w"]:
    return skimage.transform.rescale(image, 0.5, anti_aliasing=True).astype(np.float32)


def training_patches(count: int, size: int, seed: int) -> Float[np.ndarray, "n s s 1"]:
    """Random grey patches of the training photographs, randomly flipped and rotated.

    Photographs much larger than 512 pixels are halved, so that a patch shows about as much of the
    scene everywhere.

    Args:
        count: number of patches.
        size: their side length, in pixels.
        seed: seed of the draw.

    Returns:
        Patches in [0, 1].
    """
    rng = np.random.default_rng(seed)
    photographs = []
    for name in TRAIN_PHOTOGRAPHS:
        image = _photograph(name)
        photographs.append(_smaller(image) if max(image.shape) > 700 else image)
    chosen = (photographs[rng.integers(len(photographs))] for _ in range(count))
    return np.stack([random_patch(image, size, rng)[..., None] for image in chosen])


def test_photographs(size: int) -> Float[np.ndarray, "n s s 1"]:
    """Square crops of the test photographs, in [0, 1]; ``camera`` first."""
    crops = []
    for name, centre in TEST_PHOTOGRAPHS.items():
        image = _photograph(name)
        top, left = (
            min(max(middle - size // 2, 0), side - size)
            for middle, side in zip(centre, image.shape, strict=True)
        )
        crops.append(image[top : top + size, left : left + size, None])
    return np.stack(crops)


def chessboard(size: int = 64) -> tuple[Float[np.ndarray, "n s s 1"], Float[np.ndarray, "m s s 1"]]:
    """Squares of photographs never used for training, in [0, 1], in two halves.

    The halves alternate like the squares of a chessboard, in ``camera``, ``chelsea`` and
    scikit-learn's two photographs.

    Args:
        size: side length of a square, in pixels.
    """
    photographs = [_photograph(name) for name in TEST_PHOTOGRAPHS]
    samples: Any = sklearn.datasets.load_sample_images()
    photographs += [_smaller(skimage.color.rgb2gray(image)) for image in samples.images]
    boards: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for image in photographs:
        for row, column in np.ndindex(image.shape[0] // size, image.shape[1] // size):
            top, left = row * size, column * size
            square = image[top : top + size, left : left + size, None]
            boards[(row + column) % 2].append(square)
    return np.stack(boards[0]), np.stack(boards[1])
