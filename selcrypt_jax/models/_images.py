"""What both networks accept as a batch of images."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def _kind(channels: int) -> str:
    return {1: "grey", 3: "colour", 4: "colour with alpha"}.get(channels, "no usual image")


def checked_images(
    images: Any, *, channels: int, dtype: Any, model: str
) -> Float[Array, "n h w c"]:
    """The batch as a JAX array; an error in words where the model can't take it.

    Args:
        images: what the user gave.
        channels: channels that the model was built for.
        dtype: of the model's weights.
        model: name of the model, for the messages.

    Raises:
        ValueError: not four axes, or another number of channels.
        TypeError: not the weights' dtype, such as uint8 images.
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
            f"{images.shape}: {actual} channels ({_kind(actual)}). Convert the images "
            f"(channels come last), or build {model} for {actual} channels."
        )
    if images.dtype != dtype:
        raise TypeError(
            f"{model}: expected images of dtype {jnp.dtype(dtype)}, as the weights, "
            f"got {images.dtype}. Cast them; integer pixels are also divided by their largest "
            "value, so that they lie in [0, 1]."
        )
    return images
