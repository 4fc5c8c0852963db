"""Weights that occur more than once: what is encrypted in one copy is plain in none."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from selcrypt_jax import (
    Secret,
    Select,
    encrypt,
    inspect_file,
    level_key,
    protect,
    protect_file,
    unlock,
    unlock_file,
)
from selcrypt_jax._masks.scores import source_of_tree
from selcrypt_jax._release import copies
from selcrypt_jax._release.copies import Contents
from selcrypt_jax._tree.names import named_leaves

SECRET = Secret.generate()
RNG = np.random.default_rng(0)
A, B, C = (RNG.standard_normal((48, 64)).astype(np.float32) for _ in range(3))
KERNEL = RNG.standard_normal((32, 16, 3, 3)).astype(np.float32)
MASK = np.abs(A) > 1.5


def moved(leaf: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Half of the first leaf."""
    half = np.arange(leaf.size).reshape(leaf.shape) % 2 == 0
    return np.where(half, leaf, plain)


WHOLE = {
    "the same": (A, A.copy(), lambda b: b),
    "transposed": (A, A.T, lambda b: b.T),
    "flat": (A, A.reshape(-1), lambda b: b.reshape(A.shape)),
    "another shape": (A, A.reshape(64, 48), lambda b: b.reshape(A.shape)),
    "fused by rows": (A, np.concatenate([B, A, C]), lambda b: b[48:96]),
    "fused by columns": (A, np.concatenate([B, A, C], 1), lambda b: b[:, 64:128]),
    "fused, transposed": (A, np.concatenate([B.T, A.T, C.T], 1), lambda b: b[:, 48:96].T),
    "stacked": (A, np.stack([B, A]), lambda b: b[1]),
    "stacked behind": (A, np.stack([B, A], -1), lambda b: b[..., 1]),
    "a larger vocabulary": (A, np.concatenate([A, B[:2]]), lambda b: b[:48]),
}


def laid_out(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(leaf) for name, leaf in zip(("a", "b"), pair, strict=True)}


