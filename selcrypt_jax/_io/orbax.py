"""Orbax checkpoints: a folder with a pytree, and our metadata as one more file in it."""

import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .arrays import ArraySource, as_array
from .atomic import new_folder
from .safetensors import MAX_HEADER
from .strict_json import json_object

METADATA_FILE = "selcrypt.json"
_INNER = "checkpoint"
_VALUE = "/value"
_TREE = "_METADATA"  # what Orbax calls the description of a pytree


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is an Orbax checkpoint.

    Raises:
        ValueError: it holds some, as a checkpoint of several items does, but is none.
    """
    path = Path(path)
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
    """A pytree that Orbax saved; its arrays come into memory when the first of them is read.

    So what its metadata say of shapes can be compared with a signed manifest before. Names are the
    steps of a path, joined by ``/``.

    Args:
        path: the folder.

    Raises:
        ValueError: Orbax cannot read it; something in it that is no regular file; a leaf that a
            safetensors file could not hold; metadata of ours that are malformed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import orbax.checkpoint as ocp

        from .._tree.names import named_leaves

        self.path = Path(path)
        self.size = _check_folder(self.path)
        self.metadata = _read_metadata(self.path)
        with _orbax_errors(self.path), ocp.PyTreeCheckpointer() as checkpointer:
            found: Any = checkpointer.metadata(self.path.absolute())
            self._kinds = found.item_metadata.tree
            leaves = named_leaves(self._kinds, str(self.path)).leaves
            self.stored = _stored_names(leaves)
            described = {name: leaves[stored] for name, stored in self.stored.items()}
        super().__init__(described, str(self.path))
        self._lock, self._tree = threading.Lock(), None

    @property
    def tree(self) -> Any:
        """The arrays, as `named_leaves`."""
        with self._lock:
            if self._tree is None:
                self._tree = self._restored()
                leaves = self._tree.leaves
                self._arrays = {name: leaves[stored] for name, stored in self.stored.items()}
            return self._tree

    def _bytes(self, name: str) -> memoryview:
        _ = self.tree
        return super()._bytes(name)

    def _restored(self) -> Any:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        from .._tree.names import named_leaves

        with _orbax_errors(self.path), ocp.PyTreeCheckpointer() as checkpointer:
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._kinds)
            restored = checkpointer.restore(self.path.absolute(), restore_args=kinds)
        tree = named_leaves(restored, str(self.path))
        for name, info in self.tensors.items():
            shape = tuple(np.shape(tree.leaves[self.stored[name]]))
            if shape != info.shape:
                raise ValueError(
                    f"{self.path}: {name!r}: expected shape {list(info.shape)} as its metadata "
                    f"say, got {list(shape)}. It is damaged: get it again."
                )
        return tree


@contextmanager
def _orbax_errors(path: Path) -> Iterator[None]:
    """What Orbax raises where it cannot read a checkpoint, in one line."""
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"{path}: Orbax cannot read it: {error}") from error
    except RecursionError:
        raise ValueError(
            f"{path}: Orbax cannot read it: its metadata are nested too deep. It is damaged, or "
            "no checkpoint of a network."
        ) from None


def _check_folder(path: Path) -> int:
    """Refuses whatever is no plain file in a plain folder, which a checkpoint has no need of.

    A link could name any file of this machine, and a pipe or device would be waited for.

    Returns:
        The bytes of all files.

    Raises:
        ValueError: of such a thing.
    """
    size = 0
    folders = [path]
    while folders:
        with os.scandir(folders.pop()) as items:
            for item in items:
                mode = item.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    folders.append(Path(item.path))
                elif stat.S_ISREG(mode):
                    size += item.stat(follow_symlinks=False).st_size
                else:
                    what = "a symbolic link" if stat.S_ISLNK(mode) else "a pipe or device"
                    raise ValueError(
                        f"{item.path}: expected regular files in an Orbax checkpoint, got {what}. "
                        "Copy the files themselves."
                    )
    return size


@contextmanager
def orbax_output(
    path: str | os.PathLike[str], like: OrbaxCheckpoint
) -> Iterator[tuple[dict[str, memoryview], dict[str, str]]]:
    """A new Orbax checkpoint, which appears when the block ends, and only then.

    Args:
        path: of the folder; there must be nothing of this name.
        like: the checkpoint whose tree, dtypes and shapes it has.

    Yields:
        Name → bytes, and metadata of ours: both to be filled.
    """
    import orbax.checkpoint as ocp

    data: dict[str, memoryview] = {}
    metadata: dict[str, str] = {}
    with new_folder(path) as folder:
        yield data, metadata
        leaves = {
            like.stored[name]: as_array(data[name], info.dtype, info.shape)
            for name, info in like.tensors.items()
        }
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / _INNER, like.tree.rebuild(leaves))
        _put_together(folder, metadata)


