"""Levels that give what their owner wants: what a search for them found."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import PRNGKeyArray, PyTree

from .._ciphers.lossless import LosslessCipher
from .._keys.keys import Secret
from .._masks.options import Select, check_options
from .._masks.scores import scores_for, source_of_tree, whole_leaves
from .._tree.groups import Ring
from .._tree.names import check_key, named_leaves
from .network import Given, Network, Release, Sampled
from .search import Search
from .targets import Targets, checked_targets


class Calibration(NamedTuple):
    """Levels that meet their targets: averaged over keys, or in one release.

    Attributes:
        masks: M nested masks, for `encrypt` and `protect`.
        levels: the share of the groups that each level opens, for `protect` and `protect_file`
            with the same selection, which make these masks. Where no ring had to be merged upwards
            and there are no small leaves, ``nested_masks(scores, levels, scope=scope)`` are the
            masks. In a release they are for information: no others make the same release.
        values: what levels 0..M-1 give, averaged over keys that the search has not used;
            non-decreasing in quality, since two that stand in the wrong order by chance are given
            their mean. In a release, what its own levels give.
        spreads: their standard deviation over keys, which is what to expect for the one key of a
            release; NaN for one key, zero in a release.
        untouched: what level M gives.
        exact: whether level M gives back every bit.
        evaluations: how many selections and levels were tried.
        calls: how often `evaluate` was called: an evaluation takes up to `keys` calls, or one in a
            release.

    Examples:
        >>> weights = Select(granularity="weight", budget=0.9)
        >>> found = calibrate_levels(params, Targets([21, 25], psnr_of), key=key, selection=weights)
        >>> len(found.levels), found.exact
        (2, True)
    """

    masks: tuple[PyTree, ...]
    levels: tuple[float, ...]
    values: tuple[float, ...]
    spreads: tuple[float, ...]
    untouched: float
    exact: bool
    evaluations: int
    calls: int


def calibrate_levels(
    params: PyTree,
    targets: Targets,
    *,
    key: PRNGKeyArray,
    keys: int = 16,
    selection: Select = Select(),
    cipher: LosslessCipher | None = None,
) -> Calibration:
    """Finds nested masks whose levels give what is asked for, averaged over keys.

    This is for planning: a release has one key, with which a level may be far off. For a release
    whose own levels meet their targets, pass the `Targets` to `protect` or `protect_file`.

    The most important groups are encrypted: the top share f_M of the order, such that the network
    without a key gives the first target. Level m opens the top share f_m, so that what stays
    encrypted between the two leaves the next target. Every value is an average over fresh keys.

    Args:
        params: pytree of parameters; not changed.
        targets: what the levels shall give; their `evaluations` do not matter here.
        key: typed `jax.random` key, from which all keys are derived.
        keys: how many protections a value is averaged over, at most. Three are enough where the
            mean is known to a third of the tolerance by then, or two far from the target. If keys
            matter much, a small tolerance needs many.
        selection: what is encrypted, see `Select`; the finer the steps of its order, the finer the
            levels.
        cipher: `LosslessCipher()` unless given. Rings that are too small to hide in are merged
            upwards, leaf by leaf, as `protect` does.

    Returns:
        Masks and shares, and what they give.

    Raises:
        ValueError: targets that do not ascend; that the budget or the steps of the order do not
            reach, with what is reachable; a metric that is flat or not finite; no ring that the
            cipher takes.
        TypeError: a metric that does not return a number.

    Examples:
        >>> weights = Select(granularity="weight", budget=0.9)
        >>> found = calibrate_levels(params, Targets([21, 25], psnr_of), key=key, selection=weights)
        >>> released = protect(params, found.masks, secret=secret)
    """
    wanted = checked_targets(targets)
    check_key(key)
    if keys < 1:
        raise ValueError(f"keys: expected at least 1, got {keys}. 3 tell how much keys matter.")
    check_options(selection, cipher)
    cipher = LosslessCipher() if cipher is None else cipher
    source = source_of_tree(named_leaves(params))
    with ExitStack() as stack:
        scores, _ = scores_for(source, selection, stack, metadata={"format": "jax"}, what="params")
        whole = whole_leaves(source.tensors, scores, selection, cipher, default=targets.small)
        given = Given(params, scores, selection, whole, cipher, targets)
        network = Sampled(given, key=key, keys=keys)
    search = Search(network, wanted, targets, selection.budget)
    return _found(search, network)


def release_levels(
    given: Given, *, secret: Secret, twins: Sequence[Sequence[str]], sealed: bool = False
) -> tuple[list[Ring], Calibration, bytes]:
    """What to encrypt so that the levels of a release give their targets, under its own keys.

    From the top level down, counts of groups near the right one are tried until a level is within
    the tolerance; what is measured is what `unlock` gives, bit for bit. Levels take from the
    beginning of the order; where that leaves a lower level too little to lose, its ring has groups
    from the end as well.

    Args:
        given: what is released, and what its levels shall give.
        secret: the owner's.
        twins: names of leaves that are bit for bit alike, in which the same is encrypted.
        sealed: whether level 1 takes off a seal and opens no ring: the targets are those of levels
            1, 2, …, and the first ring is that of level 2.

    Returns:
        The rings; what their levels give; and the model id, under which nothing else may be
        encrypted.

    Raises:
        ValueError, TypeError: as `calibrate_levels`; or no release was found.
    """
    wanted = checked_targets(given.targets)
    network = Release(given, secret=secret, twins=twins, first=2 if sealed else 1)
    targets, progress = given.targets, given.targets.progress
    if sealed and progress is not None:  # as the owner counts levels
        targets = replace(targets, progress=lambda e: progress(e._replace(level=e.level + 1)))
    search = Search(network, wanted, targets, given.selection.budget)
    found = _found(search, network)
    rings = [r._replace(level=r.level + sealed) for r in network.rings(search.bounds)]
    return rings, found, network.model_id


def _found(search: Search, network: Network) -> Calibration:
    """Runs a search, and says what it found."""
    values, spreads = search.run()
    return Calibration(
        masks=network.masks(search.bounds),
        levels=tuple(map(network.fraction, network.opened(search.bounds))),
        values=tuple(network.sign * float(value) for value in values),
        spreads=tuple(map(float, spreads)),
        untouched=network.sign * search.untouched,
        exact=network.is_exact(search.bounds),
        evaluations=search.evaluations,
        calls=network.calls,
    )
