"""One contract for every network converted from and to PyTorch: a new one is a row."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_oracle import (
    dncnn_checkpoint,
    in_float64,
    numpy_dncnn,
    numpy_vgg,
    torch_checkpoint,
    vgg_layers,
    without_counters,
)

from selcrypt_jax.models import VGG19, DnCNN, from_torch, model_of, to_torch, torch_names


@dataclass(frozen=True)
class Member:
    """A network under PyTorch's names.

    Attributes:
        build: makes the network, with other weights.
        tensors: its checkpoint.
        oracle: ``(tensors, images, channels first) -> output``, in NumPy.
        size: height and width of the images.
        square: a tensor that fits when it is transposed.
    """

    build: Callable[[], Any]
    tensors: dict[str, np.ndarray]
    oracle: Callable[[Any, np.ndarray], np.ndarray]
    size: tuple[int, int]
    square: str


def vgg(batch_norm: bool) -> Member:
    # 16 channels before dense layers of 16 and 16: a forgotten transpose would fit.
    return Member(
        lambda: VGG19(width=1 / 32, batch_norm=batch_norm, rngs=nnx.Rngs(0)),
        torch_checkpoint(vgg_layers((2, 4, 8, 16), 16, batch_norm)),
        functools.partial(numpy_vgg, batch_norm=batch_norm),
        (32, 32),
        "classifier.1.weight",
    )


def dncnn(eps: float, **options: bool) -> Member:
    biases = {0} if options.get("first_bias") else ()
    return Member(
        lambda: DnCNN(5, 6, 3, eps=eps, **options, rngs=nnx.Rngs(0)),
        dncnn_checkpoint(5, 6, 3, biases, options.get("batch_norm", True)),
        functools.partial(numpy_dncnn, eps=eps),
        (7, 9),
        "dncnn.2.weight",
    )


MEMBERS = {
    "VGG19": vgg(True),
    "VGG19 without BatchNorm": vgg(False),
    "DnCNN": dncnn(0.1),
    "DnCNN of the paper": dncnn(1e-4, first_bias=True),
    "DnCNN without BatchNorm": dncnn(1e-5, batch_norm=False),
}
each = pytest.mark.parametrize("name", MEMBERS)


def abstract(member: Member) -> Any:
    return nnx.eval_shape(member.build)


def eps_of(member: Member) -> float:
    return member.oracle.keywords.get("eps", 1e-5)  # pyright: ignore


@nnx.jit
def apply(model, images):
    return model(images)


@each
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_round_trip_by_bytes_and_names(name, prefix, dtype):
    member = MEMBERS[name]
    plain = {n: t.astype(dtype) for n, t in without_counters(member.tensors).items()}
    given = {prefix + n: t for n, t in plain.items()}
    model = abstract(member)
    nnx.update(model, from_torch(model, given))
    exported = to_torch(model)
    assert {t.dtype for t in exported.values()} == {np.dtype(np.float32)}
    back = {n: t.astype(dtype) for n, t in exported.items()}
    assert {n: (t.shape, t.tobytes()) for n, t in back.items()} == {
        n: (t.shape, t.tobytes()) for n, t in plain.items()
    }


@each
def test_output_is_that_of_numpy(name):
    member = MEMBERS[name]
    model = model_of(member.tensors, eps=eps_of(member))
    images = np.random.default_rng(9).standard_normal((2, *member.size, 3)).astype(np.float32)
    statistics = {n for n in member.tensors if n.endswith(("running_mean", "running_var"))}
    if statistics:
        # As every new one it is in training mode, with all that it needs for that: statistics
        # change, and numbers for dropout are drawn.
        assert np.isfinite(apply(model, images)).all()
        moved = {n for n, t in to_torch(model).items() if (t != member.tensors[n]).any()}
        assert moved == statistics

    def output(tensors):
        model = model_of(tensors, eps=eps_of(member))
        model.eval()
        found = np.asarray(apply(model, images))
        return found if found.ndim == 2 else found.transpose(0, 3, 1, 2)

    expected = member.oracle(in_float64(member.tensors), images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(output(member.tensors), expected, atol=1e-5)
    square = member.tensors[member.square].swapaxes(0, 1)
    other = output(member.tensors | {member.square: square})
    assert np.abs(other - expected).max() > 1e-3


@each
def test_the_architecture_is_told_from_the_tensors(name):
    model = abstract(MEMBERS[name])
    found = model_of(MEMBERS[name].tensors)
    assert type(found) is type(model)
    assert torch_names(found) == torch_names(model)
    assert jax.tree.map(np.shape, nnx.state(found, nnx.Param)) == jax.tree.map(
        np.shape, nnx.state(model, nnx.Param)
    )


@pytest.mark.parametrize(("name", "other"), [*itertools.permutations(MEMBERS, 2)])
def test_another_architecture_is_refused(name, other):
    message = r"tensors do not fit this (VGG19|DnCNN):\n  \S+: expected"
    with pytest.raises(ValueError, match=message):
        from_torch(abstract(MEMBERS[name]), MEMBERS[other].tensors)
