"""The way into a protected file, as arrays. JAX is not needed, unless for a tree of its arrays."""

from typing import Any

from .checkpoint import AnyPath, open_checkpoint
from .use import AnyGrant, grant_key


def open_model(
    path: AnyPath, grant: AnyGrant | None = None, *, level: int | None = None, like: Any = None
) -> Any:
    """The parameters of a protected file, as a grant opens them.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        grant: a grant, a level key, or the path of a grant file; None for level 0.
        level: a lower level than that of the grant.
        like: a pytree with the same names, shapes and dtypes, of arrays or
            ``jax.ShapeDtypeStruct``; see Returns.

    Returns:
        name → NumPy array; or, with `like`, a tree of that structure, with NumPy arrays where it
        has some, and else JAX arrays, placed as those of `like`. Its leaves that are no arrays
        stay.

    Raises:
        ValueError: no protected file, or a `like` that does not fit.
        GrantError: a grant that does not open the file.
        IntegrityError: the file was altered.
        OSError: a file that cannot be read.

    Examples:
        >>> params = open_model("model.safetensors", "alice.grant")
        >>> params = open_model("model.safetensors", "alice.grant", like=nnx.state(model))
    """
    if grant is None and level is not None:
        raise ValueError(f"level: expected none without a grant, got {level}. Pass the grant.")
    key, signer = (None, None) if grant is None else grant_key(grant, level)
    arrays: dict[str, Any] = {}
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes(signer)  # before anything that a stranger could inflate
        if like is not None:
            _check_like(like, checkpoint.tensors, str(path))
        for plain in checkpoint.unlocked(envelopes, key).values():
            data: dict[str, bytearray] = {}
            for name, piece in plain.pieces():
                if name in data:
                    data[name] += piece
                else:
                    data[name] = piece
            from .._io.arrays import as_array  # NumPy has started by now, while the file was read

            for name, info in plain.tensors.items():
                try:
                    arrays[name] = as_array(data.pop(name, b""), info.dtype, info.shape)
                except ValueError as error:
                    raise ValueError(f"{path}: tensor {name!r}: {error}") from None
    return arrays if like is None else _rebuild(like, arrays)


def _check_like(like: Any, tensors: Any, path: str) -> None:
    from .._io.arrays import ArrayInfo, ArraySource
    from .._tree.names import listed, named_leaves

    leaves = named_leaves(like, "like").arrays
    extra = [name for name in tensors if name not in leaves]
    missing = [name for name in leaves if name not in tensors]
    if extra or missing:
        raise ValueError(
            f"like: expected the tensors of {path}, got a tree that lacks {listed(extra)} and has "
            f"{listed(missing)} besides. Leave `like` out to see the names."
        )
    for name, info in ArraySource(leaves, "like").tensors.items():
        actual = ArrayInfo(tensors[name].dtype, tuple(tensors[name].shape))
        if info != actual:
            raise ValueError(
                f"like: {name!r}: expected {actual.dtype}{list(actual.shape)} as in {path}, got "
                f"{info.dtype}{list(info.shape)}. Build the model as the protected one was built."
            )


def _rebuild(like: Any, arrays: dict[str, Any]) -> Any:
    import jax
    import numpy as np

    from .._tree.names import named_leaves

    tree, leaves = named_leaves(like, "like"), dict(arrays)
    for name, leaf in tree.arrays.items():
        dtype = arrays[name].dtype
        if isinstance(leaf, np.ndarray | np.generic):
            continue
        if dtype != jax.dtypes.canonicalize_dtype(dtype):
            raise ValueError(
                f"like: {name!r}: expected a dtype that JAX holds as it is, got {dtype}, which it "
                "would cut to 32 bits. Set jax_enable_x64, or use NumPy arrays in `like`."
            )
        leaves[name] = jax.device_put(arrays[name], leaf.sharding)
    return tree.rebuild(leaves)
