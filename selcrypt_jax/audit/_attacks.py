"""Attacks by name: the starting point of each, and what it trains."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._ciphers.dprm import Cipher, encrypt
from .._ciphers.lossless import LosslessCipher
from .._ciphers.window import WindowCipher
from .._tree.names import NamedLeaves, named_leaves
from .._tree.rings import checked_mask
from ._base import fill_from_base, rank_by_base
from ._fill import clip_norm, mean_fill, resample, zero_fill
from ._finetune import fine_tune, warm_cosine
from ._structure import in_order, ranked_by_siblings, sign_leanings, with_signs
from ._subject import Subject, is_scale, layout_of, normalisation_leaves, quality, reset
from ._unshuffle import unshuffle


class Loot(NamedTuple):
    """What the attacker has.

    Attributes:
        subject: architecture, loss, fresh weights; attacks do not use its trained parameters.
        params: the protected file's parameters.
        mask: which weights are encrypted. The attacker is assumed to know, because that can often
            be guessed.
        key: key of the random draws.
        cipher: the cipher that the file names; `LosslessCipher()` by default.

    Examples:
        >>> loot = Loot(subject, protected, masks[-1], key=jax.random.key(0))
    """

    subject: Subject
    params: PyTree
    mask: PyTree
    key: PRNGKeyArray
    cipher: Cipher | None = None


def _parts(loot: Loot) -> tuple[NamedLeaves, dict[str, np.ndarray], dict[str, Array]]:
    """A file's leaves; the masks of its encrypted kernels; its encrypted normalisation leaves."""
    params = named_leaves(loot.params)
    masks = checked_mask(params, loot.mask, "mask")
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    norms = normalisation_leaves(loot.params, loot.subject.normalisation)
    kernels = {name: mask for name, mask in masks.items() if name not in norms}
    return params, kernels, {name: leaf for name, leaf in norms.items() if name in masks}


def _as_shipped(loot: Loot) -> PyTree:
    return loot.params


def _kernels_zero(loot: Loot) -> PyTree:
    """Replaces encrypted kernels with zeros and encrypted normalisation with averages.

    A leaf that is encrypted whole stays as shipped, which is as good as fresh weights: a network
    with a layer of zeros learns nothing.
    """
    params, kernels, _ = _parts(loot)
    some = {name: mask for name, mask in kernels.items() if not mask.all()}
    return zero_fill(_normalisation_averaged(loot), params.rebuild_only(some))


def _fresh_where_encrypted(loot: Loot) -> PyTree:
    """Replaces encrypted kernels with fresh weights and encrypted normalisation with averages."""
    params, kernels, _ = _parts(loot)
    fresh = named_leaves(loot.subject.fresh(loot.key)).leaves
    chosen = {n: jnp.where(m, fresh[n], params.leaves[n]) for n, m in kernels.items()}
    return named_leaves(_normalisation_averaged(loot)).rebuild(chosen)


def _normalisation_reset(loot: Loot) -> PyTree:
    """Resets encrypted normalisation: scale and variance to 1, bias and mean to 0."""
    params, _, norms = _parts(loot)
    return params.rebuild({n: reset(n, leaf) for n, leaf in norms.items()})


def _normalisation_averaged(loot: Loot) -> PyTree:
    """Replaces encrypted normalisation with averages: root mean square of scales, mean of the rest.

    Biases that are encrypted whole are averaged too. The lossless cipher keeps the values up to
    their fine bits: only their order is lost.
    """
    params, others, norms = _parts(loot)
    biases = {n: params.leaves[n] for n, m in others.items() if m.ndim == 1 and m.all()}

    def average(name: str, leaf: Array) -> Array:
        # Scales of opposite signs would cancel out.
        mean = jnp.sqrt(jnp.square(leaf).mean()) if is_scale(name) else leaf.mean()
        return jnp.full_like(leaf, mean)

    return params.rebuild({n: average(n, leaf) for n, leaf in (norms | biases).items()})


