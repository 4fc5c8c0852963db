"""Constants and block arithmetic that all engines of the lossless cipher share."""

import math
from typing import Any, Literal, Protocol, runtime_checkable

BLOCK = 4096
INDEX_BITS = 12
PERMUTATION, MASK, SEAL = 0, 1, 2  # domains of a ring's key in a leaf
LEAF_DOMAIN = b"selcrypt/v1/leaf\0"


@runtime_checkable
class Form(Protocol):
    """The part of a `LosslessCipher` that an engine needs."""

    @property
    def unit(self) -> Literal["weight", "group"]:
        """What the permutation moves: single weights or whole groups."""
        ...

    @property
    def permute(self) -> bool:
        """Whether weights are permuted."""
        ...

    def fine_mask(self, dtype: Any) -> int:
        """The bits of a weight that are masked."""
        ...


def block_count(count: int) -> int:
    """The number of blocks for ``count`` units or weights."""
    return -(-count // BLOCK)


def order_bits(units: int) -> float:
    """log2 of the number of permutations of ``units`` units within their blocks."""
    blocks = block_count(units)
    size, larger = divmod(units, max(blocks, 1))
    logarithm = larger * math.lgamma(size + 2) + (blocks - larger) * math.lgamma(size + 1)
    return logarithm / math.log(2)
