"""What is encrypted: strategies by name, for the owner's network and for those of an attacker."""

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
    """Refuses a name that means nothing.

    Raises:
        ValueError: it is not known.
    """
    plain = plain_strategy(name)
    if plain not in (*CLOSED_FORM, *LEARNED) and not plain.startswith("scores:"):
        raise ValueError(
            f"importance: expected {', '.join((*CLOSED_FORM, *LEARNED))} or scores:FILE, with "
            f"{NORMALISATION} or {SMALL} behind it or not, got {name!r}."
        )


def plain_strategy(name: str) -> str:
    """Without what stands behind the +, of which there is one thing at most."""
    ending = NORMALISATION if name.endswith(NORMALISATION) else SMALL
    return name.removesuffix(ending)


def strategy_scores(subject: Subject, name: str, seed: int) -> PyTree:
    """Importance by a strategy; of those with data, from the owner's.

    Args:
        subject: trained.
        name: see `check_strategy`; what stands behind the + does not matter here.
        seed: of what is drawn.
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
    """Batches of all the training data, stacked as `pss` wants them."""
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
    """Nested masks of the best groups, with more where the strategy says so.

    Args:
        subject: protected.
        name: of the strategy.
        scores: by `strategy_scores`.
        share: of the groups.
        levels: M. Each opens an equal part of the groups, as `protect` does it; what stands behind
            the + opens with level 1.
        scope: of the share.
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
            f"importance: {name}: expected a network with normalisation, got none whose names "
            f"match {subject.normalisation!r}. Set the subject's normalisation, or leave it out."
        )
    return with_whole_leaves(named_leaves(subject.params), masks, norms)


def everything(subject: Subject) -> Sequence[PyTree]:
    """The mask of a file of which nothing but architecture and statistics is left.

    Leaves that are too small to hide in, such as the bias of two classes, stay plain as in a file.
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
        raise ValueError(f"{path}: expected scores in a .safetensors file: {error}") from None
    unknown = sorted(set(found) - set(tree.leaves))
    if unknown:
        raise ValueError(
            f"{path}: expected scores under the names of the parameters, got {unknown[0]!r}. They "
            f"are {list(tree.leaves)[:3]} and so on: save named scores of the audited tree."
        )
    return tree.rebuild_only(found)
