r"""Trains DnCNN on images and writes the best weights as safetensors.

Examples::

    python train/dncnn.py --images photographs/ --test set12/ --out dncnn_s25.safetensors
    python train/dncnn.py --images tfds/cifar10/ --test tfds/cifar10/ --tests 200 --colour \
        --sigma 0 55 --patch 32 --out blind.safetensors

Metrics go to standard output, one JSON object per line. Needs Pillow (the extra ``train``).

References:
    Zhang et al., Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising,
    IEEE TIP 2017.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from _images import add_noise, checked_sigma, random_patches
from _loop import Run, check_numbers, check_output, exits, started, train_model
from _tasks import denoising_of
from flax import nnx

from selcrypt_jax.models import DnCNN
from selcrypt_jax.models._files import read_images
from selcrypt_jax.models._network import squared_error


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """The network, the data, and the length of the training."""

    images: Path
    """Folder of training images, or of a data set prepared by TFDS (its split "train")."""

    test: Path
    """Folder of test images, or of a data set prepared by TFDS (its split "test"), to measure PSNR
    and SSIM on; never used for training."""

    sigma: tuple[float, ...] = (25.0,)
    """Standard deviation of the noise, for pixels in 0..255; or two numbers, a range from which
    each patch draws one. Tests use its midpoint."""

    tests: int | None = None
    """Number of test images; all by default."""

    depth: int = 17
    """Number of convolutions."""

    width: int = 64
    """Channels between them."""

    colour: bool = False
    """RGB instead of grey."""

    start: Path | None = None
    """A checkpoint to start from, such as a public network, instead of random weights. It must have
    been trained with the same options."""

    steps: int = 20_000
    """Gradient steps."""

    batch: int = 64
    """Patches per step."""

    patch: int = 40
    """Side length of a patch, in pixels."""

    rate: float = 1e-3
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero."""

    every: int = 500
    """Steps between measurements, and between checkpoints."""


@exits()
def main(config: Config) -> None:
    """Trains; see `Config`."""
    check_numbers(config)
    check_output(config.out)
    sigma = checked_sigma(config.sigma)
    channels = 3 if config.colour else 1
    images = read_images(config.images, split="train", channels=channels, smallest=config.patch)
    tests = read_images(config.test, split="test", channels=channels, most=config.tests)
    weights, noise, test_noise = jax.random.split(jax.random.key(config.seed), 3)

    def loss(model: DnCNN, clean: jax.Array, key: jax.Array) -> jax.Array:
        return squared_error(model, add_noise(clean, sigma, key), clean)

    def batch(number: int) -> np.ndarray:
        rng = np.random.default_rng([config.seed, number])
        return random_patches(images, config.batch, config.patch, rng)

    model = DnCNN(config.depth, config.width, channels=channels, rngs=nnx.Rngs(weights))
    train_model(
        started(model, config.start),
        config,
        optimizer=optax.adam,
        loss=loss,
        batch=batch,
        quality=lambda graph: denoising_of(graph, tests, sum(sigma) / 2, test_noise),
        best="psnr",
        metadata={"sigma": " ".join(f"{s:g}" for s in config.sigma)},
        key=noise,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
