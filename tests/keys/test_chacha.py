import contextlib
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from selcrypt_jax._keys import chacha as _chacha
from selcrypt_jax._keys.chacha import chacha20_impl, chacha20_key

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "chacha20.json").read_text())
SECRET = bytes(range(32))
DEVICES = 8

# The domains are part of the format of every file: written out, not read from the module.
RANDOM_BITS = b"random_bits\0"
SPLIT = b"split\0\0\0\0\0\0\0"
FOLD_IN = b"fold_in\0\0\0\0\0"
SEED = b"seed\0\0\0\0\0\0\0\0"


def openssl(secret, nonce, size, counter=0):
    """``size`` bytes of keystream from OpenSSL, whose nonce has the counter in front."""
    algorithm = algorithms.ChaCha20(secret, counter.to_bytes(4, "little") + nonce)
    return Cipher(algorithm, mode=None).encryptor().update(bytes(size))


def words(data):
    return np.frombuffer(data, "<u4").astype(np.uint32)


def octets(array):
    return np.asarray(array).tobytes()


def key_bytes(key):
    return octets(jax.random.key_data(key))


def seeded(seed):
    return jax.random.key(seed, impl=chacha20_impl)


def by_section(vectors):
    return pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["section"])


# --- RFC 8439 ---------------------------------------------------------------------------------


@by_section(VECTORS["quarter_round"])
def test_quarter_round_vectors(vector):
    got = _chacha._quarter_round(*(jnp.uint32(int(word, 16)) for word in vector["input"]))
    assert [f"{int(word):08x}" for word in got] == vector["output"]


@by_section(VECTORS["block"])
def test_block_vectors(vector):
    key, nonce = (words(bytes.fromhex(vector[name])) for name in ("key", "nonce"))
    block = _chacha._block(key, np.uint32(vector["counter"]), nonce)
    assert octets(block).hex() == vector["keystream"]


@by_section(VECTORS["encryption"])
def test_encryption_vectors(vector):
    key, nonce = (words(bytes.fromhex(vector[name])) for name in ("key", "nonce"))
    plaintext = np.frombuffer(bytes.fromhex(vector["plaintext"]), np.uint8)
    counters = np.uint32(vector["counter"]) + np.arange(-(-len(plaintext) // 64), dtype=np.uint32)
    stream = octets(_chacha._block(key, counters, nonce))
    stream = np.frombuffer(stream, np.uint8)[: len(plaintext)]
    assert octets(plaintext ^ stream).hex() == vector["ciphertext"]


# --- The same keystream as OpenSSL ------------------------------------------------------------

secrets = st.binary(min_size=32, max_size=32)
nonces = st.binary(min_size=12, max_size=12)


@given(secret=secrets, nonce=nonces, counter=st.integers(0, 2**32 - 1))
def test_block_equals_openssl(secret, nonce, counter):
    got = _chacha._block(words(secret), np.uint32(counter), words(nonce))
    assert octets(got) == openssl(secret, nonce, 64, counter)


@given(secret=secrets, nonce=nonces, count=st.sampled_from([0, 1, 15, 16, 17, 48]))
def test_keystream_equals_openssl(secret, nonce, count):
    got = _chacha._keystream(words(secret), words(nonce), count)
    assert octets(got) == openssl(secret, nonce, 4 * count)


CHUNK = 16 * _chacha._CPU_CHUNK


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5], ids=str)
def test_long_keystream_equals_openssl(count):
    got = _chacha._keystream(words(SECRET), words(SPLIT), count)
    assert octets(got) == openssl(SECRET, SPLIT, 4 * count)


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 19, 20, 1000])
def test_chunk_size_does_not_change_the_stream(chunk, unroll):
    got = _chacha._blocks(words(SECRET), words(SPLIT), blocks=20, chunk=chunk, unroll=unroll)
    chex.assert_shape(got, (20, 16))
    assert octets(got) == openssl(SECRET, SPLIT, 20 * 64)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_long_keystream_lowers_for_accelerators(platform):
    f = jax.jit(lambda key: jax.random.bits(key, (3 * CHUNK,), jnp.uint32))
    f.trace(chacha20_key(SECRET)).lower(lowering_platforms=(platform,))


