"""Networks that can be audited by name: the demo's networks, VGG19 and DnCNN."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from .._tree.names import named_leaves
from ..models import VGG19, DnCNN
from ..models._files import normalised, read_cifar, read_images, read_model, read_tensors
from ..models._network import (
    Network,
    accuracy,
    centre,
    cross_entropy,
    psnr,
    random_patch,
    squared_error,
)
from ..models._torch import architecture_of
from ._finetune import TrainingLossFn
from ._structure import Link
from ._subject import Subject

CONVOLUTIONS = r"^convs/.*kernel$"
ModelLoss = Callable[[Any, Any], Float[Array, ""]]


def subject_of(
    network: Network, loss: ModelLoss, fresh: Callable[..., Any], **fields: Any
) -> Subject:
    """Makes a subject of a Flax NNX network.

    Args:
        network: a trained network.
        loss: ``(model, batch) -> scalar``.
        fresh: builds the untrained network, from ``rngs``.
        fields: other fields of the `Subject`.
    """
    return Subject(
        params=network.params,
        loss_fn=lambda params, batch: loss(network.model(params), batch),
        fresh=lambda key: _state(fresh(rngs=nnx.Rngs(params=key, dropout=0))),
        training_loss_fn=_training_loss(network, loss),
        select=CONVOLUTIONS,
        chain=_chain(network.params),
        **fields,
    )


def _chain(params: PyTree) -> list[Link]:
    """The normalisation between each convolution and the next."""
    leaves = named_leaves(params).leaves

    def link(n: int) -> Link:
        before, after = f"convs/{n}/kernel", f"convs/{n + 1}/kernel"
        bias = f"norms/{n}/bias"
        return Link(before, f"norms/{n}/scale", after, bias if bias in leaves else None)

    return [found for found in map(link, range(len(leaves))) if leaves.keys() >= set(found[:3])]


def _state(model: nnx.Module) -> PyTree:
    return nnx.state(model, (nnx.Param, nnx.BatchStat))


def _training_loss(network: Network, loss: ModelLoss) -> TrainingLossFn:
    """A loss that uses batch statistics, and also returns the updated running statistics."""

    def of(params: PyTree, batch: Any) -> tuple[Array, PyTree]:
        model = network.model(params)
        # Dropout stays off: short training runs do better without it.
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.use_running_average = False
        return loss(model, batch), _state(model)

    return of


# --- the demo's networks, trained on the fly ------------------------------------------------------


def demo_vgg19(*, width: float = 0.25, steps: int = 250, seed: int = 0) -> Subject:
    """VGG19 on scikit-learn's digits, trained as in `selcrypt demo`, with the same arguments."""
    from ..demo._train import train_vgg19

    trained = train_vgg19(width=width, steps=steps, seed=seed)
    return _of_demo(trained, "VGG19, handwritten digits", batch=32)


def demo_transformer(*, steps: int = 1000, seed: int = 0) -> Subject:
    """A vision transformer on scikit-learn's digits, trained in a minute."""
    from ..demo._train import train_transformer

    trained = train_transformer(steps=steps, seed=seed)
    subject = _of_demo(trained, "vision transformer, handwritten digits", batch=32)
    # It has no running statistics. Each normalisation layer lies between the last kernel that
    # writes to the residual stream and the next that reads from it.
    blocks = [f"blocks/{n}" for n in range(4)]
    inner = [(f"{block}/out", f"{block}/norm2", f"{block}/up") for block in blocks]
    outer = [
        (f"{last}/down", f"{block}/norm1", f"{block}/qkv")
        for last, block in itertools.pairwise(blocks)
    ]
    chain = [
        Link(f"{before}/kernel", f"{norm}/scale", f"{after}/kernel", f"{norm}/bias")
        for before, norm, after in (*inner, *outer, (f"{blocks[-1]}/down", "norm", "head"))
    ]
    return subject._replace(training_loss_fn=None, select=None, layout="HWIO", chain=chain)


def demo_dncnn(
    *,
    depth: int = 10,
    width: int = 32,
    steps: int = 400,
    crop: int = 192,
    batch: int = 8,
    seed: int = 0,
) -> Subject:
    """DnCNN on scikit-image's photographs, trained as in `selcrypt demo`, with the same arguments.

    It is trained somewhat longer and at a higher rate, since a network that an attacker can train
    just as well is not worth stealing. `batch` is the number of patches in an attacker's step.
    """
    from ..demo._train import SIGMA, train_dncnn

    trained = train_dncnn(depth=depth, width=width, steps=steps, crop=crop, seed=seed, rate=1.2e-2)
    clean = np.asarray(trained.examples)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        return noisy_pair(clean[rng.choice(which, batch)], SIGMA, rng)

    return _of_demo(trained, "DnCNN, photographs, σ = 25", batch=batch)._replace(batch=draw)


def _of_demo(trained: Any, title: str, *, batch: int) -> Subject:
    examples = jax.tree.map(np.asarray, trained.examples)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = rng.choice(which, batch)
        return jax.tree.map(lambda array: array[chosen], examples)

    return subject_of(
        trained.network,
        trained.loss,
        trained.fresh,
        title=title,
        metric=trained.metric,
        unit=trained.unit,
        worthless=trained.worthless,
        examples=len(jax.tree.leaves(examples)[0]),
        batch=draw,
    )


