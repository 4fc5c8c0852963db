"""Orbax checkpoints: a folder with a pytree, and our metadata as an additional file in it."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from .arrays import ArrayInfo, ArraySource, as_array
from .atomic import new_folder
from .errors import quoted
from .folders import read_regular, regular_files
from .ocdbt import MANIFEST
from .safetensors import MAX_HEADER
from .strict_json import DAMAGED, check_json, json_object, listing, show
from .zarr import stored_shapes

METADATA_FILE = "selcrypt.json"
_REMEDY = "Download the whole folder again, or save it again with Orbax."
_INNER = "checkpoint"
_VALUE = "/value"
_DETAILS = "array_metadatas/"  # where Orbax says which arrays are random keys
_IMPLEMENTATION = "random_key_impl"
_TREE = "_METADATA"  # Orbax's name for the description of a pytree
# Files that Orbax and TensorStore parse before anything can be checked.
_JSON = (_TREE, "_CHECKPOINT_METADATA", "_sharding", "_strings.json")


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is an Orbax checkpoint.

    Raises:
        ValueError: it contains checkpoints, as one of several items does, but is not one; or it
            lacks the description of the pytree.
    """
    path = Path(path)
    if os.path.lexists(path / _TREE):  # checked later to be a regular file
        return True
    inside = sorted(item.parent.name for item in path.glob(f"*/{_TREE}"))
    if inside:
        raise ValueError(
            f"{path}: expected the Orbax checkpoint of one pytree, got a folder of "
            f"{listing(inside)}. Name one of them, such as {path / inside[0]}."
        )
    if os.path.lexists(path / MANIFEST) or os.path.lexists(path / METADATA_FILE):
        raise _without_tree(path)
    return False


def _without_tree(path: Path) -> ValueError:
    return ValueError(
        f"{path}: expected {_TREE} in this folder of an Orbax checkpoint, got none. {_REMEDY}"
    )


