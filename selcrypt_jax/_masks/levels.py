"""How many groups each level may decrypt."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from .._tree.shares import check_share, exact


@runtime_checkable
class Levels(Protocol):
    """How many groups each level may decrypt.

    Examples:
        >>> class Halves:
        ...     def counts(self, groups):
        ...         return groups // 4, groups // 2
        >>> masks = nested_masks(scores, Halves())
    """

    def counts(self, groups: int) -> tuple[int, ...]:
        """Non-decreasing counts for levels 1..M, out of ``groups``."""
        ...


@dataclass(frozen=True)
class PaperLevels:
    """The levels of the paper's published release.

    ``n = floor(ratio * groups) + 1`` of ``groups`` groups are encrypted, and level m of M may
    decrypt the ``floor((0.6 + 0.4 * m / M) * n)`` most important ones.

    Attributes:
        ratio: share of the groups that is encrypted, in (0, 1].
        levels: M, the number of levels.

    Examples:
        >>> PaperLevels(0.02).counts(4096)
        (55, 62, 68, 75, 82)

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
class _Shares:
    shares: tuple[Fraction, ...]

    def counts(self, groups: int) -> tuple[int, ...]:
        return tuple(math.floor(share * groups) for share in self.shares)


LevelsLike = int | Sequence[float] | Levels
"""A number of levels; or the share of the groups that each level opens; or `Levels`."""


def as_levels(levels: LevelsLike, budget: float | None = None) -> Levels:
    """Checks the shares that levels open.

    Args:
        levels: a number of levels, each opening an equal part of the budget; or ascending shares
            of the groups in (0, 1], one per level; or `Levels`.
        budget: share of the groups that is encrypted, for a number of levels; 0.08 by default.

    Raises:
        ValueError: out of range or not ascending; a budget together with levels that imply it.
        TypeError: any other object.
    """
    if isinstance(levels, int | np.integer) and not isinstance(levels, bool):
        if levels < 1:
            raise ValueError(f"levels: expected at least 1, got {levels}. Level 0 needs no key.")
        budget = 0.08 if budget is None else budget
        check_share("budget", budget)
        shares = [budget * level / int(levels) for level in range(1, int(levels) + 1)]
        return _Shares(tuple(map(exact, shares)))
    if budget is not None:
        raise ValueError(
            "budget: expected only with a number of levels, got levels that already determine the "
            "share that is encrypted. Omit the budget."
        )
    if isinstance(levels, Sequence | np.ndarray | jax.Array) and not isinstance(levels, str):
        shares = list(levels)
        if not shares:
            raise ValueError("levels: expected one share per level, got none. Pass [0.02, 0.08].")
        for index, share in enumerate(shares):
            check_share(f"levels[{index}]", share)
            if index and share < shares[index - 1]:
                raise ValueError(
                    f"levels: expected ascending shares, level by level, got {share!r} after "
                    f"{shares[index - 1]!r}. Sort them."
                )
        return _Shares(tuple(map(exact, shares)))
    if isinstance(levels, Levels):
        return levels
    raise TypeError(
        "levels: expected a number of levels, one share per level, or Levels such as "
        f"PaperLevels(0.08), got {type(levels).__name__}. For a single level pass [0.08]."
    )