def _put_together(folder: Path, metadata: Mapping[str, str]) -> None:
    """Moves what Orbax wrote, into a new folder as it wants it, to where it belongs."""
    inner = folder / _INNER
    for item in list(inner.iterdir()):
        item.rename(folder / item.name)
    inner.rmdir()
    if metadata:
        text = json.dumps(dict(metadata), ensure_ascii=False, indent=1)
        (folder / METADATA_FILE).write_bytes(text.encode())


def _stored_names(stored: Iterable[str]) -> dict[str, str]:
    """Names as `named_leaves` has them → those in the checkpoint.

    For an ``nnx.State``, Orbax stores one more step, ``value``, for each variable.
    """
    names = list(stored)
    of_state = bool(names) and all(name.endswith(_VALUE) for name in names)
    return {name.removesuffix(_VALUE) if of_state else name: name for name in names}


def _nested(leaves: Mapping[str, Any]) -> Any:
    """Leaves by name as dictionaries in dictionaries, which is how Orbax names them as we do."""
    from flax.traverse_util import unflatten_dict

    return leaves[""] if list(leaves) == [""] else unflatten_dict(dict(leaves), sep="/")


def _read_metadata(path: Path) -> dict[str, str] | None:
    file = path / METADATA_FILE
    if not file.exists():
        return None
    if (size := file.stat().st_size) > MAX_HEADER:
        raise ValueError(
            f"{file}: expected at most {MAX_HEADER} bytes, as in a safetensors file, got {size}. "
            "It is damaged: get it again."
        )
    metadata = json_object(file.read_bytes(), str(file))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: expected text for every key. It is damaged.")
    return metadata


def save_tree(path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str]) -> None:
    """Writes a pytree with metadata of ours, from all processes together.

    It appears under its name when all have written their part, and only then; see `new_folder`.

    Args:
        path: of the folder, which all processes see; there must be nothing of this name.
        tree: of arrays.
        metadata: of ours.

    Raises:
        ValueError, OSError: it cannot be written; in all processes.
    """
    import jax
    import orbax.checkpoint as ocp

    from .._tree.names import named_leaves

    nested = _nested(named_leaves(tree).arrays)
    folder, problem = None, None
    with ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                folder = stack.enter_context(new_folder(path))
            except OSError as error:
                problem = error
        name = _agreed_on("" if folder is None else str(folder), problem)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(Path(name) / _INNER, nested)
        if folder is not None:
            try:
                _put_together(folder, metadata)
                stack.close()
            except OSError as error:
                problem = error
        _agreed_on("", problem)


def _agreed_on(text: str, problem: OSError | None) -> str:
    """What the first process says; or what it saw go wrong, for the others must not wait for it."""
    from .._tree.hosts import from_first

    said = json.dumps([text, None if problem is None else str(problem)])
    text, failure = json.loads(from_first(said.encode()))
    if failure is not None:
        raise problem or OSError(failure)
    return text


def load_tree(path: str | os.PathLike[str], like: Any) -> tuple[Any, dict[str, str]]:
    """Reads a pytree and metadata of ours; each process what it is to have.

    Args:
        path: of the folder.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``, with shardings.

    Raises:
        ValueError: no checkpoint of ours, or one of another tree.
        OSError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    from .._tree.names import listed, named_leaves

    folder = Path(path).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: expected the folder of an Orbax checkpoint, got none. Name "
            "the folder; a safetensors file is opened with open_model."
        )
    _check_folder(folder)
    metadata = _read_metadata(folder)
    if metadata is None:
        raise ValueError(
            f"{path}: expected a protected Orbax checkpoint, got a folder without {METADATA_FILE}. "
            "Protect it, or name the folder that holds that file."
        )
    tree = named_leaves(like, "like")
    given = tree.arrays
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            found: Any = checkpointer.metadata(folder)
            stored = _stored_names(named_leaves(found.item_metadata.tree).leaves)
            if stored.keys() != given.keys():
                raise ValueError(
                    f"expected a tree with {listed(stored)}, got one with {listed(given)}"
                )
            item = _nested({stored[name]: leaf for name, leaf in given.items()})
            arguments = ocp.checkpoint_utils.construct_restore_args(item)
            restored = checkpointer.restore(folder, item=item, restore_args=arguments)
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: Orbax cannot read it: {error}") from error
    leaves = named_leaves(restored).leaves
    return tree.rebuild({name: leaves[stored[name]] for name in given}), metadata