# --- from files ----------------------------------------------------------------------------------


def noisy_pair(
    clean: np.ndarray, sigma: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Images with Gaussian noise of this standard deviation, and the clean images."""
    return clean + np.float32(sigma) * rng.standard_normal(clean.shape, np.float32), clean


def dncnn(
    *,
    weights: str,
    images: str,
    tests: str,
    sigma: float = 25.0,
    batch: int = 16,
    patch: int = 40,
    crop: int | None = None,
    eps: float = 1e-5,
    seed: int = 0,
    base: str | None = None,
    siblings: Sequence[str] = (),
) -> Subject:
    """DnCNN from a checkpoint with PyTorch's names.

    Args:
        weights: .safetensors file.
        images: folder of training images, or a data set prepared by TFDS; each image is an example.
        tests: the same, for test images.
        sigma: standard deviation of the noise, for pixels in 0..255.
        batch: patches per step.
        patch: side length of a patch, in pixels.
        crop: side length of the central squares to test on, in pixels; whole images by default.
        eps: ε of BatchNorm.
        seed: seed of the noise on the test images.
        base: .safetensors file of a network that the attacker also has, see `Subject`.
        siblings: .safetensors files of other networks of the architecture, see `Subject`.
    """
    tensors = read_tensors(Path(weights))
    model = read_model(Path(weights), DnCNN, eps=eps, tensors=tensors)
    network = Network.of(model)
    channels = model.channels
    train = read_images(Path(images), split="train", channels=channels, smallest=patch)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        patches = [random_patch(train[int(i)], patch, rng) for i in rng.choice(which, batch)]
        return noisy_pair(np.stack(patches) / np.float32(255), sigma / 255, rng)

    rng = np.random.default_rng(seed)
    pairs = []
    for image in read_images(Path(tests), split="test", channels=channels, smallest=crop or 1):
        image = centre(image, crop) if crop else image
        pairs.append(noisy_pair(image[None] / np.float32(255), sigma / 255, rng))
    if crop:  # all the same size: one batch
        pairs = [tuple(np.concatenate(side) for side in zip(*pairs, strict=True))]
    denoise = jax.jit(lambda params, noisy: network(params, noisy))

    def quality(output: Callable[[np.ndarray], Any]) -> float:
        return float(np.mean([v for noisy, clean in pairs for v in psnr(output(noisy), clean)]))

    return subject_of(
        network,
        lambda model, batch: squared_error(model, *batch),
        architecture_of(tensors, eps=eps),
        title=f"DnCNN, {Path(weights).name}, σ = {sigma:g}",
        metric=lambda params: quality(lambda noisy: denoise(params, noisy)),
        unit="dB",
        worthless=quality(lambda noisy: noisy),
        examples=len(train),
        batch=draw,
        base=base and Network.of(read_model(Path(base), DnCNN, eps=eps)).params,
        siblings=[Network.of(read_model(Path(p), DnCNN, eps=eps)).params for p in siblings],
    )


def vgg19(
    *,
    weights: str,
    data: str,
    dataset: str = "cifar10",
    batch: int = 64,
    tests: int = 1000,
    base: str | None = None,
    siblings: Sequence[str] = (),
) -> Subject:
    """VGG19 on CIFAR from a checkpoint with PyTorch's names.

    Args:
        weights: .safetensors file.
        data: the ``data_dir`` in which TFDS prepared the data as ArrayRecord files.
        dataset: cifar10 or cifar100.
        batch: images per step.
        tests: number of test images to use, from the start of the set.
        base: .safetensors file of a network that the attacker also has, see `Subject`.
        siblings: .safetensors files of other networks of the architecture, see `Subject`.
    """
    tensors = read_tensors(Path(weights))
    network = Network.of(read_model(Path(weights), VGG19, tensors=tensors))
    folder = Path(data) / dataset
    images, labels = read_cifar(folder, "train")
    tested = read_cifar(folder, "test", tests)
    share = accuracy(lambda params, images: network(params, normalised(images)), *tested)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = rng.choice(which, batch)
        flipped = rng.integers(2, size=(batch, 1, 1, 1)).astype(bool)
        found = images[chosen]
        return np.where(flipped, found[:, :, ::-1], found), labels[chosen]

    return subject_of(
        network,
        lambda model, batch: cross_entropy(model, normalised(batch[0]), batch[1]),
        architecture_of(tensors),
        title=f"VGG19, {Path(weights).name}, {dataset}",
        metric=lambda params: 100 * share(params),
        unit="%",
        worthless=100 / (int(labels.max()) + 1),
        examples=len(images),
        batch=draw,
        base=base and Network.of(read_model(Path(base), VGG19)).params,
        siblings=[Network.of(read_model(Path(path), VGG19)).params for path in siblings],
    )


BUILT_IN: Mapping[str, Callable[..., Subject]] = {
    "demo-vgg19": demo_vgg19,
    "demo-dncnn": demo_dncnn,
    "demo-transformer": demo_transformer,
    "vgg19": vgg19,
    "dncnn": dncnn,
}
