"""What it costs to guess a key: guesses on this machine, with the library's own functions."""

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
    """Guesses keys of a small protected file, and counts how many a second it can.

    A guess derives the keys and tries to open the sealed box of the lowest level, as the file
    format has it: nothing shorter tells a right guess from a wrong one. An attacker's own program
    on better hardware is faster by some factor, which does not matter where the years have dozens
    of digits, and does for a passphrase.

    Args:
        seconds: how long to guess each kind of key, at least one guess each.
        passphrase_bits: entropy of the passphrase that the secret is made from, stretched by
            `Secret.from_passphrase` with its defaults; four random words of a list of 7,776 have
            52. None leaves it out.

    Returns:
        A record of ``key``, ``bits``, ``guesses_per_second`` and ``years`` for each of the owner's
        secret, a level key, and the passphrase. The rate is per second of processor time,
        all threads together, and so that of one core. ``years`` is ``2**(bits - 1) / rate``,
        infinite where that is more than a float holds.

    Raises:
        ValueError: no time, or an entropy that is not positive.

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

        guess()  # the first one loads what it needs
        start, count = time.process_time(), 0
        while count == 0 or time.process_time() - start < seconds:
            guess()
            count += 1
        # The clock of the processor may be too coarse for a single guess.
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
