"""How much more a protected file is worth to an attacker than its architecture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Advantage(NamedTuple):
    """See `advantage`."""

    mean: float
    low: float
    high: float


def advantage(
    recovered: Sequence[float],
    baseline: Sequence[float],
    clean: float,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    paired: bool = False,
) -> Advantage:
    """``(recovered − baseline) / (clean − baseline)``, with a bootstrap interval over keys.

    Args:
        recovered: quality after the attack, one value a key; higher is better.
        baseline: what the same attacker reaches without the file, one value a key.
        clean: quality of the original.
        confidence: of the interval, in (0, 1).
        seed: of the bootstrap.
        paired: whether values at the same place belong together, as of an attacker who has the same
            data with the file and without it. What the data do to both is then no uncertainty.

    Returns:
        A named tuple of the ``mean`` over keys and the ends of the interval, ``low`` and ``high``.
        0: worth no more than no file at all; 1: as good as the original.

    Raises:
        ValueError: no values, or an original that is no better than the baseline, so that there
            is nothing to steal; pairs that are none.

    Examples:
        >>> found = advantage([28.1, 28.2], [27.2, 27.3], 29.06)
        >>> assert found.low <= found.mean <= found.high < 1
    """
    found, worthless = np.asarray(recovered, float), np.asarray(baseline, float)
    if not found.size or not worthless.size:
        raise ValueError("recovered, baseline: expected a value a key, got none.")
    if paired and found.shape != worthless.shape:
        raise ValueError(
            f"recovered, baseline: expected pairs, got {found.size} and {worthless.size} values."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}.")
    if not clean > worthless.mean():
        raise ValueError(
            f"clean: expected more than the baseline, {worthless.mean():.4g}, got {clean:.4g}. An "
            "attack on the architecture alone reaches the original: there is nothing to protect."
        )

    def of(found: np.ndarray, worthless: np.ndarray) -> np.ndarray:
        below = worthless.mean(-1)
        return (found.mean(-1) - below) / (clean - below)

    rng = np.random.default_rng(seed)
    which = rng.integers(found.size, size=(2000, found.size))
    other = which if paired else rng.integers(worthless.size, size=(2000, worthless.size))
    drawn = found[which], worthless[other]
    # A draw whose baseline is as good as the original says nothing.
    room = drawn[1].mean(-1) < clean
    draws = of(drawn[0][room], drawn[1][room])
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Advantage(float(of(found, worthless)), float(low), float(high))
