"""Windows of exponents, and the bits of a weight that the window cipher masks. See `window`."""

from typing import NamedTuple

from .._tree.dtypes import DTYPES, Dtype

FEWEST = 3
"""No window has fewer than 2^3 exponents: a leaf of ones does not tell that it is one."""


class Window(NamedTuple):
    """The exponents of a leaf, as coarsely as the cipher tells them.

    It ends with the largest exponent of the leaf and begins at its smallest one or below. A wider
    one would tell less, but sealed weights are spread over all of it: in one of half of all
    exponents, some are so much larger than the leaf's own, and some variances so much smaller,
    that VGG19's outputs overflow.

    Attributes:
        lowest: the first biased exponent inside.
        exponents: k, of the 2^k exponents inside.
        sign: whether the sign is masked too. It is not where all weights have the same one, since
            a variance that turns negative would make a network NaN.

    Examples:
        >>> Window(lowest=120, exponents=3, sign=True)  # any float32 from 2^-7 to less than 2
        Window(lowest=120, exponents=3, sign=True)
    """

    lowest: int
    exponents: int
    sign: bool


def exponent_bits(dtype: Dtype) -> int:
    """How many bits the exponent of a float has."""
    return dtype.bits - dtype.mantissa - dtype.signed


def sealed_words(dtype: Dtype) -> Dtype:
    """The numbers that are masked in a tensor: complex ones in halves, codes byte by byte."""
    if dtype.name == "complex64":
        return DTYPES["float32"]
    return dtype if dtype.bits >= 8 else DTYPES["uint8"]


def has_window(dtype: Dtype) -> bool:
    """Whether a dtype has exponents; others are masked whole."""
    return sealed_words(dtype).kind == "float"


def fits(window: Window, dtype: Dtype) -> bool:
    """Whether a window is one of this dtype."""
    dtype = sealed_words(dtype)
    most = exponent_bits(dtype)
    inside = window.exponents <= most and window.lowest + (1 << window.exponents) <= 1 << most
    return inside and (dtype.signed or not window.sign)


def offset_and_mask(dtype: Dtype, window: Window | None) -> tuple[int, int]:
    """The numbers o and m of the definition; without a window every bit that a dtype uses."""
    if dtype.name == "bool":
        return 0, 1  # it stays a boolean
    dtype = sealed_words(dtype)
    if window is None:
        return 0, (1 << dtype.bits) - 1
    mask = (1 << (window.exponents + dtype.mantissa)) - 1
    return window.lowest << dtype.mantissa, mask | window.sign << (dtype.bits - 1)
