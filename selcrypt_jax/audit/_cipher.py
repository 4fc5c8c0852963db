"""Chosen-plaintext attacks on the cipher itself: what a few encryptions of chosen weights reveal.

The checks work for any `Cipher`: they only see what `encrypt` and `decrypt` return. Weights are
chosen in two ways. *Equal weights*: the ciphertext is then the keystream. *Marked weights*: a few
encryptions under the same keys write the digits of each weight's position into its exponent; if
exponents survive, the ciphertext shows where every weight went.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .._ciphers.dprm import Cipher, decrypt, encrypt
from .._ciphers.lossless import LosslessCipher
from .._keys.keys import Secret, level_key, new_model_id, ring_keys
from ._chosen import ALARM, SHARES, Chosen, Where, bits_of, on_host, pairs, skipped
from ._order import order_checks
from ._records import CipherCheck

_DTYPES = ("float32", "bfloat16", "int8")
_SKEW = 0.02  # allowed bias of masked bits: the mantissa bits of normal variables are biased


def check_cipher(cipher: Cipher | None = None, *, seed: int = 0) -> list[CipherCheck]:
    """Runs chosen-plaintext attacks on a cipher, on a small network with keys like a vendor's.

    Args:
        cipher: `LosslessCipher()` by default. A `GaussianCipher` is fitted to the weights of each
            trial, so only its `wrap` matters; it is tested on float32 only.
        seed: seed of the network. The secret and the model ids are new each time.

    Returns:
        The same checks for float32, bfloat16 and int8, each with ``name``, ``passed``, ``found``
        and ``expected`` (in words). A check that does not apply (the cipher refuses the dtype, or
        the order cannot be read) has None as ``passed`` and NaN as ``found``, and says why. The
        probability that a sound cipher fails any check is below 1e-6: each check has a bound of
        1e-8, from Hoeffding's inequality for shares of bits and from ``P(k agree) <= b**k / k!``
        for permutations in ``b`` blocks of up to 4,096 units.

    Raises:
        ValueError: the cipher refuses float32 rings of 48 weights and more.
        TypeError: the argument does not have the methods of `Cipher`.

    Examples:
        >>> checks = check_cipher(LosslessCipher(unit="group"))
        >>> assert not [check.name for check in checks if check.passed is False]
    """
    cipher = LosslessCipher() if cipher is None else cipher
    if isinstance(cipher, type) or not isinstance(cipher, Cipher):
        raise TypeError(
            "cipher: expected an object with check and run, such as LosslessCipher(), got "
            f"{cipher!r}."
        )
    return [
        replace(check, name=f"{dtype}: {check.name}")
        for dtype in _DTYPES
        for check in _checks(Chosen.make(cipher, dtype, seed))
    ]


def _checks(network: Chosen) -> Iterator[CipherCheck]:
    if network.refusal is not None:
        yield skipped("every check", network.refusal)
        return
    secret = Secret.generate()
    models = [ring_keys(level_key(secret, new_model_id(), levels=len(SHARES))) for _ in range(2)]
    yield from _exactness(network, models[0])
    ones = {where: np.ones((), network.dtype) for where in network.groups}
    streams = [network.encrypt_with(ones, keys) for keys in models]
    masked = _masked_bits(network, streams[0])
    yield from _keystream(network, streams, masked)
    yield _own_ring(network, models[0], masked)
    yield from order_checks(network, models)


# --- decryption ---------------------------------------------------------------------------------


def _exactness(network: Chosen, keys: Any) -> Iterator[CipherCheck]:
    plain, masks = network.params, network.masks
    cipher = network.cipher(plain)
    encrypted = encrypt(plain, masks, keys, cipher=cipher)
    public = on_host(encrypted)
    opened = on_host(decrypt(encrypted, masks, keys, cipher=cipher))
    differing, changed, error = 0, 0, 0.0
    for name, leaf in plain.items():
        differing += int((bits_of(opened[name]) != bits_of(leaf)).sum())
        outside = ~np.broadcast_to(masks[-1][name], leaf.shape)
        changed += int((bits_of(public[name]) != bits_of(leaf))[outside].sum())
        wide, right = opened[name].astype(np.float64), leaf.astype(np.float64)
        distance = np.nan_to_num(np.abs(wide - right), nan=math.inf).max()
        error = max(error, float(distance) / float(right.std()))
    name = "decryption restores the weights"
    if network.tolerance:
        text = f"error of at most {network.tolerance:g} standard deviations: this cipher is inexact"
        yield CipherCheck(name, error <= network.tolerance, error, text)
    else:
        yield CipherCheck(name, differing == 0, float(differing), "0 weights that differ")
    name = "weights outside the masks are unchanged"
    yield CipherCheck(name, changed == 0, float(changed), "0 weights that changed")


# --- the keystream ------------------------------------------------------------------------------


def _masked_bits(network: Chosen, stream: Mapping[Where, np.ndarray]) -> dict[Where, int]:
    """The bits of each ring that differ between ciphertexts, though all weights are equal.

    For floats, only the fine bits: other masked bits need not be balanced.
    """
    fine = LosslessCipher().fine_mask(network.dtype)
    result = {}
    for where, words in stream.items():
        varying = int(np.bitwise_or.reduce(words ^ words[0]))
        result[where] = varying & fine or varying
    return result


def _agreeing(one: np.ndarray, other: np.ndarray, bits: int) -> tuple[float, int]:
    """Share of these bits that are equal in two lists of weights; and the number compared."""
    count = min(len(one), len(other))
    differing = np.bitwise_count((one[:count] ^ other[:count]) & one.dtype.type(bits))
    total = count * bits.bit_count()
    return 1 - float(differing.sum(dtype=np.int64)) / max(total, 1), total


def _near_half(
    name: str, shares: Iterable[tuple[float, int]], what: str, skew: float = 0.0
) -> CipherCheck:
    """Whether all shares, each of that many fair bits, are consistent with chance.

    `found` is the overall share if so, and else the share that is furthest from one half.
    """
    found = np.array([(share, bits) for share, bits in shares if bits], float)
    if not found.size:
        return skipped(name, "no bit is masked")
    share, bits = found.T
    deviations = np.maximum(np.abs(2 * share - 1) - 2 * skew, 0) * np.sqrt(bits)
    limit = math.sqrt(2 * math.log(2 * len(share) / ALARM))  # Hoeffding, in standard deviations
    worst = int(deviations.argmax())
    half = f"0.5 ± {skew:g}" if skew else "0.5"
    text = f"{half} {what}, within {limit:.1f} standard deviations in {len(share):,} comparisons"
    passed = bool(deviations[worst] <= limit)
    return CipherCheck(
        name, passed, float(share @ bits / bits.sum() if passed else share[worst]), text
    )


def _keystream(
    network: Chosen, streams: Sequence[Mapping[Where, np.ndarray]], masked: Mapping[Where, int]
) -> Iterator[CipherCheck]:
    stream, second = streams
    fine = LosslessCipher().fine_mask(network.dtype)
    name = "fine bits are masked"
    if fine:
        least = min((bits & fine).bit_count() for bits in masked.values())
        text = f"1 to {fine.bit_count()} bits differ between equal weights, in every ring"
        yield CipherCheck(name, least >= 1, float(least), text)
    else:
        yield skipped(name, "integers have none")
    shares = (pair for where, words in stream.items() for pair in _setbits_of(words, masked[where]))
    name = "keystream: as many ones as zeros"
    yield _near_half(name, shares, "of the weights with a masked bit set", _SKEW)
    equal = "of the masked bits equal"
    for name, shared in (("ring", 0), ("leaf", 1)):
        both = pairs(stream, shared)
        shares = (_agreeing(stream[a], stream[b], masked[a] & masked[b]) for a, b in both)
        yield _near_half(f"keystream: different in every {name}", shares, equal)
    shares = (_agreeing(stream[where], second[where], masked[where]) for where in stream)
    yield _near_half("keystream: different for every model id", shares, equal)
    shares = (pair for where, words in stream.items() for pair in _repeats(words, masked[where]))
    name = "keystream: does not repeat within a ring"
    yield _near_half(name, shares, f"{equal} at any distance")


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """0 or 1, ``[bits, weights]``."""
    chosen = np.array([b for b in range(bits.bit_length()) if bits >> b & 1], words.dtype)
    return words >> chosen[:, None] & 1


def _setbits_of(words: np.ndarray, bits: int) -> list[tuple[float, int]]:
    """For each bit, the share of weights in which it is set; and the number of weights."""
    return [(float(column.mean()), len(words)) for column in _unpacked(words, bits)]


def _repeats(words: np.ndarray, bits: int) -> list[tuple[float, int]]:
    """As `_agreeing`, for a ring and itself shifted by 1, 2, ... weights."""
    signs = 1 - 2.0 * _unpacked(words, bits)
    count = len(words)
    size = 1 << (2 * count - 1).bit_length()  # large enough that nothing wraps around
    spectrum = np.square(np.abs(np.fft.rfft(signs, size))).sum(0)
    pairs = len(signs) * np.arange(count - 1, 0, -1)
    shares = (1 + np.fft.irfft(spectrum, size)[1:count] / np.maximum(pairs, 1)) / 2
    return list(zip(shares.tolist(), pairs.tolist(), strict=True))


def _own_ring(network: Chosen, keys: Any, masked: Mapping[Where, int]) -> CipherCheck:
    """Whether the key of a ring also decrypts the other ring of the leaf."""
    plain, (low, high) = network.params, network.masks
    cipher = network.cipher(plain)
    public = encrypt(plain, network.masks, keys, cipher=cipher)
    exchanged = {name: high[name] & ~low[name] for name in high}, high
    opened = on_host(decrypt(public, exchanged, keys, cipher=cipher))
    shares = (
        _agreeing(network.words(opened, where), network.words(plain, where), bits)
        for where, bits in masked.items()
    )
    return _near_half("a key decrypts its own ring only", shares, "of the masked bits right")
