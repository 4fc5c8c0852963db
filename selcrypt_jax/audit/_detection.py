"""Detecting encrypted groups with a classifier trained on the attacker's own networks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from .._io.errors import extra
from .._tree.names import is_array, named_leaves
from .._tree.rings import checked_mask


class Detection(NamedTuple):
    """See `detect`."""

    auc: float
    baseline: float | None
    scores: PyTree


def group_features(
    leaf: Float[np.ndarray, "..."], mask_shape: tuple[int, ...]
) -> Float[np.ndarray, "groups features"]:
    """Statistics of each group of a leaf, by itself and relative to its neighbours.

    Args:
        leaf: weights.
        mask_shape: shape of the mask; axes on which it has size 1 lie inside the group.

    Returns:
        One row per group, in C order of the mask: logarithm of the norm minus the leaf's mean;
        rank of the norm; mean and largest weight divided by the norm; roughness within the group;
        and for each axis the cosine with the mean of the groups that differ on this axis only.
    """
    wide = np.asarray(leaf, np.float64)
    inside = [a for a, size in enumerate(mask_shape) if size == 1]
    outside = [a for a in range(wide.ndim) if a not in inside]
    # A copy with the inner axes last, [*groups, *inside].
    ordered = wide.transpose(*outside, *inside)
    within = tuple(range(len(outside), wide.ndim))
    grid = ordered.shape[: len(outside)]
    flat = ordered.reshape(*grid, -1)
    norm = np.sqrt((flat**2).sum(-1))
    safe = np.maximum(norm, 1e-12)
    log = np.log(safe)
    rank = norm.ravel().argsort().argsort().reshape(grid) / max(norm.size - 1, 1)
    steps = (np.diff(ordered, axis=axis) ** 2 for axis in within)
    rough = sum((each.sum(within) for each in steps), np.zeros(grid))
    features = [
        log - log.mean(),
        rank,
        flat.mean(-1) / safe,
        np.abs(flat).max(-1) / safe,
        np.abs(flat.mean(-1)) / safe,
        rough / safe**2,
    ]
    for axis in range(len(grid)):
        mean = flat.mean(axis, keepdims=True)
        length = np.sqrt((mean**2).sum(-1))
        features.append((flat * mean).sum(-1) / (safe * np.maximum(length, 1e-12)))
    columns = np.stack([feature.ravel() for feature in features], 1)
    # Leaves have different numbers of axes: pad with zero columns.
    return np.pad(columns, ((0, 0), (0, 10 - columns.shape[1])))


def detect(
    params: PyTree,
    mask: PyTree,
    own: Sequence[tuple[PyTree, PyTree]],
    *,
    seed: int,
    original: PyTree | None = None,
) -> Detection:
    """Trains a classifier on the attacker's own protected networks, and applies it to this one.

    Args:
        params: protected parameters.
        mask: the true mask of `params`, to score the classifier.
        own: protected parameters and masks of networks that the attacker trained, selected
            and encrypted, under other keys.
        seed: seed of the classifier.
        original: the network before encryption, for the baseline.

    Returns:
        A named tuple of ``auc``, the area under the ROC curve over all groups (0.5 is guessing, 1
        is certainty); ``baseline``, the same for these groups before encryption: any excess of
        ``auc`` is the cipher's own trace, and the rest comes from the selection; and ``scores``, a
        pytree like the mask, where higher means more suspect. Leaves whose masks select nothing
        take part too, since the attacker does not know which ones these are.

    Raises:
        ValueError: masks do not fit, or none or all of the groups are encrypted, so that there is
            nothing to detect.

    Examples:
        >>> own = [(encrypt(params, masks, other_keys), masks[-1])]
        >>> found = detect(protected, masks[-1], own, seed=0, original=params)
        >>> assert 0 <= found.auc <= 1
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"detection needs scikit-learn, which is not installed. {extra('audit')}."
        ) from error

    if not own:
        raise ValueError("own: expected at least one protected network to learn from, got none.")
    learnt = [_examples(params, mask, f"own[{i}]")[:2] for i, (params, mask) in enumerate(own)]
    inputs, truth = map(np.concatenate, zip(*learnt, strict=True))
    features, labels, names = _examples(params, mask, "mask")
    for what, values in (("own", truth), ("mask", labels)):
        if values.all() or not values.any():
            raise ValueError(
                f"{what}: expected some groups to be encrypted and some not, got "
                f"{int(values.sum())} of {values.size} encrypted."
            )
    classifier = HistGradientBoostingClassifier(
        class_weight="balanced", max_iter=200, random_state=seed
    )
    classifier.fit(inputs, truth)

    def suspicion(features: np.ndarray) -> np.ndarray:
        return classifier.predict_proba(features)[:, 1]

    scores = suspicion(features)
    baseline = None
    if original is not None:
        plain, _, _ = _examples(original, mask, "original")
        baseline = float(roc_auc_score(labels, suspicion(plain)))
    parts = np.split(scores, np.cumsum([math.prod(shape) for shape in names.values()])[:-1])
    by_leaf = {n: part.reshape(names[n]) for n, part in zip(names, parts, strict=True)}
    tree = named_leaves(params).rebuild_only(by_leaf)
    return Detection(float(roc_auc_score(labels, scores)), baseline, tree)


def _examples(
    params: PyTree, mask: PyTree, what: str
) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[int, ...]]]:
    """Features and labels of the groups of leaves whose masks are arrays; shapes of the masks."""
    tree = named_leaves(params)
    whole = checked_mask(tree, mask, what)
    features, labels, shapes = [], [], {}
    for name, leaf in tree.leaves.items():
        truth = whole[name]
        if not is_array(leaf) or truth.size == 1:
            continue  # a single group
        features.append(group_features(np.asarray(jax.device_get(leaf)), truth.shape))
        labels.append(truth.ravel())
        shapes[name] = truth.shape
    if not features:
        raise ValueError(f"{what}: expected a leaf with more than one group, got none.")
    return np.concatenate(features), np.concatenate(labels), shapes
