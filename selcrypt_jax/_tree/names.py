"""Named leaves of any pytree.

All code in the package that looks at parameters uses the *names* made here. Two trees fit each
other if their names match, whatever their containers: a mask made from a dict fits a FrozenDict, an
``nnx.State`` or an Equinox module with the same paths.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from .groups import Selector

AnyArray = Array | np.ndarray
# One typed key per level, or per ring: a sequence of them, or an array.
Keys = Sequence[Key[Array, ""]] | Key[Array, " keys"]


def _is_variable(node: Any) -> bool:
    # Looked up and not imported: a tree can only hold an nnx.Variable if nnx is loaded already.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


@dataclass(frozen=True)
class NamedLeaves:
    """The leaves of a pytree by name; ``rebuild`` makes a tree with other leaves.

    Attributes:
        leaves: name → leaf, in the order of ``jax.tree.leaves``. A name is the path's steps
            joined by ``/`` (dict keys, attribute names, indices); the leaf at the root is ``""``.
        treedef: the structure of the tree.
    """

    leaves: dict[str, Any]
    treedef: Any

    @property
    def arrays(self) -> dict[str, Any]:
        """The leaves that are arrays; see `is_array`."""
        return {name: leaf for name, leaf in self.leaves.items() if is_array(leaf)}

    @property
    def stored(self) -> dict[str, Any]:
        """The arrays that files store: all except typed random keys."""
        return {name: leaf for name, leaf in self.arrays.items() if not is_random_key(leaf)}

    def rebuild(self, leaves: Mapping[str, Any]) -> PyTree:
        """A tree of the same structure; a leaf whose name is not in ``leaves`` is kept."""
        return self.treedef.unflatten(leaves.get(name, leaf) for name, leaf in self.leaves.items())

    def rebuild_only(self, leaves: Mapping[str, Any]) -> PyTree:
        """Like `rebuild`, but leaves whose names are not in ``leaves`` become ``False``."""
        return self.treedef.unflatten(leaves.get(name, False) for name in self.leaves)


def named_leaves(tree: PyTree, what: str = "params") -> NamedLeaves:
    """Flattens ``tree`` into leaves by name.

    Args:
        tree: any pytree.
        what: the tree's name in error messages.

    Returns:
        The named leaves, in the order of ``jax.tree.leaves``.

    Raises:
        ValueError: two leaves have the same name, as in ``{"a/b": x, "a": {"b": y}}``; or a dict
            has keys that JAX cannot sort, as in ``{1: x, "1": y}``.
    """
    try:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    except (ValueError, TypeError):
        _check_sorted(tree, (), what)
        raise
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    # An nnx.Variable adds its own step (".value") below the name that the user gave it.
    boxes: set[Hashable] = {path for path, node in nodes if _is_variable(node)}
    leaves: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for path, leaf in flat:
        steps = [key for depth, key in enumerate(path) if not (depth and path[:depth] in boxes)]
        name = jax.tree_util.keystr(tuple(steps), simple=True, separator="/")
        here = jax.tree_util.keystr(path)
        if name in leaves:
            raise ValueError(
                f"{what}: two leaves are called {name!r}: {paths[name]} and {here}. Expected one "
                "leaf per name; rename one of them so that no key contains '/', which joins names."
            )
        leaves[name], paths[name] = leaf, here
    return NamedLeaves(leaves, treedef)


def _check_sorted(node: Any, path: tuple[Any, ...], what: str) -> None:
    """Refuses a dict whose keys have no order. JAX would refuse it too, without naming it.

    Raises:
        ValueError: there is one.
    """
    try:
        inside = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    except (ValueError, TypeError):
        keys: list[Any] = list(node) if isinstance(node, Mapping) else []
        for first, second in itertools.combinations(keys, 2):
            try:
                sorted((first, second))
            except TypeError:
                here = jax.tree_util.keystr(path)
                raise ValueError(
                    f"{what}: expected keys that can be sorted, got {here}[{first!r}] and "
                    f"{here}[{second!r}] in one dict. Make both the same type, such as text, "
                    "under different names."
                ) from None
        return
    for steps, child in inside:
        if child is not node:
            _check_sorted(child, path + steps, what)


def check_key(key: object) -> None:
    """Refuses a seed where a `jax.random` key is expected.

    Raises:
        TypeError: the key is not an array, for example a plain integer.
    """
    if not is_array(key):
        # The message omits the value: it may be a secret.
        raise TypeError(
            f"key: expected a jax.random key, got {type(key).__name__}. Make one from a seed: "
            "jax.random.key(0)."
        )


def constants_move() -> Any:  # a context manager, and a decorator
    """Allows our constants, and host arrays passed by the caller, to be transferred to the device.

    These transfers are necessary; ``jax_transfer_guard`` is meant to find unnecessary ones.
    """
    return jax.transfer_guard_host_to_device("allow")


def named_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key for the noise of one leaf; ciphers use the whole digest instead."""
    check_key(key)
    word = np.frombuffer(hashlib.sha256(name.encode()).digest()[:4], "<u4")[0]
    with constants_move():
        return jax.random.fold_in(key, word)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype (arrays, tracers, ``jax.ShapeDtypeStruct``)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_random_key(leaf: Any) -> bool:
    """Whether a leaf is a typed `jax.random` key or some: random state, no parameter."""
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)  # not another library's tensor
    return known and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def native(leaf: Any) -> Any:
    """The same numbers in this machine's byte order, the only one that JAX supports."""
    if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
        return leaf.astype(leaf.dtype.newbyteorder("="))
    return leaf


