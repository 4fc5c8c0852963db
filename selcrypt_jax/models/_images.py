"""Checks a batch of images for both networks."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def _kind(channels: int) -> str:
    return {1: "grey", 3: "colour", 4: "colour with alpha"}.get(channels, "no usual image")


def checked_images(
    images: Any, *, channels: int, dtype: Any, model: str
) -> Float[Array, "n h w c"]:
    """The batch as a JAX array; a clear error if the model cannot take it.

    Args:
        images: the user's images.
        channels: the model's number of channels.
        dtype: the dtype of the model's weights.
        model: the model's name, for messages.

    Raises:
        ValueError: the images do not have four axes, or another number of channels.
        TypeError: the images do not have the weights' dtype, for example uint8.
    """
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"{model}: expected a batch of images [N, H, W, {channels}], got "
            f"shape {images.shape}. One image is a batch with N = 1; a grey image has "
            "a last axis of 1."
        )
    actual = images.shape[-1]
    if actual != channels:
        raise ValueError(
            f"{model}: expected images [N, H, W, {channels}] ({_kind(channels)}), got shape "
            f"{images.shape}: {actual} channel{'s' * (actual != 1)} ({_kind(actual)}). Convert the "
            f"images (channels come last), or build {model} for that number of channels."
        )
    if images.dtype != dtype:
        raise TypeError(
            f"{model}: expected images of dtype {jnp.dtype(dtype)}, like the weights, "
            f"got {images.dtype}. Cast them; integer pixels are also divided by their largest "
            "value, so that they lie in [0, 1]."
        )
    return images
