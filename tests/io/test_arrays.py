"""Input arrays: in either byte order, from other libraries, of dtypes that no file has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selcrypt_jax import (
    Secret,
    Select,
    encrypt,
    importance,
    level_key,
    nested_masks,
    new_model_id,
    open_model,
    protect,
    ring_keys,
    unlock,
    with_small_leaves,
)
from selcrypt_jax._io.arrays import ArraySource

SECRET = Secret.generate()
RNG = np.random.default_rng(0)
NATIVE = {
    "w": RNG.standard_normal((32, 32)).astype(np.float32),
    "b": RNG.standard_normal(32),
    "i": np.arange(5, dtype=np.int32),
    "h": RNG.standard_normal((32, 8)).astype(np.float16),
}
SWAPPED = {name: leaf.astype(leaf.dtype.newbyteorder(">")) for name, leaf in NATIVE.items()}


def same_numbers(tree: dict[str, np.ndarray]) -> None:
    for name, leaf in NATIVE.items():
        assert tree[name].dtype == leaf.dtype  # native
        np.testing.assert_array_equal(tree[name], leaf)


def test_big_endian_leaves_are_written_little_endian(tmp_path):
    released = protect(SWAPPED, secret=SECRET, levels=2)
    key = level_key(SECRET, released.model_id, levels=2)
    same_numbers(unlock(released, key))
    released.save(tmp_path / "m")
    same_numbers(open_model(tmp_path / "m", key))
    same_numbers(open_model(tmp_path / "m", key, like=SWAPPED))
    released.save_orbax(tmp_path / "o")
    same_numbers(open_model(tmp_path / "o", key))


@pytest.mark.parametrize("name", ["l2", "mean", "ascend", "descend"])
def test_importance_is_that_of_the_numbers(name):
    scores = getattr(importance, name)
    for leaf, expected in scores(NATIVE).items():
        np.testing.assert_array_equal(scores(SWAPPED)[leaf], expected)


def test_masks_of_big_endian_leaves():
    scores = importance.l2(NATIVE)
    for params in (NATIVE, SWAPPED):
        masks = nested_masks(scores, [0.3], params=params)
        masks = with_small_leaves(params, masks, small=0.1)
        assert masks[0]["b"].all()
        assert masks[0]["w"].sum() == 307
    swapped_scores = {"w": np.abs(SWAPPED["w"])}
    levels = [0.2, 0.4]
    for mask, expected in zip(
        nested_masks(swapped_scores, levels), nested_masks({"w": np.abs(NATIVE["w"])}, levels),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(mask["w"], expected["w"])


def test_a_big_endian_base_and_big_endian_scores():
    base = {"w": (NATIVE["w"] + 1).astype(">f4")}
    select = Select(importance={"w": np.abs(SWAPPED["w"])})
    assert protect(NATIVE, secret=SECRET, levels=1, selection=select).model_id
    released = protect(SWAPPED, secret=SECRET, levels=1, selection=Select(base=base), rest="plain")
    assert released.plain_change is not None
    assert 0 < released.plain_change < 1


def test_encrypt_refuses_them_with_the_remedy():
    keys = ring_keys(level_key(SECRET, new_model_id(), levels=1))
    masks = [{"w": True, "b": False, "i": False, "h": False}]
    with pytest.raises(ValueError, match=r"'w': expected native byte order.*newbyteorder"):
        encrypt(SWAPPED, masks, keys)


class Tensor:
    """An array like PyTorch's, which need not be installed."""

    shape, ndim, dtype = (3, 3), 2, "torch.float32"


Tensor.__module__ = "torch"


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (Tensor(), r"got torch.float32. Pass NumPy arrays: tensor.detach\(\).cpu\(\).numpy\(\)"),
        (jnp.ones((4, 4), "int4"), r"got int4. Convert it to a wider dtype, leaf.astype\('int8'\)"),
        (
            jnp.ones((4, 4), "uint4"),
            r"got uint4. Convert it to a wider dtype, leaf.astype\('uint8'\)",
        ),
        (jnp.ones((4, 4), "int2"), r"got int2. Convert it to a wider dtype, leaf.astype\('int8'\)"),
        (jnp.ones(4, "float4_e2m1fn"), r"leaf.astype\('float8_e4m3fn'\)"),
        (np.ones(3, "c16"), "got complex128. Convert it, or keep it out"),
        (np.ones(3, "g"), r"got float128. Convert it, or keep"),
        (np.array(["a"]), "got <U1. Convert it, or keep"),
        (np.array([{}, []], object), "got object. Convert it, or keep"),
        (np.ones(3, "M8[s]"), "Convert it, or keep"),
        (np.zeros(3, "f2,i4"), "Convert it, or keep"),
    ],
)
def test_what_no_file_holds_is_refused_with_its_own_advice(leaf, words):
    with pytest.raises(ValueError, match=rf"params 't': expected .*{words}"):
        protect({"w": NATIVE["w"], "t": leaf}, secret=SECRET)


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn"])
def test_the_advice_for_narrow_numbers_works(name):
    leaf = jnp.asarray(RNG.integers(0, 7, (8, 8)), jnp.int8).astype(name)
    wide = "float8_e4m3fn" if name.startswith("float") else name.rstrip("4") + "8"
    source = ArraySource({"t": leaf.astype(wide)})
    assert source.tensors["t"].shape == (8, 8)
    back = leaf.astype(wide).astype(name)
    assert jax.numpy.array_equal(back.astype(wide), leaf.astype(wide))
