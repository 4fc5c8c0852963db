"""Keys that would be written into a compiled program, and so to disk, are refused."""

import hashlib
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    Secret,
    WindowCipher,
    decrypt,
    encrypt,
    level_key,
    new_model_id,
    ring_keys,
    unlocking,
)
from selcrypt_jax._keys.chacha import chacha20_impl

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((24, 24)), jnp.float32)}
MASKS = ({"w": True},)
CHACHA = jax.random.split(jax.random.key(5, impl=chacha20_impl), 1)
THREEFRY = jax.random.split(jax.random.key(5), 1)
CIPHERS = {
    "lossless": LosslessCipher(),
    "window": WindowCipher(),
    "gaussian": GaussianCipher.fit(PARAMS, MASKS),
}
STAGED = {
    "jit": lambda f: jax.jit(f)(PARAMS),
    "lower": lambda f: jax.jit(f).lower(PARAMS),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(PARAMS),
    "eval_shape": lambda f: jax.eval_shape(f, PARAMS),
    "grad in jit": lambda f: jax.jit(jax.grad(lambda p: f(p)["w"].sum()))(PARAMS),
    "jit in grad": lambda f: jax.grad(lambda p: jax.jit(f)(p)["w"].sum())(PARAMS),
    "checkpoint": lambda f: jax.grad(lambda p: jax.checkpoint(f)(p)["w"].sum())(PARAMS),
    "scan": lambda f: jax.lax.scan(lambda c, _: (f(c), None), PARAMS, length=1),
    "cond": lambda f: jax.lax.cond(True, f, lambda p: p, PARAMS),
    "while": lambda f: jax.lax.while_loop(lambda p: p["w"].sum() < 0, f, PARAMS),
    "vmap in jit": lambda f: jax.jit(jax.vmap(f))({"w": PARAMS["w"][None]}),
    "params closed over too": lambda f: jax.jit(lambda x: f(PARAMS)["w"] + x)(1.0),
}


@pytest.mark.parametrize("stage", STAGED)
@pytest.mark.parametrize("run", [encrypt, decrypt])
def test_closed_over_keys_are_refused_wherever_a_program_is_made(stage, run):
    with pytest.raises(TypeError, match=r"keys: expected arguments .* Pass them in: jax.jit"):
        STAGED[stage](lambda params: run(params, MASKS, CHACHA))


@pytest.mark.parametrize("stage", STAGED)
def test_keys_are_not_made_inside_of_a_program_either(stage):
    key = level_key(Secret.generate(), new_model_id(), levels=1)
    with pytest.raises(TypeError, match="outside compiled functions, got one inside"):
        STAGED[stage](lambda params: encrypt(params, MASKS, ring_keys(key)))
    eager = jax.grad(lambda p: encrypt(p, MASKS, ring_keys(key))["w"].sum())
    assert eager(PARAMS)["w"].shape == (24, 24)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("keys", [CHACHA, THREEFRY, list(THREEFRY)], ids=["own", "jax's", "list"])
def test_of_every_cipher_and_every_kind_of_key(cipher, keys):
    with pytest.raises(TypeError, match="keys: expected arguments"):
        jax.jit(lambda p: encrypt(p, MASKS, keys, cipher=CIPHERS[cipher]))(PARAMS)
    with pytest.raises(TypeError, match="keys: expected arguments"):
        jax.jit(lambda p: unlocking(lambda p: p, MASKS, cipher=CIPHERS[cipher])(p, keys))(PARAMS)


def test_one_key_of_two_is_one_too_many():
    masks = ({"w": np.eye(24, dtype=bool)}, {"w": True})
    first, second = jax.random.split(CHACHA[0])
    with pytest.raises(TypeError, match="keys: expected arguments"):
        jax.jit(lambda p, key: decrypt(p, masks, [key, second]))(PARAMS, first)


@pytest.mark.slow
def test_what_makes_no_program_may_close_over_them():
    public = encrypt(PARAMS, MASKS, THREEFRY)
    jax.grad(lambda p: decrypt(p, MASKS, THREEFRY)["w"].sum())(public)
    jax.jvp(lambda p: decrypt(p, MASKS, THREEFRY)["w"], (public,), (public,))
    with jax.disable_jit():
        jax.jit(lambda p: decrypt(p, MASKS, THREEFRY))(public)
    # Nothing is decrypted, so nothing is written.
    assert jax.jit(lambda p: decrypt(p, (), []))(public)["w"].shape == (24, 24)


PROGRAM = """
import hashlib, jax, jax.numpy as jnp
from selcrypt_jax import chacha20_key, decrypt, encrypt, unlocking
key = chacha20_key(hashlib.sha256(b'key').digest())[None]
masks = ({"w": True},)
public = encrypt({"w": jnp.ones((24, 24))}, masks, key)
jax.jit(lambda p, k: decrypt(p, masks, k))(public, key)
jax.jit(unlocking(lambda p: p["w"].sum(), masks))(public, key)
jax.grad(lambda p: decrypt(p, masks, key)["w"].sum())(public)
jax.vmap(lambda p, k: decrypt(p, masks, k))({"w": public["w"][None]}, key[None])
"""


def varint(number: int) -> bytes:
    """The numbers of a constant, as XLA writes them."""
    high = b""
    while number > 127:
        high, number = high + bytes([number & 127 | 128]), number >> 7
    return high + bytes([number])


@pytest.mark.slow
def test_no_key_is_in_the_cache_on_the_disk(tmp_path):
    cache = tmp_path / "cache"
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=os.environ | settings)
    entries = [path.read_bytes() for path in cache.iterdir() if not path.name.endswith("-atime")]
    try:
        entries = [zlib.decompress(entry) for entry in entries]
    except zlib.error:
        pytest.skip("JAX compresses its cache with zstandard here")
    assert len(entries) > 2
    key = hashlib.sha256(b"key").digest()
    words = b"".join(map(varint, np.frombuffer(key[:12], "<u4").tolist()))
    assert not any(form in entry for entry in entries for form in (key[:12], words))
