"""The paper's levels, as shares of the encrypted kernels, and its selection strategies."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from .. import (
    PSSBudgets,
    Secret,
    decrypt,
    encrypt,
    importance,
    level_key,
    mask_counts,
    nested_masks,
    new_model_id,
    pss,
    ring_keys,
)
from ._train import Subject

SELECT = r"^convs/.*kernel$"
STRATEGIES = ("pss", "random", "descend", "ascend", "mean")
# The share of the encrypted kernels that level m of 5 may decrypt; the paper's 0.6 + 0.4·m/M.
STEPS = (0.68, 0.76, 0.84, 0.92, 1.0)


class Level(NamedTuple):
    """One row of the table; level 0 has no key.

    Attributes:
        level: 0..5.
        groups: kernels that the level decrypts.
        fraction: their share of the convolution weights.
        metric: mean over keys.
    """

    level: int
    groups: int
    fraction: float
    metric: float


class Paper(NamedTuple):
    """Results of the paper's shares and strategies for one network, on held-out data.

    Attributes:
        budget: the requested share of the kernels.
        fraction: share of the convolution weights that is encrypted.
        levels: levels 0..5.
        top_bit_exact: whether the top level restores every bit of the original.
        strategies: strategy → share of the convolution weights → mean metric without a key.
        keys: the number of keys that metrics are averaged over.
    """

    budget: float
    fraction: float
    levels: tuple[Level, ...]
    top_bit_exact: bool
    strategies: dict[str, dict[float, float]]
    keys: int


def learn(
    subject: Subject, config: PSSBudgets, *, seed: int, advance: Callable[[int], None]
) -> PyTree:
    """Learned importance of the convolution kernels."""
    return pss(
        lambda params, batch: subject.loss(subject.network.model(params), batch),
        subject.params,
        subject.batches,
        key=jax.random.key(seed),
        config=config,
        select=SELECT,
        progress=lambda _, metrics: advance(len(metrics.loss)),
    )


def protect_and_measure(
    subject: Subject,
    scores: PyTree,
    *,
    budget: float,
    budgets: tuple[float, ...],
    keys: int,
    seed: int,
    advance: Callable[..., None],
) -> Paper:
    """The five levels, and PSS against the paper's other strategies.

    Args:
        subject: the trained network.
        scores: learned importance.
        budget: share of the kernels that is encrypted.
        budgets: shares at which strategies are compared, including `budget`.
        keys: how many protections to average a metric over, each under its own keys.
        seed: seed of the strategy "random".
        advance: called after each measurement, `measurements` times.

    Returns:
        The measurements.
    """
    masks = nested_masks(scores, [budget * step for step in STEPS], scope="model")
    metrics = np.zeros((keys, len(masks) + 1))
    exact = True
    for trial in range(keys):
        ring = _new_keys(len(masks))
        protected = encrypt(subject.params, masks, ring)
        levels = [decrypt(protected, masks[:m], ring[:m]) for m in range(len(masks) + 1)]
        for level, params in enumerate(levels):
            metrics[trial, level] = subject.held_out(params).mean()
            advance()
        exact = exact and same_bits(subject.params, levels[-1])

    rows = []
    for level, mask in enumerate([False, *masks]):
        groups, share = selected(subject.params, mask)
        rows.append(Level(level, groups, share, float(metrics[:, level].mean())))

    def without_key(mask: Any) -> float:
        found = subject.held_out(encrypt(subject.params, mask, _new_keys(1))).mean()
        advance()
        return float(found)

    compared: dict[str, dict[float, float]] = {}
    for strategy in STRATEGIES:
        ranked = scores
        if strategy != "pss":
            extra = {"key": jax.random.key(seed)} if strategy == "random" else {}
            ranked = getattr(importance, strategy)(subject.params, select=SELECT, **extra)
        by_share = {share: nested_masks(ranked, [share], scope="model") for share in budgets}
        compared[strategy] = {
            share: float(np.mean([without_key(mask) for _ in range(keys)]))
            for share, mask in by_share.items()
        }

    return Paper(
        budget=budget,
        fraction=rows[-1].fraction,
        levels=tuple(rows),
        top_bit_exact=exact,
        strategies=compared,
        keys=keys,
    )


def selected(params: PyTree, mask: Any) -> tuple[int, float]:
    """The number of kernels that a mask selects, and their share of all convolution weights."""
    found = mask_counts(params, mask)
    counts = [count for name, count in found.items() if re.search(SELECT, name)]
    share = sum(c.weights for c in counts) / sum(c.total for c in counts)
    return sum(c.groups for c in counts), share


def measurements(budgets: tuple[float, ...], keys: int) -> int:
    """How often `protect_and_measure` calls ``advance``."""
    return keys * (len(STEPS) + 1 + len(STRATEGIES) * len(budgets))


def _new_keys(levels: int) -> Any:
    """A vendor's keys: from a new secret and model id, one key per ring."""
    return ring_keys(level_key(Secret.generate(), new_model_id(), levels=levels))


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees hold the same arrays, bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
