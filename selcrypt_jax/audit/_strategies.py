"""Selection strategies by name, for the owner's network and for the attacker's own networks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from .. import importance
from .._ciphers.lossless import LosslessCipher
from .._importance.config import PSSConfig
from .._importance.pss import pss
from .._io.errors import quoted
from .._masks.masks import nested_masks, with_small_leaves, with_whole_leaves
from .._masks.ranks import Scope
from .._masks.selection import leaves_of_tree
from .._tree.names import named_leaves
from ._finetune import floats
from ._subject import Subject, layout_of, normalisation_leaves

CLOSED_FORM = ("random", "l2", "descend", "ascend", "mean", "taylor", "fisher")
LEARNED = {
    "pss": PSSConfig("break", penalty=2e-3),
    "pss-keep": PSSConfig("keep", penalty=1e-5),
}
EVERYTHING = "everything"
NORMALISATION = "+normalisation"
SMALL = "+small"
BATCHES = 16


def check_strategy(name: str) -> None:
    """Refuses an unknown strategy.

    Raises:
        ValueError: the name is unknown.
    """
    plain = plain_strategy(name)
    if plain not in (*CLOSED_FORM, *LEARNED) and not plain.startswith("scores:"):
        raise ValueError(
            f"importance: expected {', '.join((*CLOSED_FORM, *LEARNED))} or scores:FILE, with an "
            f"optional suffix {NORMALISATION} or {SMALL}, got {name!r}."
        )


def plain_strategy(name: str) -> str:
    """The name without its suffix, of which there is at most one."""
    ending = NORMALISATION if name.endswith(NORMALISATION) else SMALL
    return name.removesuffix(ending)


def strategy_scores(subject: Subject, name: str, seed: int) -> PyTree:
    """Importance by a strategy; strategies that need data use the owner's.

    Args:
        subject: the trained network.
        name: see `check_strategy`; the suffix does not matter here.
        seed: seed of random scores, batches and learning.
    """
    plain = plain_strategy(name)
    if plain.startswith("scores:"):
        return _scores_of_file(subject, plain.removeprefix("scores:"))
    options: dict[str, Any] = {"select": subject.select, "layout": layout_of(subject)}
    key = jax.random.key(seed)
    if plain == "random":
        return importance.random(subject.params, key=key, **options)
    if plain not in ("taylor", "fisher", *LEARNED):
        return getattr(importance, plain)(subject.params, **options)
    with_data = subject.loss_fn, subject.params, owner_batches(subject, seed)
    if plain in LEARNED:
        return pss(*with_data, key=key, config=LEARNED[plain], **options)
    return getattr(importance, plain)(*with_data, **options)


def owner_batches(subject: Subject, seed: int) -> PyTree:
    """Batches from all the training data, stacked for `pss`."""
    every = np.arange(subject.examples)
    batches = [subject.batch(every, np.random.default_rng([seed, 1, i])) for i in range(BATCHES)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def strategy_masks(
    subject: Subject,
    name: str,
    scores: PyTree,
    share: float,
    levels: int,
    scope: Scope,
    small: float = 0.02,
) -> Sequence[PyTree]:
    """Nested masks of the most important groups, plus the leaves that the suffix adds.

    Args:
        subject: the network to protect.
        name: name of the strategy.
        scores: from `strategy_scores`.
        share: share of the groups.
        levels: M. Each level opens an equal part of the groups, as in `protect`; level 1 also
            opens the leaves that the suffix adds.
        scope: whether the share holds in every leaf or over the whole model.
        small: share of all weights that "+small" takes.
    """
    shares = [share * level / levels for level in range(1, levels + 1)]
    masks = nested_masks(scores, shares, scope=scope, params=subject.params)
    if name.endswith(SMALL):
        return with_small_leaves(subject.params, masks, small=small)
    if not name.endswith(NORMALISATION):
        return masks
    norms = normalisation_leaves(subject.params, subject.normalisation)
    if not norms:
        raise ValueError(
            f"importance: {name}: expected a network with normalisation, got no leaves that match "
            f"{subject.normalisation!r}. Set the subject's normalisation, or drop the suffix."
        )
    return with_whole_leaves(named_leaves(subject.params), masks, norms)


def everything(subject: Subject) -> Sequence[PyTree]:
    """The mask of a file that leaves nothing but the architecture and each leaf's histogram.

    Leaves that are too small to hide anything, such as the bias of two classes, stay plain, as in
    a file.
    """
    tree, cipher = named_leaves(subject.params), LosslessCipher()
    leaves = leaves_of_tree(tree)
    names = {n: leaf for n, leaf in floats(tree).items() if cipher.hides(*leaves[n])}
    return with_whole_leaves(tree, [False], names)


def _scores_of_file(subject: Subject, path: str) -> PyTree:
    tree = named_leaves(subject.params)
    try:
        found = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: expected scores in a .safetensors file, got: {quoted(error)}. Save them with "
            "safetensors.numpy.save_file."
        ) from None
    unknown = sorted(set(found) - set(tree.leaves))
    if unknown:
        raise ValueError(
            f"{path}: expected scores under the names of the parameters, which are "
            f"{list(tree.leaves)[:3]} and so on, got {unknown[0]!r}. Save the scores of the "
            "audited tree by name."
        )
    return tree.rebuild_only(found)
