"""Trains VGG19 on CIFAR-10 or CIFAR-100 and writes the best weights as safetensors.

Example::

    python train/vgg19.py --data tfds/ --out vgg19.safetensors --checkpoints kept/

Needs the extra ``train``. The data are read by TFDS, without TensorFlow, as ArrayRecord files that
were prepared before: on a machine with TensorFlow and the internet,
``tfds.builder("cifar10", file_format="array_record", data_dir=...).download_and_prepare()``.

Metrics go to standard output, one JSON object a line.

References:
    Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition, 2015;
    the head of 512, 512 and the classes is that of Tian, Zhou, Duan, CVPR 2021.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
import tyro
from _loop import Row, check_batch, gradient_step, save_weights, train
from flax import nnx

from selcrypt_jax.models import VGG19

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
PADDING = 4  # pixels, of a random crop
TEST_BATCH = 500


@dataclass(frozen=True)
class Config:
    """What to train, on what, for how long."""

    data: Path
    """Folder with the prepared data, as TFDS's ``data_dir``."""

    out: Path
    """The .safetensors file to write, in PyTorch's names and layout."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which one."""

    width: float = 1.0
    """Factor on the number of channels."""

    batch_norm: bool = True
    """Normalise after every convolution. Without it, use a --rate ten times smaller."""

    steps: int = 40_000
    """Gradient steps."""

    batch: int = 128
    """Images in a step."""

    rate: float = 0.05
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero."""

    decay: float = 5e-4
    """Weight decay."""

    every: int = 1000
    """Steps between two measurements, and between two checkpoints."""

    tests: int | None = None
    """How many test images to measure on; all of them by default."""

    checkpoints: Path | None = None
    """Folder for checkpoints. A run that finds some there goes on from the last one, and ends as if
    it had never been interrupted."""

    seed: int = 0
    """Seed of weights, order of the images, crops and dropout."""


def read(config: Config, split: str) -> Any:
    """A split of the data, by index; from files alone, never from the network."""
    folder = config.data / config.dataset
    found = sorted(folder.glob("*/dataset_info.json"))
    if not found:
        raise SystemExit(
            f"{folder}: expected a data set that TFDS prepared (VERSION/dataset_info.json in it), "
            "got none. --help says how to prepare it."
        )
    try:
        builder: Any = tfds.builder_from_directory(found[-1].parent)
        return builder.as_data_source(split)
    except Exception as error:  # of many kinds, by what is missing or half-written
        raise SystemExit(
            f"{found[-1].parent}: expected {config.dataset} in ArrayRecord files, got "
            f"{type(error).__name__}: {str(error)[:200]}. --help says how to prepare it."
        ) from error


def augment(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A random crop of the padded image, flipped or not."""
    image = np.pad(example["image"], ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    top, left = rng.integers(2 * PADDING + 1, size=2)
    image = image[top : top + 32, left : left + 32]
    return {
        "image": image[:, ::-1] if rng.integers(2) else image,
        "label": np.int32(example["label"]),
    }


def normalised(images: jax.Array) -> jax.Array:
    """Pixels as the network sees them."""
    return (images.astype(jnp.float32) / 255 - MEAN) / STD


def main(config: Config) -> None:
    """Trains; see `Config`."""
    check_batch(config.batch)
    source, tests = read(config, "train"), read(config, "test")
    # By index, so that the images of a step depend on its number alone.
    batches = (
        grain.MapDataset.source(source)
        .seed(config.seed)
        .shuffle()
        .repeat()
        .random_map(augment)
        .batch(config.batch)
    )
    count = min(config.tests or len(tests), len(tests))
    examples = [tests[index] for index in range(count)]
    test_images = np.stack([example["image"] for example in examples])
    test_labels = np.array([example["label"] for example in examples])
    config.out.parent.mkdir(parents=True, exist_ok=True)

    weights, noise = jax.random.split(jax.random.key(config.seed))
    classes = 10 if config.dataset == "cifar10" else 100
    model = VGG19(classes, width=config.width, batch_norm=config.batch_norm, rngs=nnx.Rngs(weights))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, config.steps // 20, config.steps
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(config.decay), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )

    def loss(model: VGG19, batch: dict[str, jax.Array], _: jax.Array) -> jax.Array:
        logits = model(normalised(batch["image"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean()

    @jax.jit
    def right(params: Any, rest: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest, copy=True)
        model.eval()
        return (model(normalised(images)).argmax(-1) == labels).sum()

    def measure(number: int, carry: Any, rows: list[Row]) -> Row:
        """Accuracy on the test images; the best weights are written."""
        params, rest, _ = carry
        found = sum(
            int(
                right(
                    params, rest, test_images[at : at + TEST_BATCH], test_labels[at:][:TEST_BATCH]
                )
            )
            for at in range(0, count, TEST_BATCH)
        )
        accuracy = found / count
        if accuracy > max((row["accuracy"] for row in rows), default=-1):
            metadata = {
                "accuracy": f"{accuracy:.4f}",
                "dataset": config.dataset,
                "step": str(number),
            }
            save_weights(nnx.merge(graph, params, rest, copy=True), config.out, metadata)
        return {"accuracy": accuracy}

    train(
        jax.tree.map(jnp.copy, (params, rest, optimizer.init(params))),
        gradient_step(graph, optimizer, loss),
        batches.__getitem__,
        key=noise,
        steps=config.steps,
        every=config.every,
        measure=measure,
        checkpoints=config.checkpoints,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
