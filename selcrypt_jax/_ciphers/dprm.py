"""DPRM, distribution-preserving random masks: encrypts the rings of a pytree in place.

This module checks the input and defines the gradient. A `Cipher` rewrites the weights: `lossless`
(the default) or `gaussian` (the paper's).
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .._tree.groups import Ring
from .._tree.names import Keys, is_array, named_leaves, without_explicit_axes
from .._tree.rings import split_rings
from .cipher import Cipher
from .keys import RingKeys, key_words
from .lossless import LosslessCipher


def encrypt(
    params: PyTree,
    masks: Sequence[PyTree],
    keys: Keys,
    *,
    cipher: Cipher | None = None,
    donate: bool = False,
) -> PyTree:
    """Encrypts what nested masks select, each ring under its own key.

    Ring m is what ``masks[m - 1]`` adds to ``masks[m - 2]``; it is encrypted in every leaf with a
    key derived from ``keys[m - 1]`` and the leaf's name. Leaves in which nothing is selected are
    passed through: the same objects. Works under ``jit`` (close over the masks, but pass keys as
    arguments: what is closed over is written into the program), under ``vmap`` over params *and*
    keys (over params alone it would use a key twice) and with donation; sharded leaves give the
    same bits as on one device.

    Gradients of any order flow through weights that are not selected, as if nothing had been
    encrypted. The gradient of a selected weight is zero: its bits are scrambled, so a small change
    in its ciphertext is not a small change in the weight. To train decrypted weights,
    differentiate with respect to the result of `decrypt`.

    Args:
        params: any pytree of arrays. Other leaves (functions, strings, numbers) pass through.
            Copies of a leaf are leaves of their own: select the same in them, or use `protect`.
        masks: M nested masks for ``params``, see `nested_masks`.
        keys: M typed `jax.random` keys, of any implementation; see `ring_keys`. **A key must
            never encrypt two different trees**: draw a new model id for each. (The bits of
            "rbg" keys differ between devices; those of ChaCha20 and threefry do not.)
        cipher: `LosslessCipher()` unless given.
        donate: whether the selected leaves may be used up, as by
            ``jax.jit(..., donate_argnums=0)``: their JAX arrays are deleted, each as soon as its
            result is there, so that memory holds few leaves twice. Under ``jit`` and other
            transformations this does nothing; tell ``jit`` instead.

    Returns:
        A tree of the same structure, shapes and dtypes. Selected leaves are JAX arrays.

    Raises:
        ValueError: masks that do not fit or are not nested, a number of keys that does not fit
            the levels, a ring that is too small to hide in, a dtype that cannot be encrypted.
        TypeError: traced masks; raw integers or old-style keys; keys that a compiled function
            closes over.

    Examples:
        >>> scores = l2(params, granularity="weight")
        >>> masks = nested_masks(scores, [0.1, 0.3, 0.5])
        >>> keys = ring_keys(level_key(secret, model_id, levels=3))
        >>> protected = encrypt(params, masks, keys)
        >>> basic = decrypt(protected, masks[:1], keys[:1])

    References:
        Tian, Zhou, Duan, CVPR 2021, section 3.2.
    """
    return _transform(params, masks, keys, cipher, inverse=False, donate=donate)


def decrypt(
    params: PyTree,
    masks: Sequence[PyTree],
    keys: Keys,
    *,
    cipher: Cipher | None = None,
    donate: bool = False,
) -> PyTree:
    """Decrypts the rings that a level opens; the higher ones stay as they are.

    Runs wherever `encrypt` does, with the same gradients: zero for weights that are decrypted.
    Rings that stay encrypted count as plain.

    Args:
        params: what `encrypt` returned.
        masks: ``masks[:m]`` of the masks that it was encrypted with, for level m.
        keys: ``keys[:m]``.
        cipher: as in `encrypt`.
        donate: as in `encrypt`.

    Returns:
        A tree of the same structure, in which rings 1..m are as before encryption, bit for bit
        with `LosslessCipher`. With a wrong key they are other noise; nothing tells it apart here.

    Raises:
        ValueError, TypeError: as in `encrypt`.

    Examples:
        >>> basic = decrypt(protected, masks[:1], keys[:1])  # level 1
        >>> original = decrypt(protected, masks, keys)
        >>> all(jax.tree.leaves(jax.tree.map(jax.numpy.array_equal, original, params)))
        True
    """
    return _transform(params, masks, keys, cipher, inverse=True, donate=donate)


def unlocking(
    function: Callable[..., Any],
    masks: Sequence[PyTree],
    *,
    cipher: Cipher | None = None,
) -> Callable[..., Any]:
    """A function of parameters as one of protected parameters and keys, to be compiled as a whole.

    Parameters at rest in device memory stay encrypted; a compiled step decrypts the weights that it
    needs, and frees them. XLA schedules this, leaf by leaf or at the beginning: its schedulers for
    accelerators save memory, the one for CPUs saves time. Every call decrypts again: use it where
    parameters must not lie in the clear, and `decrypt` once where they may.

    It composes with ``grad`` on both sides: ``value_and_grad(unlocking(f, masks))`` differentiates
    with respect to the protected parameters, of which the selected weights get zero, and
    ``unlocking(value_and_grad(f), masks)`` with respect to the decrypted ones, all of them.

    Args:
        function: ``(params, *args, **kwargs) -> anything``.
        masks: ``masks[:m]`` for level m.
        cipher: as in `encrypt`.

    Returns:
        ``(protected, keys, *args, **kwargs) -> anything``.

    Examples:
        >>> forward = jax.jit(unlocking(apply, masks[:2]))
        >>> outputs = forward(protected, keys[:2], images)
        >>> step = jax.jit(unlocking(jax.value_and_grad(loss_fn), masks[:2]))
        >>> loss, gradient = step(protected, keys[:2], images)
    """

    @functools.wraps(function)
    def unlocked(protected: PyTree, keys: Keys, *args: Any, **kwargs: Any) -> Any:
        return function(decrypt(protected, masks, keys, cipher=cipher), *args, **kwargs)

    return unlocked


def _transform(
    params: PyTree,
    masks: Sequence[PyTree],
    keys: Keys,
    cipher: Cipher | None,
    *,
    inverse: bool,
    donate: bool,
) -> PyTree:
    cipher = LosslessCipher() if cipher is None else cipher
    tree = named_leaves(params)
    found = split_rings(tree, masks)
    if isinstance(cipher, type) or not isinstance(cipher, Cipher):
        raise TypeError(
            "cipher: expected an object with check and run, such as LosslessCipher(), got "
            f"{cipher!r}."
        )
    _check_keys(keys, len(masks))
    words = key_words(keys)
    if words is None and masks:
        _check_keys_are_arguments(keys)
    if not inverse:
        if not masks:
            raise ValueError(
                "masks: expected one mask a level, got none. The result would be plaintext. Make "
                "masks with nested_masks."
            )
        _check_keys_differ(words)
    # Everything is checked before anything is computed: no half-encrypted tree, ever.
    for ring in found:
        _check_leaf(ring.name, tree.leaves[ring.name])
        cipher.check(ring, tree.leaves[ring.name])
    if not found:
        return params
    given = {ring.name: tree.leaves[ring.name] for ring in found}
    leaves = {name: _on_device(leaf) for name, leaf in given.items()}
    donated = _donated(given, tree.leaves) if donate else ()

    def run(leaves: Mapping[str, Array], keys: Keys) -> dict[str, Array]:
        # Differentiated eagerly, a NumPy leaf arrives here as one.
        leaves = {name: _on_device(leaf) for name, leaf in leaves.items()}
        ring_keys = RingKeys(keys, found, words)
        changed = cipher.run(leaves, found, ring_keys, inverse=inverse, donate=donated)
        return {name: _placed(changed[name], leaf) for name, leaf in leaves.items()}

    levels = keys if is_array(keys) else list(keys)
    return tree.rebuild(_differentiable(run, found)(leaves, levels))


def _on_device(leaf: Any) -> Array:
    if isinstance(leaf, Tracer) or hasattr(leaf, "sharding"):
        return leaf
    return jax.device_put(np.asarray(leaf))


def _donated(given: Mapping[str, Any], everything: Mapping[str, Any]) -> set[str]:
    """The leaves that may be used up.

    Not a leaf that is in the tree twice, nor one of NumPy: that is its owner's, and JAX may only
    have borrowed its memory. None at all where some are traced: arrays are constants there.
    """
    if any(isinstance(leaf, Tracer) for leaf in given.values()):
        return set()
    times = Counter(id(leaf) for leaf in everything.values())
    return {n for n, leaf in given.items() if isinstance(leaf, jax.Array) and times[id(leaf)] == 1}


def _differentiable(
    run: Callable[[Mapping[str, Array], Keys], dict[str, Array]], rings: Sequence[Ring]
) -> Callable[[Mapping[str, Array], Keys], dict[str, Array]]:
    """``run`` with the derivative of the identity for plain weights, and 0 for those of rings."""
    differentiable = jax.custom_jvp(run)

    @differentiable.defjvp
    def _(primals: Any, tangents: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        selected: dict[str, Any] = {}
        for ring in rings:
            selected[ring.name] = selected.get(ring.name, False) | ring.mask
        return differentiable(*primals), {
            name: _zeroed(tangent, selected[name]) for name, tangent in tangents[0].items()
        }

    return differentiable


def _zeroed(tangent: Array, selected: np.ndarray) -> Array:
    if tangent.dtype == jax.dtypes.float0:  # of integers: no values at all
        return tangent
    return without_explicit_axes(_zero_where, tangent)(tangent, selected)


@jax.jit
def _zero_where(tangent: Array, selected: Array) -> Array:
    return jnp.where(selected, jnp.zeros((), tangent.dtype), tangent)


def _placed(array: Array, like: Any) -> Array:
    """Where ``like`` lies, if that is known: the compiler is free to choose another sharding."""
    # An array that is free to go anywhere has to stay so.
    if isinstance(array, Tracer) or not isinstance(like, jax.Array) or not like.committed:
        return array
    return jax.device_put(array, like.sharding)


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"params {name!r}: expected a JAX or NumPy array, got {type(leaf).__name__}. Pass the "
            "arrays themselves, or set its mask to False."
        )
    dtype = leaf.dtype  # np.dtype() does not take the dtypes of typed keys
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"params {name!r}: expected floats or integers, got {dtype}, which has no cipher. "
            "Set its mask to False."
        )
    if not dtype.isnative:
        raise ValueError(
            f"params {name!r}: expected native byte order, got {dtype.str}. Convert it: "
            "leaf.astype(leaf.dtype.newbyteorder('='))."
        )
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise ValueError(
            f"params {name!r}: expected a dtype that JAX holds as it is, got {dtype}, which it "
            "would cut to 32 bits. Set jax_enable_x64, or its mask to False."
        )
    if math.prod(leaf.shape) >= 2**31:
        raise ValueError(
            f"params {name!r}: expected fewer than 2**31 weights in a leaf, got "
            f"{math.prod(leaf.shape)}. Split the leaf."
        )


def _check_keys(keys: Any, levels: int) -> None:
    try:
        count = len(keys)
    except TypeError:
        count = None
    if count != levels:
        actual = "a single key" if count is None and hasattr(keys, "dtype") else count
        raise ValueError(
            f"keys: expected {levels}, one for each of the {levels} masks, got "
            f"{type(keys).__name__ if actual is None else actual}. For level m pass masks[:m] and "
            "keys[:m]; of a LevelKey, ring_keys(level_key)."
        )
    first: Any = None
    # An array of keys is looked at as a whole: JAX cannot take one apart that a jitted function
    # closes over.
    whole = is_array(keys)
    for index, key in enumerate([keys] if whole else keys):
        if not is_array(key) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            # Not the value: it may be a secret.
            actual = f"an array of {key.dtype}" if is_array(key) else type(key).__name__
            raise TypeError(
                f"keys[{index}]: expected a typed key, got {actual}. Derive keys with "
                "ring_keys(level_key(...)), or wrap one with jax.random.wrap_key_data."
            )
        shape = key.shape[1:] if whole else key.shape
        if shape != ():
            raise ValueError(
                f"keys[{index}]: expected one key, got an array of keys of shape {shape}."
            )
        if index and key.dtype != first:
            raise ValueError(
                f"keys[{index}]: expected {first} as keys[0], got {key.dtype}. Use one "
                "implementation for all levels."
            )
        first = key.dtype


def _check_keys_are_arguments(keys: Any) -> None:
    """Refuses keys that would be a constant of a compiled program.

    Raises:
        TypeError: of them.
    """
    if not all(isinstance(key, Tracer) for key in ([keys] if is_array(keys) else keys)):
        raise TypeError(
            "keys: expected arguments of the function that is compiled, got keys that it closes "
            "over: they would be written into the program, and with it into JAX's cache on the "
            "disk. Pass them in: jax.jit(lambda params, keys: decrypt(params, masks, keys)), or "
            "see unlocking."
        )


def _check_keys_differ(words: np.ndarray | None) -> None:
    """With one key for two rings, a lower level would open a higher one."""
    rows = [] if words is None else [row.tobytes() for row in words]  # none under jit
    for index, row in enumerate(rows):
        if (first := rows.index(row)) < index:
            raise ValueError(
                f"keys[{index}]: expected a key of its own for each level, got keys[{first}] "
                "again. Derive them with ring_keys(level_key(...))."
            )
