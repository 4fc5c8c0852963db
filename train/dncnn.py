"""Trains DnCNN on a folder of images and writes the best weights as safetensors.

Example::

    python train/dncnn.py --images photographs/ --test set12/ --out dncnn_s25.safetensors

Metrics go to standard output, one JSON object a line. Needs Pillow (the extra ``train``).

References:
    Zhang et al., Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising,
    IEEE TIP 2017.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _loop import Row, check_batch, gradient_step, save_weights, train
from flax import nnx
from PIL import Image

from selcrypt_jax.models import DnCNN

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Config:
    """What to train, on what, for how long."""

    images: Path
    """Folder of images to train on."""

    test: Path
    """Folder of images to measure PSNR on; never trained on."""

    out: Path
    """The .safetensors file to write, in PyTorch's names and layout."""

    sigma: float = 25.0
    """Standard deviation of the noise, for pixels in 0..255."""

    depth: int = 17
    """Number of convolutions."""

    width: int = 64
    """Channels between them."""

    colour: bool = False
    """RGB instead of grey."""

    steps: int = 20_000
    """Gradient steps."""

    batch: int = 64
    """Patches in a step."""

    patch: int = 40
    """Side of a patch, in pixels."""

    rate: float = 1e-3
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero."""

    every: int = 500
    """Steps between two measurements, and between two checkpoints."""

    checkpoints: Path | None = None
    """Folder for checkpoints. A run that finds some there goes on from the last one, and ends as if
    it had never been interrupted."""

    seed: int = 0
    """Seed of weights, patches and noise."""


def read_images(folder: Path, colour: bool, smallest: int) -> list[np.ndarray]:
    """All images of a folder, ``[H, W, C]`` floats in [0, 1], in the order of their names."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    images = []
    for path in paths:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB" if colour else "L"), np.float32) / 255
        images.append(pixels if colour else pixels[..., None])
        if min(pixels.shape[:2]) < smallest:
            raise SystemExit(
                f"{path}: expected at least {smallest}×{smallest} pixels, got "
                f"{pixels.shape[1]}×{pixels.shape[0]}. Use a smaller --patch, or leave it out."
            )
    if not images:
        raise SystemExit(f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), got none.")
    return images


def random_patches(
    images: list[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """``[count, size, size, C]``, flipped and turned at random."""
    patches = []
    for _ in range(count):
        image = images[rng.integers(len(images))]
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
        patch = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
        patches.append(patch[:, ::-1] if rng.integers(2) else patch)
    return np.stack(patches)


def main(config: Config) -> None:
    """Trains; see `Config`."""
    if not 0 < config.sigma <= 255:
        raise SystemExit(f"--sigma: expected a number in (0, 255], got {config.sigma:g}.")
    check_batch(config.batch)
    images = read_images(config.images, config.colour, config.patch)
    tests = read_images(config.test, config.colour, 1)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    sigma = config.sigma / 255
    weights, noise, test_noise = jax.random.split(jax.random.key(config.seed), 3)
    model = DnCNN(
        config.depth, config.width, channels=3 if config.colour else 1, rngs=nnx.Rngs(weights)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, config.steps // 20, config.steps
    )
    optimizer = optax.adam(schedule)

    def loss(model: DnCNN, clean: jax.Array, key: jax.Array) -> jax.Array:
        noisy = clean + sigma * jax.random.normal(key, clean.shape)
        return jnp.square(model(noisy) - clean).mean()

    denoise = nnx.jit(lambda model, noisy: model(noisy))

    def batch(number: int) -> np.ndarray:
        rng = np.random.default_rng([config.seed, number])
        return random_patches(images, config.batch, config.patch, rng)

    def measure(number: int, carry: Any, rows: list[Row]) -> Row:
        """PSNR of the test images; the best weights are written."""
        model = nnx.merge(graph, carry[0], carry[1], copy=True)
        model.eval()
        quality = []
        for index, clean in enumerate(tests):
            key = jax.random.fold_in(test_noise, index)
            output = denoise(model, clean[None] + sigma * jax.random.normal(key, (1, *clean.shape)))
            quality.append(-10 * float(jnp.log10(jnp.square(output[0] - clean).mean())))
        psnr = float(np.mean(quality))
        if psnr > max((row["psnr"] for row in rows), default=-np.inf):
            metadata = {"psnr": f"{psnr:.3f}", "sigma": f"{config.sigma:g}", "step": str(number)}
            save_weights(model, config.out, metadata)
        return {"psnr": psnr}

    train(
        jax.tree.map(jnp.copy, (params, rest, optimizer.init(params))),
        gradient_step(graph, optimizer, loss),
        batch,
        key=noise,
        steps=config.steps,
        every=config.every,
        measure=measure,
        checkpoints=config.checkpoints,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
