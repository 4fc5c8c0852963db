"""A trained network with its data, as the target of attacks."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._importance.closed import LossFn
from .._masks.scores import guess_layout
from .._tree.groups import Layout
from .._tree.names import is_array, named_leaves, select_leaves
from ._base import check_base, check_like
from ._finetune import TrainingLossFn, floats
from ._structure import Link, check_chain

# Few weights, but valuable: a network suffers more from losing its scales, biases and statistics
# than from losing a tenth of its kernels; see docs/security.md.
NORMALISATION = r"(?i)(^|[/._])(batch|layer|group|instance|rms)?_?(bn|ln|norms?)\d*([/._]|$)"
# Running statistics identify a normalisation layer under any name, as in PyTorch's nn.Sequential.
_STATISTICS = ({"running_mean", "running_var"}, {"mean", "var"})
_SCALES = ("scale", "weight", "var", "running_var")


class Subject(NamedTuple):
    """A network to protect and attack.

    Attributes:
        title: network and data, in words.
        params: trained parameters, including running statistics.
        loss_fn: ``(params, batch) -> scalar`` in evaluation mode.
        metric: ``params -> float`` on test data; higher is better.
        unit: the metric's unit, ``"dB"`` or ``"%"``.
        worthless: the metric of guessing.
        examples: the number of examples in the training data.
        batch: ``(which, rng) -> batch``: draws a batch, with a NumPy generator, from the examples
            with indices ``which``, those that the attacker has. All batches have the same shape.
        fresh: ``key -> params``: untrained parameters, for an attacker who has the architecture
            alone.
        training_loss_fn: the loss in training mode, if it differs: ``(params, batch) -> (scalar,
            params)``, with running statistics updated by the batch.
        select: a regular expression for the leaves whose groups are selected; None: all leaves
            with two axes or more.
        layout: order of the axes of a kernel, ``"HWIO"``, or ``"OIHW"`` as in PyTorch; None:
            inferred from the shapes, as in `protect_file`.
        normalisation: a regular expression for the names of normalisation parameters and
            statistics.
        chain: normalisation layers between two convolutions, see `Link`.
        base: parameters that the attacker also has, a tree like `params`: a public network that
            this one was fine-tuned from, or an earlier release of it.
        siblings: parameters of other networks of this architecture that the attacker has or has
            trained, trees like `params`. From them the attacker learns what plain kernels reveal.

    Examples:
        >>> subject = Subject(
        ...     title="a denoiser",
        ...     params=params,
        ...     loss_fn=loss_fn,
        ...     metric=psnr_of,
        ...     unit="dB",
        ...     worthless=20.0,
        ...     examples=len(images),
        ...     batch=lambda which, rng: images[rng.choice(which, 1)],
        ...     fresh=lambda key: jax.tree.map(jnp.zeros_like, params),
        ... )
    """

    title: str
    params: PyTree
    loss_fn: LossFn
    metric: Callable[[PyTree], float]
    unit: str
    worthless: float
    examples: int
    batch: Callable[[Int[np.ndarray, " n"], np.random.Generator], Any]
    fresh: Callable[[PRNGKeyArray], PyTree]
    training_loss_fn: TrainingLossFn | None = None
    select: str | None = None
    layout: Layout | None = None
    normalisation: str = NORMALISATION
    chain: Sequence[Link] = ()
    base: PyTree = None
    siblings: Sequence[PyTree] = ()


def quality(subject: Subject, params: PyTree) -> float:
    """The metric as a number; NaN for a network that does not work, as after a failed attack.

    Raises:
        ValueError: the metric returns something else.
    """
    found = subject.metric(params)
    if not isinstance(found, str) and np.ndim(found) == 0:
        with contextlib.suppress(TypeError, ValueError):
            return float(found)
    raise ValueError(
        f"{subject.title}: metric: expected a number, got {type(found).__name__}. Return a float: "
        "higher is better."
    )


def check_subject(subject: Subject, what: str) -> Subject:
    """Refuses a subject on which attacks would fail, perhaps hours later.

    Args:
        subject: the subject to check.
        what: the network, for messages.

    Returns:
        The subject, with every entry of its chain as a `Link`.

    Raises:
        ValueError: a field is invalid, or does not match the parameters.
    """
    params = named_leaves(subject.params).arrays
    if subject.layout not in (None, *get_args(Layout)):
        raise ValueError(
            f"{what}: layout: expected one of {get_args(Layout)} or None, got {subject.layout!r}."
        )
    if subject.examples < 1:
        raise ValueError(f"{what}: examples: expected at least 1, got {subject.examples}.")
    if not math.isfinite(subject.worthless):
        raise ValueError(
            f"{what}: worthless: expected the metric of guessing, got {subject.worthless}."
        )
    remedy = "Return untrained parameters of this architecture."
    check_like(params, subject.fresh(jax.random.key(0)), f"{what}: fresh", remedy)
    if subject.base is not None:
        check_base(subject.params, subject.base, what)
    shapes = {name: np.shape(leaf) for name, leaf in params.items()}
    subject = _with_layout(subject, shapes, what)
    chain = check_chain(subject.chain, shapes, subject.layout or "HWIO", what)
    if subject.siblings and not chain:
        raise ValueError(
            f"{what}: siblings: expected a chain too, got none: siblings are used to predict the "
            "normalisation between two kernels. Give the subject's chain, or leave siblings out."
        )
    names = {name for link in chain for name in link if name is not None}
    for number, sibling in enumerate(subject.siblings):
        check_like(
            {name: params[name] for name in sorted(names)},
            sibling,
            f"{what}: siblings[{number}]",
            "Give a list of networks of this architecture.",
            more=True,
        )
    _check_losses(subject, what)
    return subject._replace(chain=chain)


def _with_layout(subject: Subject, shapes: Mapping[str, tuple[int, ...]], what: str) -> Subject:
    """Sets the layout; if all kernels have two axes, only the chain can reveal it."""
    if not subject.chain or subject.layout is not None:
        return subject
    leaves = select_leaves(subject.params, subject.select)
    if any(len(np.shape(leaf)) > 2 for leaf in leaves.values()):
        return subject._replace(layout=layout_of(subject))
    fitting = []
    for layout in get_args(Layout):
        with contextlib.suppress(ValueError):
            check_chain(subject.chain, shapes, layout, what)
            fitting.append(layout)
    if len(fitting) == 2:
        raise ValueError(
            f"{what}: chain: cannot tell the input axis of its kernels from the output axis. Set "
            "the subject's layout: OIHW for (out, in) as in PyTorch, HWIO for (in, out) as in JAX."
        )
    return subject._replace(layout=fitting[0] if fitting else None)


def _check_losses(subject: Subject, what: str) -> None:
    loss = subject.training_loss_fn
    if loss is None:
        return
    batch = example_batches(subject, 1.0, 0)[1](1)
    shape = jax.eval_shape(lambda params: loss(params, batch), place(subject.params))
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(
            f"{what}: training_loss_fn: expected the loss and the parameters with updated "
            f"statistics, got {type(shape).__name__}. Leave it out if there are no statistics."
        )
    trees = [jax.tree.structure(tree) for tree in (subject.params, shape[1])]
    if trees[0] != trees[1]:
        raise ValueError(
            f"{what}: training_loss_fn: expected its second result to have the structure of "
            f"params, got {trees[1]}. Return all parameters."
        )


def layout_of(subject: Subject) -> Layout:
    """The order of its kernels' axes: as given, or inferred from the shapes.

    Raises:
        ValueError: it cannot be inferred.
    """
    if subject.layout is not None:
        return subject.layout
    leaves = select_leaves(subject.params, subject.select)
    try:
        return guess_layout(leaves, list(leaves), {}, "kernel")
    except ValueError:
        raise ValueError(
            f"{subject.title}: cannot tell the input axis of its kernels from the output axis. "
            "Set the subject's layout: OIHW as in PyTorch, or HWIO as in JAX and TensorFlow."
        ) from None


def normalisation_leaves(params: PyTree, pattern: str = NORMALISATION) -> dict[str, Any]:
    """Scales, biases and running statistics of normalisation layers.

    Args:
        params: any pytree.
        pattern: regular expression, searched in the names of leaves, whose parts are joined by
            ``/`` or ``.``.

    Returns:
        name → leaf, for floats with one axis that match, or whose layer also has a running mean
        and variance; may be empty.
    """
    leaves = floats(named_leaves(params))
    siblings: dict[str, set[str]] = {}
    for layer, own in map(_parts, leaves):
        siblings.setdefault(layer, set()).add(own)

    def found(name: str) -> bool:
        beside = siblings[_parts(name)[0]]
        return bool(re.search(pattern, name)) or any(pair <= beside for pair in _STATISTICS)

    return {n: leaf for n, leaf in leaves.items() if len(leaf.shape) == 1 and found(n)}


def is_scale(name: str) -> bool:
    """Whether a normalisation leaf multiplies or divides, by the last part of its name."""
    return _parts(name)[1] in _SCALES


def _parts(name: str) -> tuple[str, str]:
    """The names of a leaf's layer, and of the leaf within it."""
    end = max(name.rfind("/"), name.rfind(".")) + 1
    return name[:end], name[end:]


def reset(name: str, leaf: Array) -> Array:
    """A normalisation leaf with its initial values: scale and variance 1, the rest 0."""
    return jnp.full_like(leaf, 1.0 if is_scale(name) else 0.0)


def example_batches(subject: Subject, share: float, seed: int) -> tuple[int, Callable[[int], Any]]:
    """Batches for an attacker with a share of the training data.

    Args:
        subject: the network with its data.
        share: share of its examples, in (0, 1]; at least one example.
        seed: seed of the choice of examples, and of the batches.

    Returns:
        The number of examples; and a function from step number to batch.
    """
    if not 0 < share <= 1:
        raise ValueError(f"data: expected shares of the training data in (0, 1], got {share}.")
    count = max(1, round(share * subject.examples))
    which = np.random.default_rng(seed).permutation(subject.examples)[:count]
    return count, lambda step: subject.batch(which, np.random.default_rng([seed, step]))


def place(params: PyTree) -> PyTree:
    """Moves parameters to the device, so that they are sent once and not at every step."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_array(leaf) else leaf, params)
