"""A trained network with its data: what importance is learned on, and what is measured."""

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax
from _images import add_noise, checked_sigma, random_patches, read_images
from flax import nnx

from selcrypt_jax.models import VGG19, DnCNN, model_of

Loss = Callable[[Any, Any], jax.Array]
Metrics = dict[str, float]


class Task(NamedTuple):
    """What PSS needs.

    Attributes:
        params: a pytree; of a network of ours with its running statistics.
        loss_fn: ``(params, batch) -> scalar``, in evaluation mode.
        batch: number of the step → batch of the training data.
        model: of `params`, if it is one of ours.
    """

    params: Any
    loss_fn: Loss
    batch: Callable[[int], Any]
    model: VGG19 | DnCNN | None


def read_tensors(path: Path) -> dict[str, jax.Array]:
    """All tensors of a safetensors file.

    Raises:
        SystemExit: it is none, or a protected one, whose weights are not those of the network.
    """
    if path.is_dir():
        raise SystemExit(f"{path}: expected one .safetensors file, got a folder.")
    if is_protected(path):
        raise SystemExit(
            f"{path}: expected a trained network, got a protected file. Unlock it first: selcrypt "
            "unlock."
        )
    try:
        return safetensors.flax.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path}: expected a .safetensors file: {error}") from None


def is_protected(path: Path) -> bool:
    """Whether a .safetensors file has a manifest.

    Raises:
        SystemExit: it is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return "selcrypt" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path}: expected a .safetensors file: {error}") from None


def read_model(path: Path, kind: type[VGG19] | type[DnCNN], *, eps: float = 1e-5) -> Any:
    """The network of a checkpoint in PyTorch's names, in evaluation mode.

    Raises:
        SystemExit: a checkpoint of another architecture.
    """
    return model_in(read_tensors(path), str(path), kind, eps=eps)


def model_in(tensors: Any, what: str, kind: type[VGG19] | type[DnCNN], *, eps: float) -> Any:
    """As `read_model`, of tensors; ``what`` they are, for messages."""
    try:
        model = model_of(tensors, eps=eps)
    except ValueError as error:
        raise SystemExit(f"{what}: {error}") from None
    if not isinstance(model, kind):
        raise SystemExit(
            f"{what}: expected a checkpoint of {kind.__name__}, got one of {type(model).__name__}."
        )
    model.eval()
    return model


# --- what is measured ---------------------------------------------------------------------------


def classification_loss(graph: Any) -> Loss:
    """Cross-entropy of a batch ``{"image": uint8, "label"}``."""
    from _cifar import normalised

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(normalised(batch["image"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return loss_fn


def denoising_loss(graph: Any) -> Loss:
    """Mean squared error of a batch ``{"clean", "noisy"}``."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.square(nnx.merge(graph, params)(batch["noisy"]) - batch["clean"]).mean()

    return loss_fn