def encrypted(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return before.view(f"u{before.itemsize}") != np.asarray(after).view(f"u{before.itemsize}")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("case", WHOLE)
def test_a_mask_for_one_of_two_is_for_both(case, dtype):
    *pair, part = WHOLE[case]
    params = {name: leaf.astype(dtype) for name, leaf in laid_out(tuple(pair)).items()}
    release = protect(params, ({"a": MASK, "b": False},), secret=SECRET, rest="plain")
    changed = {name: encrypted(leaf, release.params[name]) for name, leaf in params.items()}
    # A weight may come back to its own place by chance, but hardly any.
    assert not (part(changed["b"]) & ~MASK).any()
    assert (part(changed["b"]) & MASK).sum() > 0.9 * MASK.sum()
    assert changed["b"].sum() == part(changed["b"]).sum()
    opened = unlock(release, level_key(SECRET, release.model_id, levels=1))
    for name, leaf in params.items():
        np.testing.assert_array_equal(opened[name], leaf)


@pytest.mark.parametrize("case", ["fused by rows", "fused, transposed", "stacked behind"])
def test_a_mask_for_the_larger_one_is_for_the_smaller_one(case):
    *pair, part = WHOLE[case]
    params = laid_out(tuple(pair))
    mask = np.zeros(params["b"].shape, bool)
    part(mask)[...] = MASK
    release = protect(params, ({"a": False, "b": mask},), secret=SECRET, rest="plain")
    changed = encrypted(params["a"], release.params["a"])
    assert changed.sum() > 0.9 * MASK.sum()
    assert not (changed & ~MASK).any()


@pytest.mark.parametrize("axes", [(2, 3, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)])
@pytest.mark.parametrize("fused", [False, True])
def test_kernels_in_another_order_of_axes(axes, fused):
    other = KERNEL.transpose(axes)
    if fused:
        other = np.concatenate([other, other * 3], axis=-1)
    params = {"a": KERNEL, "b": np.ascontiguousarray(other)}
    mask = np.zeros((32, 16, 1, 1), bool)
    mask[:7] = True
    release = protect(params, ({"a": mask, "b": False},), secret=SECRET, rest="plain")
    changed = encrypted(params["b"], release.params["b"])
    assert changed.sum() > 0.95 * 7 * 16 * 9
    part = changed[..., : changed.shape[-1] // 2] if fused else changed
    assert not part.transpose(np.argsort(axes))[7:].any()


def test_an_average_of_which_half_has_not_moved():
    params = {"a": A, "ema": moved(A, A * np.float32(0.99))}
    release = protect(params, ({"a": MASK, "ema": False},), secret=SECRET, rest="plain")
    assert encrypted(params["ema"], release.params["ema"])[MASK].mean() > 0.9


def test_copies_of_copies():
    params = {"a": A, "b": np.ascontiguousarray(A.T), "c": np.concatenate([B.T, A.T]), "d": A + 0}
    for chosen in params:
        mask = {
            "a": MASK,
            "b": MASK.T,
            "c": np.concatenate([np.zeros_like(MASK.T), MASK.T]),
            "d": MASK,
        }
        masks = ({name: mask[name] if name == chosen else False for name in params},)
        release = protect(params, masks, secret=SECRET, rest="plain")
        for name, leaf in params.items():
            changed = encrypted(leaf, release.params[name])
            assert not (changed & ~mask[name]).any()
            assert changed[mask[name]].mean() > 0.9


def test_masks_that_differ_are_joined_and_the_lower_level_opens_what_both_have():
    low, high = np.abs(A) > 2, np.abs(A) > 1
    masks = (
        {"a": low, "b": False, "c": False},
        {"a": low, "b": high, "c": False},
    )
    params = {"a": A, "b": A.copy(), "c": C}
    release = protect(params, masks, secret=SECRET, rest="plain")
    basic = unlock(release, level_key(SECRET, release.model_id, level=1, levels=2))
    for name in ("a", "b"):
        shut = encrypted(A, basic[name])
        assert not (shut & low).any()
        assert shut[high & ~low].mean() > 0.9


def test_files_have_them_too(tmp_path):
    params = {"a": A, "b": np.ascontiguousarray(np.concatenate([B.T, A.T, C.T], 1))}
    save_file(params, tmp_path / "in")
    options = {"secret": SECRET, "levels": 2, "rest": "plain"}
    select = Select("random", select="^a$", budget=0.3, small=0, layout="HWIO")
    done = protect_file(tmp_path / "in", tmp_path / "out", selection=select, **options)
    assert set(done.groups) == {"a", "b"}
    assert done.groups["a"] == done.groups["b"]
    key = level_key(SECRET, bytes.fromhex(inspect_file(tmp_path / "out").model_id), levels=2)
    unlock_file(tmp_path / "out", tmp_path / "back", key)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "in").read_bytes()
    # The next version ties what was apart, and the other way round.
    save_file({"a": A, "b": np.concatenate([B.T, C.T, C.T], 1)}, tmp_path / "apart")
    done = protect_file(
        tmp_path / "apart", tmp_path / "next", secret=SECRET, like=tmp_path / "out", rest="plain"
    )
    assert done.groups["a"] == done.groups["b"]


def test_too_little_of_a_copy_is_refused_by_name():
    params = {"a": A, "b": A[:8, :8].copy()}
    mask = np.zeros(A.shape, bool)
    mask[4:] = True
    mask[4:8, :8] = False
    mask[4, 2:4] = True
    with pytest.raises(ValueError, match=r"'b', level 1, a copy of .* in 'a': too small to"):
        protect(params, ({"a": mask, "b": False},), secret=SECRET)


def test_what_is_only_similar_is_said(tmp_path):
    noisy = (A + 0.05 * B).astype(np.float32)
    for other in (noisy, A.astype(np.float16), A * 2):
        params = {"a": A, "other": other}
        with pytest.warns(
            UserWarning, match=r"params: 100% of the weights encrypted in 'a' .*'other'"
        ):
            protect(params, ({"a": MASK, "other": False},), secret=SECRET, rest="plain")
    save_file({"a": A, "ema": noisy}, tmp_path / "in")
    done = protect_file(
        tmp_path / "in", tmp_path / "out", secret=SECRET, levels=1, rest="plain",
        selection=Select("random", small=0, layout="HWIO"),
    )  # fmt: skip
    assert len(done.similar) == 2
    assert all("very similar. Leave one" in text for text in done.similar)


def test_what_is_not_alike_is_left_alone():
    params = {"a": A, "b": B, "c": np.ascontiguousarray(C.T), "zeros": A * 0, "ones": A * 0 + 1}
    masks = ({name: MASK if name == "a" else False for name in params},)
    release = protect(params, masks, secret=SECRET, rest="plain")
    for name in ("b", "c", "zeros", "ones"):
        assert release.params[name] is params[name]


@pytest.mark.parametrize(
    ("one", "other"),
    {
        "rows in another order": (A, A[RNG.permutation(48)]),
        "upside down": (A, A[::-1]),
        "filters in another order": (KERNEL, KERNEL[RNG.permutation(32)]),
        "each has rows of its own": (np.concatenate([A, C[:20]]), np.concatenate([B[:20], A])),
    }.values(),
)
def test_what_is_there_in_another_order_is_said(one, other):
    params = laid_out((one, other))
    with pytest.warns(UserWarning, match="Much of 'a' is also in 'b', in another order"):
        protect(params, ({"a": np.abs(one) > 1.5, "b": False},), secret=SECRET, rest="plain")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.int8, np.float32, ml_dtypes.bfloat16])