def unsigned(leaf: Any) -> np.dtype:
    """The unsigned integer dtype as wide as the array's elements."""
    return np.dtype(f"u{leaf.dtype.itemsize}")


def listed(names: Iterable[str], limit: int = 12, note: Callable[[str], str] | None = None) -> str:
    """Names for an error message, cut after ``limit``, each with its note."""
    names = list(names)
    notes = [f" ({note(name)})" if note else "" for name in names[:limit]]
    text = ", ".join(map("{!r}{}".format, names, notes)) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def select_leaves(tree: PyTree, select: Selector = None) -> dict[str, Any]:
    """The selected array leaves.

    Args:
        tree: parameters.
        select: which leaves: a regular expression searched in the name; a function
            ``(name, leaf) -> bool``; or ``None`` for every floating-point array with at least
            two axes (kernels of convolutions and dense layers, embeddings). ``None`` skips leaves
            that are not arrays; selecting one any other way is an error.

    Returns:
        name → leaf of the selected leaves.

    Raises:
        ValueError: nothing is selected, or a selected leaf is not an array of numbers.
    """
    leaves = named_leaves(tree).leaves
    if select is None:
        chosen = {
            name: leaf
            for name, leaf in leaves.items()
            if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2
        }
        asked = "the default (floating-point arrays with two axes or more)"
    elif isinstance(select, str):
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(
                f"select={select!r} is not a regular expression: {error}. Write '.*' for any text, "
                "and put a backslash before a special character that stands for itself."
            ) from None
        chosen = {name: leaf for name, leaf in leaves.items() if pattern.search(name)}
        asked = f"the regular expression {select!r}"
    elif not callable(select):
        raise TypeError(
            f"select: expected a regular expression or a function (name, leaf) -> bool, got "
            f"{type(select).__name__}. Join names into one expression: 'conv|head'."
        )
    else:
        chosen = {name: leaf for name, leaf in leaves.items() if select(name, leaf)}
        asked = f"the function {getattr(select, '__name__', select)!r}"
    if not chosen:
        raise ValueError(
            f"select: {asked} matches no leaf. There are: {listed(leaves)}. "
            "Expected at least one; change `select`."
        )
    for name, leaf in chosen.items():
        if not is_array(leaf) or not (
            jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.issubdtype(leaf.dtype, jnp.integer)
        ):
            actual = leaf.dtype if is_array(leaf) else type(leaf).__name__
            raise ValueError(
                f"{name!r}: expected an array of floats or integers, got {actual}. "
                f"Change `select` to exclude this leaf."
            )
    return {name: native(leaf) for name, leaf in chosen.items()}


def select_differentiable(tree: PyTree, select: Selector = None) -> dict[str, Any]:
    """Like `select_leaves`, for scores that need gradients.

    Raises:
        ValueError: nothing is selected, or a selected leaf is not a floating-point array.
    """
    chosen = select_leaves(tree, select)
    whole = [name for name, leaf in chosen.items() if jnp.issubdtype(leaf.dtype, jnp.integer)]
    if whole:
        raise ValueError(
            f"params: expected floats, which have gradients, got integers in {listed(whole)}. "
            "Exclude them with `select`, or use importance.l2 or importance.random."
        )
    return chosen


def without_explicit_axes(function: Callable[..., Array], leaf: Array) -> Callable[..., Array]:
    """``function``, whose result is like ``leaf``, with its sharding left to the compiler.

    On a mesh with explicit axes, the default of ``jax.make_mesh``, JAX refuses to flatten a
    sharded leaf because no type can express the sharding of the result.
    """
    sharding = jax.typeof(leaf).sharding
    axes = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in axes if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return function
    wrapped: Any = jax.sharding.auto_axes(function, axes=explicit, out_sharding=sharding)
    return wrapped


def padded(count: int) -> int:
    """``count`` rounded up to one of a few sizes, by at most a quarter, to limit compilations.

    All numbers up to 8, then four per octave: 10, 12, 14, 16, 20, 24, …
    """
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
