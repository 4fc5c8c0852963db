"""A header that would be too large: the error says what fills it, and what to do."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from selcrypt_jax import Secret, Select, protect_file
from selcrypt_jax._io import safetensors
from selcrypt_jax._io.arrays import ArrayInfo
from selcrypt_jax._masks.levels import as_levels
from selcrypt_jax._release import size

SECRET = Secret.generate()
RNG = np.random.default_rng(0)


def infos(count: int, shape: tuple[int, ...]) -> dict[str, ArrayInfo]:
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    return {name.format(i // 100, i % 100): ArrayInfo("BF16", shape) for i in range(count)}


@pytest.mark.slow
def test_many_tensors_are_not_blamed_on_positions():
    tensors = infos(520_000, (16, 16))
    shapes = [(16, 16)] * len(tensors)
    expected = (
        r"model: header: .*520,000 tensors: .* MB names, .* digests, .* MB pos.*several files"
    )
    for levels in (as_levels(2, 0.02), None):
        with pytest.raises(ValueError, match=expected if levels else "[0-9] MB names, .* several"):
            size.check_header(tensors, shapes, levels, "model")
    size.check_header(infos(100_000, (16, 16)), shapes[:100_000], as_levels(2, 0.02), "model")


def test_digests_of_large_tensors_count_too():
    huge = {"w": ArrayInfo("F32", (2**20, 2**20))}  # a digest for each 4 MiB, half a million
    size.check_header(huge, [], None, "model")
    with pytest.raises(ValueError, match="MB names, shapes and digests"):
        size.check_header(dict.fromkeys("abc", huge["w"]), [], None, "model")


@pytest.mark.parametrize(
    ("tensors", "metadata", "selection", "words"),
    [
        (
            {f"layer{i}": (8, 8) for i in range(30)},
            None,
            {"budget": 0.2},
            "into several files",
        ),
        ({"w": (256, 256)}, None, {"budget": 0.5, "scope": "model"}, "Select larger groups"),
        ({"w": (64, 64)}, {"note": "x" * 5700}, {"budget": 0.02}, "Shorten the metadata"),
    ],
    ids=["tensors", "positions", "metadata"],
)
def test_what_fills_a_header_is_said(tensors, metadata, selection, words, monkeypatch, tmp_path):
    arrays = {n: RNG.standard_normal(shape, np.float32) for n, shape in tensors.items()}
    save_file(arrays, tmp_path / "in.safetensors", metadata)
    for module in (safetensors, size):
        monkeypatch.setattr(module, "MAX_HEADER", 6000)
    with pytest.raises(ValueError, match=rf"header: expected at most .*{words}") as caught:
        protect_file(
            tmp_path / "in.safetensors",
            tmp_path / "out.safetensors",
            secret=SECRET,
            levels=2,
            selection=Select(granularity="weight", small=0, layout="HWIO", **selection),
        )
    assert not (tmp_path / "out.safetensors").exists()
    assert re.search(rf"for its {len(tensors)} tensors?: ", str(caught.value))