def _pruned(loot: Loot) -> PyTree:
    """Zeroes the largest groups of each leaf, as many as are encrypted: a guess at which ones."""
    params, kernels, _ = _parts(loot)
    guesses = {}
    for name, mask in kernels.items():
        leaf = np.asarray(jax.device_get(params.leaves[name]), np.float64)
        inside = tuple(a for a, n in enumerate(mask.shape) if n == 1 != leaf.shape[a])
        norms = np.square(leaf).sum(inside, keepdims=True)
        guesses[name] = norms >= np.partition(norms.ravel(), -int(mask.sum()))[-int(mask.sum())]
    return zero_fill(loot.params, params.rebuild_only(guesses))


def _signs_by_structure(loot: Loot) -> PyTree:
    """As `_kernels_zero`, and gives scales the signs that the plain kernels reveal."""
    return _by_structure(loot, {})


def _sizes_by_siblings(loot: Loot) -> PyTree:
    """As `_signs_by_structure`, with scales and biases ranked as sibling networks predict."""
    params, kernels, encrypted = _parts(loot)
    chain = [link for link in loot.subject.chain if link.scale in encrypted]
    hidden = {n: np.broadcast_to(m, np.shape(params.leaves[n])) for n, m in kernels.items()}
    others = [named_leaves(network).leaves for network in loot.subject.siblings]
    if not chain:
        return _by_structure(loot, {})
    layout = layout_of(loot.subject)
    return _by_structure(loot, ranked_by_siblings(params.leaves, others, chain, hidden, layout))


def _by_structure(loot: Loot, rankings: Mapping[str, np.ndarray]) -> PyTree:
    tree, encrypted = named_leaves(_kernels_zero(loot)), _parts(loot)[2]
    layout, new = layout_of(loot.subject), {}
    for link in loot.subject.chain:
        if link.scale in encrypted:
            before, after = (np.asarray(tree.leaves[n]) for n in (link.before, link.after))
            leanings, scale = sign_leanings(before, after, layout), encrypted[link.scale]
            signed = with_signs(np.asarray(scale), leanings, rankings.get(link.scale))
            new[link.scale] = jnp.asarray(signed)
        if link.bias in encrypted and link.bias in rankings:
            biases = in_order(np.asarray(encrypted[link.bias]), rankings[link.bias])
            new[link.bias] = jnp.asarray(biases)
    return tree.rebuild(new)


def _noise(loot: Loot) -> PyTree:
    """Fresh weights, sealed: random signs and sizes, each leaf within its range of exponents.

    Some networks learn faster from such a start than from the usual one.
    """
    fresh = loot.subject.fresh(loot.key)
    return encrypt(fresh, [True], loot.key[None], cipher=WindowCipher.fit(fresh))


def _base_filled(loot: Loot) -> PyTree:
    return fill_from_base(loot.params, loot.subject.base, loot.mask)


def _base_ranked(loot: Loot) -> PyTree:
    """Sorts by rank, if the cipher's ranks are known."""
    cipher = LosslessCipher() if loot.cipher is None else loot.cipher
    if not isinstance(cipher, LosslessCipher):
        return _base_filled(loot)
    return rank_by_base(loot.params, loot.subject.base, loot.mask, cipher)


class Attack(NamedTuple):
    """A way to recover the network's quality.

    Attributes:
        knows: the attacker's knowledge, in words.
        start: what the attacker has → the parameters to start from.
        trains: which weights are trained with data, if any. "order": no weights are trained;
            instead, their order is searched for, with as many gradients.
        statistics: whether the network runs in training mode, which re-estimates running
            statistics from data; has no effect if the subject has no such mode.
        base: whether the attacker needs the subject's base.
        chain: whether the attacker needs the subject's chain.
        siblings: whether the attacker needs the subject's siblings.

    Examples:
        >>> halved = Attack(
        ...     "the file", lambda loot: jax.tree.map(lambda w: w / 2, loot.params), "nothing"
        ... )
    """

    knows: str
    start: Callable[[Loot], PyTree]
    trains: Literal["nothing", "all", "suspected", "normalisation", "order"]
    statistics: bool = False
    base: bool = False
    chain: bool = False
    siblings: bool = False


