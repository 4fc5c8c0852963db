"""Levels that meet their owner's targets: the result of a search for them."""

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
        levels: the share of the groups that each level opens. `protect` and `protect_file` make
            the same masks from it, given the same selection. If no ring had to be merged upwards
            and there are no small leaves, ``nested_masks(scores, levels, scope=scope)`` makes them
            too. For a release they are for information only: nothing else makes the same release.
        values: the quality of levels 0..M-1, averaged over keys that the search has not used;
            non-decreasing: two levels in the wrong order by chance both get their mean. For a
            release, the quality of its own levels.
        spreads: their standard deviation over keys, which is the deviation to expect for the one
            key of a release; NaN for one key, zero in a release.
        untouched: the quality of level M.
        exact: whether level M restores every bit.
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

    def __repr__(self) -> str:
        # The masks would fill the screen, and hide what the reader looks for.
        rest = ", ".join(
            f"{name}={value}" for name, value in self._asdict().items() if name != "masks"
        )
        return f"Calibration(masks=<{len(self.masks)} trees>, {rest})"


def calibrate_levels(
    params: PyTree,
    targets: Targets,
    *,
    key: PRNGKeyArray,
    keys: int = 16,
    selection: Select = Select(),
    cipher: LosslessCipher | None = None,
) -> Calibration:
    """Finds nested masks whose levels have the requested quality, averaged over keys.

    This is for planning: a release has one key, and with it a level may be far off. For a release
    whose own levels meet their targets, pass the `Targets` to `protect` or `protect_file`.

    The most important groups are encrypted: the top share f_M of the order, such that the network
    without a key reaches the first target. Level m opens the top share f_m, such that the groups
    left encrypted between f_m and f_M leave the next target. Every value is an average over fresh
    keys.

    Args:
        params: pytree of parameters; not modified.
        targets: the quality of the levels; its `evaluations` is not used here.
        key: typed `jax.random` key, from which all keys are derived.
        keys: the largest number of protections to average a value over. Three are used if the
            mean is then known to a third of the tolerance, two if it is far from the target. If
            keys matter much, a small tolerance needs many.
        selection: what is encrypted, see `Select`; finer steps in its order give finer levels.
        cipher: the cipher; `LosslessCipher()` by default. Rings that are too small to hide in are
            merged upwards, leaf by leaf, as in `protect`.

    Returns:
        Masks and shares, and the quality they give.

    Raises:
        ValueError: targets that do not ascend; targets that the budget or the steps of the order
            cannot reach, with the reachable range; a metric that is flat or not finite; no ring
            that the cipher accepts.
        TypeError: a metric that does not return a number.

    Examples:
        >>> weights = Select(granularity="weight", budget=0.9)
        >>> found = calibrate_levels(params, Targets([21, 25], psnr_of), key=key, selection=weights)
        >>> released = protect(params, found.masks, secret=secret)
    """
    wanted = checked_targets(targets)
    check_key(key)
    if keys < 1:
        raise ValueError(
            f"keys: expected at least 1, got {keys}. Three show how much results vary between keys."
        )
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
    """Finds what to encrypt so that a release's levels meet their targets under its own keys.

    From the top level down, counts of groups near the right one are tried until a level is within
    the tolerance; the measured network is the result of `unlock`, bit for bit. Levels take groups
    from the beginning of the order; if that leaves a lower level too little to lose, its ring also
    takes groups from the end.

    Args:
        given: the network to release, and the targets of its levels.
        secret: the owner's secret.
        twins: names of leaves that are bit for bit equal, in which the same is encrypted.
        sealed: whether level 1 removes a seal and opens no ring: the targets are those of levels
            1, 2, …, and the first ring is that of level 2.

    Returns:
        The rings; the quality of their levels; and the model id, under which nothing else may be
        encrypted.

    Raises:
        ValueError, TypeError: as in `calibrate_levels`; or no release was found.
    """
    wanted = checked_targets(given.targets)
    network = Release(given, secret=secret, twins=twins, first=2 if sealed else 1)
    targets, progress = given.targets, given.targets.progress
    if sealed and progress is not None:  # levels numbered as the owner counts them
        targets = replace(targets, progress=lambda e: progress(e._replace(level=e.level + 1)))
    search = Search(network, wanted, targets, given.selection.budget)
    found = _found(search, network)
    rings = [r._replace(level=r.level + sealed) for r in network.rings(search.bounds)]
    return rings, found, network.model_id


def _found(search: Search, network: Network) -> Calibration:
    """Runs a search, and returns its result."""
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
