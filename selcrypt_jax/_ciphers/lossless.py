"""The lossless cipher: it permutes the bits that carry the distribution and masks the others.

On the bit patterns of a ring's weights in a leaf, in C order (with ``unit="group"``: group by
group, in C order of the mask)::

    c = π(x) XOR (k AND F)          x = π⁻¹(c XOR (k AND F))

with a keyed permutation π, a keystream k, and the dtype's *fine bits* F. Integer arithmetic only,
so every device, every sharding and every engine gives the same bits. This module holds the
definition; the engines are `engine_numpy`, which needs no JAX, `engine_host`, which runs it on JAX
arrays, and `engine_xla`.

How π and k are made (``B`` = 4096, ``n`` units, ``b = ceil(n / B)`` blocks):

- a key has two random streams: 32-bit numbers, ``bits(fold_in(key, 0))``, and numbers as wide as
  the dtype, ``bits(fold_in(key, 1))``. ChaCha20 reads any part of its stream by the block counter.
  With other implementations of `jax.random`, number ``i`` of a stream is number ``i mod B`` of
  ``bits(fold_in(stream's key, i div B), B)``.
- block r holds the units ``r, r + b, r + 2b, …``: a sample spread over the whole ring. The units
  of a block are sorted by 20 random bits, ties by position: the upper 20 of numbers ``rB``,
  ``rB + 1``, … of the first stream. A pair ties with probability 2⁻²⁰, which biases its order by
  2⁻²¹; the information in this bias is under 2⁻¹⁷ bits per block.
- weight number i of the ring is masked with number i of the second stream.
"""

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .._io.errors import counted
from .._tree.dtypes import DTYPES, Dtype
from .blocks import order_bits

MINIMUM_HIDING = 128  # bits
_COARSE_MANTISSA = 3  # top mantissa bits that are permuted and not masked: eighths of an octave


