"""Shares of the groups, as users write them."""

from fractions import Fraction
from typing import Any

import numpy as np


def exact(fraction: float) -> Fraction:
    """The number as it was written in decimal."""
    # So that 0.29 of 100 groups is 29 and not floor(28.999999999999996).
    # str() of a NumPy or JAX scalar is in its own precision, so np.float32(0.29) is 0.29 too.
    return Fraction(str(fraction))


def check_share(what: str, share: Any, *, of: str = "the groups", or_none: bool = False) -> None:
    """Refuses a number that is not a share, such as 8 for 8 %.

    Args:
        what: the argument's name, for messages.
        share: in (0, 1].
        of: the whole, for messages.
        or_none: allow 0 too.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    if share is None or isinstance(share, str | bool) or np.ndim(share):
        raise TypeError(
            f"{what}: expected a number in (0, 1], got {type(share).__name__}. Pass a share of "
            f"{of}, such as 0.08; or a list with one per level, such as [0.02, 0.08], for levels."
        )
    if not 0 <= share <= 1 or (share == 0 and not or_none):  # also catches NaN
        number = float(share)
        remedy = f"For {number:g} % pass {number / 100:g}." if 1 < number <= 100 else "0.08 is 8 %."
        raise ValueError(
            f"{what}: expected a share of {of} in {'[' if or_none else '('}0, 1], got {share!r}. "
            + remedy
        )
