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
        recovered: quality after the attack, one value per key; higher is better.
        baseline: what the same attacker reaches without the file, one value per key.
        clean: quality of the original.
        confidence: confidence level of the interval, in (0, 1).
        seed: seed of the bootstrap.
        paired: whether values at the same index belong together, as when the attacker has the same
            data with the file and without it. The variation that both share then does not widen
            the interval.

    Returns:
        A named tuple of the ``mean`` over keys and the ends of the interval, ``low`` and ``high``.
        0: no better than having no file; 1: as good as the original.

    Raises:
        ValueError: there are no values; the original is no better than the baseline, so there is
            nothing to steal; or paired values differ in number.

    Examples:
        >>> found = advantage([28.1, 28.2], [27.2, 27.3], 29.06)
        >>> assert found.low <= found.mean <= found.high < 1
    """
    found, worthless = np.asarray(recovered, float), np.asarray(baseline, float)
    if not found.size or not worthless.size:
        raise ValueError("recovered, baseline: expected one value per key, got none.")
    if paired and found.shape != worthless.shape:
        raise ValueError(
            f"recovered, baseline: expected pairs, got {found.size} and {worthless.size} values."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}.")
    if not clean > worthless.mean():
        raise ValueError(
            f"clean: expected more than the baseline, {worthless.mean():.4g}, got {clean:.4g}. "
            "Training the architecture alone reaches the original: there is nothing to protect."
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
