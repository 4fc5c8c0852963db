import itertools
import os
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from torch_oracle import dncnn_checkpoint, stand_ins, torch_checkpoint, vgg_layers, without_counters

from selcrypt_jax import importance, nested_masks
from selcrypt_jax.models import (
    VGG19,
    Conv3x3,
    DnCNN,
    conv3x3,
    from_torch,
    model_of,
    to_torch,
    torch_names,
)
from selcrypt_jax.models._torch import _width
from selcrypt_jax.models._vgg import WIDTHS

DATA = pathlib.Path(os.environ.get("SELCRYPT_DATA", "."))


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rngs():
    # rbg compiles in a quarter of the time of threefry, once for each shape that is drawn.
    return nnx.Rngs(jax.random.key(0, impl="rbg"))


# From tensors, whose numbers need not be compiled.
def small_vgg(*, batch_norm=True):
    """A network with 2, 4, 8 and 16 channels."""
    return model_of(torch_checkpoint(vgg_layers((2, 4, 8, 16), 16, batch_norm)))


def small_dncnn(*, depth=5, channels=1, batch_norm=True):
    return model_of(dncnn_checkpoint(depth, 6, channels, batch_norm=batch_norm))


def shapes(model, kind=nnx.Param):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): variable.shape for path, variable in flat}


# The convolution ----------------------------------------------------------------------------


def lax_conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (1, 2), (2, 1), (1, 5), (2, 4), (1, 9), (0, 0)]


@pytest.mark.parametrize("size", SIZES)
def test_convolution_and_its_gradients_are_those_of_lax(size):
    x, kernel = normal(0, (3, *size, 5)), normal(1, (3, 3, 5, 4))
    weight = normal(2, (3, *size, 4))

    def everything(conv):
        def loss(x, kernel):
            y = conv(x, kernel)
            return jnp.sum(y * weight), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

    (_, y), gradients = everything(conv3x3)
    (_, expected_y), expected_gradients = everything(lax_conv)
    chex.assert_trees_all_close((y, gradients), (expected_y, expected_gradients), atol=3e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_convolution_under_vmap_over_inputs_and_kernels(size):
    x, kernel = normal(0, (2, 3, size, size, 5)), normal(1, (2, 3, 3, 5, 4))
    expected = np.stack([lax_conv(*pair) for pair in zip(x, kernel, strict=True)])
    np.testing.assert_allclose(jax.vmap(conv3x3)(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "convolutions"), [(1, 0), (2, 0), (3, 1), (32, 1)])
def test_small_maps_need_no_xla_convolution(size, convolutions):
    text = str(jax.make_jaxpr(conv3x3)(jnp.zeros((2, size, size, 3)), jnp.zeros((3, 3, 3, 4))))
    assert text.count("conv_general_dilated[") == convolutions


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layer_adds_its_bias(size):
    layer = Conv3x3(3, 4, rngs=rngs())
    x = jnp.ones((2, size, size, 3))
    before = layer(x)
    layer.bias[...] = jnp.arange(4.0)
    expected = jnp.broadcast_to(jnp.arange(4.0), before.shape)
    np.testing.assert_allclose(layer(x) - before, expected, atol=1e-6)
    assert shapes(layer) == {"kernel": (3, 3, 3, 4), "bias": (4,)}
    assert shapes(Conv3x3(3, 4, use_bias=False, rngs=rngs())) == {"kernel": (3, 3, 3, 4)}


def test_layer_starts_with_he_variance():
    kernel = Conv3x3(32, 64, rngs=rngs()).kernel[...]
    assert np.var(kernel) == pytest.approx(2 / (9 * 32), rel=0.03)


# Structure ----------------------------------------------------------------------------------


def abstract(build):
    """A network's shapes, without allocating it."""
    return shapes(nnx.eval_shape(build))


def conv_weights(named):
    return [np.prod(shape) for name, shape in named.items() if re.search("conv.*kernel", name)]


def test_vgg19_of_the_paper():
    named = abstract(lambda: VGG19(rngs=rngs()))
    # Simonyan and Zisserman, table 1, column E.
    stages = [3, 64, 64, 128, 128, 256, 256, 256, 256, *[512] * 8]
    expected = {}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(stages)):
        expected |= {
            f"convs/{index}/kernel": (3, 3, inputs, outputs),
            f"convs/{index}/bias": (outputs,),
            f"norms/{index}/scale": (outputs,),
            f"norms/{index}/bias": (outputs,),
        }
    for index, outputs in enumerate((512, 512, 10)):
        expected |= {f"head/{index}/kernel": (512, outputs), f"head/{index}/bias": (outputs,)}
    assert named == expected
    assert len(conv_weights(named)) == 16
    assert sum(conv_weights(named)) == 20_018_880
    without = abstract(lambda: VGG19(batch_norm=False, rngs=rngs()))
    assert without == {name: shape for name, shape in expected.items() if "norms" not in name}


