"""Trains VGG19 on CIFAR-10 or CIFAR-100 and writes the best weights as safetensors.

Example::

    python train/vgg19.py --data tfds/ --out vgg19.safetensors --checkpoints kept/

Needs the extra ``train``. TFDS reads the data, without TensorFlow, from ArrayRecord files prepared
in advance on a machine with TensorFlow and internet access:
``tfds.builder("cifar10", file_format="array_record", data_dir=...).download_and_prepare()``.

Metrics go to standard output, one JSON object per line.

References:
    Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition, 2015;
    the head (512, 512, classes) is from Tian, Zhou, Duan, CVPR 2021.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import optax
import tyro
from _cifar import batches
from _loop import Run, check_numbers, check_output, exits, started, train_model
from _tasks import accuracy_of
from flax import nnx

from selcrypt_jax.models import VGG19
from selcrypt_jax.models._files import normalised, read_cifar
from selcrypt_jax.models._network import cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """The network, the data, and the length of the training."""

    data: Path
    """Folder with the prepared data: TFDS's ``data_dir``."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which data set."""

    width: float = 1.0
    """Multiplier for the number of channels."""

    batch_norm: bool = True
    """Normalise after every convolution. Without it, use a --rate ten times smaller."""

    start: Path | None = None
    """A checkpoint to start from, such as a public network, instead of random weights. It must have
    been trained with the same options."""

    steps: int = 40_000
    """Gradient steps."""

    batch: int = 128
    """Images per step."""

    rate: float = 0.05
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero."""

    decay: float = 5e-4
    """Weight decay."""

    every: int = 1000
    """Steps between measurements, and between checkpoints."""

    tests: int | None = None
    """Number of test images; all by default."""


@exits()
def main(config: Config) -> None:
    """Trains; see `Config`."""
    check_numbers(config)
    check_output(config.out)
    folder = config.data / config.dataset
    source = batches(folder, config.batch, seed=config.seed)
    tests = read_cifar(folder, "test", config.tests)
    weights, noise = jax.random.split(jax.random.key(config.seed))
    classes = 10 if config.dataset == "cifar10" else 100

    def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
        descent = optax.sgd(schedule, momentum=0.9, nesterov=True)
        return optax.chain(optax.add_decayed_weights(config.decay), descent)

    def loss(model: VGG19, batch: dict[str, jax.Array], _: jax.Array) -> jax.Array:
        return cross_entropy(model, normalised(batch["image"]), batch["label"])

    options = {"width": config.width, "batch_norm": config.batch_norm}
    train_model(
        started(VGG19(classes, **options, rngs=nnx.Rngs(weights)), config.start),
        config,
        optimizer=optimizer,
        loss=loss,
        batch=source.__getitem__,
        quality=lambda graph: accuracy_of(graph, *tests),
        best="accuracy",
        metadata={"dataset": config.dataset},
        key=noise,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
