"""Losses to train the two networks with, and metrics to evaluate them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree


class Network(NamedTuple):
    """A network in evaluation mode as a function of its parameters.

    Attributes:
        graphdef: its structure.
        params: weights (``nnx.Param``) and running statistics (``nnx.BatchStat``).
        rest: its other state, such as dropout's.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    rest: nnx.State

    @classmethod
    def of(cls, model: nnx.Module) -> "Network":
        """Splits a model, and sets it to evaluation mode."""
        model.eval()
        parts: Any = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
        return cls(*parts)

    def model(self, params: PyTree) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params, self.rest, copy=True)

    def __call__(self, params: PyTree, images: Float[Array, "n h w c"]) -> Array:
        """The network's output for images."""
        return self.model(params)(images)


def cross_entropy(
    model: Callable[[Any], Array], images: Float[Array, "n h w c"], labels: Int[Array, " n"]
) -> Float[Array, ""]:
    """Mean cross-entropy of logits over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def squared_error(
    model: Callable[[Any], Array], noisy: Float[Array, "n h w c"], clean: Float[Array, "n h w c"]
) -> Float[Array, ""]:
    """Mean squared error over all pixels of a batch."""
    return jnp.square(model(noisy) - clean).mean()


def accuracy(
    logits: Callable[[PyTree, Any], Array], images: Any, labels: Any, *, batch: int = 500
) -> Callable[[PyTree], float]:
    """``params -> share`` of the images whose largest logit is their label's.

    Args:
        logits: ``logits(params, images)``, the network; it is compiled.
        images: any dtype that `logits` accepts.
        labels: integers.
        batch: number of images at a time.
    """

    @jax.jit
    def right(params: PyTree, images: Array, labels: Array) -> Array:
        return (logits(params, images).argmax(-1) == labels).sum()

    def share(params: PyTree) -> float:
        parts = [slice(at, at + batch) for at in range(0, len(images), batch)]
        return sum(int(right(params, images[part], labels[part])) for part in parts) / len(images)

    return share


def psnr(images: Float[Any, "n h w c"], clean: Float[Any, "n h w c"]) -> Float[Array, " n"]:
    """Peak signal-to-noise ratio in dB of each image, in [0, 1]; images are not clipped."""
    return -10 * jnp.log10(jnp.square(jnp.asarray(images) - clean).mean((1, 2, 3)))


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image ``[H, W, C]``."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def random_patch(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square patch of an image ``[H, W, C]``, randomly rotated and flipped."""
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    patch = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
    return patch[:, ::-1] if rng.integers(2) else patch