def test_dncnn_of_the_paper():
    named = abstract(lambda: DnCNN(channels=3, rngs=rngs()))
    expected = {f"convs/{index}/kernel": (3, 3, 64, 64) for index in range(1, 16)}
    expected |= {"convs/0/kernel": (3, 3, 3, 64), "convs/16/kernel": (3, 3, 64, 3)}
    for index in range(1, 16):
        expected |= {f"norms/{index}/scale": (64,), f"norms/{index}/bias": (64,)}
    assert named == expected
    assert len(conv_weights(named)) == 17
    assert sum(conv_weights(named)) == 556_416
    without = abstract(lambda: DnCNN(channels=3, batch_norm=False, rngs=rngs()))
    assert not [name for name in without if name.startswith("norms")]
    with_first = abstract(lambda: DnCNN(channels=3, first_bias=True, rngs=rngs()))
    assert with_first == expected | {"convs/0/bias": (64,)}
    assert len([name for name in without if name.endswith("bias")]) == 17


def test_width_is_rounded_and_at_least_one():
    named = abstract(lambda: VGG19(width=0.01, classes=7, in_channels=1, rngs=rngs()))
    assert named["convs/0/kernel"] == (3, 3, 1, 1)
    assert named["convs/4/kernel"] == (3, 3, 1, 3)  # 2.56
    assert named["head/0/kernel"] == (5, 5)
    assert named["head/2/kernel"] == (5, 7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VGG19(width=0.0, rngs=rngs()), "expected width > 0, got 0.0"),
        (lambda: VGG19(width=float("nan"), rngs=rngs()), "expected width > 0, got nan"),
        (lambda: VGG19(dropout=1.0, rngs=rngs()), "expected 0 <= dropout < 1, got 1.0"),
        (lambda: VGG19(classes=0, rngs=rngs()), "classes=0"),
        (lambda: DnCNN(depth=1, rngs=rngs()), "expected depth >= 2.*got depth=1"),
        (lambda: DnCNN(channels=0, rngs=rngs()), "channels=0"),
        (lambda: DnCNN(eps=0.0, rngs=rngs()), "eps=0.0"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@nnx.jit
def apply(model, images):
    return model(images)


# Images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 500), (41, 41), (2, 2), (5, 3), (1, 8)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dncnn_keeps_any_image_size(size, mode):
    model = small_dncnn(depth=3)
    getattr(model, mode)()
    denoised = apply(model, normal(0, (1, *size, 1)))
    chex.assert_shape(denoised, (1, *size, 1))
    chex.assert_tree_all_finite(denoised)


def test_dncnn_subtracts_the_noise():
    model = small_dncnn(channels=3)
    model.eval()
    images = jnp.asarray(normal(0, (2, 9, 8, 3)))
    noise = model.estimate_noise(images)
    assert np.any(noise)
    np.testing.assert_array_equal(model(images), images - noise)


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (
            1,
            (1, 8, 8, 3),
            r"\[N, H, W, 1\] \(grey\), got shape \(1, 8, 8, 3\): 3 channels \(colour",
        ),
        (3, (1, 8, 8, 1), r"\(colour\), got shape .*: 1 channel \(grey\)"),
        (3, (1, 8, 8, 4), r"4 channels \(colour with alpha\)"),
        (3, (1, 3, 8, 8), r"8 channels .*channels come last"),
        (1, (8, 8), r"a batch of images \[N, H, W, 1\], got shape \(8, 8\)"),
    ],
)
def test_wrong_channels_are_told_in_words(channels, shape, message):
    with pytest.raises(ValueError, match=message):
        small_dncnn(channels=channels)(jnp.zeros(shape))