def accuracy_of(
    graph: Any, images: np.ndarray, labels: np.ndarray, batch: int = 500
) -> Callable[[Any], Metrics]:
    """``params -> {"accuracy"}``, a share of uint8 images."""
    from _cifar import normalised

    @jax.jit
    def right(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return (nnx.merge(graph, params)(normalised(images)).argmax(-1) == labels).sum()

    def measure(params: Any) -> Metrics:
        found = 0
        for at in range(0, len(images), batch):
            found += int(right(params, images[at : at + batch], labels[at : at + batch]))
        return {"accuracy": found / len(images)}

    return measure


def psnr(images: jax.Array, clean: jax.Array) -> jax.Array:
    """In dB, of each of ``[n, H, W, C]`` in [0, 1]; pixels are not clipped."""
    return -10 * jnp.log10(jnp.square(images - clean).mean((1, 2, 3)))


def denoising_of(
    graph: Any, images: Iterable[np.ndarray], sigma: float, key: jax.Array
) -> Callable[[Any], Metrics]:
    """``params -> {"psnr", "ssim"}``, means over uint8 images ``[H, W, C]``.

    PSNR is that of the network's output as it is, SSIM that of it clipped to [0, 1], since it
    needs a range.
    """
    pairs = []
    for index, image in enumerate(images):
        if min(image.shape[:2]) < 11:  # the window of SSIM
            raise SystemExit(
                f"test image {index}: expected at least 11×11 pixels, got {image.shape[1]}×"
                f"{image.shape[0]}: SSIM needs them."
            )
        clean = jnp.asarray(image, jnp.float32)[None] / 255
        noise = jax.random.normal(jax.random.fold_in(key, index), clean.shape)
        pairs.append((clean, clean + sigma * noise))
    denoise = jax.jit(lambda params, noisy: nnx.merge(graph, params)(noisy))

    def measure(params: Any) -> Metrics:
        rows: list[list[float]] = []
        for clean, noisy in pairs:
            output = denoise(params, noisy)
            similarity = jnp.mean(dm_pix.ssim(output.clip(0, 1), clean))
            rows.append([float(psnr(output, clean)[0]), float(similarity)])
        means = np.mean(rows, axis=0)
        return {"psnr": float(means[0]), "ssim": float(means[1])}

    return measure


# --- on the command line ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Vgg19Task:
    """VGG19 on CIFAR."""

    weights: Path
    """The trained network: .safetensors, in PyTorch's names and layout."""

    data: Path
    """Folder with the prepared data, as TFDS's ``data_dir``."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which one."""

    batch: int = 64
    """Images in a step."""

    def task(self, seed: int) -> Task:
        """Reads it."""
        from _cifar import batches

        model = read_model(self.weights, VGG19)
        graph, params = nnx.split(model)
        source = batches(self.data / self.dataset, self.batch, seed=seed, augment=False)
        return Task(params, classification_loss(graph), source.__getitem__, model)


@dataclass(frozen=True, kw_only=True)
class DncnnTask:
    """DnCNN on patches of images."""

    weights: Path
    """The trained network: .safetensors, in PyTorch's names and layout."""

    images: Path
    """Folder of images, or of a data set that TFDS prepared; colour and grey are converted as the
    network needs it."""

    sigma: tuple[float, ...] = (25.0,)
    """Standard deviation of the noise, for pixels in 0..255; or a range of two."""

    eps: float = 1e-5
    """ε of BatchNorm."""

    bgr: bool = False
    """The network wants blue, green, red: so do the weights published with the paper."""

    batch: int = 8
    """Patches in a step."""

    patch: int = 48
    """Side of a patch, in pixels."""

    def task(self, seed: int) -> Task:
        """Reads it."""
        sigma = checked_sigma(self.sigma)
        model = read_model(self.weights, DnCNN, eps=self.eps)
        graph, params = nnx.split(model)
        images = read_images(
            self.images, split="train", channels=model.channels, smallest=self.patch
        )
        return Task(
            params,
            denoising_loss(graph),
            patch_batches(images, self.batch, self.patch, sigma, seed=seed, bgr=self.bgr),
            model,
        )


def patch_batches(
    images: Any,
    batch: int,
    patch: int,
    sigma: tuple[float, float],
    *,
    seed: int,
    bgr: bool = False,
) -> Callable[[int], Any]:
    """Number of the step → ``{"clean", "noisy"}``, ``[batch, patch, patch, C]``."""
    noise = jax.random.key(seed)

    def make(number: int) -> Any:
        rng = np.random.default_rng([seed, number])
        clean = random_patches(images, batch, patch, rng)
        clean = np.ascontiguousarray(clean[..., ::-1]) if bgr else clean
        noisy = add_noise(jnp.asarray(clean), sigma, jax.random.fold_in(noise, number))
        return {"clean": clean, "noisy": noisy}

    return make


@dataclass(frozen=True, kw_only=True)
class CustomTask:
    """A network of your own."""

    weights: Path
    """The trained network: .safetensors; the loss gets a dict of its tensors by name."""

    loss: str
    """Import path of ``loss_fn(params, batch) -> scalar``, as my_package.losses:loss_fn."""

    batches: str
    """A file .npz of arrays [batches, ...], or an import path: of a pytree of such arrays, or of a
    function that gives the batch of a step's number."""

    layout: Literal["HWIO", "OIHW"] = "OIHW"
    """Where input and output channels of a convolution are; OIHW is PyTorch's."""

    def task(self, seed: int) -> Task:
        """Imports and reads it; the order of the batches is yours, and does not heed the seed."""
        del seed
        loss: Any = import_object(self.loss, "--loss")
        if not callable(loss):
            raise SystemExit(f"--loss: expected a function, got {loss!r}.")
        loss_fn: Any = loss  # a function; of what type, its author knows
        found: Any
        if self.batches.endswith(".npz"):
            try:
                # Opened here: NumPy leaves open what turns out to be no archive.
                with open(self.batches, "rb") as file, np.load(file) as arrays:
                    found = dict(arrays)
            except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
                raise SystemExit(f"--batches: {self.batches}: {error}") from None
        else:
            found = import_object(self.batches, "--batches")
        batch: Any = found if callable(found) else _in_turn(found)
        return Task(read_tensors(self.weights), loss_fn, batch, None)


def _in_turn(batches: Any) -> Callable[[int], Any]:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise SystemExit(
            "--batches: expected arrays [batches, ...] with the same number of batches, got first "
            f"axes {sorted(lengths) or 'of nothing'}."
        )
    ((count,),) = lengths
    return lambda number: jax.tree.map(lambda leaf: leaf[(number - 1) % count], batches)


def import_object(path: str, option: str) -> Any:
    """What an import path as ``package.module:name`` stands for; the working folder is searched.

    Raises:
        SystemExit: it stands for nothing.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name or module.startswith("."):
        raise SystemExit(f"{option}: expected an import path module:name, got {path!r}.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does as it is imported
        raise SystemExit(
            f"{option}: expected {path!r} to import, got {type(error).__name__}: {error}."
        ) from error
