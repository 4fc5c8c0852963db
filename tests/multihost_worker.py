"""One of several processes that work together: ``python multihost_worker.py PORT COUNT INDEX FOLDER
TASK``; see test_multihost.py."""

import json
import os
import signal
import sys
from functools import cache
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from selcrypt_jax import (
    LosslessCipher,
    Protected,
    Secret,
    SigningKey,
    decrypt,
    encrypt,
    importance,
    level_key,
    nested_masks,
    protect,
    ring_keys,
    unlock,
)
from selcrypt_jax._ciphers import engine_host
from selcrypt_jax._tree import hosts

port, count, index = (int(text) for text in sys.argv[1:4])
folder, task = Path(sys.argv[4]), sys.argv[5]
engine_host._EXCHANGED = 100  # so that hosts tell each other about a leaf in several parts
SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(32))
SHAPES = {
    "conv": ((3, 3, 16, 32), "float32", P(None, None, "a", "b")),
    "dense": ((64, 48), "bfloat16", P("b", "a")),
    "bytes": ((32, 16), "int8", P(("a", "b"))),
    "scale": ((40,), "float32", P()),
}


@cache
def mesh() -> Mesh:
    return jax.make_mesh((count, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def original():
    found = {}
    for number, (name, (shape, dtype, _)) in enumerate(SHAPES.items()):
        rng = np.random.default_rng(number)
        values = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
        found[name] = values.view(dtype).reshape(shape)
    # Importance is judged of this one: no NaN in it.
    found["conv"] = np.random.default_rng(9).standard_normal(SHAPES["conv"][0], np.float32)
    return found


def spread(arrays):
    return {
        name: hosts.put(leaf, NamedSharding(mesh(), SHAPES[name][2]))
        for name, leaf in arrays.items()
    }


def octets(array):
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def assert_shards(tree, expected):
    """Every process checks its own part."""
    for name, leaf in tree.items():
        for shard in leaf.addressable_shards:
            assert octets(shard.data) == octets(expected[name][shard.index]), (name, shard.index)
        assert leaf.sharding.spec == SHAPES[name][2], name


def masks_of(params):
    finite = {n: x for n, x in params.items() if n in ("conv", "bytes")}
    scores = importance.l2(finite, select="conv|bytes") | {"dense": False, "scale": False}
    masks = nested_masks(scores, [0.3, 0.7])
    return tuple(mask | {"dense": bool(level)} for level, mask in enumerate(masks))


def bits():
    """Encrypts arrays that no process holds whole."""
    whole = original()
    params, masks, keys = (
        spread(whole),
        masks_of(whole),
        ring_keys(level_key(SECRET, bytes(16), levels=2)),
    )
    for cipher in (LosslessCipher(), LosslessCipher(permute=False)):
        expected = jax.tree.map(np.asarray, encrypt(whole, masks, keys, cipher=cipher))
        protected = encrypt(params, masks, keys, cipher=cipher)
        assert_shards(protected, expected)
        assert_shards(decrypt(protected, masks, keys, cipher=cipher), whole)
        again = jax.jit(lambda p, k, c=cipher: encrypt(p, masks, k, cipher=c))(params, keys)
        assert_shards(again, expected)
    floats = {name: leaf for name, leaf in params.items() if leaf.dtype == np.float32}
    of_level = [{name: mask[name] for name in floats} for mask in masks]
    _, gradient_of = jax.vjp(lambda params: encrypt(params, of_level, keys), floats)
    (gradient,) = gradient_of(floats)  # zero where it is encrypted
    assert_shards(gradient, {n: np.where(of_level[-1][n], np.float32(0), whole[n]) for n in floats})


def write():
    """Protects and saves."""
    whole = original()
    params = spread(whole)
    masks = masks_of(spread({n: whole[n] for n in ("conv", "bytes")}))
    for mask, same in zip(masks, masks_of(whole), strict=True):
        assert {n: octets(m) for n, m in mask.items()} == {n: octets(m) for n, m in same.items()}
    released = protect(params, masks, secret=SECRET, signing=SIGNING)
    if "kill" in task and index == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    released.save_orbax(folder / "public")
    with pytest.raises(OSError, match="public"):  # nothing is written twice
        released.save_orbax(folder / "public")


def read():
    """Loads and unlocks; no process opens more than its own part of what it loads."""
    whole = original()
    like = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=NamedSharding(mesh(), spec))
        for name, (shape, dtype, spec) in SHAPES.items()
    }
    released = Protected.load_orbax(folder / "public", like)
    assert all(leaf.sharding == like[name].sharding for name, leaf in released.params.items())
    for level in (1, 2):
        key = level_key(SECRET, released.model_id, level=level, levels=2)
        opened = unlock(released, key)
        if level == 2:
            assert_shards(opened, whole)
    changed = dict(released.params)
    changed["scale"] = spread({"scale": whole["scale"] + 1})["scale"]
    with pytest.raises(ValueError, match="scale"):  # found by every process
        unlock(Protected(changed, released.metadata), key)


def different():
    """Processes with different inputs."""
    whole = original()
    if index:
        whole["scale"] = whole["scale"] * 2  # replicated, so that each can have its own
    with pytest.raises(ValueError, match="in all processes"):
        protect(spread(whole), masks_of(whole), secret=SECRET)


jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=10 if "kill" in task else 100
)
{"bits": bits, "write": write, "write-kill": write, "read": read, "different": different}[task]()
print(json.dumps({"index": index, "done": task}), flush=True)
jax.distributed.shutdown()