def test_integer_pixels_are_refused():
    with pytest.raises(TypeError, match=r"dtype float32, like the weights, got uint8.*\[0, 1\]"):
        small_dncnn()(jnp.zeros((1, 8, 8, 1), jnp.uint8))
    with pytest.raises(TypeError, match=r"got float16"):
        small_vgg()(jnp.zeros((1, 32, 32, 3), jnp.float16))


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (32, 64)])
def test_vgg19_needs_32_by_32(size):
    message = rf"32×32 pixels, \[N, 32, 32, 3\], got shape \(2, {size[0]}, {size[1]}, 3\)"
    with pytest.raises(ValueError, match=message):
        small_vgg()(jnp.zeros((2, *size, 3)))
    with pytest.raises(ValueError, match="1 channel"):
        small_vgg()(jnp.zeros((2, 32, 32, 1)))


# Training and evaluation mode ---------------------------------------------------------------


def test_dropout_is_on_in_training_only():
    # Without BatchNorm dropout is all that training mode changes.
    model = small_vgg(batch_norm=False)
    images = jnp.asarray(normal(0, (2, 32, 32, 3)))
    assert not np.array_equal(apply(model, images), apply(model, images))
    model.eval()
    logits = apply(model, images)
    if hasattr(nnx, "view"):  # Flax 0.12.4 has it first
        view = nnx.view(model, deterministic=False)
        assert not np.array_equal(apply(view, images), logits)
    assert np.array_equal(apply(model, images), logits)


def test_batch_norm_updates_its_statistics_in_training_only():
    model = small_dncnn()
    images = jnp.asarray(normal(0, (4, 8, 8, 1)))
    first = nnx.relu(lax_conv(images, model.convs[0].kernel[...]))
    inputs = np.asarray(lax_conv(first, model.convs[1].kernel[...]), np.float64)
    model.norms[1].mean[...] = jnp.zeros(6)
    model.norms[1].var[...] = jnp.ones(6)
    model.eval()
    model(images)
    assert np.array_equal(model.norms[1].mean[...], np.zeros(6))
    model.train()
    model(images)
    # torch's momentum of 0.1, from means of 0 and variances of 1.
    np.testing.assert_allclose(
        model.norms[1].mean[...], 0.1 * inputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        model.norms[1].var[...], 0.9 + 0.1 * inputs.var((0, 1, 2)), rtol=1e-4
    )
    assert set(shapes(model, nnx.BatchStat)) == {
        f"norms/{index}/{name}" for index in (1, 2, 3) for name in ("mean", "var")
    }


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("build", "shape"),
    [pytest.param(small_vgg, (32, 32, 3), marks=pytest.mark.slow), (small_dncnn, (2, 2, 1))],
)
def test_batch_over_eight_devices(axis_type, build, shape):
    model = build()
    model.eval()
    images = normal(0, (8, *shape))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    result = apply(model, jax.device_put(images, sharding))
    assert len(result.sharding.device_set) == 8
    np.testing.assert_allclose(result, apply(model, images), atol=1e-6)