class OrbaxCheckpoint:
    """A pytree saved by Orbax: a `TensorSource` of NumPy arrays.

    Names are the steps of a path, joined by ``/``. The folder is not trusted, so it is read
    in three steps, each of which bounds the memory of the next one: our metadata, whose
    signature the caller checks; names, dtypes and shapes (`tensors`), which the caller compares
    with the manifest; and the arrays, all of them at the first `read`.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        metadata: our metadata, or None if there is none.

    Raises:
        ValueError: our metadata is malformed; here and later, files that are not
            regular, or would grow in memory beyond the arrays that they hold; a checkpoint that
            Orbax cannot read; a leaf that a safetensors file could not hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata = _read_metadata(self.path)
        self._lock = threading.Lock()  # the first caller reads, and the others wait for it
        if self.metadata is None:
            _ = self.tensors  # nothing to check before, so errors are raised at once

    @property
    def size(self) -> int:
        """Total size of all files in bytes."""
        return sum(self._files.values())

    @property
    def tensors(self) -> Mapping[str, ArrayInfo]:
        """See `TensorSource`."""
        return self._described.tensors

    @cached_property
    def stored(self) -> dict[str, str]:
        """Name → name in the checkpoint."""
        from .._tree.names import named_leaves

        return _stored_names(named_leaves(self._tree, str(self.path)).leaves)

    @cached_property
    def tree(self) -> Any:
        """The named leaves of the pytree; reads it."""
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        from .._tree.names import named_leaves

        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree)
        return named_leaves(self._restore(restore_args=kinds), str(self.path))

    @cached_property
    def random_keys(self) -> dict[str, str]:
        """Name of each array of typed `jax.random` keys → their implementation."""
        from .._tree.names import named_leaves

        found: dict[str, str] = {}
        for file in self._files:
            if file.startswith(_DETAILS):
                raw = read_regular(self.path.resolve() / file, MAX_HEADER)
                entries = json_object(raw, str(self.path / file)).get("array_metadatas")
                for entry in entries if isinstance(entries, list) else ():
                    array = entry.get("array_metadata") if isinstance(entry, dict) else None
                    more = array.get("ext_metadata") if isinstance(array, dict) else None
                    impl = more.get(_IMPLEMENTATION) if isinstance(more, dict) else None
                    if isinstance(array, dict) and isinstance(impl, str):
                        found[str(array.get("param_name"))] = impl
        stored = named_leaves(self._tree, str(self.path)).leaves
        names = {name: getattr(stored[at], "name", None) for name, at in self.stored.items()}
        return {name: found[at] for name, at in names.items() if at in found}

    def typed(self, name: str, array: Any) -> Any:
        """An array to write, as keys if it holds keys of one of JAX's own implementations.

        Orbax cannot read others, such as our ChaCha20: those are stored as numbers.
        """
        import jax

        if name not in self.random_keys:
            return array
        try:
            return jax.random.wrap_key_data(jax.device_put(array), impl=self.random_keys[name])
        except (ValueError, TypeError):
            return array

    def read(self, name: str) -> memoryview:
        """See `TensorSource`. May be called by several threads."""
        with self._lock:
            arrays = self._arrays
        return arrays.read(name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `StoredTensors`. May be called by several threads."""
        with self._lock:
            arrays = self._arrays
        arrays.read_into(name, start, buffer)

    def load(self, like: Any) -> Any:
        """The pytree; each process gets its own part.

        Args:
            like: a tree of arrays or ``jax.ShapeDtypeStruct``, with shardings.

        Raises:
            ValueError: the checkpoint holds another tree.
        """
        import orbax.checkpoint as ocp

        from .._tree.names import listed, named_leaves

        tree = named_leaves(like, "like")
        given = tree.stored
        if self.stored.keys() != given.keys():
            raise ValueError(
                f"{self.path}: Orbax cannot read it: expected a tree with {listed(self.stored)}, "
                f"got one with {listed(given)}. Pass one with the same paths."
            )
        item = _nested({self.stored[name]: leaf for name, leaf in given.items()})
        arguments = ocp.checkpoint_utils.construct_restore_args(item)
        leaves = named_leaves(self._restore(item=item, restore_args=arguments)).leaves
        return tree.rebuild({name: leaves[self.stored[name]] for name in given})

    @cached_property
    def _files(self) -> dict[str, int]:
        return regular_files(self.path)

    @cached_property
    def _tree(self) -> Any:
        """Orbax's description of each leaf, read once that is safe."""
        import orbax.checkpoint as ocp

        from .._tree.names import named_leaves

        folder = self.path.resolve()  # TensorStore does not accept ".."
        if _TREE not in self._files:
            raise _without_tree(self.path)
        for name in _JSON:
            if name in self._files:
                check_json(read_regular(folder / name, MAX_HEADER), f"{self.path / name}")
        shapes = stored_shapes(folder, self._files)
        if not shapes:
            raise ValueError(
                f"{self.path}: expected arrays, in {MANIFEST} or in folders of their own, got "
                f"none. {_REMEDY}"
            )
        with _orbax(self.path), ocp.PyTreeCheckpointer() as checkpointer:
            found: Any = checkpointer.metadata(folder)
            tree = found.item_metadata.tree
        for name, leaf in named_leaves(tree, str(self.path)).leaves.items():
            actual = shapes.get(getattr(leaf, "name", None) or "")
            # Orbax does not check the shape of a scalar.
            if actual is None or not hasattr(leaf, "dtype") or actual != tuple(leaf.shape):
                raise ValueError(
                    f"{self.path}: {name!r}: expected an array in the folder, got "
                    f"{type(leaf).__name__} where shape {actual} is stored. Keep leaves that are "
                    "not arrays out of the tree, or download the folder again if it was altered."
                )
        return tree

    @cached_property
    def _described(self) -> ArraySource:
        from .._tree.names import named_leaves

        leaves = named_leaves(self._tree, str(self.path)).leaves
        return ArraySource({n: leaves[at] for n, at in self.stored.items()}, str(self.path))

    @cached_property
    def _arrays(self) -> ArraySource:
        leaves = self.tree.leaves
        found = ArraySource({n: leaves[at] for n, at in self.stored.items()}, str(self.path))
        if found.tensors != self.tensors:
            raise ValueError(
                f"{self.path}: expected the dtypes and shapes as when it was opened, got others. "
                "Another program changed it in the meantime: open it again."
            )
        return found

    def _restore(self, **arguments: Any) -> Any:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        kinds = ocp.type_handlers
        handlers = kinds.create_type_handler_registry(
            (np.ndarray, _reading_all(kinds.NumpyHandler)),
            (np.number, _reading_all(kinds.ScalarHandler)),
            (jax.Array, _reading_all(kinds.ArrayHandler)),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
        remedy = "Pass the tree that was saved, or download the whole folder again."
        remedy = remedy if "item" in arguments else _REMEDY
        with _orbax(self.path, remedy), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(self.path.resolve(), **arguments)


def _reading_all(kind: Any) -> Any:
    """Orbax's reader, except that it returns only after all of its reads, also after an error.

    The original gives up at the first error and closes its event loop while TensorStore still reads
    the others; each of those then prints a traceback, since the loop is closed.
    """
    import asyncio

    import orbax.checkpoint as ocp

    class ReadingAll(kind):
        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            one = super().deserialize
            args = args or [ocp.RestoreArgs()] * len(infos)
            reads = (one([info], [arg]) for info, arg in zip(infos, args, strict=True))
            found: list[Any] = await asyncio.gather(*reads, return_exceptions=True)
            for result in found:
                if isinstance(result, BaseException):
                    raise result
            return [array for arrays in found for array in arrays]

    return ReadingAll()


@contextmanager
def _orbax(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Adds the folder to errors: on a damaged one, Orbax may raise anything."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: Orbax cannot read it: expected a whole checkpoint, got: {quoted(error)}. "
            f"{remedy}"
        ) from error


@contextmanager
def orbax_output(
    path: str | os.PathLike[str], like: OrbaxCheckpoint, *, private: bool = False
) -> Iterator[tuple[dict[str, memoryview], dict[str, str]]]:
    """A new Orbax checkpoint, which appears only when the block ends.

    Args:
        path: the folder's path; nothing may exist there.
        like: the checkpoint whose tree, dtypes and shapes it has.
        private: only its owner may enter the folder.

    Yields:
        Name → bytes, and our metadata: both to be filled.
    """
    import orbax.checkpoint as ocp

    data: dict[str, memoryview] = {}
    metadata: dict[str, str] = {}
    with new_folder(path, private=private) as folder:
        yield data, metadata
        leaves = {
            like.stored[name]: like.typed(name, as_array(data[name], info.dtype, info.shape))
            for name, info in like.tensors.items()
        }
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve() / _INNER, like.tree.rebuild(leaves))
        _put_together(folder, metadata)


