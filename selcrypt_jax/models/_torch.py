"""Converts weights of VGG19 and DnCNN from and to PyTorch names and layout.

PyTorch numbers the layers of an ``nn.Sequential``, including ReLU, pooling and dropout, and
stores a convolution as OIHW and a dense layer as [out, in]; NNX has HWIO and [in, out].
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from .._tree.names import is_array, listed, named_leaves
from ._dncnn import DnCNN
from ._vgg import POOLED, VGG19, WIDTHS

_Path = tuple[str | int, ...]

_CONV = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = ".num_batches_tracked"
# Indices of the dense layers in: dropout, dense, ReLU, dropout, dense, ReLU, dense.
_CLASSIFIER = (1, 4, 6)


def _layers(model: VGG19 | DnCNN) -> Iterator[tuple[_Path, str, dict[str, str]]]:
    """The path of each layer with weights, its PyTorch name, and the names of its tensors."""
    sequence, pooled = ("features", POOLED) if isinstance(model, VGG19) else ("dncnn", ())
    place = 0
    for index, norm in enumerate(model.norms):
        yield ("convs", index), f"{sequence}.{place}", _CONV
        place += 1
        if norm is not None:
            yield ("norms", index), f"{sequence}.{place}", _NORM
            place += 1
        place += 1 + (index in pooled)  # ReLU, pooling
    if isinstance(model, VGG19):
        for index, place in enumerate(_CLASSIFIER):
            yield ("head", index), f"classifier.{place}", _CONV


def _variables(model: VGG19 | DnCNN) -> dict[str, tuple[_Path, Any]]:
    """PyTorch name → path and variable, for all weights and running statistics."""
    if not isinstance(model, VGG19 | DnCNN):
        raise TypeError(f"model: expected VGG19 or DnCNN, got {type(model).__name__}.")
    flat = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return {
        f"{layer}.{theirs}": ((*path, ours), flat[(*path, ours)])
        for path, layer, names in _layers(model)
        for ours, theirs in names.items()
        if (*path, ours) in flat
    }


def _torch_axes(ndim: int) -> tuple[int, ...]:
    """The order of our axes in PyTorch."""
    return (3, 2, 0, 1) if ndim == 4 else tuple(reversed(range(ndim)))


def from_torch(model: VGG19 | DnCNN, tensors: Mapping[str, np.ndarray]) -> nnx.State:
    """Converts a PyTorch checkpoint into a model's state.

    Args:
        model: a VGG19 or DnCNN of the checkpoint's size; it is not modified. The ε of BatchNorm is
            not part of a checkpoint: pass it to the model.
        tensors: PyTorch name → array, as ``safetensors.numpy.load_file`` reads them:
            ``features.N`` and ``classifier.{1,4,6}`` for VGG19, ``dncnn.N`` for DnCNN; OIHW. A
            ``module.`` before the names (``nn.DataParallel``) is dropped, and BatchNorm's
            counters ``num_batches_tracked`` are ignored. Floats of any precision become the
            model's float32.

    Returns:
        The weights (``nnx.Param``) and running statistics (``nnx.BatchStat``) of the model, for
        ``nnx.update(model, state)``.

    Raises:
        ValueError: names are missing, unknown or repeated, or shapes or dtypes differ; the first
            20 are listed.
        TypeError: another type of model.

    Examples:
        >>> model = DnCNN(channels=3, eps=1e-4, first_bias=True, rngs=nnx.Rngs(0))
        >>> nnx.update(model, from_torch(model, safetensors.numpy.load_file(path)))
    """
    expected = _variables(model)
    given: dict[str, np.ndarray] = {}
    problems = []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.")
        if name.endswith(_COUNTER):
            continue
        if name in given:
            problems.append(f"{name!r}: expected once, got it with and without 'module.'")
        elif name not in expected:
            problems.append(f"{name!r}: expected no such tensor, got shape {np.shape(tensor)}")
        given[name] = np.asarray(tensor)
    flat = {}
    for name, (path, variable) in expected.items():
        axes = _torch_axes(variable.ndim)
        shape = tuple(variable.shape[axis] for axis in axes)
        if name not in given:
            problems.append(f"{name!r}: expected shape {shape}, got no such tensor")
        elif given[name].shape != shape:
            problems.append(f"{name!r}: expected shape {shape}, got {given[name].shape}")
        elif not jnp.issubdtype(given[name].dtype, jnp.floating):
            problems.append(f"{name!r}: expected floats, got {given[name].dtype}")
        else:
            array = given[name].transpose(np.argsort(axes)).astype(variable.dtype)
            flat[path] = variable.replace(jnp.asarray(array))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"tensors do not fit this {type(model).__name__}:\n{shown}{more}\n"
            "Build the model with the size of the checkpoint's: width, depth, channels, classes, "
            "batch_norm, first_bias."
        )
    return nnx.from_flat_state(flat)


def to_torch(model: VGG19 | DnCNN, tree: PyTree | None = None) -> dict[str, np.ndarray]:
    """The weights and running statistics of a model under their PyTorch names.

    Args:
        model: VGG19 or DnCNN.
        tree: something else to convert to those names and that layout: a pytree with the paths of
            ``nnx.state(model)`` or of a part of it, with arrays that broadcast against the model's,
            such as scores or masks. Leaves that are not arrays, such as ``False``, are omitted.

    Returns:
        PyTorch name → array in C order, OIHW; the inverse of `from_torch`. BatchNorm's counters
        ``num_batches_tracked`` are omitted; ``load_state_dict`` of a plain dict does not need them.

    Raises:
        ValueError: arrays in `tree` that the model does not have, or that do not fit it.
        TypeError: another type of model.

    Examples:
        >>> scores = pss(loss_fn, nnx.state(model, nnx.Param), batches, key=jax.random.key(0))
        >>> save_file(to_torch(model, scores), "scores.safetensors")  # for protect --importance
    """
    variables = _variables(model)
    state = nnx.state(model)
    tree = state if tree is None else tree
    given = {
        name: np.asarray(jax.device_get(leaf))
        for name, leaf in named_leaves(tree, "tree").leaves.items()
        if is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    ours = {"/".join(map(str, path)): variable for path, variable in variables.values()}
    rest = named_leaves(state, "model").leaves.keys() - ours.keys()  # dropout's
    given = {name: array for name, array in given.items() if name not in rest}
    unknown = [name for name in given if name not in ours]
    if unknown:
        raise ValueError(
            f"tree: expected leaves of the model's weights and statistics, got {listed(unknown)}. "
            f"The model has {listed(ours)}."
        )
    for name, array in given.items():
        shape = ours[name].shape
        if array.ndim != len(shape) or any(
            m not in (1, n) for m, n in zip(array.shape, shape, strict=True)
        ):
            raise ValueError(
                f"tree: {name!r}: expected an array that broadcasts against shape {shape}, each "
                f"axis of size 1 or the leaf's, got shape {array.shape}."
            )
    # safetensors writes the bytes of an array's buffer, whatever its strides.
    return {
        theirs: np.ascontiguousarray(given[ours].transpose(_torch_axes(given[ours].ndim)))
        for ours, theirs in torch_names(model).items()
        if ours in given
    }


def torch_names(model: VGG19 | DnCNN) -> dict[str, str]:
    """Names in ``nnx.state(model)``, such as ``convs/0/kernel`` → PyTorch names.

    Raises:
        TypeError: another type of model.

    Examples:
        >>> assert torch_names(model)["convs/0/kernel"] == "dncnn.0.weight"
    """
    return {"/".join(map(str, path)): name for name, (path, _) in _variables(model).items()}


def model_of(tensors: Mapping[str, np.ndarray], *, eps: float = 1e-5) -> VGG19 | DnCNN:
    """Builds the VGG19 or DnCNN of a PyTorch checkpoint, with its weights.

    Width, depth, channels, classes, BatchNorm and biases are read from names and shapes.

    Args:
        tensors: as for `from_torch`.
        eps: ε of BatchNorm in DnCNN, which is not part of a checkpoint: 1e-4 for the weights
            published with the selective-encryption paper.

    Returns:
        The model, in training mode like every new one.

    Raises:
        ValueError: the tensors have another architecture.

    Examples:
        >>> model = model_of(safetensors.numpy.load_file(path))
        >>> model.eval()
    """
    # Abstract: random weights would take seconds to compile, and unbounded memory if the
    # tensors do not fit each other.
    model = nnx.eval_shape(lambda: architecture_of(tensors, eps=eps)(rngs=nnx.Rngs(0)))
    nnx.update(model, from_torch(model, tensors))
    if isinstance(model, VGG19):
        model.dropout = nnx.Dropout(model.dropout.rate, rngs=nnx.Rngs(0))
    return model


def architecture_of(
    tensors: Mapping[str, Any], *, eps: float = 1e-5
) -> Callable[..., VGG19 | DnCNN]:
    """Builds the network of `model_of` with new weights, from ``rngs``."""
    shapes = {name.removeprefix("module."): np.shape(array) for name, array in tensors.items()}
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    norms = any(name.endswith("running_mean") for name in shapes)
    if kernels and all(re.fullmatch(r"dncnn\.\d+\.weight", name) for name in kernels):
        width, channels = kernels.get("dncnn.0.weight", (1, 1))[:2]
        # Without BatchNorm all convolutions have a bias; two convolutions have no norm between
        # them.
        last = max(kernels, key=lambda name: int(name.split(".")[1]))
        norms = last.replace("weight", "bias") not in shapes
        biased = norms and "dncnn.0.bias" in shapes
        return partial(DnCNN, len(kernels), width, channels, norms, eps=eps, first_bias=biased)
    if (
        "features.0.weight" in kernels
        and all(re.fullmatch(r"features\.\d+\.weight", name) for name in kernels)
        and len(shapes.get("classifier.6.weight", ())) == 2
    ):
        classes, channels = shapes["classifier.6.weight"][0], shapes["features.0.weight"][1]
        return partial(VGG19, classes, channels, _width(kernels), norms)
    raise ValueError(
        "tensors: expected those of VGG19 ('features.0.weight' to 'classifier.6.weight') or "
        f"DnCNN ('dncnn.0.weight' and so on) under PyTorch's names, got {listed(shapes)}."
    )


def _width(kernels: Mapping[str, tuple[int, ...]]) -> float:
    """The width multiplier that gives all convolutions of a VGG19 their number of channels."""
    found = [kernels[name][0] for name in sorted(kernels, key=lambda n: int(n.split(".")[1]))]
    pairs = list(zip(found, WIDTHS, strict=False))
    # Each was rounded to a whole number of channels, and is at least 1.
    low = max(0.0 if channels == 1 else (channels - 0.5) / full for channels, full in pairs)
    high = min((channels + 0.5) / full for channels, full in pairs)
    return (low + high) / 2
