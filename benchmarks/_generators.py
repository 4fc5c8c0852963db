"""Section "random": random bits by `jax.random`, with ChaCha20 and with JAX's own generators."""

import importlib
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Contender, measure
from _rows import Options, Row
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from selcrypt_jax import chacha20_key

NOTES = {
    "random": (
        "Words of 32 bits by jax.random.bits, jitted, with the key as an argument; ratios are "
        "relative to threefry."
    )
}
BASELINE = "threefry2x32"
SIZES = (1 << 20, 1 << 24)
QUICK_SIZES = (1 << 16,)


def check_keystream(secret: bytes, found: Any) -> None:
    """Raises unless the words match OpenSSL's."""
    stream = Cipher(ChaCha20(secret, bytes(4) + b"random_bits\0"), mode=None).encryptor()
    if np.asarray(found).astype("<u4").tobytes() != stream.update(bytes(4 * found.size)):
        raise RuntimeError("ChaCha20: not the keystream of RFC 8439.")


def jax_chacha_prng(words: int) -> Contender:
    """The package of that name, if it works with this JAX."""
    name = "jax-chacha-prng"
    try:
        theirs = importlib.import_module("chacha.random")
    except ImportError as error:
        why = "not installed" if isinstance(error, ModuleNotFoundError) else f"no import: {error}"
        return Contender(name, missing=f"{why}; its release 1.4.3 does not run with jax >= 0.8")
    bits = jax.jit(lambda key: theirs.random_bits(key, 32, (words,)))
    return Contender(name, bits, lambda: theirs.PRNGKey(0), size=lambda: 4 * words)


def contenders(words: int) -> list[Contender]:
    """All contenders, for that many words."""
    secret = secrets.token_bytes(32)

    def generator(
        name: str, key: Callable[[], Any], check: Callable[[Any], None] = lambda _: None
    ) -> Contender:
        bits = jax.jit(lambda key: jax.random.bits(key, (words,), jnp.uint32))
        return Contender(name, bits, key, size=lambda: 4 * words, check=check)

    return [
        generator("ChaCha20", partial(chacha20_key, secret), partial(check_keystream, secret)),
        *[generator(name, partial(jax.random.key, 0, impl=name)) for name in (BASELINE, "rbg")],
        jax_chacha_prng(words),
    ]


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    found = []
    for words in QUICK_SIZES if options.quick else SIZES:
        found += measure(
            "random", f"{words:,} words", contenders, words, baseline=BASELINE, options=options
        )
    return found