def _put_together(folder: Path, metadata: Mapping[str, str]) -> None:
    """Moves Orbax's output, which it insists on writing into a new folder, to its final place."""
    inner = folder / _INNER
    for item in list(inner.iterdir()):
        item.rename(folder / item.name)
    inner.rmdir()
    if metadata:
        text = json.dumps(dict(metadata), ensure_ascii=False, indent=1)
        (folder / METADATA_FILE).write_bytes(text.encode())


def _stored_names(stored: Iterable[str]) -> dict[str, str]:
    """Names as in `named_leaves` → names in the checkpoint.

    For an ``nnx.State``, Orbax stores an additional step, ``value``, for each variable.
    """
    names = list(stored)
    of_state = bool(names) and all(name.endswith(_VALUE) for name in names)
    return {name.removesuffix(_VALUE) if of_state else name: name for name in names}


def _nested(leaves: Mapping[str, Any]) -> Any:
    """Leaves by name as nested dictionaries, for which Orbax uses the same names as we do."""
    from flax.traverse_util import unflatten_dict

    return leaves[""] if list(leaves) == [""] else unflatten_dict(dict(leaves), sep="/")


def _read_metadata(path: Path) -> dict[str, str] | None:
    file = path / METADATA_FILE
    if not os.path.lexists(file):
        return None
    metadata = json_object(read_regular(file, MAX_HEADER), str(file))
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{file}: expected text for every key, got {show(value)} for {show(key)}. {DAMAGED}"
            )
    return metadata


def save_tree(path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str]) -> None:
    """Writes a pytree with our metadata, from all processes together.

    It appears under its name only when all have written their part; see `new_folder`.

    Args:
        path: the folder's path, visible to all processes; nothing may exist there.
        tree: a tree of arrays.
        metadata: our metadata.

    Raises:
        ValueError, OSError: it cannot be written; raised in all processes.
    """
    import jax
    import orbax.checkpoint as ocp

    from .._tree.names import named_leaves

    nested = _nested(named_leaves(tree).stored)
    folder, problem = None, None
    with ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                folder = stack.enter_context(new_folder(path))
            except OSError as error:
                problem = error
        name = _agreed_on("" if folder is None else str(folder.resolve()), problem)
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
    """The first process's text; or the error that it met, for which the others must not wait."""
    from .._tree.hosts import from_first

    said = json.dumps([text, None if problem is None else str(problem)])
    text, failure = json.loads(from_first(said.encode()))
    if failure is not None:
        raise problem or OSError(failure)
    return text


def load_tree(
    path: str | os.PathLike[str], like: Any, check: Callable[[OrbaxCheckpoint], object]
) -> tuple[Any, dict[str, str]]:
    """Reads a pytree and our metadata; each process gets its own part.

    Args:
        path: the folder's path.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``, with shardings.
        check: raises an error unless the metadata is valid and matches the tensors.

    Raises:
        ValueError: not a protected checkpoint, or one of another tree.
        OSError: it cannot be read.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{path}: expected the folder of an Orbax checkpoint, got none. Name "
            "the folder; a safetensors file is opened with open_model."
        )
    checkpoint = OrbaxCheckpoint(path)
    if checkpoint.metadata is None:
        raise ValueError(
            f"{path}: expected a protected Orbax checkpoint, got a folder without {METADATA_FILE}. "
            "Protect it, or name the folder that holds that file."
        )
    check(checkpoint)
    return checkpoint.load(like), checkpoint.metadata
