"""Reads files for the two networks: checkpoints, and CIFAR or images to evaluate them on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from jaxtyping import Array, Float

from ._dncnn import DnCNN
from ._torch import model_of
from ._vgg import VGG19

# ImageNet's colours.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)
_STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
_HOW = (
    'Prepare it on a machine with TensorFlow and internet access: tfds.builder("NAME", '
    'file_format="array_record", data_dir="DATA").download_and_prepare().'
)

# --- checkpoints --------------------------------------------------------------------------------


def is_protected(path: Path) -> bool:
    """Whether a .safetensors file has a manifest.

    Raises:
        ValueError: the file is not a .safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return "selcrypt" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: expected a .safetensors file: {str(error).rstrip('.')}. Name one."
        ) from None


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of a .safetensors file.

    Raises:
        ValueError: it is not such a file, or a protected one, whose weights are not the network's.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: expected one .safetensors file, got a folder. Name a file in it."
        )
    if is_protected(path):
        raise ValueError(
            f"{path}: expected a trained network, got a protected file. Unlock it first: selcrypt "
            "unlock."
        )
    return safetensors.flax.load_file(path)


def read_model(
    path: Path,
    kind: type[VGG19 | DnCNN],
    *,
    eps: float = 1e-5,
    tensors: Mapping[str, Any] | None = None,
) -> Any:
    """The network of a checkpoint with PyTorch's names, in evaluation mode.

    Args:
        path: the path of a .safetensors file.
        kind: the required class.
        eps: ε of BatchNorm in DnCNN.
        tensors: the file's tensors, if they have been read; `path` is then for messages alone.

    Raises:
        ValueError: the checkpoint has another architecture.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    try:
        model = model_of(tensors, eps=eps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(model, kind):
        raise ValueError(
            f"{path}: expected a checkpoint of {kind.__name__}, got one of {type(model).__name__}. "
            "Name another."
        )
    model.eval()
    return model


# --- data sets ----------------------------------------------------------------------------------


def prepared(folder: Path) -> list[Path]:
    """Versions of a TFDS data set in a folder like ``data_dir/cifar10``, or that folder."""

    def number(version: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in version.name.split(".") if part.isdigit())

    own = [folder] if (folder / "dataset_info.json").is_file() else []
    return own or sorted((p.parent for p in folder.glob("*/dataset_info.json")), key=number)


def read_split(folder: Path, split: str) -> Any:
    """A split of the newest version in a folder, by index: no TensorFlow, no network.

    Args:
        folder: such as ``data_dir/cifar10``, or with a version.
        split: such as ``"train"``.

    Returns:
        A sequence of examples, dicts of arrays.

    Raises:
        ValueError: the folder holds nothing prepared by TFDS, or not as ArrayRecord files.
        ModuleNotFoundError: TFDS is not installed.
    """
    found = prepared(folder)
    if not found:
        raise ValueError(
            f"{folder}: expected a data set that TFDS prepared (VERSION/dataset_info.json in it), "
            f"got none. {_HOW}"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{found[-1]}: needs tensorflow-datasets, which does not import ({error}). Install the "
            "extra: pip install '.[train]' in your copy of the repository.",
            name="tensorflow_datasets",
        ) from None
    try:
        builder: Any = tfds.builder_from_directory(found[-1])
        source = builder.as_data_source(split)
        for index in (0, len(source) - 1):  # files are opened on the first read
            if "image" not in source[index]:
                raise ValueError(f"no image in example {index}")
        return source
    except Exception as error:  # many kinds, depending on what is missing or half-written
        raise ValueError(
            f"{found[-1]}: expected {folder.name} in ArrayRecord files with a split {split!r}, got "
            f"{type(error).__name__}: {str(error)[:200].rstrip('.')}. {_HOW}"
        ) from error


def read_cifar(folder: Path, split: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 ``[n, 32, 32, 3]``, and labels ``[n]``, or the first ``most`` of them."""
    source = read_split(folder, split)
    rows = [source[index] for index in range(_at_most(most, len(source)))]
    images = np.stack([row["image"] for row in rows])
    return images, np.array([row["label"] for row in rows], np.int32)


def normalised(images: Any) -> Float[Array, "n h w 3"]:
    """Colour pixels of 0..255, normalised for VGG19."""
    return (jnp.asarray(images).astype(jnp.float32) / 255 - _MEAN) / _STD


def _at_most(most: int | None, count: int) -> int:
    if most is not None and most < 1:
        raise ValueError(f"tests: expected at least 1, got {most}.")
    return min(most or count, count)


# --- images -------------------------------------------------------------------------------------


class _TfdsImages(Sequence[np.ndarray]):
    """The images of a data set, each decoded on access: there may be many."""

    def __init__(self, folder: Path, split: str, most: int | None, channels: int, smallest: int):
        self.source = read_split(folder, split)
        self.folder = folder
        self.length = _at_most(most, len(self.source))
        self.kind = channels, smallest

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        if not 0 <= index < self.length:
            raise IndexError(index)
        pixels = self.source[index]["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return _pixels(image, f"{self.folder}: image {index}", *self.kind)


def _pixels(image: Any, what: str, channels: int, smallest: int) -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise ValueError(f"{what}: expected integer pixels, got floats. Save them as 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if min(pixels.shape[:2]) < smallest:
        raise ValueError(
            f"{what}: expected at least {smallest}×{smallest} pixels, got {pixels.shape[1]}×"
            f"{pixels.shape[0]}. Use smaller patches or crops, or exclude the image."
        )
    return pixels.reshape(*pixels.shape[:2], channels)


def read_images(
    folder: Path, *, split: str, channels: int, smallest: int = 1, most: int | None = None
) -> Sequence[np.ndarray]:
    """The images of a folder, in the order of their names, or of a split of a TFDS data set.

    Args:
        folder: a folder of image files, or one prepared by TFDS, such as ``data_dir/NAME``.
        split: the split of a TFDS data set.
        channels: 1 for grey, 3 for colour (RGB); images of the other kind are converted.
        smallest: the smallest allowed number of pixels on a side.
        most: read only this many, from the first.

    Returns:
        uint8, ``[H, W, channels]``.

    Raises:
        ValueError: no images, or one that is too small.
    """
    from PIL import Image

    if prepared(folder):
        return _TfdsImages(folder, split, most, channels, smallest)
    paths = []
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder}: expected images ({', '.join(sorted(_SUFFIXES))}) or a data set that TFDS "
            "prepared, got none. Name another folder."
        )
    images = []
    for path in paths[: _at_most(most, len(paths))]:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path}: expected an image, got {str(error).rstrip('.')}. Repair or remove it."
            ) from error
        images.append(_pixels(image, str(path), channels, smallest))
    return images
