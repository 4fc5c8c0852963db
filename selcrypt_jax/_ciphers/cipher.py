"""The interface of a cipher."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from .._tree.groups import Ring
from .keys import RingKeys


@runtime_checkable
class Cipher(Protocol):
    """Rewrites the weights of rings; the leaves keep their shapes and dtypes.

    `encrypt` and `decrypt` check masks and keys, derive a key for each ring, and define the
    gradient; a cipher does none of this.

    Examples:
        >>> class SignCipher:
        ...     def check(self, ring, leaf):
        ...         if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        ...             raise ValueError(f"params {ring.name!r}: expected floats.")
        ...     def run(self, leaves, rings, keys, *, inverse, donate=()):
        ...         result = dict(leaves)
        ...         for ring, key in zip(rings, keys):
        ...             leaf = result[ring.name]
        ...             signs = jax.random.rademacher(key, leaf.shape, leaf.dtype)
        ...             result[ring.name] = jax.numpy.where(ring.mask, leaf * signs, leaf)
        ...         return result
        >>> toy = encrypt(params, masks, keys, cipher=SignCipher())
        >>> same = decrypt(toy, masks, keys, cipher=SignCipher())
    """

    def check(self, ring: Ring, leaf: Any) -> None:
        """Raises ValueError if the cipher cannot protect this ring of this leaf."""
        ...

    def run(
        self,
        leaves: Mapping[str, Array],
        rings: Sequence[Ring],
        keys: RingKeys,
        *,
        inverse: bool,
        donate: Collection[str] = (),
    ) -> dict[str, Array]:
        """Encrypts ``rings[i]`` with key number i, or decrypts it if ``inverse``.

        Args:
            leaves: name → array; not to be modified, except for those in ``donate``.
            rings: non-empty, disjoint within a leaf.
            keys: an iterable of one typed `jax.random` key per ring; ``keys.array`` holds the same
                keys as one array, padded at the end.
            inverse: whether to decrypt.
            donate: names of leaves whose memory the cipher may reuse; it is free to ignore this.

        Returns:
            name → new array, for every name in ``leaves``.
        """
        ...
