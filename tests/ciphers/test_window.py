"""The window cipher: its definition, what it hides, and that it never loses a bit."""

import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16 and float8
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selcrypt_jax import Window, WindowCipher, chacha20_key, decrypt, encrypt
from selcrypt_jax._ciphers import engine_host, engine_window

EXPONENTS = {"float64": 11, "float32": 8, "bfloat16": 8, "float16": 5, "float8_e5m2": 5}
MANTISSAS = {"float64": 52, "float32": 23, "bfloat16": 7, "float16": 10, "float8_e5m2": 2}
SECRET = bytes(range(32))
KEYS = [chacha20_key(SECRET)]


def stream(key: bytes, domain: bytes, counter: int, size: int) -> bytes:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def oracle(name: str, leaf: np.ndarray, window: Window | None) -> np.ndarray:
    """The definition, in Python's integers."""
    key = SECRET
    digest = hashlib.sha256(b"selcrypt/v1/leaf\0" + name.encode()).digest()
    for word in (*np.frombuffer(digest, "<u4"), 2):
        key = stream(key, b"fold_in", int(word), 32)
    width = leaf.dtype.itemsize
    words = leaf.reshape(-1).view(f"u{width}")
    drawn = np.frombuffer(stream(key, b"random_bits", 0, leaf.nbytes), words.dtype)
    offset, mask = 0, 256**width - 1
    if window is not None:
        mantissa = MANTISSAS[str(leaf.dtype)]
        offset = window.lowest << mantissa
        mask = 2 ** (mantissa + window.exponents) - 1 + (window.sign << (8 * width - 1))
    new = [
        (((b - offset) ^ (r & mask)) + offset) % 256**width
        for b, r in zip(map(int, words), map(int, drawn), strict=True)
    ]
    return np.array(new, words.dtype).view(leaf.dtype).reshape(leaf.shape)


def leaves(dtype: str, seed: int = 0, scale: float = 0.1, shape=(7, 33)) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("xla", [False, True], ids=["host", "XLA"])
@pytest.mark.parametrize("dtype", [*EXPONENTS, "int8", "uint32"])
def test_as_defined(dtype, xla, monkeypatch):
    if dtype == "float64" and not jax.config.jax_enable_x64:
        pytest.skip("JAX would cut it to 32 bits")
    monkeypatch.setattr(engine_host, "on_host", lambda leaf: not xla)
    leaf = leaves(dtype, scale=3)
    cipher = WindowCipher.fit({"w": leaf})
    window = (cipher.windows or {}).get("w")
    protected = encrypt({"w": leaf}, [True], KEYS, cipher=cipher)
    found = np.asarray(protected["w"])
    assert found.tobytes() == oracle("w", leaf, window).tobytes()
    opened = decrypt(protected, [True], KEYS, cipher=cipher)
    assert np.asarray(opened["w"]).tobytes() == leaf.tobytes()


@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 9e3]),
    part=st.booleans(),
)
def test_nothing_is_lost_whatever_the_window(dtype, seed, scale, part):
    leaf = leaves(dtype, seed, scale)
    mask = np.random.default_rng(seed).random(leaf.shape) < 0.5 if part else True
    fitting = WindowCipher.fit({"w": leaf})
    for cipher in (fitting, WindowCipher(), WindowCipher({"w": Window(3, 2, True)})):
        protected = encrypt({"w": leaf}, [{"w": mask}], KEYS, cipher=cipher)
        opened = decrypt(protected, [{"w": mask}], KEYS, cipher=cipher)
        assert np.asarray(opened["w"]).tobytes() == leaf.tobytes()
        if part:
            plain = ~np.asarray(mask)
            assert (np.asarray(protected["w"])[plain].tobytes()) == leaf[plain].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_window_says_how_large_weights_are_and_no_more(dtype):
    exponents = EXPONENTS[dtype]
    one = 2 ** (exponents - 1) - 1  # the exponent of 1

    def window(*numbers: float) -> Window:
        return (WindowCipher.fit({"w": np.array(numbers, dtype)}).windows or {})["w"]

    assert window(1, 1.9) == window(1, 2**-7) == window(1.5) == Window(one - 7, 3, False)
    assert window(-1, 2**-8) == window(1, -(2**-12)) == Window(one - 15, 4, True)
    assert window(7, 1) == Window(one - 5, 3, False)
    assert window(0, 0) == Window(0, 3, False)
    assert window(0, 1) == Window(0, exponents - 1, False)
    assert window(0, 5) == window(1, np.inf) == window(np.nan) == Window(0, exponents, False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [0.1, 40.0])