@pytest.mark.parametrize("name", [pytest.param("vgg", marks=pytest.mark.slow), "dncnn"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_loss_of_params_in_jit(name, batch_norm):
    """As in the training scripts: split, merge within a jitted loss, return the statistics."""
    chex.clear_trace_counter()
    model = (small_vgg if name == "vgg" else small_dncnn)(batch_norm=batch_norm)
    images = jnp.asarray(normal(0, (2, 32, 32, 3 if name == "vgg" else 1)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimiser = optax.sgd(1e-3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, rest, momentum):
        def loss(params):
            # A copy: `rest` belongs to the trace outside of the gradient.
            merged = nnx.merge(graph, params, rest, copy=True)
            output = merged(images)
            return jnp.mean(output**2), nnx.state(merged, nnx.Not(nnx.Param))

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimiser.update(gradient, momentum, params)
        return optax.apply_updates(params, updates), rest, momentum, value, gradient

    new, new_rest, momentum, value, gradient = step(params, rest, optimiser.init(params))
    new, new_rest, _, _, _ = step(new, new_rest, momentum)
    chex.assert_tree_all_finite((value, nnx.to_pure_dict(gradient), nnx.to_pure_dict(new)))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert jax.tree.structure(new_rest) == jax.tree.structure(rest)
    kernels = [
        variable[...] for path, variable in nnx.to_flat_state(gradient) if path[-1] == "kernel"
    ]
    assert all(np.any(kernel) for kernel in kernels), "a kernel gets no gradient"
    view = nnx.merge(graph, new, new_rest)
    view.eval()
    chex.assert_tree_all_finite(nnx.jit(lambda model, x: model(x))(view, images))


# PyTorch ------------------------------------------------------------------------------------


def loaded(model, tensors):
    nnx.update(model, from_torch(model, tensors))
    model.eval()
    return model


def test_import_leaves_the_model_and_gives_its_tree():
    model = small_dncnn()
    before = nnx.clone(nnx.state(model))
    state = from_torch(model, dncnn_checkpoint(5, 6, 1))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(before))
    own = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert jax.tree.structure(state) == jax.tree.structure(own)
    # The statistics are told apart from the weights.
    weights, statistics = nnx.filter_state(state, nnx.Param, nnx.BatchStat)
    assert (len(jax.tree.leaves(weights)), len(jax.tree.leaves(statistics))) == (11, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("dncnn.3.running_var"),
            r"'dncnn\.3\.running_var': expected shape \(6,\), got no such tensor",
        ),
        (
            lambda t: t.update({"dncnn.0.bias": np.zeros(6, np.float32)}),
            r"'dncnn\.0\.bias': expected no such tensor, got shape \(6,\)",
        ),
        (
            lambda t: t.update({"dncnn.0.weight": t["dncnn.0.weight"].transpose(2, 3, 1, 0)}),
            r"'dncnn\.0\.weight': expected shape \(6, 1, 3, 3\), got \(3, 3, 1, 6\)",
        ),
        (
            lambda t: t.update({"dncnn.3.bias": np.zeros(6, np.int8)}),
            r"'dncnn\.3\.bias': expected floats, got int8",
        ),
        (
            lambda t: t.update({"module.dncnn.3.bias": t["dncnn.3.bias"]}),
            r"'dncnn\.3\.bias': expected once, got it with and without 'module\.'",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors = dncnn_checkpoint(5, 6, 1)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        from_torch(small_dncnn(), tensors)


def test_many_problems_are_listed_briefly():
    with pytest.raises(ValueError, match=r"expected shape \(64, 64, 3, 3\).*") as caught:
        from_torch(nnx.eval_shape(lambda: DnCNN(rngs=rngs())), dncnn_checkpoint(5, 6, 1))
    assert len(str(caught.value).splitlines()) == 23


@pytest.mark.parametrize("function", [to_torch, torch_names])
def test_other_models_are_refused(function):
    with pytest.raises(TypeError, match="expected VGG19 or DnCNN, got Linear"):
        function(nnx.Linear(2, 2, rngs=rngs()))


# A checkpoint's architecture ----------------------------------------------------------------

WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)


def torch_shapes(model):
    names = torch_names(model)
    return {
        names[name]: (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
        for name, shape in shapes(model, WEIGHTS).items()
    }


def told_from_its_tensors(build, **options):
    """Whether the shapes of a network's tensors give a network of the same shapes."""
    model = nnx.eval_shape(build)
    tensors = stand_ins(torch_shapes(model))
    found = nnx.eval_shape(lambda: model_of(tensors, **options))
    assert type(found) is type(model)
    return shapes(found, WEIGHTS) == shapes(model, WEIGHTS)


@given(width=st.floats(0.001, 3))
# Half a channel is rounded to the even number; 0.001 leaves one everywhere.
@example(width=2.5 / 64)
@example(width=3.5 / 64)
@example(width=0.001)
@example(width=1.0 + 1e-9)
def test_the_width_of_vgg19_is_told_from_its_channels(width):
    def channels(width):
        return [max(1, round(full * width)) for full in WIDTHS]

    kernels = {f"features.{i}.weight": (n, 1, 3, 3) for i, n in enumerate(channels(width))}
    assert channels(_width(kernels)) == channels(width)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    width=st.floats(0.001, 0.3),
    batch_norm=st.booleans(),
    classes=st.integers(1, 1000),
    channels=st.integers(1, 4),
)
@example(width=1.1, batch_norm=False, classes=10, channels=3)
def test_vgg19_is_told_from_its_tensors(width, batch_norm, classes, channels):
    assert told_from_its_tensors(lambda: VGG19(classes, channels, width, batch_norm, rngs=rngs()))


@pytest.mark.slow
@settings(max_examples=15)
@given(
    depth=st.integers(2, 20),
    width=st.integers(1, 70),
    channels=st.integers(1, 4),
    batch_norm=st.booleans(),
    first_bias=st.booleans(),
)
@example(depth=17, width=64, channels=3, batch_norm=True, first_bias=True)
@example(depth=3, width=1, channels=1, batch_norm=True, first_bias=False)
@example(depth=2, width=5, channels=1, batch_norm=True, first_bias=False)
def test_dncnn_is_told_from_its_tensors(depth, width, channels, batch_norm, first_bias):
    assert told_from_its_tensors(
        lambda: DnCNN(depth, width, channels, batch_norm, first_bias=first_bias, rngs=rngs()),
        eps=0.5,
    )


def kernel(*shape):
    return np.zeros((*shape, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"of VGG19 .* or DnCNN .* under PyTorch's names, got none\."),
        ({"conv1.weight": kernel(4, 3)}, r"of VGG19 .* or DnCNN .*, got 'conv1\.weight'\."),
        ({"dncnn.0.weight": np.zeros((4, 3), np.float32)}, r"got 'dncnn\.0\.weight'"),
        # One layer that is none of its.
        (dncnn_checkpoint(3, 4, 1) | {"extra.weight": kernel(4, 4)}, r"got 'dncnn\.0\.weight', "),
        ({"features.0.weight": kernel(4, 3)}, r"got 'features\.0\.weight'"),
        (
            {"features.0.weight": kernel(4, 3), "classifier.6.weight": np.float32(1)},
            r"got 'features\.0\.weight', 'classifier\.6\.weight'",
        ),
        # Sizes that no network has.
        ({"dncnn.2.weight": kernel(4, 3)}, "expected depth >= 2"),
        ({f"dncnn.{place}.weight": kernel(0, 1) for place in (0, 2)}, "width >= 1"),
        ({f"dncnn.{place}.weight": kernel(1, 0) for place in (0, 2)}, "channels >= 1"),
        (
            {"features.0.weight": kernel(4, 0), "classifier.6.weight": np.zeros((10, 4))},
            "in_channels=0",
        ),
        (
            {"features.0.weight": kernel(0, 3), "classifier.6.weight": np.zeros((10, 4))},
            "expected width > 0",
        ),
        # Layers that do not fit each other.
        (
            dncnn_checkpoint(3, 4, 1) | {"dncnn.2.weight": kernel(4, 5)},
            r"'dncnn\.2\.weight': expected shape \(4, 4, 3, 3\), got \(4, 5, 3, 3\)",
        ),
        (
            dncnn_checkpoint(3, 4, 1) | {"module.dncnn.0.weight": kernel(4, 1)},
            "expected once, got it with and without 'module",
        ),
    ],
)
def test_tensors_of_no_network_of_ours(tensors, message):
    with pytest.raises(ValueError, match=message):
        model_of(tensors)


def test_vgg19_whose_first_layer_does_not_fit_is_refused():
    # By that layer it would be thousands of times as wide as the paper's, too much for any
    # machine: shapes are all that may be looked at.
    tensors = stand_ins(torch_shapes(nnx.eval_shape(lambda: VGG19(width=0.05, rngs=rngs()))))
    tensors["features.0.weight"] = np.broadcast_to(np.float32(0), (10**6, 3, 3, 3))
    with pytest.raises(ValueError, match=r"'features\.0\.weight': expected shape"):
        model_of(tensors)


def test_torch_names():
    assert torch_names(DnCNN(3, 2, first_bias=True, rngs=rngs())) == {
        "convs/0/kernel": "dncnn.0.weight",
        "convs/0/bias": "dncnn.0.bias",
        "convs/1/kernel": "dncnn.2.weight",
        "norms/1/scale": "dncnn.3.weight",
        "norms/1/bias": "dncnn.3.bias",
        "norms/1/mean": "dncnn.3.running_mean",
        "norms/1/var": "dncnn.3.running_var",
        "convs/2/kernel": "dncnn.5.weight",
    }
    for batch_norm in (True, False):
        model = nnx.eval_shape(lambda norm=batch_norm: VGG19(batch_norm=norm, rngs=rngs()))
        names = torch_names(model)
        assert set(names) == set(shapes(model, WEIGHTS))
        expected = torch_checkpoint(vgg_layers((1, 1, 1, 1), 1, batch_norm))
        assert set(names.values()) == set(without_counters(expected))
    assert names["convs/15/kernel"] == "features.34.weight"  # of torchvision's vgg19
    assert names["head/2/bias"] == "classifier.6.bias"


# Scores and masks under PyTorch's names -----------------------------------------------------


@pytest.mark.parametrize("granularity", ["kernel", "filter", "weight"])
@pytest.mark.parametrize("name", [pytest.param("vgg", marks=pytest.mark.slow), "dncnn"])
def test_scores_and_masks_are_those_of_the_tensors(name, granularity):
    model = (small_vgg if name == "vgg" else small_dncnn)()
    params = nnx.state(model, nnx.Param)
    scores = importance.l2(params, granularity=granularity)
    found = to_torch(model, scores)
    expected = importance.l2(to_torch(model), granularity=granularity, layout="OIHW")
    taken = {name: score for name, score in expected.items() if score is not False}
    assert set(found) == set(taken)  # biases and statistics have no part in it
    for tensor, score in found.items():
        assert score.shape == taken[tensor].shape
        assert score.flags.c_contiguous
        np.testing.assert_allclose(score, taken[tensor], rtol=1e-5, atol=1e-7)
    if granularity == "kernel":
        inputs, outputs = np.shape(params["convs"][1]["kernel"])[2:]
        name = torch_names(model)["convs/1/kernel"]
        assert found[name].shape == (outputs, inputs, 1, 1)
        theirs = nnx.to_pure_dict(scores)["convs"][1]["kernel"]
        np.testing.assert_array_equal(found[name][:, :, 0, 0], theirs[0, 0].T)
    (masks,) = nested_masks(scores, [0.5])
    shapes_of_masks = {name: mask.shape for name, mask in to_torch(model, masks).items()}
    assert shapes_of_masks == {name: score.shape for name, score in found.items()}
    assert {mask.dtype for mask in to_torch(model, masks).values()} == {np.dtype(bool)}


def test_trees_of_a_part_of_the_network():
    model = small_dncnn()
    tree = {
        "convs": {1: {"kernel": jnp.arange(36.0).reshape(1, 1, 6, 6)}, 2: {"kernel": False}},
        "norms": {"2": {"mean": np.ones(1, np.int8)}},
        "head": None,
        "note": "not an array",
    }
    found = to_torch(model, tree)
    assert set(found) == {"dncnn.2.weight", "dncnn.6.running_mean"}
    assert found["dncnn.2.weight"][4, 3, 0, 0] == 6 * 3 + 4
    assert found["dncnn.6.running_mean"].dtype == np.int8
    assert to_torch(model, {}) == {}


@pytest.mark.parametrize("build", [small_vgg, small_dncnn])
def test_the_tree_of_the_network_itself(build):
    model = build()
    expected = safetensors.numpy.save(to_torch(model))
    # Whatever else is in its state, as the numbers for dropout, is no tensor of a checkpoint.
    assert safetensors.numpy.save(to_torch(model, nnx.state(model))) == expected
    assert safetensors.numpy.save(to_torch(model, nnx.state(model, WEIGHTS))) == expected


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"convs": {9: {"kernel": np.ones((1, 1, 6, 6))}}},
            r"expected leaves of the model's .*, got 'convs/9/kernel'\. The model has 'convs/0/k",
        ),
        ({"dncnn.0.weight": np.ones(1)}, r"got 'dncnn\.0\.weight'"),
        (
            {"convs": {1: {"kernel": np.ones((1, 1, 6, 5))}}},
            r"'convs/1/kernel': expected an array that broadcasts against shape \(3, 3, 6, 6\), "
            r"each axis .*, got shape \(1, 1, 6, 5\)\.",
        ),
        # In PyTorch's layout already, and with fewer axes.
        ({"convs": {0: {"kernel": np.ones((6, 1, 1, 1))}}}, r"got shape \(6, 1, 1, 1\)"),
        ({"convs": {1: {"kernel": np.ones((6, 6))}}}, r"got shape \(6, 6\)"),
        ({"convs": {1: {"kernel": np.ones((0, 1, 6, 6))}}}, r"got shape \(0, 1, 6, 6\)"),
        ({"norms": {1: {"scale": np.float32(1)}}}, r"got shape \(\)"),
        ({"a": {"b": np.ones(6)}, "a/b": np.ones(6)}, "tree: two leaves are called 'a/b'"),
    ],
)
def test_trees_that_do_not_fit(tree, message):
    with pytest.raises(ValueError, match=message):
        to_torch(small_dncnn(), tree)


