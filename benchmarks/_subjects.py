"""Trees of weights and their masks and keys, for the sections that encrypt and decrypt."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selcrypt_jax import (
    LosslessCipher,
    Secret,
    decrypt,
    encrypt,
    importance,
    level_key,
    nested_masks,
    ring_keys,
)
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax._tree.rings import split_rings
from selcrypt_jax.models import VGG19

SECRET, MODEL_ID = bytes(range(32)), bytes(16)
LEVELS = 5
LARGE = "transformer, 1 B"
BLOCK = 1_000_003  # a prime, so that no two rows are alike
PERMUTING, STREAM = LosslessCipher(), LosslessCipher(permute=False)


class Case(NamedTuple):
    """A protection: the name of a tree in `TREES`, the encrypted share, and how many levels."""

    tree: str
    share: float
    levels: int


def weights(*shape: int) -> jax.Array:
    """Normal bfloat16 weights, made quickly even for a billion."""
    block = np.random.default_rng(0).standard_normal(BLOCK).astype(np.float32)
    return jnp.asarray(np.resize(block.astype(jnp.bfloat16), shape))


def vgg19(width: float = 1.0) -> Any:
    """The parameters of VGG19."""
    return nnx.state(VGG19(width=width, rngs=nnx.Rngs(0)), nnx.Param)


def transformer(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Parameters in the shapes of a decoder, nine leaves per layer and three more."""
    hidden = 64 * round(8 * width / 3 / 64)

    def layer() -> dict[str, jax.Array]:
        square = {name: weights(width, width) for name in ("query", "key", "value", "output")}
        up = {name: weights(width, hidden) for name in ("gate", "up")}
        norms = {name: weights(width) for name in ("attention_norm", "mlp_norm")}
        return square | up | {"down": weights(hidden, width)} | norms

    return {
        "embedding": weights(vocabulary, width),
        "layers": [layer() for _ in range(layers)],
        "norm": weights(width),
        "head": weights(width, vocabulary),
    }


def dense(count: int) -> dict[str, jax.Array]:
    """One leaf with that many weights, a multiple of 1024."""
    return {"kernel": weights(count // 1024, 1024)}


def learned_masks(params: Any, share: float, levels: int) -> Sequence[Any]:
    """The largest kernels of the convolutions."""
    scores = importance.l2(params, select=r"convs.*kernel$")
    return nested_masks(scores, [share * (m + 1) / levels for m in range(levels)])


def random_masks(params: Any, share: float, levels: int) -> Sequence[Any]:
    """Randomly drawn weights of all matrices: sorting a billion scores takes minutes."""
    rng = np.random.default_rng(1)

    def level_of(leaf: Any) -> Any:
        """The level that opens each weight; one above the top for unencrypted weights."""
        if leaf.ndim < 2:
            return False
        drawn = rng.integers(0, 2**16, leaf.shape, np.uint16)
        ends = [round(2**16 * share * (m + 1) / levels) - 1 for m in range(levels)]
        return np.searchsorted(ends, drawn) if levels > 1 else (drawn > ends[0]).view(np.uint8)

    def opened_at(level: int) -> Any:
        return jax.tree.map(lambda leaf: leaf is not False and leaf <= level, levels_of)

    levels_of = jax.tree.map(level_of, params)
    return [opened_at(level) for level in range(levels)]


class Tree(NamedTuple):
    """Functions that make parameters, and their masks for a share and a number of levels."""

    params: Callable[[], Any]
    masks: Callable[[Any, float, int], Sequence[Any]]


TREES = {
    "VGG19": Tree(vgg19, learned_masks),
    "VGG19, a sixteenth": Tree(lambda: vgg19(0.25), learned_masks),
    LARGE: Tree(lambda: transformer(18, 2048, 32000), random_masks),
    "transformer, 200 leaves": Tree(lambda: transformer(22, 192, 4096), random_masks),
    "transformer, tiny": Tree(lambda: transformer(2, 96, 1024), random_masks),
    **{
        f"dense, 2^{power}": Tree(lambda power=power: dense(2**power), random_masks)
        for power in range(16, 31)
    },
}


def bits_of(leaf: Any) -> np.ndarray:
    """A leaf as unsigned integers ``[weights]``, in the same memory if it is in host memory."""
    array = np.asarray(leaf)
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")


def check_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises unless the leaves equal the expected ones, bit for bit."""
    for name, leaf in found.items():
        if not np.array_equal(bits_of(leaf).view(np.uint8), bits_of(expected[name]).view(np.uint8)):
            raise RuntimeError(f"{name}: differs from the original.")


class Subject:
    """A tree, its masks, keys and ciphertexts; each is made on first use."""

    def __init__(self, case: Case):
        self.case = case
        self._protected: dict[LosslessCipher, Any] = {}

    @cached_property
    def params(self) -> Any:
        """The original."""
        return TREES[self.case.tree].params()

    @cached_property
    def masks(self) -> Sequence[Any]:
        """One per level."""
        return TREES[self.case.tree].masks(self.params, self.case.share, self.case.levels)

    @cached_property
    def keys(self) -> Any:
        """One per level."""
        return ring_keys(level_key(Secret(SECRET), MODEL_ID, levels=self.case.levels))

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """Name → original leaf."""
        return named_leaves(self.params).leaves

    @cached_property
    def rings(self) -> dict[str, list[tuple[np.ndarray, bytes]]]:
        """Name → the masks of the leaf's rings, each with the key of its level."""
        words = [np.asarray(jax.random.key_data(key)).astype("<u4") for key in self.keys]
        found: dict[str, list[tuple[np.ndarray, bytes]]] = {}
        for ring in split_rings(named_leaves(self.params), self.masks):
            found.setdefault(ring.name, []).append((ring.mask, words[ring.level - 1].tobytes()))
        return found

    @property
    def size(self) -> int:
        """The size of the tree in bytes."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def protected(self, cipher: LosslessCipher = PERMUTING) -> Any:
        """The encrypted tree."""
        if cipher not in self._protected:
            self._protected[cipher] = encrypt(self.params, self.masks, self.keys, cipher=cipher)
        return self._protected[cipher]

    def given(self, cipher: LosslessCipher = PERMUTING) -> tuple[Any, Sequence[Any], Any]:
        """The arguments of `decrypt`: the encrypted tree, masks and keys."""
        return self.protected(cipher), self.masks, self.keys

    def given_up(self, cipher: LosslessCipher = PERMUTING) -> tuple[Any, Sequence[Any], Any]:
        """Like `given`, with a copy of the tree that may be used up."""
        return jax.tree.map(jnp.copy, self.protected(cipher)), self.masks, self.keys

    def jitted(self) -> Callable[..., Any]:
        """`decrypt` as a jitted function of params, which are donated, and keys."""
        return jax.jit(lambda params, keys: decrypt(params, self.masks, keys), donate_argnums=0)

    def check(self, found: Any) -> None:
        """Raises unless a tree equals the original."""
        check_bits(named_leaves(found).leaves, self.leaves)
