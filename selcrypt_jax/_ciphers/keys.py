"""The key of each ring in its leaf, derived from the levels' keys."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Key, PRNGKeyArray

from .._keys.chacha import chacha20_impl
from .._tree.groups import Ring
from .._tree.names import Keys, is_array, padded
from .engine_numpy import leaf_digest


class RingKeys:
    """A typed `jax.random` key for each ring: ``zip(rings, keys)`` pairs them.

    No two rings share a key, whatever their leaves and levels. JAX derives the keys on first use,
    and not at all for a cipher that starts from `secrets`.

    Attributes:
        secrets: for each ring the 32 bytes of its *level's* key, from which `leaf_key` derives the
            leaf's key; None if keys are traced or of another implementation than ChaCha20.
    """

    def __init__(self, levels: Keys, rings: Sequence[Ring], words: np.ndarray | None) -> None:
        self._levels, self._rings = levels, rings
        self.secrets: list[bytes] | None = None
        first: Any = levels if is_array(levels) else levels[0]
        if words is not None and jax.random.key_impl(first) == chacha20_impl:
            self.secrets = [words[ring.level - 1].astype("<u4").tobytes() for ring in rings]

    @cached_property
    def array(self) -> Key[Array, " keys"]:
        """The keys of all rings, padded at the end to one of a few lengths."""
        words = np.zeros((padded(len(self)), 8), np.uint32)
        words[: len(self)] = [leaf_digest(ring.name) for ring in self._rings]
        numbers = np.zeros(len(words), np.int32)
        numbers[: len(self)] = [ring.level - 1 for ring in self._rings]
        levels: Any = self._levels
        if not is_array(levels):  # by data: JAX's checker of key reuse counts stacked keys as used
            data = jnp.stack([jax.random.key_data(key) for key in levels])
            levels = jax.random.wrap_key_data(data, impl=jax.random.key_impl(levels[0]))
        return _fold_names(levels, *jax.device_put((numbers, words)))

    def __len__(self) -> int:
        return len(self._rings)

    def __iter__(self) -> Iterator[PRNGKeyArray]:
        return iter(self.array[: len(self)])


def key_words(keys: Keys) -> np.ndarray | None:
    """The data of keys, ``[keys, words]``; None if they are traced."""
    each: Any = [keys] if is_array(keys) else keys
    data = [jax.random.key_data(key) for key in each]
    if not data or any(isinstance(words, Tracer) for words in data):
        return None
    return np.concatenate([np.atleast_2d(words) for words in jax.device_get(data)])


def key_by_key(draw: Callable[..., Any], keys: Key[Array, " keys"]) -> Callable[..., Any]:
    """``draw(key, ...)``, such that under ``vmap`` every key still gives its own bits.

    XLA's generator draws for a whole batch of keys from the first one, so the bits would depend
    on the other rings in the batch: this processes one key after the other.
    """
    if jax.random.key_impl(keys) in ("rbg", "unsafe_rbg"):
        return jax.custom_batching.sequential_vmap(draw)
    return draw


@jax.jit
def _fold_names(keys: Key[Array, " levels"], levels: Array, words: Array) -> Key[Array, " keys"]:
    # fold_in takes 32 bits at a time: the whole digest is folded in, word by word.
    def fold(key: PRNGKeyArray, name: Array) -> PRNGKeyArray:
        return lax.scan(lambda k, word: (jax.random.fold_in(k, word), None), key, name)[0]

    return jax.vmap(key_by_key(fold, keys))(keys[levels], words)