# Trained weights ----------------------------------------------------------------------------

needs_data = pytest.mark.skipif("SELCRYPT_DATA" not in os.environ, reason="no SELCRYPT_DATA")


def psnr(clean, image):
    return -10 * np.log10(np.mean((clean - image) ** 2))


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_the_papers_colour_weights_denoise_as_in_its_release():
    folder = DATA / "dncnn_color_paper"
    model = DnCNN(channels=3, eps=1e-4, first_bias=True, rngs=rngs())
    loaded(model, safetensors.numpy.load_file(folder / "dncnn_color_sigma50.safetensors"))
    with np.load(folder / "crops_sigma50.npz") as crops:
        clean, noisy = crops["clean_bgr_uint8"] / np.float32(255), crops["noisy_bgr"]
    denoised = apply(model, noisy)
    figures = [psnr(*pair) for pair in zip(clean, denoised, strict=True)]
    # What the release's own code gives, unclipped: release_reference.json.
    np.testing.assert_allclose(figures, [27.8396, 39.5913, 27.0273, 25.5270], atol=0.01)


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_grey_weights_denoise():
    import skimage.io

    model = DnCNN(channels=1, rngs=rngs())
    loaded(model, safetensors.numpy.load_file(DATA / "dncnn_gray/dncnn_s25.safetensors"))
    image = skimage.io.imread(DATA / "dncnn_gray/set12/01.png")
    clean = image[64:192, 64:192] / np.float32(255)
    noisy = clean + np.float32(25 / 255) * normal(0, clean.shape)
    denoised = apply(model, noisy[None, ..., None])[0, ..., 0]
    assert psnr(clean, noisy) < 21
    assert psnr(clean, denoised) > 28
