"""Images to learn denoising from: a folder of files, or a set that TFDS prepared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _tfds import prepared, read_split
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


class _TfdsImages(Sequence[np.ndarray]):
    """Those of a data set, each decoded when it is asked for: they may be many."""

    def __init__(self, source: Any, folder: Path, most: int | None, channels: int, smallest: int):
        self.source = source
        self.folder = folder
        self.length = min(most or len(source), len(source))
        self.channels = channels
        self.smallest = smallest

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        pixels = self.source[index]["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return _pixels(image, f"{self.folder}: image {index}", self.channels, self.smallest)


def _pixels(image: Image.Image, what: str, channels: int, smallest: int) -> np.ndarray:
    if image.mode == "F":
        raise SystemExit(f"{what}: expected integer pixels, got floats. Save them as 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if min(pixels.shape[:2]) < smallest:
        raise SystemExit(
            f"{what}: expected at least {smallest}×{smallest} pixels, got {pixels.shape[1]}×"
            f"{pixels.shape[0]}. Use a smaller --patch, or leave it out."
        )
    return pixels.reshape(*pixels.shape[:2], channels)


def read_images(
    folder: Path, *, split: str, channels: int, smallest: int = 1, most: int | None = None
) -> Sequence[np.ndarray]:
    """The images of a folder, in the order of their names, or of a split of a TFDS set.

    Args:
        folder: with image files, or one that TFDS prepared, as ``data_dir/NAME``.
        split: which part of a TFDS set.
        channels: 1 for grey, 3 for colour (RGB); images of the other kind are converted.
        smallest: least number of pixels on a side.
        most: take the first ones only.

    Returns:
        uint8, ``[H, W, channels]``.

    Raises:
        SystemExit: no images, or one that is too small.
    """
    if most is not None and most < 1:
        raise SystemExit(f"--tests: expected at least 1, got {most}.")
    if prepared(folder):
        return _TfdsImages(read_split(folder, split), folder, most, channels, smallest)
    paths = []
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) or a data set that TFDS "
            "prepared, got none."
        )
    images = []
    for path in paths[:most]:
        try:
            with Image.open(path) as file:
                images.append(_pixels(file, str(path), channels, smallest))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SystemExit(
                f"{path}: expected an image, got {error}. Repair or remove it."
            ) from error
    return images


def random_patches(
    images: Sequence[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """``[count, size, size, C]`` in [0, 1], flipped and turned at random."""
    patches = []
    for _ in range(count):
        image = images[int(rng.integers(len(images)))]
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
        patch = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
        patches.append(patch[:, ::-1] if rng.integers(2) else patch)
    return np.stack(patches).astype(np.float32) / 255


def checked_sigma(sigma: tuple[float, ...]) -> tuple[float, float]:
    """The least and the greatest deviation of the noise, for pixels in [0, 1].

    Args:
        sigma: one number, or both, for pixels in 0..255.

    Raises:
        SystemExit: out of range.
    """
    if len(sigma) not in (1, 2) or not 0 <= sigma[0] <= sigma[-1] <= 255 or not sigma[-1] > 0:
        raise SystemExit(
            "--sigma: expected a number in (0, 255], or a range of two, got "
            f"{' '.join(f'{s:g}' for s in sigma) or 'none'}."
        )
    return sigma[0] / 255, sigma[-1] / 255


def add_noise(clean: jax.Array, sigma: tuple[float, float], key: jax.Array) -> jax.Array:
    """Images ``[n, H, W, C]`` and normal noise, whose deviation is drawn for each of them."""
    deviation_key, noise_key = jax.random.split(key)
    low, high = sigma
    deviation = jax.random.uniform(deviation_key, (len(clean), 1, 1, 1))
    noise = jax.random.normal(noise_key, clean.shape)
    return clean + (low + (high - low) * deviation) * noise
