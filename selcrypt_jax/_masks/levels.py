"""How many groups each level may decrypt."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np


@runtime_checkable
class Levels(Protocol):
    """How many groups each level may decrypt."""

    def counts(self, groups: int) -> tuple[int, ...]:
        """Non-decreasing counts for levels 1..M, out of ``groups``."""
        ...


@dataclass(frozen=True)
class PaperLevels:
    """The levels of the paper's published release.

    Of ``groups`` groups ``n = floor(ratio * groups) + 1`` are selected, and level m of M may
    decrypt the ``floor((0.6 + 0.4 * m / M) * n)`` most important ones of them.

    Attributes:
        ratio: share of the groups that is encrypted, in (0, 1].
        levels: M, the number of levels.

    References:
        Tian, Zhou, Duan, CVPR 2021, section 3.3, and its published code.
    """

    ratio: float
    levels: int = 5

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if operator.index(self.levels) < 1:
            raise ValueError(f"levels: expected at least 1, got {self.levels}.")

    def counts(self, groups: int) -> tuple[int, ...]:
        """See `Levels.counts`."""
        total = min(groups, math.floor(exact(self.ratio) * groups) + 1)
        return tuple(
            math.floor((Fraction(3, 5) + Fraction(2, 5) * Fraction(m, self.levels)) * total)
            for m in range(1, self.levels + 1)
        )


@dataclass(frozen=True)
class _Fractions:
    fractions: tuple[Fraction, ...]

    def counts(self, groups: int) -> tuple[int, ...]:
        return tuple(math.floor(fraction * groups) for fraction in self.fractions)


def exact(fraction: float) -> Fraction:
    # What its author wrote, so that 0.29 of 100 groups is 29 and not floor(28.999999999999996).
    # str() of a NumPy or JAX scalar is in its own precision, so np.float32(0.29) is 0.29 too.
    return Fraction(str(fraction))


def check_share(what: str, share: Any, *, of: str = "the groups", or_none: bool = False) -> None:
    """Refuses what is no share; whoever writes 8 means 8 %.

    Args:
        what: it is of, for messages.
        share: in (0, 1].
        of: what is shared.
        or_none: allow 0 too.

    Raises:
        TypeError: no number.
        ValueError: out of range.
    """
    if share is None or isinstance(share, str | bool) or np.ndim(share):
        raise TypeError(
            f"{what}: expected a number in (0, 1], got {type(share).__name__}. Pass a share of "
            f"{of}, such as 0.08; or one a level, such as [0.02, 0.08], where levels are asked for."
        )
    if not 0 <= share <= 1 or (share == 0 and not or_none):  # also catches NaN
        number = float(share)
        remedy = f"For {number:g} % pass {number / 100:g}." if 1 < number <= 100 else "0.08 is 8 %."
        raise ValueError(
            f"{what}: expected a share of {of} in {'[' if or_none else '('}0, 1], got {share!r}. "
            + remedy
        )


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) == 0:
        raise ValueError("fractions: expected one a level, got none. Pass some: [0.02, 0.08].")
    for index, fraction in enumerate(fractions):
        check_share(f"fractions[{index}]", fraction)
        if index and fraction < fractions[index - 1]:
            raise ValueError(
                f"fractions: expected ascending shares, level by level, got {fraction!r} after "
                f"{fractions[index - 1]!r}. Sort them."
            )


def as_levels(fractions: Sequence[float] | Levels) -> Levels:
    """Checks shares, one a level.

    Raises:
        ValueError: out of range or not ascending.
        TypeError: neither shares nor `Levels`.
    """
    if isinstance(fractions, Sequence | np.ndarray | jax.Array) and not isinstance(fractions, str):
        fractions = list(fractions)
        _check_fractions(fractions)
        return _Fractions(tuple(map(exact, fractions)))
    if isinstance(fractions, Levels):
        return fractions
    raise TypeError(
        f"fractions: expected one share a level or Levels such as PaperLevels(0.08), got "
        f"{type(fractions).__name__}. For a single level pass [fraction]."
    )