def test_few_values_agree_by_chance_and_are_no_copies(dtype):
    pair = [RNG.integers(-1, 2, shape).astype(dtype) for shape in ((96, 128), (384, 512))]
    mask = RNG.random((96, 128)) < 0.3
    release = protect(
        laid_out((pair[0], pair[1])), ({"a": mask, "b": False},), secret=SECRET, rest="plain"
    )
    assert not encrypted(pair[1], release.params["b"]).any()


@pytest.mark.parametrize("zeros", [1.0, 0.9, 0.5])
def test_a_large_tensor_of_zeros_needs_little_memory(zeros):
    leaf = RNG.standard_normal((1024, 1024)).astype(np.float32)
    leaf[RNG.random(leaf.shape) < zeros] = 0
    leaf[0, 0] = 1
    source = source_of_tree(named_leaves({"a": leaf, "b": leaf.T.copy()}))
    tracemalloc.start()
    found = Contents(dict.fromkeys(source.tensors, source), {}).copies()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * leaf.nbytes
    assert bool(found) == (zeros < 1)


def test_encrypt_leaves_it_to_the_caller():
    # It is told which weights to take, leaf by leaf, and shapes are all that it may depend on.
    assert "copies" in (encrypt.__doc__ or "").lower()


def test_many_that_are_alike_are_named_once_each_and_tiny_ones_are_not():
    decay = np.log(np.arange(1, 17)) * np.ones((64, 1))
    gate = RNG.standard_normal((1, 16))
    params = {
        f"{number}.{name}": (leaf + 0.1 * RNG.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in (("decay", decay), ("gate", gate))
        for number in range(6)
    }
    masks = ({name: name.startswith("0") for name in params},)
    with pytest.warns(UserWarning, match=r"'0\.decay' are plain.* in '[1-5]\.decay'") as caught:
        protect(params, masks, secret=SECRET, rest="plain")
    assert len(caught) == 5
    masks = ({name: np.arange(16) % 2 == int(name[0]) % 2 for name in params},)
    masks = ({n: np.broadcast_to(mask, params[n].shape) for n, mask in masks[0].items()},)
    with pytest.warns(UserWarning, match="decay") as caught:  # not one for each pair
        protect(params, masks, secret=SECRET, rest="plain")
    assert len(caught) == 6


def test_many_tensors_of_one_shape_are_compared_in_parts(monkeypatch):
    params = {f"{n:02}": RNG.standard_normal((8, 8)).astype(np.float32) for n in range(20)}
    params["19"] = params["03"] * 2
    params["04"] = params["03"] * 3
    source = source_of_tree(named_leaves(params))
    contents = Contents(dict.fromkeys(params, source), params)
    contents.copies()
    whole = list(contents.similar())
    monkeypatch.setattr(copies, "_ROWS", 3)
    assert list(contents.similar()) == whole == [("03", "04"), ("03", "19"), ("04", "19")]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_numbers_out_of_range_are_compared_without_a_warning(dtype):
    """Random bytes include NaN, signalling or quiet, and infinity."""
    tensors = {name: np.frombuffer(RNG.bytes(8192), dtype).reshape(16, -1) for name in "ab"}
    tensors["c"] = np.full_like(tensors["a"], np.finfo(dtype).max)
    contents = Contents(dict.fromkeys(tensors, source_of_tree(named_leaves(tensors))), set(tensors))
    assert contents.copies() == []
    assert list(contents.similar()) == []