def test_what_is_sealed_is_finite(dtype, scale):
    leaf = np.abs(leaves(dtype, scale=scale, shape=(200, 300))) + np.array(scale, dtype)
    cipher = WindowCipher.fit({"w": leaf})
    found = np.asarray(encrypt({"w": leaf}, [True], KEYS, cipher=cipher)["w"])
    assert np.isfinite(found).all()
    assert (found >= 0).all()  # a variance stays one


def test_two_networks_of_one_window_look_alike():
    """Every masked bit is one as often as zero, whatever the weights are (chi-square, 29 bits)."""
    rng = np.random.default_rng(0)
    one = (0.05 * rng.standard_normal(100_000)).astype(np.float32)
    sizes = np.abs(one)
    other = np.where(rng.random(100_000) < 0.9, -sizes.min(), sizes.max())
    cipher = WindowCipher.fit({"w": one})
    assert cipher == WindowCipher.fit({"w": other})
    lowest, exponents, sign = (cipher.windows or {})["w"]
    assert (exponents, sign) == (5, True)
    for leaf in (one, other):
        found = np.asarray(encrypt({"w": leaf}, [True], KEYS, cipher=cipher)["w"]).view(np.uint32)
        found = found - np.uint32(lowest << 23)
        ones = np.array([(found >> bit & 1).sum() for bit in range(32)])
        assert (ones[23 + exponents : 31] == 0).all()  # nothing leaves the window
        rest = np.delete(ones, range(23 + exponents, 31))
        assert ((rest - 50_000) ** 2 / 25_000).sum() < 68  # p > 1e-4


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_the_same_bits_and_no_communication_when_sharded(spec):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    leaf = leaves("float32", shape=(64, 128))
    cipher = WindowCipher.fit({"w": leaf})
    spread = jax.device_put(jnp.asarray(leaf), sharding)
    expected = oracle("w", leaf, (cipher.windows or {})["w"]).tobytes()
    eager = encrypt({"w": spread}, [True], KEYS, cipher=cipher)["w"]
    assert eager.sharding == sharding
    assert np.asarray(eager).tobytes() == expected

    @jax.jit
    def protect(leaf, keys):
        return encrypt({"w": leaf}, [True], keys, cipher=cipher)["w"]

    compiled = protect.lower(spread, KEYS).compile()
    assert np.asarray(protect(spread, KEYS)).tobytes() == expected
    text = compiled.as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in text


def test_refusals():
    with pytest.raises(ValueError, match=r"params 'w': expected a window of float16, got Window"):
        encrypt(
            {"w": leaves("float16")}, [True], KEYS, cipher=WindowCipher({"w": Window(20, 4, True)})
        )
    with pytest.raises(ValueError, match="expected floats or integers"):
        encrypt({"w": np.ones(9, bool)}, [True], KEYS, cipher=WindowCipher())
    with pytest.raises(TypeError, match=r"windows 'w': expected a Window, got \(1, 2, 3\)"):
        WindowCipher({"w": (1, 2, 3)})
    with pytest.raises(TypeError, match="Find the windows before jit"):
        jax.jit(lambda w: WindowCipher.fit({"w": w}) and w)(jnp.ones(9))


def test_equal_ciphers_are_one_key():
    """A cipher can be a static argument of a jitted function."""
    one, other = (WindowCipher.fit({"w": leaves("float16")}) for _ in range(2))
    assert len({one, other, WindowCipher()}) == 2


def test_xla_compiles_once_for_all_windows(monkeypatch):
    monkeypatch.setattr(engine_host, "on_host", lambda leaf: False)
    for scale in (1e-3, 1, 1e3):
        params = {"w": scale * jnp.arange(1.0, 9.0)}
        encrypt(params, [True], KEYS, cipher=WindowCipher.fit(params))
        compiled = engine_window._compiled()._cache_size()
        if scale == 1e-3:
            first = compiled
    assert compiled == first
