"""Opens a protected file as arrays. Needs JAX only to return a tree of JAX arrays."""

import operator
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .._format.manifest import byte_count
from .._format.tensors import Unlocked
from .checkpoint import AnyPath, Checkpoint, open_checkpoint
from .signers import AnySigner, expected_signer
from .use import AnyGrant, grant_key

if TYPE_CHECKING:
    import numpy as np


def open_model(
    path: AnyPath,
    grant: AnyGrant | None = None,
    *,
    level: int | None = None,
    signer: AnySigner | None = None,
    names: Collection[str] | None = None,
    like: Any = None,
) -> Any:
    """The parameters of a protected file, as far as a grant opens them.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        grant: a grant, a level key, or the path of a grant file; None for level 0.
        level: a level lower than the grant's.
        signer: the owner's public key, or its file: refuse a file that is unsigned or signed by
            anyone else. A grant of a signed file enforces this by itself; a level key and level 0
            do not.
        names: names of the tensors to read; all by default. Not with `like`.
        like: a pytree with the same names, shapes and dtypes, of arrays or
            ``jax.ShapeDtypeStruct``; see Returns. Not with `names`.

    Returns:
        name → NumPy array; or, with `like`, a tree of its structure, with NumPy arrays where `like`
        has some, and otherwise JAX arrays with the sharding of those in `like`. Leaves of `like`
        that are not arrays are kept, as are random keys (in a model with dropout) that the file
        lacks.

    Raises:
        ValueError: not a protected file, names that it does not have, or a `like` that does not
            fit.
        GrantError: the grant does not open the file, or requires another signer.
        IntegrityError: the file was altered, or has another signer.
        OSError: a file that cannot be read.

    Examples:
        >>> params = open_model("model.safetensors", "alice.grant")
        >>> params = open_model("model.safetensors", signer="keys/signing.pub")
        >>> params = open_model("model.safetensors", "alice.grant", like=nnx.state(model))
    """
    if names is not None and like is not None:
        raise ValueError("names: expected none with like, got some. Leave out one or the other.")
    with LazyModel(path, grant, level=level, signer=signer) as model:
        if like is not None:
            _check_like(like, model.tensors, str(path))
        arrays = model.load(model.tensors if names is None else names)
    return arrays if like is None else _rebuild(like, arrays)


class LazyModel(Mapping[str, "np.ndarray"]):
    """A protected file whose tensors, or rows of them, are read on demand.

    A mapping from names to arrays, and a context manager. Signature, manifest and boxes are checked
    when the file is opened; the digests of a tensor each time that a part of it is read, before the
    data are returned. So each of several hosts can read its own part of a large checkpoint. For an
    unknown name, ``[]`` raises KeyError, as in any mapping.

    Args: see `open_model`.

    Attributes:
        tensors: name → anything with a ``dtype`` (safetensors' name) and a ``shape``.

    Raises: as `open_model`.

    Examples:
        >>> with LazyModel("model.safetensors", "alice.grant") as model:
        ...     name = next(iter(model))
        ...     whole, first = model[name], model.rows(name, 0, 2)
        >>> first.shape[0]
        2
    """

    def __init__(
        self,
        path: AnyPath,
        grant: AnyGrant | None = None,
        *,
        level: int | None = None,
        signer: AnySigner | None = None,
    ) -> None:
        if grant is None and level is not None:
            raise ValueError(f"level: expected none without a grant, got {level}. Pass the grant.")
        key, of_grant = (None, None) if grant is None else grant_key(grant, level)
        expected = expected_signer(signer, of_grant)
        self._path = path
        with ExitStack() as stack:
            checkpoint: Checkpoint = stack.enter_context(open_checkpoint(path))
            plain = checkpoint.unlocked(checkpoint.envelopes(expected), key)
            self._source = {name: file for file in plain.values() for name in file.tensors}
            self._stack: ExitStack | None = stack.pop_all()
        self.tensors: dict[str, Any] = {n: file.tensors[n] for n, file in self._source.items()}

    def __enter__(self) -> "LazyModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; arrays that have been read stay valid."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> "np.ndarray":
        if name not in self.tensors:
            raise KeyError(name)
        return self.load([name])[name]

    def load(self, names: Collection[str]) -> "dict[str, np.ndarray]":
        """Reads several tensors together, which is faster than one after the other.

        Raises:
            ValueError: a name that the file does not have; and as in `open_model`.
            TypeError: a single name instead of several.
        """
        if isinstance(names, str):
            raise TypeError(
                f"names: expected several names, got the text {names!r}. Write [{names!r}]."
            )
        wanted: dict[Unlocked, list[str]] = {}
        for name in names:
            wanted.setdefault(self._file(name), []).append(name)
        found = {
            name: self._array(data, name, tuple(self.tensors[name].shape))
            for file, own in wanted.items()
            for name, data in file.load(own)
        }
        return {name: found[name] for name in names}

    def rows(self, name: str, start: int, stop: int) -> "np.ndarray":
        """Rows ``start`` to ``stop`` of the first axis of a tensor.

        Reads only the chunks that hold them, unless the grant opens rings in the tensor: their
        weights are permuted across all of it.

        Raises:
            ValueError: rows that the tensor does not have; and as in `open_model`.
        """
        file, info = self._file(name), self.tensors[name]
        start, stop = operator.index(start), operator.index(stop)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(
                f"{self._path}: tensor {name!r}: expected rows within shape "
                f"{list(info.shape)}, got {start} to {stop}."
            )
        shape = (stop - start, *info.shape[1:])
        row = byte_count(info.dtype, info.shape[1:])
        return self._array(file.read_part(name, start * row, stop * row), name, shape)

    def _file(self, name: str) -> Unlocked:
        if self._stack is None:
            raise ValueError(
                f"{self._path}: is closed, expected an open model. Read inside of `with`, or open "
                "it again."
            )
        if name not in self._source:
            from .._tree.names import listed

            raise ValueError(
                f"{self._path}: has no tensor {name!r}. There are: {listed(self.tensors)}."
            )
        return self._source[name]

    def _array(self, data: memoryview, name: str, shape: tuple[int, ...]) -> "np.ndarray":
        from .._io.arrays import as_array

        try:
            return as_array(data, self.tensors[name].dtype, shape)
        except ValueError as error:
            raise ValueError(f"{self._path}: tensor {name!r}: {error}") from None


