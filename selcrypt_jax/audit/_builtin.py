"""Networks that can be audited by name: those of the demo, VGG19 and DnCNN."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.flax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..models import VGG19, DnCNN, model_of
from ._finetune import TrainingLossFn
from ._subject import Subject

CONVOLUTIONS = r"^convs/.*kernel$"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
ModelLoss = Callable[[Any, Any], Float[Array, ""]]


def evaluating(model: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph, parameters with running statistics, and the rest, in evaluation mode."""
    model.eval()
    parts: Any = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    return parts


def training_loss(graphdef: nnx.GraphDef, rest: nnx.State, loss: ModelLoss) -> TrainingLossFn:
    """The loss with the statistics of the batch, and parameters with moved running statistics."""

    def of(params: PyTree, batch: Any) -> tuple[Array, PyTree]:
        model = nnx.merge(graphdef, params, rest, copy=True)
        # Dropout stays off: a thief who trains a few hundred steps does better without.
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.use_running_average = False
        value = loss(model, batch)
        return value, nnx.state(model, (nnx.Param, nnx.BatchStat))

    return of


def fresh_model(make: Callable[[nnx.Rngs], Any]) -> Callable[[PRNGKeyArray], PyTree]:
    """``key -> params`` of a network as it is before training."""

    def fresh(key: PRNGKeyArray) -> PyTree:
        model = make(nnx.Rngs(params=key, dropout=0))
        return nnx.state(model, (nnx.Param, nnx.BatchStat))

    return fresh


# --- the demo's, trained on the spot -------------------------------------------------------------


