"""Orbax checkpoints: a folder with a pytree, and our metadata as one more file in it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._arrays import ArraySource, as_array
from ._atomic import new_folder
from ._json import json_object

METADATA_FILE = "selcrypt.json"
_TREE = "_METADATA"  # what Orbax calls the description of a pytree


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is an Orbax checkpoint.

    Raises:
        ValueError: it holds some, as a checkpoint of several items does, but is none.
    """
    path = Path(path)
    if not path.is_dir():
        return False
    if (path / _TREE).is_file():
        return True
    inside = sorted(item.parent.name for item in path.glob(f"*/{_TREE}"))
    if inside:
        raise ValueError(
            f"{path}: expected the Orbax checkpoint of one pytree, got a folder of {inside}. Name "
            f"one of them, such as {path / inside[0]}."
        )
    return False


class OrbaxCheckpoint(ArraySource):
    """A pytree that Orbax saved, in memory as NumPy arrays.

    Names are the steps of a path, joined by ``/``.

    Args:
        path: the folder.

    Raises:
        ValueError: Orbax cannot read it; a leaf that a safetensors file could not hold; metadata
            of ours that are malformed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        from ._tree import named_leaves

        self.path = Path(path)
        folder = self.path.absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            try:
                found: Any = checkpointer.metadata(folder)
                tree = found.item_metadata.tree
                kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                restored = checkpointer.restore(folder, restore_args=kinds)
            except (ValueError, KeyError, FileNotFoundError, AttributeError) as error:
                raise ValueError(f"{self.path}: Orbax cannot read it: {error}") from error
        self.tree = named_leaves(restored, str(self.path))
        super().__init__(self.tree.leaves, str(self.path))
        self.size = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
        self.metadata: dict[str, str] | None = None
        if (folder / METADATA_FILE).exists():
            what = str(self.path / METADATA_FILE)
            metadata = json_object((folder / METADATA_FILE).read_bytes(), what)
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError(f"{what}: expected text for every key. It is damaged.")
            self.metadata = metadata

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def orbax_output(
    path: str | os.PathLike[str], like: OrbaxCheckpoint
) -> Iterator[tuple[dict[str, bytearray], dict[str, str]]]:
    """A new Orbax checkpoint, which appears when the block ends, and only then.

    Args:
        path: of the folder; there must be nothing of this name.
        like: the checkpoint whose tree, dtypes and shapes it has.

    Yields:
        Name → bytes, and metadata of ours: both to be filled.
    """
    import orbax.checkpoint as ocp

    data: dict[str, bytearray] = {}
    metadata: dict[str, str] = {}
    with new_folder(path) as folder:
        yield data, metadata
        leaves: Mapping[str, Any] = {
            name: as_array(data[name], info.dtype, info.shape)
            for name, info in like.tensors.items()
        }
        inner = folder.absolute() / "checkpoint"
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(inner, like.tree.rebuild(leaves))
        for item in list(inner.iterdir()):
            item.rename(folder / item.name)
        inner.rmdir()
        if metadata:
            text = json.dumps(metadata, ensure_ascii=False, indent=1)
            (folder / METADATA_FILE).write_bytes(text.encode())