def test_block_broadcasts():
    keys = np.stack([words(SECRET), words(SECRET[::-1])])[:, None]
    counters = np.arange(3, dtype=np.uint32)
    got = _chacha._block(keys, counters, words(SPLIT))
    chex.assert_shape(got, (2, 3, 16))
    for i, secret in enumerate((SECRET, SECRET[::-1])):
        assert octets(got[i]) == openssl(secret, SPLIT, 3 * 64)


# --- The domains: what each derivation is in terms of the RFC ---------------------------------


@pytest.mark.parametrize("shape", [(), (3, 0, 2), (15,), (16,), (17,), (5, 13)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_bits_are_the_keystream(dtype, shape):
    with jax.enable_x64(dtype == "uint64"):
        got = jax.random.bits(chacha20_key(SECRET), shape, dtype)
        chex.assert_shape(got, shape)
        assert got.dtype == dtype
        assert octets(got) == openssl(SECRET, RANDOM_BITS, got.nbytes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
def test_split_is_the_keystream(shape):
    children = jax.random.split(chacha20_key(SECRET), shape)
    chex.assert_shape(children, shape)
    assert key_bytes(children) == openssl(SECRET, SPLIT, 32 * children.size)


def test_split_does_not_depend_on_how_many():
    key = chacha20_key(SECRET)
    many = key_bytes(jax.random.split(key, 100))
    for count in (1, 3, 99):
        assert key_bytes(jax.random.split(key, count)) == many[: 32 * count]


@pytest.mark.parametrize("data", [0, 1, 2**31, 2**32 - 1])
def test_fold_in_is_a_block(data):
    child = jax.random.fold_in(chacha20_key(SECRET), data)
    assert key_bytes(child) == openssl(SECRET, FOLD_IN, 32, data)


@pytest.mark.parametrize("data", [-1, 2**32, 2**32 + 1])
def test_fold_in_refuses_integers_of_more_than_a_word(data):
    with pytest.raises(OverflowError):
        jax.random.fold_in(chacha20_key(SECRET), data)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, -1, -(2**31)])
def test_seed_is_a_block(seed, x64):
    expected = openssl((seed % 2**64).to_bytes(32, "little"), SEED, 32)
    with jax.enable_x64(x64):
        assert key_bytes(seeded(seed)) == expected
        # Under jit, a seed is an int32 or (x64) an int64 array.
        assert key_bytes(jax.jit(seeded)(seed)) == expected
        assert key_bytes(seeded(jnp.int32(seed))) == expected


def test_seed_dtypes():
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.uint32):
        assert key_bytes(seeded(dtype(77))) == key_bytes(seeded(77))
    assert key_bytes(seeded(np.uint32(2**32 - 1))) != key_bytes(seeded(-1))
    with jax.enable_x64(True):
        seeds = [0, 1, 2**32, 2**32 + 1, 2**63 - 1, -1, 2**32 - 1]
        assert len({key_bytes(seeded(seed)) for seed in seeds}) == len(seeds)


def test_derivations_never_collide():
    key = chacha20_key(SECRET)
    numbers = jnp.arange(1000, dtype=jnp.uint32)
    derived = [
        jax.random.bits(key, (8000,), jnp.uint32),
        jax.random.key_data(jax.random.split(key, 1000)),
        jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)),
        jax.random.key_data(jax.vmap(seeded)(numbers)),
        jax.random.key_data(key),
    ]
    rows = np.concatenate([np.reshape(x, (-1, 8)) for x in derived])
    assert len(np.unique(rows, axis=0)) == len(rows) == 4001


# --- Keys -------------------------------------------------------------------------------------


def test_key_is_the_secret():
    key = chacha20_key(SECRET)
    assert key.shape == ()
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert key.dtype == chacha20_key(SECRET[::-1]).dtype == seeded(0).dtype
    assert key.dtype != jax.random.key(0).dtype
    assert jax.random.key_impl(key) == chacha20_impl
    assert key_bytes(key) == SECRET