def _check_like(like: Any, tensors: Any, path: str) -> None:
    from .._io.arrays import ArrayInfo, ArraySource
    from .._tree.names import is_random_key, listed, named_leaves

    tree = named_leaves(like, "like")
    # Random keys are kept, unless the file has them, as one made from an Orbax folder does.
    leaves = {n: leaf for n, leaf in tree.arrays.items() if n in tensors or n in tree.stored}
    leaves = {n: _key_data(leaf) if is_random_key(leaf) else leaf for n, leaf in leaves.items()}
    extra = [name for name in tensors if name not in leaves]
    missing = [name for name in leaves if name not in tensors]
    if extra or missing:
        raise ValueError(
            f"like: expected the tensors of {path}, got a tree that lacks {listed(extra)} and also "
            f"has {listed(missing)}. Leave `like` out to see the names."
        )
    for name, info in ArraySource(leaves, "like").tensors.items():
        actual = ArrayInfo(tensors[name].dtype, tuple(tensors[name].shape))
        if info != actual:
            raise ValueError(
                f"like: {name!r}: expected {actual.dtype}{list(actual.shape)} as in {path}, got "
                f"{info.dtype}{list(info.shape)}. Build the model as the protected one was built."
            )


def _key_data(key: Any) -> Any:
    """Shape and dtype of the numbers that a file stores for random keys."""
    import jax

    return jax.eval_shape(jax.random.key_data, key)


def _rebuild(like: Any, arrays: dict[str, Any]) -> Any:
    import jax
    import numpy as np

    from .._tree.names import is_random_key, named_leaves

    tree, leaves = named_leaves(like, "like"), dict(arrays)
    for name, leaf in tree.arrays.items():
        if is_random_key(leaf):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"like: {name!r}: expected random keys themselves, got only their shape. Pass "
                    "keys, such as those of nnx.state(model), or leave random state out of `like`."
                )
            if name in arrays:
                data = jax.device_put(arrays[name])
                key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
                leaves[name] = jax.device_put(key, leaf.sharding)
            continue
        dtype = arrays[name].dtype
        if isinstance(leaf, np.ndarray | np.generic):
            continue
        if dtype != jax.dtypes.canonicalize_dtype(dtype):
            raise ValueError(
                f"like: {name!r}: expected a dtype that JAX holds as it is, got {dtype}, which it "
                "would truncate to 32 bits. Set jax_enable_x64, or use NumPy arrays in `like`."
            )
        leaves[name] = jax.device_put(arrays[name], leaf.sharding)
    return tree.rebuild(leaves)
