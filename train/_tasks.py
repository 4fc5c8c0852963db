"""A trained network with its data: for learning importance, and for measuring quality."""

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from _images import checked_sigma, patch_batches
from flax import nnx

from selcrypt_jax._io.imported import imported
from selcrypt_jax.models import VGG19, DnCNN
from selcrypt_jax.models._files import normalised, read_images, read_model, read_tensors
from selcrypt_jax.models._network import accuracy, cross_entropy, psnr, squared_error

Loss = Callable[[Any, Any], jax.Array]
Metrics = dict[str, float]


class Task(NamedTuple):
    """The inputs of PSS.

    Attributes:
        params: a pytree; with running statistics for one of our networks.
        loss_fn: ``(params, batch) -> scalar``, in evaluation mode.
        batch: step number → batch of training data.
        model: the model of `params`, if it is one of ours.
    """

    params: Any
    loss_fn: Loss
    batch: Callable[[int], Any]
    model: VGG19 | DnCNN | None


# --- quality ------------------------------------------------------------------------------------


def classification_loss(graph: Any) -> Loss:
    """Cross-entropy of a batch ``{"image": uint8, "label"}``."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        return cross_entropy(model, normalised(batch["image"]), batch["label"])

    return loss_fn


def denoising_loss(graph: Any) -> Loss:
    """Mean squared error of a batch ``{"clean", "noisy"}``."""
    return lambda params, batch: squared_error(
        nnx.merge(graph, params), batch["noisy"], batch["clean"]
    )


def accuracy_of(graph: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[Any], Metrics]:
    """``params -> {"accuracy"}``, as a share of the uint8 images."""
    share = accuracy(lambda params, x: nnx.merge(graph, params)(normalised(x)), images, labels)
    return lambda params: {"accuracy": share(params)}


def denoising_of(
    graph: Any, images: Iterable[np.ndarray], sigma: float, key: jax.Array
) -> Callable[[Any], Metrics]:
    """``params -> {"psnr", "ssim"}``, means over uint8 images ``[H, W, C]``.

    PSNR is measured on the network's output as it is, SSIM on the output clipped to [0, 1], because
    it needs a range.
    """
    pairs = []
    for index, image in enumerate(images):
        if min(image.shape[:2]) < 11:  # the window of SSIM
            raise ValueError(
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
    """Folder with the prepared data: TFDS's ``data_dir``."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which data set."""

    batch: int = 64
    """Images per step."""

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
    """Folder of images, or of a data set prepared by TFDS; colour and grey are converted to suit
    the network."""

    sigma: tuple[float, ...] = (25.0,)
    """Standard deviation of the noise, for pixels in 0..255; or a range of two."""

    eps: float = 1e-5
    """ε of BatchNorm."""

    bgr: bool = False
    """The network expects BGR channels, as do the weights published with the paper."""

    batch: int = 8
    """Patches per step."""

    patch: int = 48
    """Side length of a patch, in pixels."""

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


@dataclass(frozen=True, kw_only=True)
class CustomTask:
    """A network of your own."""

    weights: Path
    """The trained network: .safetensors; the loss gets a dict of its tensors by name."""

    loss: str
    """Import path of ``loss_fn(params, batch) -> scalar``, as my_package.losses:loss_fn."""

    batches: str
    """An .npz file of arrays [batches, ...], or an import path to a pytree of such arrays or to a
    function from step number to batch."""

    layout: Literal["HWIO", "OIHW"] = "OIHW"
    """The axis order of convolution kernels; OIHW is PyTorch's."""

    def task(self, seed: int) -> Task:
        """Imports and reads it; the order of the batches is yours and ignores the seed."""
        del seed
        loss_fn = imported("--loss", self.loss)
        if self.batches.endswith(".npz"):
            try:
                # Opened here: NumPy leaves a file open if it is not an archive.
                with open(self.batches, "rb") as file, np.load(file) as arrays:
                    found = dict(arrays)
            except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"--batches: {self.batches}: {error}") from None
        else:
            found = imported("--batches", self.batches, data=True)
        batch: Any = found if callable(found) else _in_turn(found)
        return Task(read_tensors(self.weights), loss_fn, batch, None)


def _in_turn(batches: Any) -> Callable[[int], Any]:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "--batches: expected arrays [batches, ...] with the same number of batches, got first "
            f"axes {sorted(lengths) or 'of nothing'}."
        )
    ((count,),) = lengths
    return lambda number: jax.tree.map(lambda leaf: leaf[(number - 1) % count], batches)