@pytest.mark.parametrize("byte", [0, 3, 4, 5, 8, 16, 31])
@pytest.mark.parametrize("flip", [1, 128])
def test_every_byte_of_the_secret_counts(byte, flip):
    other = bytearray(SECRET)
    other[byte] ^= flip
    keys = [chacha20_key(SECRET), chacha20_key(bytes(other))]
    for derive in (
        lambda key: jax.random.bits(key, (64,), jnp.uint32),
        lambda key: jax.random.key_data(jax.random.split(key, 8)),
        lambda key: jax.random.key_data(jax.random.fold_in(key, 0)),
    ):
        a, b = (np.ravel(derive(key)) for key in keys)
        assert np.mean(a == b) < 0.05


@pytest.mark.parametrize("size", [0, 8, 31, 33, 64])
def test_key_refuses_other_sizes_without_showing_them(size):
    with pytest.raises(ValueError, match=f"^secret has {size} bytes but expected 32$"):
        chacha20_key(b"\xab" * size)


@pytest.mark.parametrize(
    "secret", ["x" * 32, 1234567, bytearray(32), np.zeros(32, np.uint8)], ids=type
)
def test_key_refuses_other_types_without_showing_them(secret):
    name = type(secret).__name__
    with pytest.raises(TypeError, match=f"^secret has type {name} but expected bytes$"):
        chacha20_key(secret)


# --- The end of the counter -------------------------------------------------------------------

LIMITS = {  # one more than there is
    "bits8": lambda key: jax.random.bits(key, (2**38 + 1,), jnp.uint8),
    "bits32": lambda key: jax.random.bits(key, (2**36 + 1,), jnp.uint32),
    "bits32 in two dimensions": lambda key: jax.random.bits(key, (2**20, 2**17), jnp.uint32),
    "split": lambda key: jax.random.key_data(jax.random.split(key, 2**33 + 1)),
}


@pytest.mark.parametrize("ask", LIMITS.values(), ids=LIMITS)
def test_requests_past_the_counter_raise_before_any_work(ask):
    key, message = chacha20_key(SECRET), r"words of ChaCha20 keystream .* allows 4294967296"
    keys = jax.random.split(key, 2)
    with pytest.raises(ValueError, match=message):
        ask(key)
    with pytest.raises(ValueError, match=message):
        jax.jit(ask).lower(key)
    with pytest.raises(ValueError, match=message):
        jax.jit(jax.vmap(ask)).lower(keys)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    shard_ask = jax.shard_map(lambda k: ask(k[0]), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=message):
        jax.jit(shard_ask).lower(keys)


def test_keystream_to_the_end_of_the_counter():
    key, nonce = words(SECRET), words(RANDOM_BITS)
    whole = jax.eval_shape(lambda: _chacha._keystream(key, nonce, 2**36))
    assert whole.shape == (2**36,)


# --- One contract: every way to run is the loop over the keys ---------------------------------


def contract(key):
    """Everything that JAX asks of an implementation, from one key."""
    keys = jax.random.split(key, 5)
    number = jax.random.bits(keys[0], (), jnp.uint32)
    return {
        "uint8": jax.random.bits(keys[1], (3, 23), jnp.uint8),
        "uint32": jax.random.bits(keys[2], (33,), jnp.uint32),
        "fold_in": jax.random.key_data(jax.random.fold_in(keys[3], number)),
        "split": jax.random.key_data(jax.random.split(keys[4], (2, 3))),
    }


def samplers(key):
    keys = jax.random.split(key, 6)
    return {
        "uniform": jax.random.uniform(keys[0], (33,), jnp.float32),
        "bfloat16": jax.random.uniform(keys[1], (33,), jnp.bfloat16),
        "normal": jax.random.normal(keys[2], (33,), jnp.float32),
        "randint": jax.random.randint(keys[3], (33,), 0, 10, jnp.int32),
        "permutation": jax.random.permutation(keys[4], 33),
        "bernoulli": jax.random.bernoulli(keys[5], 0.5, (33,)),
    }


