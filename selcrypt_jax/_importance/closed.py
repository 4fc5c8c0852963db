"""Closed-form importance: one float per group of weights, from the weights or from gradients.

Every function returns a pytree of scores with the structure of ``params``: float32 arrays that
broadcast against their leaf (a kernel score of an HWIO leaf is ``(1, 1, I, O)``), and ``False``
for leaves that are not selected. Higher is more important. They run under ``jit``.
"""

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._io.errors import described
from .._tree.groups import Granularity, Layout, group_shape, inner_axes
from .._tree.names import (
    AnyArray,
    Selector,
    constants_move,
    is_array,
    named_key,
    named_leaves,
    select_differentiable,
    select_leaves,
)

_SHOWN = 4  # arrays, in messages
LossFn = Callable[[PyTree, Any], Float[Array, ""]]
Axes = tuple[int, ...]


def _by_leaf(
    score: Callable[[str, AnyArray, Axes], Array],
    params: PyTree,
    select: Selector,
    granularity: Granularity,
    layout: Layout,
) -> PyTree:
    """Scores by name, leaf and its axes inside a group, in the tree's structure."""
    with constants_move():
        scores = {
            name: score(name, leaf, inner_axes(leaf.shape, granularity, layout)).astype(jnp.float32)
            for name, leaf in select_leaves(params, select).items()
        }
    return named_leaves(params).rebuild_only(scores)


def _check_numbers(name: str, leaf: AnyArray) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger):
        # Packed low-bit weights come as unsigned bytes, whose values mean nothing.
        raise ValueError(
            f"params {name!r}: expected floats or signed integers, got {leaf.dtype}, whose values "
            "may be packed codes. Use importance.random (--importance random), or exclude it "
            "with `select`."
        )


def _numbers(name: str, leaf: AnyArray) -> Array:
    """The leaf as floats, after checking that it holds numbers."""
    _check_numbers(name, leaf)
    return wide(leaf)


def wide(leaf: AnyArray) -> Array:
    """The leaf as floats, wide enough for sums."""
    narrow = leaf.dtype.itemsize < 4 or jnp.issubdtype(leaf.dtype, jnp.integer)
    array = jnp.asarray(leaf)  # JAX may truncate float64 to 32 bits, which is enough for scores
    return array.astype(jnp.float32) if narrow else array


def _size(name: str, leaf: AnyArray, axes: Axes) -> Array:
    """|mean of the group|."""
    return jnp.abs(_numbers(name, leaf).mean(axes, keepdims=True))


# Compiled, since otherwise every step would make an array as large as the leaf.
@partial(jax.jit, static_argnums=1)
def _norm(leaf: AnyArray, axes: Axes) -> Array:
    return jnp.sqrt(jnp.square(wide(leaf)).sum(axes, keepdims=True))


