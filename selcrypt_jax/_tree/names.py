"""Named leaves of any pytree.

Everything in the package that looks at parameters goes through the *names* made here. Two trees
fit each other when their names do, whatever their containers: a mask made from a dict fits a
FrozenDict, an ``nnx.State`` or an Equinox module with the same paths.
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
# One typed key a level, or ring: a sequence of them, or an array.
Keys = Sequence[Key[Array, ""]] | Key[Array, " keys"]


def _is_variable(node: Any) -> bool:
    # Looked up and not imported: a tree can only hold an nnx.Variable if nnx is loaded already.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


@dataclass(frozen=True)
class NamedLeaves:
    """The leaves of a pytree by name; ``rebuild`` puts others in their place.

    Attributes:
        leaves: name → leaf, in the order of ``jax.tree.leaves``. A name is the path's steps
            joined by ``/`` (dict keys, attribute names, indices); the leaf at the root is ``""``.
        treedef: structure of the tree.
    """

    leaves: dict[str, Any]
    treedef: Any

    @property
    def arrays(self) -> dict[str, Any]:
        """The leaves that are arrays; see `is_array`."""
        return {name: leaf for name, leaf in self.leaves.items() if is_array(leaf)}

    @property
    def stored(self) -> dict[str, Any]:
        """The arrays that files hold: all but typed random keys."""
        return {name: leaf for name, leaf in self.arrays.items() if not is_random_key(leaf)}

    def rebuild(self, leaves: Mapping[str, Any]) -> PyTree:
        """A tree of the same structure; names that ``leaves`` lacks keep their own leaf."""
        return self.treedef.unflatten(leaves.get(name, leaf) for name, leaf in self.leaves.items())

    def rebuild_only(self, leaves: Mapping[str, Any]) -> PyTree:
        """As `rebuild`, but ``False``, "no part in this", where ``leaves`` lacks a name."""
        return self.treedef.unflatten(leaves.get(name, False) for name in self.leaves)


def named_leaves(tree: PyTree, what: str = "params") -> NamedLeaves:
    """Flattens ``tree`` into leaves by name.

    Args:
        tree: any pytree.
        what: how error messages call the tree.

    Returns:
        The named leaves, in the order of ``jax.tree.leaves``.

    Raises:
        ValueError: two leaves have the same name, as ``{"a/b": x, "a": {"b": y}}`` would; or a
            dict has keys that JAX cannot sort, as ``{1: x, "1": y}`` would.
    """
    try:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    except (ValueError, TypeError):
        _check_sorted(tree, (), what)
        raise
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    # An nnx.Variable adds a step of its own (".value") below the name that its user gave it.
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
                "leaf a name; rename one of them, so that no key contains the '/' that joins names."
            )
        leaves[name], paths[name] = leaf, here
    return NamedLeaves(leaves, treedef)


def _check_sorted(node: Any, path: tuple[Any, ...], what: str) -> None:
    """Refuses a dict whose keys have no order, on behalf of JAX, which does not say which one.

    Raises:
        ValueError: of one.
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
                    f"{here}[{second!r}] in one dict. Make both of one type, such as text, under "
                    "different names."
                ) from None
        return
    for steps, child in inside:
        if child is not node:
            _check_sorted(child, path + steps, what)


def check_key(key: object) -> None:
    """Refuses a seed where a `jax.random` key is expected.

    Raises:
        TypeError: it is no array, such as a plain integer.
    """
    if not is_array(key):
        # Not the value: it may be a secret.
        raise TypeError(
            f"key: expected a jax.random key, got {type(key).__name__}. Make one from a seed: "
            "jax.random.key(0)."
        )


def constants_move() -> Any:  # a context manager, and a decorator
    """Lets numbers of ours, and arrays on the host that we were given, move to the device.

    They have to, and ``jax_transfer_guard`` is there to find what need not.
    """
    return jax.transfer_guard_host_to_device("allow")


def named_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key for the noise of one leaf; ciphers derive theirs from the whole digest."""
    check_key(key)
    word = np.frombuffer(hashlib.sha256(name.encode()).digest()[:4], "<u4")[0]
    with constants_move():
        return jax.random.fold_in(key, word)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype (arrays, tracers, ``jax.ShapeDtypeStruct``)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_random_key(leaf: Any) -> bool:
    """Whether a leaf is a typed `jax.random` key, or some: random state, and no parameter."""
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)  # not a tensor of another library
    return known and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def native(leaf: Any) -> Any:
    """The same numbers in the byte order of this machine: JAX has no other."""
    if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
        return leaf.astype(leaf.dtype.newbyteorder("="))
    return leaf


def unsigned(leaf: Any) -> np.dtype:
    """The unsigned integers that are as wide as the elements of an array."""
    return np.dtype(f"u{leaf.dtype.itemsize}")


def listed(names: Iterable[str], limit: int = 12, note: Callable[[str], str] | None = None) -> str:
    """Names for an error message, cut after ``limit``; with what is to be noted of each."""
    names = list(names)
    notes = [f" ({note(name)})" if note else "" for name in names[:limit]]
    text = ", ".join(map("{!r}{}".format, names, notes)) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def select_leaves(tree: PyTree, select: Selector = None) -> dict[str, Any]:
    """The array leaves that take part.

    Args:
        tree: parameters.
        select: which leaves: a regular expression searched in the name; a function
            ``(name, leaf) -> bool``; or ``None`` for every floating-point array with at least
            two axes (kernels of convolutions and dense layers, embeddings). Leaves that are no
            arrays are never selected by ``None``, and are an error otherwise.

    Returns:
        name → leaf of the selected leaves.

    Raises:
        ValueError: nothing is selected, or something that is not a number array is.
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
                "and a backslash before a sign that stands for itself."
            ) from None
        chosen = {name: leaf for name, leaf in leaves.items() if pattern.search(name)}
        asked = f"the regular expression {select!r}"
    elif not callable(select):
        raise TypeError(
            f"select: expected a regular expression or a function (name, leaf) -> bool, got "
            f"{type(select).__name__}. Join names to one expression: 'conv|head'."
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
                f"Change `select`, so that it leaves this one out."
            )
    return {name: native(leaf) for name, leaf in chosen.items()}


def select_differentiable(tree: PyTree, select: Selector = None) -> dict[str, Any]:
    """As `select_leaves`, for what needs gradients.

    Raises:
        ValueError: nothing is selected, or something that is not a floating-point array is.
    """
    chosen = select_leaves(tree, select)
    whole = [name for name, leaf in chosen.items() if jnp.issubdtype(leaf.dtype, jnp.integer)]
    if whole:
        raise ValueError(
            f"params: expected floats, which have gradients, got integers in {listed(whole)}. "
            "Leave them out with `select`, or use importance.l2 or importance.random."
        )
    return chosen


def without_explicit_axes(function: Callable[..., Array], leaf: Array) -> Callable[..., Array]:
    """``function``, whose result is like ``leaf``, where the compiler may choose how to shard.

    On a mesh with explicit axes, the default of ``jax.make_mesh``, JAX refuses to flatten a
    sharded leaf, since it cannot say in a type how the result is spread.
    """
    sharding = jax.typeof(leaf).sharding
    axes = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in axes if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return function
    wrapped: Any = jax.sharding.auto_axes(function, axes=explicit, out_sharding=sharding)
    return wrapped


def padded(count: int) -> int:
    """``count`` rounded up to one of a few sizes, at most a quarter more, so that few are compiled.

    All numbers to 8, and four in each octave beyond: 10, 12, 14, 16, 20, 24, …
    """
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