def loop(f, keys):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *(f(key) for key in keys))


def eager_without_jit(f, keys):
    with jax.disable_jit():
        return loop(f, keys[:1])  # slow, and the other keys are no different


def nested_vmap(f, keys):
    nested = jax.vmap(jax.vmap(f), in_axes=1, out_axes=1)(keys.reshape(2, -1))
    return jax.tree.map(lambda x: x.reshape(DEVICES, *x.shape[2:]), nested)


def vmap_over_last_axis(f, keys):
    out = jax.vmap(lambda key: f(key[0]), in_axes=1, out_axes=-1)(keys[None])
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), out)


def scan(f, keys):
    return lax.scan(lambda carry, key: (carry, f(key)), None, keys)[1]


def shard_map(f, keys, check_vma=True):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    return jax.shard_map(
        jax.vmap(f), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )(keys)


def sharded(f, keys):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    keys = jax.device_put(keys, jax.NamedSharding(mesh, PartitionSpec("d")))
    with jax.set_mesh(mesh):
        return jax.jit(jax.vmap(f))(keys)


MODES = {
    "disable_jit": eager_without_jit,
    "jit": lambda f, keys: loop(jax.jit(f), keys),
    "vmap": lambda f, keys: jax.vmap(f)(keys),
    "jit(vmap)": lambda f, keys: jax.jit(jax.vmap(f))(keys),
    "nested vmap": nested_vmap,
    "vmap over the last axis": vmap_over_last_axis,
    "scan": scan,
    "shard_map": shard_map,
    "shard_map, unchecked": lambda f, keys: shard_map(f, keys, check_vma=False),
    "jit(shard_map)": lambda f, keys: jax.jit(lambda keys: shard_map(f, keys))(keys),
    "explicit sharding": sharded,
}


SLOW = {
    "jit(vmap)",
    "vmap over the last axis",
    "shard_map, unchecked",
    "jit(shard_map)",
    "explicit sharding",
    "disable_jit",
}
FAST_AND_SLOW_MODES = [
    pytest.param(run, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, run in MODES.items()
]


def key_batch():
    return jax.random.split(chacha20_key(SECRET), DEVICES)


@pytest.fixture(scope="module")
def expected():
    return jax.device_get(loop(contract, key_batch()))


@pytest.mark.parametrize("run", FAST_AND_SLOW_MODES)
def test_every_mode_equals_the_loop(run, expected):
    got = jax.device_get(run(contract, key_batch()))
    first = {name: x[: len(got[name])] for name, x in expected.items()}
    chex.assert_trees_all_equal(got, first)
    chex.assert_trees_all_equal_dtypes(got, first)


def test_the_keys_of_a_batch_have_streams_of_their_own(expected):
    for name in ("uint8", "uint32", "fold_in", "split"):
        rows = np.reshape(expected[name], (DEVICES, -1))
        assert len(np.unique(rows, axis=0)) == DEVICES


@contextlib.contextmanager
def flag(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_debug_key_reuse", True),
        pytest.param("jax_debug_nans", True, marks=pytest.mark.slow),
        pytest.param("jax_enable_checks", True, marks=pytest.mark.slow),
    ],
)
def test_every_flag_equals_the_loop(name, value, expected):
    with flag(name, value):
        got = jax.device_get(jax.jit(jax.vmap(contract))(key_batch()))
        chex.assert_trees_all_equal(got, expected)


def test_no_implicit_transfers():
    with jax.transfer_guard("disallow"):
        key = chacha20_key(SECRET)
        jax.random.bits(key, (5,), jnp.uint32).block_until_ready()
        jax.random.bits(key, (5,), jnp.uint8).block_until_ready()
        jax.random.key_data(jax.random.split(key, 3)).block_until_ready()


def test_the_key_reuse_checker_knows_our_keys():
    with jax.debug_key_reuse(True):
        key = chacha20_key(SECRET)
        jax.random.bits(key, (3,), jnp.uint32)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.random.bits(key, (3,), jnp.uint32)