_FILE = "the file"
_PLACES = "which weights are encrypted"
_BASE = "which weights are encrypted, and the base"
_SIBLINGS = "which weights are encrypted, and other networks of the architecture"

ATTACKS: Mapping[str, Attack] = {
    "zero-fill": Attack(_PLACES, lambda x: zero_fill(x.params, x.mask), "nothing"),
    "mean-fill": Attack(_PLACES, lambda x: mean_fill(x.params, x.mask), "nothing"),
    "resample": Attack(_PLACES, lambda x: resample(x.params, x.mask, key=x.key), "nothing"),
    "norm clipping": Attack(_PLACES, lambda x: clip_norm(x.params, x.mask), "nothing"),
    "prune largest": Attack(_FILE, _pruned, "nothing"),
    "re-estimate statistics": Attack(_FILE, _as_shipped, "nothing", statistics=True),
    "fine-tune all": Attack(_FILE, _as_shipped, "all"),
    "fine-tune all, batch statistics": Attack(_FILE, _as_shipped, "all", statistics=True),
    "fine-tune encrypted weights": Attack(_PLACES, _as_shipped, "suspected", statistics=True),
    "fine-tune normalisation": Attack(_FILE, _as_shipped, "normalisation", statistics=True),
    "reset normalisation, fine-tune all": Attack(
        _PLACES, _normalisation_reset, "all", statistics=True
    ),
    "average normalisation, fine-tune all": Attack(
        _PLACES, _normalisation_averaged, "all", statistics=True
    ),
    "average and zero-fill": Attack(_PLACES, _kernels_zero, "nothing"),
    "average and zero-fill, re-estimate statistics": Attack(
        _PLACES, _kernels_zero, "nothing", statistics=True
    ),
    "average and zero-fill, fine-tune all": Attack(_PLACES, _kernels_zero, "all", statistics=True),
    "sign recovery": Attack(_PLACES, _signs_by_structure, "nothing", chain=True),
    "sign recovery, fine-tune all": Attack(
        _PLACES, _signs_by_structure, "all", statistics=True, chain=True
    ),
    "sibling regression": Attack(
        _SIBLINGS, _sizes_by_siblings, "nothing", chain=True, siblings=True
    ),
    "sibling regression, fine-tune all": Attack(
        _SIBLINGS, _sizes_by_siblings, "all", statistics=True, chain=True, siblings=True
    ),
    "re-initialise encrypted weights, fine-tune all": Attack(
        _PLACES, _fresh_where_encrypted, "all", statistics=True
    ),
    "unshuffle": Attack(_PLACES, _as_shipped, "order"),
    "fill from base": Attack(_BASE, _base_filled, "nothing", base=True),
    "fill from base, re-estimate statistics": Attack(
        _BASE, _base_filled, "nothing", statistics=True, base=True
    ),
    "fill from base, fine-tune all": Attack(_BASE, _base_filled, "all", statistics=True, base=True),
    "rank matching": Attack(_BASE, _base_ranked, "nothing", base=True),
    "rank matching, re-estimate statistics": Attack(
        _BASE, _base_ranked, "nothing", statistics=True, base=True
    ),
    "rank matching, fine-tune all": Attack(_BASE, _base_ranked, "all", statistics=True, base=True),
    "from scratch": Attack(
        "the architecture", lambda x: x.subject.fresh(x.key), "all", statistics=True
    ),
    "from noise": Attack("the architecture", _noise, "all", statistics=True),
    "base": Attack("the base", lambda x: x.subject.base, "nothing", base=True),
    "base, re-estimate statistics": Attack(
        "the base", lambda x: x.subject.base, "nothing", statistics=True, base=True
    ),
    "fine-tune base": Attack(
        "the base", lambda x: x.subject.base, "all", statistics=True, base=True
    ),
}

REFERENCES = (
    "from scratch",
    "from noise",
    "base",
    "base, re-estimate statistics",
    "fine-tune base",
)
"""Attacks that need no file: the quality that they reach is not worth stealing."""

