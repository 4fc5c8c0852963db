"""The cost of guessing a key, measured on this machine with the library's own functions."""

import contextlib
import math
import os
import time
from collections.abc import Callable

from .._ciphers.lossless import LosslessCipher
from .._format.envelope import Envelope
from .._format.manifest import LevelSize, Manifest
from .._io.errors import IntegrityError
from .._keys.keys import LevelKey, Secret, level_key, new_model_id
from .._keys.material import KEY_BYTES
from ._records import KeySearch

_YEAR = 3.156e7  # seconds
_SALT_BYTES = 16


def key_search(*, seconds: float = 0.5, passphrase_bits: float | None = 40) -> list[KeySearch]:
    """Guesses keys of a small protected file, and measures how many per second it can try.

    A guess derives the keys and tries to open the sealed box of the lowest level, as the file
    format defines it: no shorter test tells a right guess from a wrong one. An attacker's own
    program on better hardware is faster by some factor. That does not matter when the years have
    dozens of digits, but it does for a passphrase.

    Args:
        seconds: how long to guess each kind of key; each gets at least one guess.
        passphrase_bits: entropy of the passphrase that the secret is made from, stretched by
            `Secret.from_passphrase` with its defaults; four random words from a list of 7,776
            have 52 bits. None leaves it out.

    Returns:
        One record each for the owner's secret, a level key and the passphrase, with ``key``,
        ``bits``, ``guesses_per_second`` and ``years``. The rate is per second of CPU time summed
        over threads, and so the rate of one core. ``years`` is ``2**(bits - 1) / rate``, infinite
        if a float cannot hold it.

    Raises:
        ValueError: the time or the entropy is not positive.

    Examples:
        >>> secret, level, passphrase = key_search(seconds=0.01, passphrase_bits=52)
        >>> assert passphrase.years < level.years
    """
    if not seconds > 0 or not math.isfinite(seconds):
        raise ValueError(f"seconds: expected a positive number of seconds, got {seconds}.")
    if passphrase_bits is not None and not 0 < passphrase_bits < math.inf:
        raise ValueError(
            f"passphrase_bits: expected a positive number of bits, got {passphrase_bits}. "
            "Pass None to leave the passphrase out."
        )
    model_id = new_model_id()
    manifest = Manifest(model_id, LosslessCipher(), "plain", (LevelSize(0, 0),), {})
    right = level_key(Secret.generate(), model_id, level=1, levels=1)
    file = Envelope.seal(manifest, None, [[]], right, None, "key search")
    salt = os.urandom(_SALT_BYTES)

    def of_secret(secret: Secret | bytes) -> LevelKey:
        return level_key(secret, model_id, level=1, levels=1)

    def search(name: str, bits: float, guessed: Callable[[], LevelKey]) -> KeySearch:
        def guess() -> None:
            with contextlib.suppress(IntegrityError):
                file.open(guessed())

        guess()  # warm-up: the first guess loads libraries
        start, count = time.process_time(), 0
        while count == 0 or time.process_time() - start < seconds:
            guess()
            count += 1
        # The CPU clock may be too coarse for a single guess.
        rate = count / max(time.process_time() - start, 1e-9)
        years = 2.0 ** (bits - 1) / rate / _YEAR if bits < 1025 else math.inf
        return KeySearch(name, bits, rate, years)

    def level() -> LevelKey:
        return LevelKey(os.urandom(KEY_BYTES), level=1, model_id=model_id)

    def passphrase() -> LevelKey:
        return of_secret(Secret.from_passphrase(os.urandom(8).hex(), salt))

    found = [
        search("random secret", 8.0 * KEY_BYTES, lambda: of_secret(os.urandom(KEY_BYTES))),
        search("level key", 8.0 * KEY_BYTES, level),
    ]
    if passphrase_bits is not None:
        found.append(search("passphrase", float(passphrase_bits), passphrase))
    return found
