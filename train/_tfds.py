"""Data sets that TFDS prepared, read by index from their files: no TensorFlow, no network."""

from pathlib import Path
from typing import Any

HOW = (
    'Prepare it on a machine with TensorFlow and the internet: tfds.builder("NAME", '
    'file_format="array_record", data_dir="DATA").download_and_prepare().'
)


def prepared(folder: Path) -> list[Path]:
    """The versions of a data set in a folder as ``data_dir/cifar10``, or that folder itself."""
    own = [folder] if (folder / "dataset_info.json").is_file() else []
    return own or sorted((p.parent for p in folder.glob("*/dataset_info.json")), key=_number)


def _number(version: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in version.name.split(".") if part.isdigit())


def read_split(folder: Path, split: str) -> Any:
    """A split of the newest version in a folder, as a sequence of examples.

    Args:
        folder: as ``data_dir/cifar10``, or with a version.
        split: as ``"train"``.

    Raises:
        SystemExit: nothing that TFDS prepared, or not as ArrayRecord files.
    """
    found = prepared(folder)
    if not found:
        raise SystemExit(
            f"{folder}: expected a data set that TFDS prepared (VERSION/dataset_info.json in it), "
            f"got none. {HOW}"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SystemExit(
            f"{found[-1]}: needs the extra `train`: pip install 'selcrypt-jax[train]'. ({error})"
        ) from None
    try:
        builder: Any = tfds.builder_from_directory(found[-1])
        source = builder.as_data_source(split)
        for index in (0, len(source) - 1):  # files are opened when something is read of them
            if "image" not in source[index]:
                raise ValueError(f"no image in example {index}")
        return source
    except Exception as error:  # of many kinds, by what is missing or half-written
        raise SystemExit(
            f"{found[-1]}: expected {folder.name} in ArrayRecord files with a split {split!r}, got "
            f"{type(error).__name__}: {str(error)[:200]}. {HOW}"
        ) from error
