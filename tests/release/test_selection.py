"""The same options select the same weights in every function."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from selcrypt_jax import (
    LosslessCipher,
    PaperLevels,
    Secret,
    Select,
    Targets,
    calibrate_levels,
    importance,
    inspect_file,
    level_key,
    mask_counts,
    nested_masks,
    open_model,
    protect,
    protect_file,
    unlock,
    with_small_leaves,
)

SECRET = Secret(bytes(range(32)))


def network(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "first": (3, 3, 1, 32),
        "conv": (3, 3, 32, 32),
        "norm": (32,),
        "tiny": (5,),
        "head": (64, 33),
    }
    return {n: rng.standard_normal(s).astype(jnp.dtype(dtype)) for n, s in shapes.items()}


def changed(public, plain) -> dict[str, np.ndarray]:
    return {name: np.asarray(public[name] != plain[name]) for name in plain}


def written(tmp_path, params, **options):
    safetensors.numpy.save_file(params, tmp_path / "plain.safetensors", {"format": "np"})
    return protect_file(
        tmp_path / "plain.safetensors", tmp_path / "public", secret=SECRET, force=True, **options
    )


LEVELS = st.one_of(
    st.integers(1, 5),
    st.lists(st.integers(1, 20), min_size=1, max_size=4, unique=True).map(
        lambda percents: [percent / 20 for percent in sorted(percents)]
    ),
    st.just(PaperLevels(0.3, levels=3)),
)


@settings(max_examples=25)
@given(
    levels=LEVELS,
    scope=st.sampled_from(["leaf", "model"]),
    small=st.sampled_from([0, 0.02, 0.1]),
    cipher=st.sampled_from(
        [LosslessCipher(), LosslessCipher(fine_bits=0), LosslessCipher(permute=False)]
    ),
    strategy=st.sampled_from(["l2", "descend"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_functions_agree(tmp_path_factory, levels, scope, small, cipher, strategy, dtype):
    tmp_path = tmp_path_factory.mktemp("selection")
    params = network(dtype)
    budget = 0.6 if isinstance(levels, int) else None
    selection = Select(strategy, budget=budget, scope=scope, small=small)
    options = {"levels": levels, "selection": selection, "cipher": cipher}
    try:
        found = written(tmp_path, params, **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"too small to hide in|adds no groups"):
            protect(params, secret=SECRET, **options)
        return
    count = len(inspect_file(tmp_path / "public").levels)
    released = protect(params, secret=SECRET, **options)
    key = level_key(SECRET, released.model_id, levels=count)

    scores = getattr(importance, strategy)(params)
    (small_mask,) = with_small_leaves(params, (False,), small=small, cipher=cipher)
    whole = {name for name, mask in small_mask.items() if mask is not False}
    graded = {n: False if n in whole else s for n, s in scores.items()}
    masks = nested_masks(
        graded, levels, budget=budget, scope=scope, params=params, cipher=cipher
    )  # fmt: skip
    masks = with_small_leaves(params, masks, small=small, cipher=cipher)
    for level in range(1, count + 1):
        file_key = level_key(SECRET, found.model_id, level=level, levels=count)
        in_file = changed(open_model(tmp_path / "public", file_key), params)
        in_memory = changed(unlock(released, key.lower(level)), params)
        for name in params:
            still = np.broadcast_to(masks[-1][name], params[name].shape) & ~np.broadcast_to(
                masks[level - 1][name], params[name].shape
            )
            # A permutation leaves some weights as they were.
            for where in (in_file[name], in_memory[name]):
                assert not (where & ~still).any(), (name, level)
                assert where.sum() >= still.sum() / 2
    groups = {n: c.groups for n, c in mask_counts(params, masks[-1]).items() if c.groups}
    assert groups == dict(found.groups)


def test_a_ring_that_the_command_merges_is_merged_in_memory(tmp_path):
    """1 of 32 kernels of 9 bfloat16 weights cannot hide, and is opened by the next level."""
    params = {n: leaf for n, leaf in network("bfloat16").items() if n in ("first", "conv")}
    selection = Select("l2", small=0)
    written(tmp_path, params, levels=[0.05, 0.3], selection=selection)
    released = protect(params, secret=SECRET, levels=[0.05, 0.3], selection=selection)
    scores = importance.l2(params)
    with pytest.raises(ValueError, match="'first', ring 1: too small to hide in"):
        protect(params, nested_masks(scores, [0.05, 0.3]), secret=SECRET)
    masks = nested_masks(scores, [0.05, 0.3], params=params)
    assert not masks[0]["first"].any()
    protect(params, masks, secret=SECRET)
    opened = unlock(released, level_key(SECRET, released.model_id, level=1, levels=2))
    assert (np.asarray(opened["first"]) != params["first"]).any()


@pytest.mark.parametrize("where", ["file", "memory", "means"])
def test_small_leaves_are_those_that_the_given_cipher_hides(tmp_path, where):
    """`LosslessCipher(fine_bits=0)` needs more weights to hide in than the default."""
    params = network() | {"bias": np.random.default_rng(1).standard_normal(20).astype(np.float32)}
    cipher = LosslessCipher(fine_bits=0)
    targets = Targets(
        [None, 80],
        lambda p: 100 * float(np.mean([np.mean(np.asarray(p[n]) == params[n]) for n in params])),
        tolerance=3,
    )
    selection = Select("random", small=0.02)
    if where == "file":
        found = written(tmp_path, params, levels=targets, selection=selection, cipher=cipher)
        masks = found.calibration.masks
        assert "bias" not in found.groups
    elif where == "memory":
        released = protect(
            params, secret=SECRET, levels=targets, selection=selection, cipher=cipher
        )
        masks = released.calibration.masks
    else:
        import jax

        masks = calibrate_levels(
            params, targets, key=jax.random.key(0), keys=3, selection=selection, cipher=cipher
        ).masks
    assert not np.any(masks[-1]["bias"])
    assert np.all(masks[0]["norm"]) == cipher.hides(np.dtype("float32"), (32,))


def test_tied_weights_are_found_in_memory_too():
    params = network()
    params["copy"] = params["head"].copy()
    released = protect(
        params, secret=SECRET, levels=2, selection=Select("random", budget=0.4, select="head")
    )
    hidden = changed(released.params, params)
    assert hidden["head"].any()
    assert (hidden["head"] == hidden["copy"]).mean() > 0.95


def test_small_tensors_stay_in_levels_where_there_are_no_others(tmp_path):
    rng = np.random.default_rng(0)
    params = {"a": (8, 64), "b": (64, 16), "big": (512, 512)}
    params = {n: rng.standard_normal(s).astype(np.float32) for n, s in params.items()}
    found = written(tmp_path, params, levels=[0.1], selection=Select(select="^[ab]$"))
    assert found.groups == {"a": 51, "b": 102}
    with pytest.raises(ValueError, match=r"small: 0\.02 .* leaves nothing for levels to open"):
        protect(params, secret=SECRET, selection=Select(select="^[ab]$", small=0.02))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "l2"}, r"selection: expected a Select, got str. Pass Select"),
        ({"cipher": "lossless"}, "cipher: expected a LosslessCipher, got str"),
        ({"levels": Targets(20, float)}, "targets: expected a number for each level"),
    ],
)
def test_options_of_another_type_are_named(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        protect(network(), secret=SECRET, **options)
    with pytest.raises(TypeError, match=message):
        written(tmp_path, network(), **options)
    assert not (tmp_path / "public").exists()
