"""Tables beside packed 4-bit weights are left alone unless they are named."""

import numpy as np
import pytest

from selcrypt_jax import Secret, Select, protect, with_small_leaves

RNG = np.random.default_rng(0)
SECRET = Secret.generate()
# Layer by layer as the libraries save them: what is packed, tables, and the rest.
LAYOUTS = {
    "bitsandbytes, 4 bits": (
        {"w.weight": np.uint8},
        {"w.weight.quant_map": 16, "w.weight.nested_quant_map": 256},
        {"w.weight.absmax": 64, "w.weight.nested_absmax": 16},
    ),
    "bitsandbytes, 8 bits": ({"w.weight": np.int8}, {"w.SCB": 32}, {"w.bias": 32}),
    "GPTQ": ({"w.qweight": np.int32}, {"w.qzeros": 32, "w.g_idx": 32}, {"w.scales": 64}),
    "codebooks": ({"w.codes": np.int16}, {"w.codebooks": 64}, {"w.scales": 32}),
    "zero points": ({"w.weight_packed": np.int32}, {"w.weight_zero_point": 64}, {"w.bias": 32}),
}


def tree(case: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    codes, tables, rest = LAYOUTS[case]
    params: dict[str, np.ndarray] = {
        name: RNG.integers(0, 100, (64, 64)).astype(dtype) for name, dtype in codes.items()
    }
    for name, size in (tables | rest).items():
        params[name] = RNG.standard_normal(size).astype(np.float32)
    params["head.weight"] = RNG.standard_normal((64, 64)).astype(np.float32)
    return params, list(tables), list(rest)


@pytest.mark.parametrize("case", LAYOUTS)
def test_tables_stay_and_small_tensors_do_not(case):
    params, tables, rest = tree(case)
    release = protect(params, secret=SECRET, selection=Select(small=0.3), levels=1, rest="plain")
    for name in tables:
        assert release.params[name] is params[name], name
    for name in rest:
        assert (release.params[name] != params[name]).any(), name
    masks = with_small_leaves(params, (dict.fromkeys(params, False),), small=0.3)
    selected = {name for name, mask in masks[0].items() if np.any(mask)}
    assert selected == set(rest)


def test_tables_that_are_named_are_encrypted():
    params, (table, *_), _ = tree("bitsandbytes, 4 bits")
    select = Select(select="quant_map|head", small=0.3)
    release = protect(params, secret=SECRET, selection=select, levels=1, rest="plain")
    assert (release.params[table] != params[table]).any()


def test_without_packed_weights_a_name_says_nothing():
    params = {
        "w": RNG.standard_normal((64, 64)).astype(np.float32),
        "zeros": RNG.standard_normal(32).astype(np.float32),
        "lut": RNG.standard_normal((32, 32)).astype(np.float32),
        "vq.codebook": RNG.standard_normal((32, 32)).astype(np.float32),
    }
    params |= {"steps": np.arange(9, dtype=np.int32), "vq.seen": np.arange(9, dtype=np.int64)}
    release = protect(params, secret=SECRET, levels=1, rest="plain")
    for name, leaf in params.items():
        if leaf.dtype == np.float32:
            assert (release.params[name] != leaf).any(), name