def demo_vgg19(
    *,
    width: float = 0.25,
    steps: int = 250,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> Subject:
    """VGG19 on the digits of scikit-learn, as `selcrypt demo` trains it; arguments as there."""
    from ..demo._train import train_vgg19

    said = {} if advance is None else {"advance": advance}
    trained = train_vgg19(width=width, steps=steps, seed=seed, **said)
    return _of_demo(
        trained,
        "VGG19, handwritten digits",
        lambda rngs: VGG19(in_channels=1, width=width, dropout=0.1, rngs=rngs),
        batch=32,
    )


def demo_dncnn(
    *,
    depth: int = 10,
    width: int = 32,
    steps: int = 400,
    crop: int = 192,
    batch: int = 8,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> Subject:
    """DnCNN on photographs of scikit-image, as `selcrypt demo` trains it; arguments as there.

    For somewhat longer, since what a thief trains better himself is not worth stealing; `batch` is
    how many patches he takes in a step.
    """
    from ..demo._train import SIGMA, train_dncnn

    said = {} if advance is None else {"advance": advance}
    trained = train_dncnn(depth=depth, width=width, steps=steps, crop=crop, seed=seed, **said)
    clean = np.asarray(trained.examples)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = clean[rng.choice(which, batch)]
        noise = rng.standard_normal(chosen.shape, np.float32)
        return chosen + np.float32(SIGMA) * noise, chosen

    subject = _of_demo(
        trained,
        "DnCNN, photographs, σ = 25",
        lambda rngs: DnCNN(depth=depth, width=width, rngs=rngs),
        batch=batch,
    )
    return subject._replace(batch=draw)


def _of_demo(trained: Any, title: str, make: Callable[[nnx.Rngs], Any], *, batch: int) -> Subject:
    examples = jax.tree.map(np.asarray, trained.examples)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = rng.choice(which, batch)
        return jax.tree.map(lambda array: array[chosen], examples)

    return Subject(
        title=title,
        params=trained.params,
        loss_fn=trained.loss_fn,
        metric=trained.metric,
        unit=trained.unit,
        worthless=trained.worthless,
        examples=len(jax.tree.leaves(examples)[0]),
        batch=draw,
        fresh=fresh_model(make),
        training_loss_fn=training_loss(trained.graphdef, trained.rest, trained.loss),
        select=CONVOLUTIONS,
    )


# --- from files ----------------------------------------------------------------------------------


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
) -> Subject:
    """DnCNN from a checkpoint in PyTorch's names.

    Args:
        weights: .safetensors file.
        images: folder of training images; each is an example.
        tests: folder of test images.
        sigma: standard deviation of the noise, for pixels in 0..255.
        batch: patches in a step.
        patch: side of a patch, in pixels.
        crop: test on the centres of that side, in pixels; whole images by default.
        eps: ε of BatchNorm.
        seed: of the noise on the test images.
    """
    model = _model(weights, DnCNN, eps=eps)
    channels, depth, width = model.channels, len(model.convs), model.convs[0].kernel.shape[-1]
    deviation = np.float32(sigma / 255)
    train = _images(images, channels, smallest=patch)
    graphdef, params, rest = evaluating(model)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        patches = np.empty((batch, patch, patch, channels), np.float32)
        for row in patches:
            image = train[int(rng.choice(which))]
            top, left = (int(rng.integers(side - patch + 1)) for side in image.shape[:2])
            turned = np.rot90(image[top : top + patch, left : left + patch], int(rng.integers(4)))
            row[:] = turned[:, ::-1] if rng.integers(2) else turned
        clean = patches / np.float32(255)
        return clean + deviation * rng.standard_normal(clean.shape, np.float32), clean

    def loss(model: Any, batch: Any) -> Array:
        noisy, clean = batch
        return jnp.square(model(noisy) - clean).mean()

    pairs = []
    rng = np.random.default_rng(seed)
    for image in _images(tests, channels, smallest=crop or 1):
        if crop:
            top, left = ((side - crop) // 2 for side in image.shape[:2])
            image = image[top : top + crop, left : left + crop]
        clean = image.astype(np.float32)[None] / 255
        pairs.append((clean, clean + deviation * rng.standard_normal(clean.shape, np.float32)))
    if crop:  # of one size: all at once
        pairs = [tuple(np.concatenate(side) for side in zip(*pairs, strict=True))]
    denoise = jax.jit(lambda params, noisy: nnx.merge(graphdef, params, rest)(noisy))

    def psnr(images: Any, clean: np.ndarray) -> list[float]:
        error = np.square(np.asarray(images, np.float64) - clean).mean((1, 2, 3))
        return (-10 * np.log10(error)).tolist()

    def metric(params: PyTree) -> float:
        return float(
            np.mean([v for clean, noisy in pairs for v in psnr(denoise(params, noisy), clean)])
        )

    return Subject(
        title=f"DnCNN, {Path(weights).name}, σ = {sigma:g}",
        params=params,
        loss_fn=lambda params, batch: loss(nnx.merge(graphdef, params, rest), batch),
        metric=metric,
        unit="dB",
        worthless=float(np.mean([v for clean, noisy in pairs for v in psnr(noisy, clean)])),
        examples=len(train),
        batch=draw,
        fresh=fresh_model(
            lambda rngs: DnCNN(
                depth=depth,
                width=width,
                channels=channels,
                batch_norm=any(norm is not None for norm in model.norms),
                eps=eps,
                first_bias=model.convs[0].bias is not None,
                rngs=rngs,
            )
        ),
        training_loss_fn=training_loss(graphdef, rest, loss),
        select=CONVOLUTIONS,
    )


def vgg19(
    *,
    weights: str,
    data: str,
    dataset: str = "cifar10",
    batch: int = 64,
    tests: int = 1000,
) -> Subject:
    """VGG19 on CIFAR from a checkpoint in PyTorch's names.

    Args:
        weights: .safetensors file.
        data: folder with data that TFDS prepared as ArrayRecord files, its ``data_dir``.
        dataset: cifar10 or cifar100.
        batch: images in a step.
        tests: the first test images, so many.
    """
    model = _model(weights, VGG19, eps=1e-5)
    width = model.convs[0].kernel.shape[-1] / 64
    images, labels = _cifar(Path(data) / dataset, "train", None)
    test_images, test_labels = _cifar(Path(data) / dataset, "test", tests)
    classes = int(labels.max()) + 1
    graphdef, params, rest = evaluating(model)

    def draw(which: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = rng.choice(which, batch)
        flipped = rng.integers(2, size=(batch, 1, 1, 1)).astype(bool)
        found = images[chosen]
        return np.where(flipped, found[:, :, ::-1], found), labels[chosen]

    def loss(model: Any, batch: Any) -> Array:
        logits = model(_normalised(batch[0]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    @jax.jit
    def right(params: PyTree, images: Array, labels: Array) -> Array:
        logits = nnx.merge(graphdef, params, rest)(_normalised(images))
        return (logits.argmax(-1) == labels).sum()

    def metric(params: PyTree) -> float:
        parts = range(0, len(test_images), 500)
        found = sum(
            int(right(params, test_images[at : at + 500], test_labels[at : at + 500]))
            for at in parts
        )
        return 100 * found / len(test_images)

    return Subject(
        title=f"VGG19, {Path(weights).name}, {dataset}",
        params=params,
        loss_fn=lambda params, batch: loss(nnx.merge(graphdef, params, rest), batch),
        metric=metric,
        unit="%",
        worthless=100 / classes,
        examples=len(images),
        batch=draw,
        fresh=fresh_model(
            lambda rngs: VGG19(
                classes,
                width=width,
                batch_norm=any(norm is not None for norm in model.norms),
                rngs=rngs,
            )
        ),
        training_loss_fn=training_loss(graphdef, rest, loss),
        select=CONVOLUTIONS,
    )


def _normalised(images: Any) -> Array:
    mean, std = _MEAN[None, None, None], _STD[None, None, None]
    return (jnp.asarray(images).astype(jnp.float32) / 255 - mean) / std


def _model(weights: str, kind: type, *, eps: float) -> Any:
    path = Path(weights)
    try:
        tensors = safetensors.flax.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected a .safetensors file: {error}") from None
    try:
        wide: Any = {n: t.astype(jnp.float32) for n, t in tensors.items()}
        model = model_of(wide, eps=eps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(model, kind):
        raise ValueError(
            f"{path}: expected a checkpoint of {kind.__name__}, got one of {type(model).__name__}."
        )
    return model


def _images(folder: str, channels: int, *, smallest: int) -> list[np.ndarray]:
    """uint8 ``[H, W, channels]``, in the order of their names."""
    import skimage.io
    import skimage.util
    from skimage.color import gray2rgb, rgb2gray

    paths = sorted(
        path
        for path in Path(folder).glob("*")
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
    )
    if not paths:
        raise ValueError(f"{folder}: expected a folder with images, got none.")
    found = []
    for path in paths:
        image: Any = skimage.io.imread(path)
        image = image[..., :3] if image.ndim == 3 else image
        if channels == 1 and image.ndim == 3:
            image = rgb2gray(image)
        elif channels == 3 and image.ndim == 2:
            image = gray2rgb(image)
        image = skimage.util.img_as_ubyte(image)
        if min(image.shape[:2]) < smallest:
            raise ValueError(
                f"{path}: expected at least {smallest}×{smallest} pixels, got {image.shape[1]}×"
                f"{image.shape[0]}. Use smaller patches or crops, or leave it out."
            )
        found.append(image.reshape(*image.shape[:2], channels))
    return found


def _cifar(folder: Path, split: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 ``[n, 32, 32, 3]``, and labels."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError("CIFAR needs TFDS: pip install 'selcrypt-jax[train]'") from error

    versions = sorted(folder.glob("*/dataset_info.json"))
    if not versions:
        raise ValueError(
            f"{folder}: expected data that TFDS prepared (VERSION/dataset_info.json in it), got "
            "none."
            "file_format='array_record'."
        )
    builder: Any = tfds.builder_from_directory(versions[-1].parent)
    source: Any = builder.as_data_source(split)
    rows = [source[index] for index in range(min(most or len(source), len(source)))]
    return (
        np.stack([row["image"] for row in rows]),
        np.array([row["label"] for row in rows], np.int32),
    )


BUILT_IN: Mapping[str, Callable[..., Subject]] = {
    "demo-vgg19": demo_vgg19,
    "demo-dncnn": demo_dncnn,
    "vgg19": vgg19,
    "dncnn": dncnn,
}
