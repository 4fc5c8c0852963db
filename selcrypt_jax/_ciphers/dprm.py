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
    """Encrypts the weights that nested masks select, each ring under its own key.

    Ring m is the difference of ``masks[m - 1]`` and ``masks[m - 2]``; in every leaf it is encrypted
    with a key derived from ``keys[m - 1]`` and the leaf's name. Leaves without selected weights are
    passed through: the same objects. Works under ``jit`` (close over the masks, but pass keys as
    arguments: values that are closed over are written into the program), under ``vmap`` over params
    *and* keys (over params alone, one key would be used twice) and with donation. Sharded leaves
    give the same bits as on one device.

    Gradients of any order flow through weights that are not selected, as if nothing had been
    encrypted. The gradient of a selected weight is zero: its bits are scrambled, so a small change
    in the ciphertext is not a small change in the weight. To train decrypted weights,
    differentiate with respect to the result of `decrypt`.

    Args:
        params: any pytree of arrays. Other leaves (functions, strings, numbers) pass through.
            Copies of a leaf are separate leaves: select the same in them, or use `protect`.
        masks: M nested masks for ``params``, see `nested_masks`.
        keys: M typed `jax.random` keys, of any implementation; see `ring_keys`. **A key must
            never encrypt two different trees**: draw a new model id for each. (The bits of
            "rbg" keys differ between devices; those of ChaCha20 and threefry do not.)
        cipher: the cipher; `LosslessCipher()` by default.
        donate: whether the memory of selected leaves may be reused, as with
            ``jax.jit(..., donate_argnums=0)``: their JAX arrays are deleted, each as soon as its
            result is ready, so that few leaves are in memory twice. Under ``jit`` and other
            transformations this does nothing; donate to ``jit`` instead.

    Returns:
        A tree of the same structure, shapes and dtypes. Selected leaves are JAX arrays.

    Raises:
        ValueError: masks that do not fit or are not nested, a number of keys that differs from the
            number of levels, a ring that is too small to hide in, a dtype that cannot be encrypted.
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
    """Decrypts the rings that a level opens; higher rings stay encrypted.

    Runs wherever `encrypt` does, with the same gradients: zero for the weights that it decrypts.
    Rings that stay encrypted get gradients like plain weights.

    Args:
        params: the result of `encrypt`.
        masks: for level m, ``masks[:m]`` of the masks that it was encrypted with.
        keys: ``keys[:m]``.
        cipher: as in `encrypt`.
        donate: as in `encrypt`.

    Returns:
        A tree of the same structure, with rings 1..m as before encryption, bit for bit with
        `LosslessCipher`. A wrong key gives noise; this function cannot detect it.

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
    """Turns a function of parameters into one of protected parameters and keys, for ``jit``.

    Parameters at rest in device memory stay encrypted; a compiled step decrypts the weights that it
    needs, and frees them. XLA decides when to decrypt, leaf by leaf or all at the beginning: its
    schedulers for accelerators save memory, the one for CPUs saves time. Every call decrypts again:
    use it if parameters must never rest in memory as plaintext; otherwise call `decrypt` once.

    It composes with ``grad`` on both sides: ``value_and_grad(unlocking(f, masks))`` differentiates
    with respect to the protected parameters, where selected weights get zero, and
    ``unlocking(value_and_grad(f), masks)`` with respect to all decrypted ones.

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
                "masks: expected one mask per level, got none. The result would be plaintext. Make "
                "masks with nested_masks."
            )
        _check_keys_differ(words)
    # Everything is checked before anything is computed: there is never a half-encrypted tree.
    for ring in found:
        _check_leaf(ring.name, tree.leaves[ring.name])
        cipher.check(ring, tree.leaves[ring.name])
    if not found:
        return params
    given = {ring.name: tree.leaves[ring.name] for ring in found}
    leaves = {name: _on_device(leaf) for name, leaf in given.items()}
    donated = _donated(given, tree.leaves) if donate else ()

    def run(leaves: Mapping[str, Array], keys: Keys) -> dict[str, Array]:
        # When differentiated eagerly, a NumPy leaf arrives here unchanged.
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
    """The leaves whose memory may be reused.

    Excluded are leaves that are in the tree twice, and NumPy arrays: the caller owns them, and JAX
    may have borrowed their memory. If some leaves are traced, none: arrays are constants there.
    """
    if any(isinstance(leaf, Tracer) for leaf in given.values()):
        return set()
    times = Counter(id(leaf) for leaf in everything.values())
    return {n for n, leaf in given.items() if isinstance(leaf, jax.Array) and times[id(leaf)] == 1}


def _differentiable(
    run: Callable[[Mapping[str, Array], Keys], dict[str, Array]], rings: Sequence[Ring]
) -> Callable[[Mapping[str, Array], Keys], dict[str, Array]]:
    """``run`` with the identity's derivative for plain weights, and 0 for weights in rings."""
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
    if tangent.dtype == jax.dtypes.float0:  # the tangent of integers, which has no values
        return tangent
    return without_explicit_axes(_zero_where, tangent)(tangent, selected)


@jax.jit
def _zero_where(tangent: Array, selected: Array) -> Array:
    return jnp.where(selected, jnp.zeros((), tangent.dtype), tangent)


def _placed(array: Array, like: Any) -> Array:
    """Puts an array where ``like`` lies, if that is known; otherwise the compiler chooses."""
    # An uncommitted array has to stay uncommitted.
    if isinstance(array, Tracer) or not isinstance(like, jax.Array) or not like.committed:
        return array
    return jax.device_put(array, like.sharding)


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"params {name!r}: expected a JAX or NumPy array, got {type(leaf).__name__}. Pass the "
            "arrays themselves, or set its mask to False."
        )
    dtype = leaf.dtype  # np.dtype() does not accept the dtypes of typed keys
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
            "would truncate to 32 bits. Set jax_enable_x64, or set its mask to False."
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
            f"keys: expected {levels}, one for each mask, got "
            f"{type(keys).__name__ if actual is None else actual}. For level m pass masks[:m] and "
            "keys[:m]; for a LevelKey, pass ring_keys(level_key)."
        )
    first: Any = None
    # An array of keys is checked as a whole: JAX cannot index one that a jitted function closes
    # over.
    whole = is_array(keys)
    for index, key in enumerate([keys] if whole else keys):
        if not is_array(key) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            # The message omits the value: it may be a secret.
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
    """Refuses keys that would become constants of a compiled program.

    Raises:
        TypeError: there are such keys.
    """
    if not all(isinstance(key, Tracer) for key in ([keys] if is_array(keys) else keys)):
        raise TypeError(
            "keys: expected arguments of the compiled function, got keys that it closes over: they "
            "would be written into the program, and with it into JAX's cache on disk. Pass them "
            "in: jax.jit(lambda params, keys: decrypt(params, masks, keys)), or see unlocking."
        )


def _check_keys_differ(words: np.ndarray | None) -> None:
    """Refuses one key for two rings: a lower level would open a higher one."""
    rows = [] if words is None else [row.tobytes() for row in words]  # none under jit
    for index, row in enumerate(rows):
        if (first := rows.index(row)) < index:
            raise ValueError(
                f"keys[{index}]: expected a different key for each level, got keys[{first}] again. "
                "Derive them with ring_keys(level_key(...))."
            )
