"""Patches of noisy images, to learn denoising from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selcrypt_jax.models._network import random_patch


def random_patches(
    images: Sequence[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """``[count, size, size, C]`` in [0, 1], flipped and rotated at random."""
    chosen = (images[int(rng.integers(len(images)))] for _ in range(count))
    return np.stack([random_patch(image, size, rng) for image in chosen]) / np.float32(255)


def checked_sigma(sigma: tuple[float, ...]) -> tuple[float, float]:
    """The smallest and the largest standard deviation of the noise, for pixels in [0, 1].

    Args:
        sigma: one number, or both, for pixels in 0..255.

    Raises:
        ValueError: out of range.
    """
    if len(sigma) not in (1, 2) or not 0 <= sigma[0] <= sigma[-1] <= 255 or not sigma[-1] > 0:
        raise ValueError(
            "--sigma: expected a number in (0, 255], or a range of two, got "
            f"{' '.join(f'{s:g}' for s in sigma) or 'none'}."
        )
    return sigma[0] / 255, sigma[-1] / 255


def add_noise(clean: jax.Array, sigma: tuple[float, float], key: jax.Array) -> jax.Array:
    """Images ``[n, H, W, C]`` plus normal noise, with a standard deviation drawn for each image."""
    deviation_key, noise_key = jax.random.split(key)
    low, high = sigma
    deviation = jax.random.uniform(deviation_key, (len(clean), 1, 1, 1))
    noise = jax.random.normal(noise_key, clean.shape)
    return clean + (low + (high - low) * deviation) * noise


def patch_batches(
    images: Sequence[np.ndarray],
    batch: int,
    patch: int,
    sigma: tuple[float, float],
    *,
    seed: int,
    bgr: bool = False,
) -> Callable[[int], Any]:
    """Step number → ``{"clean", "noisy"}``, ``[batch, patch, patch, C]``."""
    noise = jax.random.key(seed)

    def make(number: int) -> Any:
        rng = np.random.default_rng([seed, number])
        clean = random_patches(images, batch, patch, rng)
        clean = np.ascontiguousarray(clean[..., ::-1]) if bgr else clean
        noisy = add_noise(jnp.asarray(clean), sigma, jax.random.fold_in(noise, number))
        return {"clean": clean, "noisy": noisy}

    return make
