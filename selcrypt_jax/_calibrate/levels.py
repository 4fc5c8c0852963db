"""Levels that give what their owner wants: masks from targets, found by search."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray, PyTree

from .._ciphers.lossless import LosslessCipher
from .._masks.ranks import Scope
from .._tree.names import Selector, check_key
from .network import Network, Sampled
from .search import Evaluation, Search


class Calibration(NamedTuple):
    """Levels that meet their targets: in the mean over keys, or those of one release.

    Attributes:
        masks: M nested masks, for `encrypt` and `protect`.
        fractions: shares that make these masks: for `protect` and `protect_file`, with the same
            scores, scope and small leaves. Where no ring had to be merged upwards and there are
            no small leaves, ``nested_masks(scores, fractions, scope=scope)`` are the masks. Of a
            release, the shares of the groups that its levels open.
        values: what levels 0..M-1 give, mean over keys that the search has not used; non-decreasing
            in quality, since two that stand in the wrong order by chance are given their mean. Of
            a release, what its own levels give.
        spreads: their standard deviation over keys, which is what to expect of the one key of a
            release; NaN for one key, zero for those of a release.
        untouched: what level M gives.
        exact: whether level M gives back every bit.
        evaluations: how many selections and levels were tried.
        calls: how often `eval_fn` was called: an evaluation takes up to `keys` calls, or one for a
            release.

    Examples:
        >>> found = calibrate_levels(psnr_of, params, scores, [22, 26], key=key)
        >>> for level, value in enumerate(found.values):
        ...     print(f"level {level}: {value:.1f} dB, ±{found.spreads[level]:.1g} by the key")
        >>> released = protect(params, found.masks, secret=secret)
    """

    masks: tuple[PyTree, ...]
    fractions: tuple[float, ...]
    values: tuple[float, ...]
    spreads: tuple[float, ...]
    untouched: float
    exact: bool
    evaluations: int
    calls: int


def calibrate_levels(
    eval_fn: Callable[[PyTree], Any],
    params: PyTree,
    scores: PyTree,
    targets: Sequence[float | None],
    *,
    key: PRNGKeyArray,
    keys: int = 16,
    tolerance: float | None = None,
    scope: Scope = "leaf",
    budget: float = 1.0,
    small: float = 0.0,
    select: Selector = None,
    cipher: LosslessCipher | None = None,
    higher_is_better: bool = True,
    progress: Callable[[Evaluation], None] | None = None,
) -> Calibration:
    """Finds nested masks whose levels give what is asked for, in the mean over keys.

    This is for planning: a release has one key, with which a level may be far off. For a release
    whose own levels meet their targets, see `protect_calibrated`.

    The top share f_M of the order of importance is encrypted, such that the network without a key
    gives ``targets[0]``; level m opens the top share f_m, so that what stays encrypted between the
    two gives ``targets[m]``. Each share is found by bisection and interpolation on the logarithm
    of the number of groups, from the top level down, on networks that are really encrypted, under
    fresh keys each time. A last check protects the network once for each key, opens it level by
    level, and measures each; levels that are off are corrected and checked again.

    Args:
        eval_fn: ``params -> number``: the metric, on data that were not used for training. As
            precise as it is, as precise are the levels: 1,000 test images say an accuracy of 75 %
            to ±1.4.
        params: any pytree of arrays.
        scores: importance, see `nested_masks`; the smaller its steps, the finer the levels.
        targets: what levels 0 to M-1 shall give, from the worst to the best; level M gives the
            original. The first may be None, "as bad as it gets": all of `budget` is encrypted.
        key: typed `jax.random` key, from which all keys are derived.
        keys: how many protections a value is the mean of, at most. Three are enough where the mean
            is known to a third of the tolerance by then, or two far from the target. If keys
            matter much, a small tolerance needs many.
        tolerance: how far a level may be from its target. By default 2 % of the way from the
            first target to the untouched network.
        scope: see `nested_masks`.
        budget: largest share of the groups that may be encrypted, in (0, 1].
        small: share of all weights: small leaves are encrypted as a whole too, see
            `with_small_leaves`, and opened by level 1. Level 0 is then hard to steer: let it be
            None.
        select: small leaves that may be taken.
        cipher: `LosslessCipher()` unless given. Rings in which too little is to be guessed are
            merged upwards, leaf by leaf, as `protect` does.
        higher_is_better: False for a loss: the targets then descend.
        progress: called after each evaluation.

    Returns:
        Masks and shares, and what they give.

    Raises:
        ValueError: targets that do not ascend; that the budget or the steps of the order do not
            reach, with what is reachable; a metric that is flat or not finite; no ring that the
            cipher takes.
        TypeError: an `eval_fn` that gives no number.

    Examples:
        >>> levels = calibrate_levels(psnr_of, params, scores, [20, 24, 28], key=key)
        >>> released = protect(params, levels.masks, secret=secret)
    """
    sign = 1.0 if higher_is_better else -1.0
    wanted = checked_targets(targets, sign)
    check_key(key)
    if keys < 1:
        raise ValueError(f"keys: expected at least 1, got {keys}. 3 tell how much keys matter.")
    network = Sampled(
        eval_fn, params, scores, scope, small, select, cipher, sign, key=key, keys=keys
    )
    return calibrated(Search(network, wanted, budget, tolerance, progress), network)


def calibrated(search: Search, network: Network) -> Calibration:
    """Runs a search, and says what it found."""
    values, spreads = search.run()
    return Calibration(
        masks=network.masks(search.bounds),
        fractions=tuple(map(network.fraction, network.opened(search.bounds))),
        values=tuple(network.sign * float(value) for value in values),
        spreads=tuple(map(float, spreads)),
        untouched=network.sign * search.untouched,
        exact=network.is_exact(search.bounds),
        evaluations=search.evaluations,
        calls=network.calls,
    )


def checked_targets(targets: Sequence[float | None], sign: float) -> list[float | None]:
    """Targets of which the higher is the better.

    Raises:
        TypeError: no list of numbers.
        ValueError: they are none, or not in order.
    """
    if isinstance(targets, str) or not hasattr(targets, "__len__"):
        raise TypeError(
            "targets: expected a number for each level from 0 on, got "
            f"{type(targets).__name__}. Pass a list, such as [20, 24, 28]."
        )
    if not len(targets):
        raise ValueError(
            "targets: expected a number for each level from 0 on, got none. Pass some."
        )
    wanted: list[float | None] = []
    for level, target in enumerate(targets):
        if target is None and level == 0 and len(targets) > 1:
            wanted.append(None)
            continue
        if target is None or isinstance(target, str) or not math.isfinite(target):
            raise ValueError(
                f"targets[{level}]: expected a finite number, got {target!r}. None, as bad as it "
                "gets, is for level 0 alone, with levels above it."
            )
        wanted.append(sign * float(target))
        below = wanted[level - 1] if level else None
        if below is not None and sign * target < below:
            order = "ascending" if sign > 0 else "descending (lower is better)"
            raise ValueError(
                f"targets[{level}]: expected {order} targets, from level 0 on, got {target} after "
                f"{targets[level - 1]}. Sort them."
            )
    return wanted