def test_batch_of_no_keys():
    keys = key_batch()[:0]
    chex.assert_shape(jax.vmap(lambda k: jax.random.bits(k, (5,), jnp.uint32))(keys), (0, 5))
    chex.assert_shape(jax.vmap(jax.random.split)(keys), (0, 2))


def test_uint64_without_x64_is_never_quietly_shorter():
    # JAX cuts the dtype, with a warning, before the implementation is asked.
    with pytest.warns(UserWarning, match="uint64 is not available"):
        got = jax.random.bits(chacha20_key(SECRET), (4,), "uint64")
    assert got.dtype == jnp.uint32
    with pytest.raises(ValueError, match=r"\(with jax_enable_x64\) 64 random bits"):
        _chacha._random_bits(words(SECRET), 64, (4,))


def test_long_batches_in_chunks_equal_openssl():
    keys, count = key_batch()[:2], CHUNK + 17
    got = jax.jit(jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32)))(keys)
    for key, row in zip(keys, got, strict=True):
        assert octets(row) == openssl(key_bytes(key), RANDOM_BITS, 4 * count)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disable_jit", "shard_map", "jit(shard_map)", "scan"])
def test_long_batches_in_every_mode(mode):
    keys, count = key_batch(), 2 * CHUNK + 17
    got = MODES[mode](lambda key: jax.random.bits(key, (count,), jnp.uint32), keys)
    for key, row in zip(keys[: len(got)], got, strict=True):
        assert octets(row) == openssl(key_bytes(key), RANDOM_BITS, 4 * count)


# --- jax.random on top ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "jit(vmap)"])
def test_samplers_equal_the_loop(mode):
    keys = key_batch()[:2]
    # Not bit for bit: XLA rounds a fused erf_inv differently.
    chex.assert_trees_all_close(MODES[mode](samplers, keys), loop(samplers, keys), atol=1e-6)


def test_samples_have_their_distribution():
    keys = jax.random.split(chacha20_key(SECRET), 4)
    count = 20_000
    uniform = np.sort(jax.random.uniform(keys[0], (count,), jnp.float32))
    distance = np.abs(uniform - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / count**0.5  # Kolmogorov–Smirnov, p = 0.001
    normal = np.asarray(jax.random.normal(keys[1], (count,), jnp.float32))
    assert abs(normal.mean()) < 4 / count**0.5
    assert abs(normal.var() - 1) < 4 * (2 / count) ** 0.5
    counts = np.bincount(np.asarray(jax.random.bits(keys[2], (count,), jnp.uint8)), minlength=256)
    assert ((counts - count / 256) ** 2 / (count / 256)).sum() < 330.5  # chi², 255, p = 0.001
    permuted = np.asarray(jax.random.permutation(keys[3], 1000))
    assert (np.sort(permuted) == np.arange(1000)).all()
    assert (permuted != np.arange(1000)).mean() > 0.98


SAMPLES = {
    "choice": lambda key: jax.random.choice(key, 100, (10,), replace=False),
    "categorical": lambda key: jax.random.categorical(key, jnp.zeros(5), shape=(10,)),
    "truncated_normal": lambda key: jax.random.truncated_normal(key, -1.0, 1.0, (10,)),
    "exponential": lambda key: jax.random.exponential(key, (10,)),
    "gumbel": lambda key: jax.random.gumbel(key, (10,)),
    "laplace": lambda key: jax.random.laplace(key, (10,)),
    "gamma": lambda key: jax.random.gamma(key, 2.0, (10,)),
    "dirichlet": lambda key: jax.random.dirichlet(key, jnp.ones(10)),
    "rademacher": lambda key: jax.random.rademacher(key, (10,)),
    "orthogonal": lambda key: jax.random.orthogonal(key, 10)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_all_kinds_of_samples(sample):
    key = chacha20_key(SECRET)
    got = sample(key)
    chex.assert_shape(got, (10,))
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(jax.jit(sample)(key), got, rtol=1e-5)