@dataclass(frozen=True)
class LosslessCipher:
    """The default cipher: exact on every dtype, with no side data.

    Attributes:
        unit: what the permutation moves: ``"weight"``, single weights; ``"group"``, whole groups
            of the mask, so that a kernel still looks like one.
        permute: ``False`` is the *stream* form: no permutation, and by default the sign and the
            whole mantissa are masked. It preserves only the histogram of octaves of |w|.
        fine_bits: how many of the lowest bits are masked. By default: all mantissa bits but the
            top three (20 of float32, 4 of bfloat16, 7 of float16, none of float8), and none of an
            integer's bits. Without `permute`: sign and mantissa, and all bits of an integer.

    With the defaults, the signed histogram in eighths of an octave is preserved exactly, in every
    ring of every leaf and in every block of up to 4,096 of its units; nothing beyond that histogram
    leaks. A lossless in-place cipher that preserves the whole histogram can only be a permutation,
    so this is the best possible.

    How much a ring hides depends on its size in each leaf. `check` refuses less than 128 bits,
    masked bits included. But masked bits change a weight by less than an eighth, so an attacker who
    is content with *roughly* right weights only has to guess the order: 18 bits for one 3×3
    kernel, 237 for six. Give a leaf dozens of weights per ring, rather than one kernel.

    Equal weights do not hide each other: an int8 leaf of zeros does not change at all, and a
    BatchNorm scale of ones stays within an eighth of one. The size check does not look at values.

    Masking may turn a number into NaN, or NaN into a number, if the largest exponent holds both
    (float8 e4m3fn), and Inf into NaN in the stream form. A network with such weights may not run
    encrypted, but it decrypts to the same bits.

    Examples:
        >>> cipher = LosslessCipher(permute=False)  # the stream form, for large sharded leaves
        >>> stream = encrypt(params, masks, keys, cipher=cipher)
        >>> restored = decrypt(stream, masks, keys, cipher=cipher)
        >>> all(jax.tree.leaves(jax.tree.map(jax.numpy.array_equal, restored, params)))
        True
    """

    unit: Literal["weight", "group"] = "weight"
    permute: bool = True
    fine_bits: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("weight", "group"):
            raise ValueError(f"unit: expected 'weight' or 'group', got {self.unit!r}.")
        if self.fine_bits is not None and operator.index(self.fine_bits) < 0:
            raise ValueError(f"fine_bits: expected at least 0, got {self.fine_bits}.")

    def fine_mask(self, dtype: Any) -> int:
        """The fine bits F of a dtype.

        Raises:
            ValueError: more `fine_bits` than the dtype has, or a dtype of less than eight bits.
        """
        dtype = dtype_of(dtype)
        if dtype.kind == "other":
            raise ValueError(f"expected floats or integers, got {dtype.name}, which has no cipher")
        if dtype.bits < 8:
            raise ValueError(f"expected a dtype of 8 bits or more, got {dtype.name}")
        most = dtype.mantissa if dtype.kind == "float" else dtype.bits
        if self.fine_bits is None:
            stream = (1 << most) - 1 | dtype.signed << (dtype.bits - 1)
            return (1 << dtype.bits) - 1 - _coarse_mask(dtype) if self.permute else stream
        if self.fine_bits > most:
            raise ValueError(
                f"fine_bits: expected at most {most} for {dtype.name}, got {self.fine_bits}"
            )
        return (1 << self.fine_bits) - 1

    def check(self, ring: Any, leaf: Any) -> None:
        """Refuses dtypes without a cipher, and rings with less than 128 bits to hide in."""
        import numpy as np  # imported late: opening a file starts it while the file is read

        groups = int(np.count_nonzero(ring.mask))  # ten times as fast as a sum
        weights = groups * (math.prod(leaf.shape) // ring.mask.size)
        what = f"params {ring.name!r}, ring {ring.level}"
        self.check_size(what, dtype_of(leaf.dtype), groups=groups, weights=weights)

    def hides(self, dtype: Any, shape: Sequence[int]) -> bool:
        """Whether a leaf of this dtype and shape could be encrypted weight by weight."""
        size = math.prod(shape)
        try:
            self.check_size("leaf", dtype_of(dtype), groups=size, weights=size)
        except ValueError:
            return False
        return True

    def check_size(self, what: str, dtype: Dtype, *, groups: int, weights: int) -> None:
        """Like `check`, for a ring of ``groups`` groups with ``weights`` weights in total."""
        try:
            fine = self.fine_mask(dtype)
        except ValueError as error:
            raise ValueError(
                f"{what}: {error}. Exclude it (mask False), or change fine_bits."
            ) from None
        units = groups if self.unit == "group" else weights
        arrangements = order_bits(units) if self.permute else 0.0
        hiding = arrangements + weights * fine.bit_count()
        if hiding < MINIMUM_HIDING:
            raise ValueError(
                f"{what}: too small to hide in: {counted(weights, 'weight')} of {dtype.name} with "
                f"{counted(round(hiding), 'bit')} ({arrangements:.0f} of order, "
                f"{weights * fine.bit_count()} masked), expected at least {MINIMUM_HIDING}. Select "
                "more groups in this leaf, use fewer levels or larger groups (or unit='weight'), "
                "or exclude it (--select, or mask False)."
            )
        if not arrangements and not fine & _coarse_mask(dtype):
            raise ValueError(
                f"{what}: expected a cipher that changes more than fine bits, got {self}, which "
                f"has {units} {self.unit} to permute and masks none of sign, exponent and top "
                "three mantissa bits: every weight would stay within an eighth. Use unit='weight' "
                "or a mask with more groups, or do not set fine_bits."
            )

    def run(
        self,
        leaves: Mapping[str, Any],
        rings: Sequence[Any],
        keys: Any,
        *,
        inverse: bool,
        donate: Collection[str] = (),
    ) -> dict[str, Any]:
        """See `Cipher.run`: in NumPy if it knows keys and weights, otherwise in XLA."""
        from .engine_host import on_host, run_on_host  # the definition alone needs no JAX
        from .engine_xla import run_in_xla

        secrets = keys.secrets
        here = {n: leaf for n, leaf in leaves.items() if secrets is not None and on_host(leaf)}
        rest = {n: leaf for n, leaf in leaves.items() if n not in here}
        options: Any = {"inverse": inverse, "donate": donate}
        return {
            **(run_on_host(self, here, rings, secrets or (), **options) if here else {}),
            **run_in_xla(self, rest, rings, keys, **options),
        }


def dtype_of(dtype: Any) -> Dtype:
    """The table's entry for a dtype of NumPy, ml_dtypes or JAX.

    Raises:
        ValueError: the dtype is unknown.
    """
    if isinstance(dtype, Dtype):
        return dtype
    import numpy as np

    # NumPy does not know the dtypes of typed random keys.
    name = str(dtype) if str(dtype).startswith("key<") else np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"expected one of the dtypes {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def _coarse_mask(dtype: Dtype) -> int:
    """The bits that give a weight's rough value: all but the low mantissa bits of a float."""
    if dtype.kind == "integer":
        return (1 << dtype.bits) - 1
    return (1 << dtype.bits) - (1 << max(dtype.mantissa - _COARSE_MANTISSA, 0))
