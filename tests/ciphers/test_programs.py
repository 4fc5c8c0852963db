"""What is compiled, counted: speed is kept by counts, not by clocks."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selcrypt_jax import (
    LosslessCipher,
    PSSConfig,
    chacha20_impl,
    decrypt,
    encrypt,
    importance,
    nested_masks,
    pss_learner,
)
from selcrypt_jax._ciphers.engine_host import _move_in_place, _padded_tables
from selcrypt_jax._ciphers.engine_numpy import leaf_tables


def tree(leaves, size=40):
    keys = jax.random.split(jax.random.key(0), leaves)
    return {f"w{i:03}": jax.random.normal(key, (size, size)) for i, key in enumerate(keys)}


def chacha_keys(levels):
    return jax.random.split(jax.random.key(0, impl=chacha20_impl), levels)


def compiled_names(caplog, function):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return [m.split()[1] for m in caplog.messages if m.startswith("Compiling")]


def operations(program, name):
    return len(re.findall(rf" {name}\(", program))


@pytest.mark.parametrize("leaves", [2, 30])
def test_leaves_of_a_shape_share_programs(caplog, leaves):
    # Sizes that no other test has, so that nothing is in the cache.
    params = tree(leaves, size=43 + leaves)
    masks, keys = nested_masks(importance.l2(params), [0.2, 0.4]), chacha_keys(2)
    names = compiled_names(caplog, lambda: encrypt(params, masks, keys))
    assert len([name for name in names if "move" in name]) == 1
    assert compiled_names(caplog, lambda: encrypt(params, masks, keys)) == []


def test_on_a_cpu_nothing_is_sorted_by_xla(caplog):
    params = tree(3, size=37)
    masks, keys = nested_masks(importance.l2(params), [0.3]), chacha_keys(1)
    names = compiled_names(caplog, lambda: decrypt(params, masks, keys))
    assert not [name for name in names if "permutation" in name or "rewrite" in name]


def text_of(leaves, levels, cipher=None):
    params = tree(leaves)
    shares = [0.5 * (level + 1) / levels for level in range(levels)]
    masks, keys = nested_masks(importance.l2(params), shares), chacha_keys(levels)
    function = jax.jit(lambda params, keys: decrypt(params, masks, keys, cipher=cipher))
    return function.lower(params, keys).as_text()


def test_a_jitted_program_has_one_sort_and_does_not_grow_with_levels():
    assert text_of(2, 2).count("stablehlo.sort") == text_of(6, 5).count("stablehlo.sort") == 1
    # Rings of one size in a leaf are one loop.
    few, many = text_of(2, 2), text_of(2, 6)
    for operation in ("gather", "scatter"):
        assert few.count(f"stablehlo.{operation}") == many.count(f"stablehlo.{operation}") > 0
    assert "stablehlo.sort" not in text_of(2, 2, LosslessCipher(permute=False))


def test_a_leaf_is_rewritten_where_it_lies():
    leaf = jnp.zeros((512, 512))
    rings = [(np.random.default_rng(0).random(leaf.shape) < 0.05, bytes(32))]
    made = leaf_tables(
        leaf.shape,
        rings,
        cipher=LosslessCipher(),
        fine=0xFFFFF,
        dtype=np.dtype("u4"),
        inverse=True,
    )
    tables = _padded_tables(made, leaf.size)
    program = _move_in_place.lower(leaf, *tables, inverse=True, as_it_is=True).compile()
    memory = program.memory_analysis()
    # In place: the leaf is no output of its own, and no copy of it is made on the way.
    assert memory.alias_size_in_bytes == leaf.nbytes
    assert memory.temp_size_in_bytes < leaf.nbytes / 4
    text = program.as_text()
    assert operations(text, "scatter") <= 1
    assert operations(text, "sort") == 0
    assert not re.search(r"f32\[(512,512|262144)\]\S* copy\(", text)


def test_a_step_of_pss_is_compiled_once(caplog):
    trained = jax.random.normal(jax.random.key(0), (7, 5))
    params = {"w": trained}
    batches = jax.random.normal(jax.random.key(1), (4, 3, 7))

    def loss_fn(params, batch):
        return jnp.square(batch @ (params["w"] - trained)).mean() + 1e-3

    for config in (PSSConfig(), PSSConfig("keep", optimizer=optax.sgd(0.1, momentum=0.9))):
        learner = pss_learner(loss_fn, params, config=config)
        state = learner.init(params, batches, key=jax.random.key(2))

        def three_runs(learner=learner, state=state):
            for _ in range(3):
                state, _ = learner.run(params, batches, state, 2)

        names = compiled_names(caplog, three_runs)
        assert [name for name in names if "step" in name] == ["jit(step)"]