_NORM_RATE = 3.0  # relative to the kernels' rate; attacks and references both gain from it
# One optimizer for all rates, so that they share a compiled step.
_ADAM = optax.adam(1.0)


def needs_data(attack: Attack) -> bool:
    """Whether the attacker needs some of the training data."""
    return attack.trains != "nothing" or attack.statistics


def run_attack(
    attack: Attack,
    loot: Loot,
    batch: Callable[[int], Any],
    *,
    rate: float,
    stops: Sequence[int],
) -> Iterator[tuple[int, PyTree]]:
    """Runs an attack; training uses Adam.

    Args:
        attack: one of `ATTACKS`, or your own.
        loot: what the attacker has.
        batch: step number, from 1 → a batch of the attacker's data.
        rate: peak learning rate of kernels, with warm-up and decay to zero. Normalisation trains
            at three times that rate.
        stops: numbers of steps; each is a separate training run.

    Yields:
        The number of steps and the parameters of each run; only step 0 if the attack needs no
        data. Of a training run these are the last weights or their running average, whichever the
        subject's metric rates higher. A run whose loss is not finite yields nothing.

    Raises:
        ValueError: the attack needs normalisation or leaves that the network does not have.

    Examples:
        >>> loot = Loot(subject, protected, masks[-1], key=jax.random.key(0))
        >>> attack = run_attack(ATTACKS["fine-tune all"], loot, batch, rate=1e-3, stops=[1, 2])
        >>> metrics = {step: subject.metric(params) for step, params in attack}
    """
    for step, found in candidates(attack, loot, batch, rate=rate, stops=stops):
        rated = [quality(loot.subject, params) for params in found] if len(found) > 1 else [0.0]
        yield step, found[int(np.argmax(np.nan_to_num(rated, nan=-np.inf)))]


def candidates(
    attack: Attack,
    loot: Loot,
    batch: Callable[[int], Any],
    *,
    rate: float,
    stops: Sequence[int],
) -> Iterator[tuple[int, list[PyTree]]]:
    """As `run_attack`, with all parameters that an attacker chooses from: last weights, average."""
    params = attack.start(loot)
    if not needs_data(attack):
        yield 0, [params]
        return
    subject = loot.subject
    if attack.trains == "order":
        yield from _unshuffled(params, loot, batch, stops)
        return
    training = subject.training_loss_fn if attack.statistics else None
    norms = normalisation_leaves(params, subject.normalisation)
    trainable: Any = True
    if attack.trains == "suspected":
        trainable = loot.mask
    elif attack.trains == "normalisation":
        trainable = named_leaves(params).rebuild_only(dict.fromkeys(norms, True))
    highest = 0.0 if attack.trains == "nothing" else rate
    for stop in stops:
        for checkpoint in fine_tune(
            params,
            training or subject.loss_fn,
            batch,
            stops=[stop],
            optimizer=_ADAM,
            rate=warm_cosine(highest, stop),
            trainable=trainable,
            statistics=training is not None,
            rate_factors=dict.fromkeys(norms, _NORM_RATE),
        ):
            yield checkpoint.step, [checkpoint.params, checkpoint.average]


def _unshuffled(
    params: PyTree, loot: Loot, batch: Callable[[int], Any], stops: Sequence[int]
) -> Iterator[tuple[int, list[PyTree]]]:
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch(1), batch(2))
    for last, stop in itertools.pairwise([0, *stops]):
        trials = max(stop - last, 5)  # the minimum for two batches
        params = unshuffle(params, loot.mask, loot.subject.loss_fn, batches, trials=trials).params
        yield stop, [params]


def applies(attack: Attack, subject: Subject) -> bool:
    """Whether the attack applies to a network."""
    if (attack.base and subject.base is None) or (attack.chain and not subject.chain):
        return False
    if attack.siblings and not subject.siblings:
        return False
    if attack.trains == "normalisation":
        return bool(normalisation_leaves(subject.params, subject.normalisation))
    if attack.trains == "nothing" and attack.statistics:
        return subject.training_loss_fn is not None
    return True
