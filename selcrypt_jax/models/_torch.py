"""Weights of VGG19 and DnCNN under their PyTorch names and layout, and back.

PyTorch numbers the layers of an ``nn.Sequential``, ReLU, pooling and dropout included, and
stores a convolution as OIHW and a dense layer as [out, in]; NNX has HWIO and [in, out].
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._dncnn import DnCNN
from ._vgg import POOLED, VGG19

_Path = tuple[str | int, ...]

_CONV = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = ".num_batches_tracked"
# Places of the dense layers in: dropout, dense, ReLU, dropout, dense, ReLU, dense.
_CLASSIFIER = (1, 4, 6)


def _layers(model: VGG19 | DnCNN) -> Iterator[tuple[_Path, str, dict[str, str]]]:
    """Path of each layer with weights, its PyTorch name, and the names of its tensors."""
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
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    flat = dict(nnx.to_flat_state(state))
    return {
        f"{layer}.{theirs}": ((*path, ours), flat[(*path, ours)])
        for path, layer, names in _layers(model)
        for ours, theirs in names.items()
        if (*path, ours) in flat
    }


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.transpose()
    # safetensors writes the bytes of an array's buffer, whatever its strides.
    return np.ascontiguousarray(array)


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.transpose()


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def from_torch(model: VGG19 | DnCNN, tensors: Mapping[str, np.ndarray]) -> nnx.State:
    """The state that a PyTorch checkpoint gives a model.

    Args:
        model: VGG19 or DnCNN of the checkpoint's size; it is not changed. The ε of BatchNorm is
            no part of a checkpoint: give it to the model.
        tensors: PyTorch name → array, as ``safetensors.numpy.load_file`` reads them:
            ``features.N`` and ``classifier.{1,4,6}`` for VGG19, ``dncnn.N`` for DnCNN; OIHW. A
            ``module.`` before the names (``nn.DataParallel``) is dropped, and BatchNorm's
            counters ``num_batches_tracked`` are ignored. Floats of any precision become the
            model's float32.

    Returns:
        The weights (``nnx.Param``) and running statistics (``nnx.BatchStat``) of the model, to
        be put in by ``nnx.update(model, state)``.

    Raises:
        ValueError: names are missing, unknown or double, or shapes or dtypes differ; the first
            20 are listed.
        TypeError: another model.

    Example::

        model = DnCNN(channels=3, eps=1e-4, first_bias=True, rngs=nnx.Rngs(0))
        nnx.update(model, from_torch(model, safetensors.numpy.load_file(path)))
    """
    expected = _variables(model)
    given: dict[str, np.ndarray] = {}
    problems = []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.")
        if name.endswith(_COUNTER):
            continue
        if name in given:
            problems.append(f"{name}: expected once, got it with and without 'module.'")
        elif name not in expected:
            problems.append(f"{name}: expected no such tensor, got shape {np.shape(tensor)}")
        given[name] = np.asarray(tensor)
    flat = {}
    for name, (path, variable) in expected.items():
        shape = _torch_shape(variable.shape)
        if name not in given:
            problems.append(f"{name}: expected shape {shape}, got no such tensor")
        elif given[name].shape != shape:
            problems.append(f"{name}: expected shape {shape}, got {given[name].shape}")
        elif not jnp.issubdtype(given[name].dtype, jnp.floating):
            problems.append(f"{name}: expected floats, got {given[name].dtype}")
        else:
            array = _from_torch_layout(given[name]).astype(variable.dtype)
            flat[path] = variable.replace(jnp.asarray(array))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"tensors do not fit this {type(model).__name__}:\n{shown}{more}\n"
            "Build the model as the one the tensors come from: width, depth, channels, classes, "
            "batch_norm, first_bias."
        )
    return nnx.from_flat_state(flat)


def to_torch(model: VGG19 | DnCNN) -> dict[str, np.ndarray]:
    """The weights and running statistics of a model under their PyTorch names.

    Args:
        model: VGG19 or DnCNN.

    Returns:
        PyTorch name → array in C order, OIHW: the inverse of `from_torch`. BatchNorm's counters
        ``num_batches_tracked`` are left out: ``load_state_dict`` of a plain dict does without.

    Raises:
        TypeError: another model.
    """
    return {
        name: _to_torch_layout(np.asarray(variable[...]))
        for name, (_, variable) in _variables(model).items()
    }