def random(
    params: PyTree,
    *,
    key: PRNGKeyArray,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """Uniform noise: the baseline that uses no information.

    Args:
        params: pytree of arrays.
        key: typed `jax.random` key; one is derived for each leaf from its name.
        select: which leaves are scored: a regular expression searched in the leaf's name, a
            function ``(name, leaf) -> bool``, or ``None`` for floats with two axes or more.
        granularity: ``"kernel"``, ``"filter"`` or ``"weight"``.
        layout: ``"HWIO"`` (JAX) or ``"OIHW"`` (PyTorch).

    Returns:
        Scores in [0, 1).

    Raises:
        ValueError: `select` matches nothing, or a leaf that is not an array of numbers.

    Examples:
        >>> from selcrypt_jax import importance
        >>> scores = importance.random(params, key=jax.random.key(0), granularity="weight")
        >>> masks = nested_masks(scores, [0.02, 0.08])
    """

    def score(name: str, leaf: AnyArray, _: Axes) -> Array:
        shape = group_shape(leaf.shape, granularity, layout)
        return jax.random.uniform(named_key(key, name), shape, jnp.float32)

    return _by_leaf(score, params, select, granularity, layout)


def descend(
    params: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """|mean of the group|, the largest first. Arguments as in `random`.

    Examples:
        >>> from selcrypt_jax import importance
        >>> masks = nested_masks(importance.descend(params), [0.02, 0.08])

    References:
        Tian, Zhou, Duan, CVPR 2021, section 4 ("descending").
    """
    return _by_leaf(_size, params, select, granularity, layout)


def ascend(
    params: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """−|mean of the group|, the smallest first. Arguments as in `random`.

    Examples:
        >>> from selcrypt_jax import importance
        >>> masks = nested_masks(importance.ascend(params), [0.02, 0.08])

    References:
        Tian, Zhou, Duan, CVPR 2021, section 4 ("ascending").
    """
    return _by_leaf(lambda *group: -_size(*group), params, select, granularity, layout)


def mean(
    params: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """Closeness to the leaf's average of |mean of the group|. Arguments as in `random`.

    Examples:
        >>> from selcrypt_jax import importance
        >>> masks = nested_masks(importance.mean(params), [0.02, 0.08])

    References:
        Tian, Zhou, Duan, CVPR 2021, section 4 ("mean").
    """

    def score(name: str, leaf: AnyArray, axes: Axes) -> Array:
        size = _size(name, leaf, axes)
        return -jnp.abs(size - size.mean())

    return _by_leaf(score, params, select, granularity, layout)


def l2(
    params: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """Euclidean norm of the group. Arguments as in `random`.

    Examples:
        >>> from selcrypt_jax import importance
        >>> scores = importance.l2(params, select="convs", granularity="filter")
        >>> masks = nested_masks(scores, [0.1, 0.5], scope="model")

    References:
        Li et al., Pruning filters for efficient ConvNets, ICLR 2017 (there with the l1 norm).
    """

    def score(name: str, leaf: AnyArray, axes: Axes) -> Array:
        _check_numbers(name, leaf)
        return _norm(leaf, axes)

    return _by_leaf(score, params, select, granularity, layout)


def taylor(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """Mean over batches of |Σ w·∂loss/∂w| over the group: the estimated cost of zeroing it.

    Args:
        loss_fn: ``(params, batch) -> scalar``.
        params: pytree of arrays.
        batches: pytree of arrays ``[batches, ...]``; one gradient per batch. A list of batches is
            stacked with ``jax.tree.map(lambda *x: jnp.stack(x), *batches)``.
        select: as in `random`, but floating-point leaves only.
        granularity: as in `random`.
        layout: as in `random`.

    Returns:
        Scores ≥ 0, in units of the loss.

    Raises:
        ValueError: batches that are not stacked, a selected leaf without gradients, or as in
            `random`.
        TypeError: the loss is not a scalar array.

    Examples:
        >>> from selcrypt_jax import importance
        >>> scores = importance.taylor(loss_fn, params, batches)
        >>> masks = nested_masks(scores, [0.02, 0.08])

    References:
        Molchanov et al., Importance estimation for neural network pruning, CVPR 2019.
    """

    def score(product: Array, axes: Axes) -> Array:
        return jnp.abs(product.sum(axes, keepdims=True))

    return _by_gradient(score, loss_fn, params, batches, select, granularity, layout)


def fisher(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PyTree:
    """Mean over batches of Σ (w·∂loss/∂w)² over the group: empirical Fisher, batch by batch.

    Arguments as in `taylor`. With batches of one example it is the diagonal Fisher estimate.

    Examples:
        >>> from selcrypt_jax import importance
        >>> scores = importance.fisher(loss_fn, params, batches, granularity="filter")
        >>> masks = nested_masks(scores, [0.1, 0.5], scope="model")

    References:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018.
    """

    def score(product: Array, axes: Axes) -> Array:
        return jnp.square(product).sum(axes, keepdims=True)

    return _by_gradient(score, loss_fn, params, batches, select, granularity, layout)


def _by_gradient(
    score: Callable[[Array, Axes], Array],
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    select: Selector,
    granularity: Granularity,
    layout: Layout,
) -> PyTree:
    """Mean over batches of the scores of weight times gradient."""
    tree = named_leaves(params)
    chosen = select_differentiable(params, select)
    arrays = tree.arrays

    # Weights are arguments, since values that are closed over become part of the program; and one
    # batch at a time, since XLA's CPU backend is slow at gradients of convolutions inside loops.
    @jax.jit
    def products(arrays: dict[str, AnyArray], batch: Any) -> dict[str, Array]:
        def loss(chosen: dict[str, AnyArray]) -> Array:
            return loss_of(loss_fn, tree.rebuild(arrays | chosen), batch)

        gradients = jax.grad(loss)({name: arrays[name] for name in chosen})
        return {
            name: score(
                _numbers(name, arrays[name]) * _numbers(name, gradients[name]),
                inner_axes(arrays[name].shape, granularity, layout),
            )
            for name in chosen
        }

    count = batch_count(batches)
    with constants_move():
        total = products(arrays, batch_at(batches, 0))
        for index in range(1, count):
            more = products(arrays, batch_at(batches, index))
            total = jax.tree.map(operator.add, total, more)
    return _by_leaf(lambda name, *_: total[name] / count, params, select, granularity, layout)


def loss_of(loss_fn: LossFn, params: PyTree, batch: Any) -> Array:
    """The loss of one batch, after checking that it is one.

    Raises:
        TypeError: it is something else.
        ValueError: `loss_fn` cannot use the batch, which may come from batches in a list.
    """
    try:
        loss = loss_fn(params, batch)
    except Exception as error:  # a user's function may raise anything
        # Arrays of one shape may be the two images of a pair, so they are refused only now.
        if type(batch) not in (list, tuple) or len({np.shape(part) for part in batch}) != 1:
            raise
        raise ValueError(
            f"loss_fn: raised {described(error)}, given one entry of each of the {len(batch)} "
            f"arrays in batches. If each array is a batch, stack them: {_STACK}."
        ) from error
    return checked_loss(loss)


def checked_loss(loss: Any) -> Array:
    """The loss, after checking that it is one.

    Raises:
        TypeError: it is something else.
    """
    if not is_array(loss) or loss.shape != ():
        actual = f"shape {loss.shape}" if is_array(loss) else type(loss).__name__
        raise TypeError(f"loss_fn: expected a scalar array, got {actual}. Return the loss alone.")
    return loss


_STACK = "jax.tree.map(lambda *x: jnp.stack(x), *batches)"


def batch_count(batches: PyTree) -> int:
    """The common length of the first axis of all arrays in ``batches``.

    Raises:
        ValueError: there are no arrays, or their lengths differ; or it is a list or tuple of
            batches.
    """
    if type(batches) in (list, tuple):
        # A batch itself is rarely a list of containers that are all alike.
        kinds = {jax.tree.structure(part) for part in batches}
        if len(kinds) == 1 and not jax.tree_util.treedef_is_leaf(*kinds):
            raise ValueError(
                "batches: expected one pytree of arrays with a first axis for the batches, got a "
                f"{type(batches).__name__} of {len(batches)}. Stack them, without a smaller last "
                f"one: {_STACK}. If they are parts of one batch, name them in a dict."
            )
    leaves = named_leaves(batches, "batches").leaves
    sizes = {name: leaf.shape[0] if np.ndim(leaf) else None for name, leaf in leaves.items()}
    count, *others = {*sizes.values()} or {None}
    if others or not count:
        shown = dict(itertools.islice(sizes.items(), _SHOWN))
        more = f" and {len(sizes) - _SHOWN} more" if len(sizes) > _SHOWN else ""
        raise ValueError(
            "batches: expected arrays with the same first axis, one entry per batch, got "
            f"{shown}{more}. Stack batches of one size: {_STACK}."
        )
    return count


def batch_at(batches: PyTree, step: Int[Array, ""] | int) -> Any:
    """The batch of a step, counted from 0; after the last one the first comes again."""
    count = batch_count(batches)
    return jax.tree.map(lambda leaf: leaf[step % count], batches)
