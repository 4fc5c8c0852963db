"""Attacks on the cipher itself, by chosen weights: what a thief learns who may have some encrypted.

Every check holds for any `Cipher`: it sees nothing but what `encrypt` and `decrypt` return. The
weights are chosen in two ways. *Equal ones*: the ciphertext is then the keystream. *Marked ones*:
a few encryptions under the same keys write the digits of each weight's place into its exponent;
where exponents survive, the ciphertext tells where every weight went.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from .._ciphers.blocks import block_count
from .._ciphers.dprm import Cipher, decrypt, encrypt
from .._ciphers.gaussian import GaussianCipher
from .._ciphers.lossless import LosslessCipher
from .._keys.keys import Secret, level_key, new_model_id, ring_keys
from .._masks.masks import nested_masks
from .._tree.dtypes import DTYPES
from .._tree.groups import group_positions, group_shape
from .._tree.names import named_leaves
from .._tree.rings import split_rings
from ._records import CipherCheck

_SHAPES = {"conv": (2, 2, 64, 64), "twin": (2, 2, 64, 64), "dense": (64, 128), "bias": (128,)}
_SHARES = (0.375, 0.75)  # so that both rings of a leaf have the same size
_DTYPES = ("float32", "bfloat16", "int8")
_ALARM = 1e-8  # of a check, for a cipher that is in order: under 1e-6 for all of them together
_CLOSE = 1e-3  # standard deviations: what rounding may do to the Gaussian cipher
_SKEW = 0.02  # by which masked bits may prefer 0 or 1: the mantissa bits of normal numbers do
_LARGE = 1024  # units from which a ring is looked at piece by piece
_PIECES = 8
_LAGS = 2048
_DIGIT = 4  # bits, of a place, that an exponent can tell
_COARSE = 0b101  # the top three mantissa bits of a marked weight

_Where = tuple[str, int]  # leaf and level: a ring in a leaf


def check_cipher(cipher: Cipher | None = None, *, seed: int = 0) -> list[CipherCheck]:
    """Attacks a cipher by chosen plaintext, on a small network with keys as a vendor makes them.

    Args:
        cipher: `LosslessCipher()` unless given. A `GaussianCipher` is fitted anew to the weights
            of each trial; only its `wrap` counts, and it is tried on float32 alone.
        seed: of the network. Secret and model ids are new each time.

    Returns:
        For float32, bfloat16 and int8 the same named checks. One that cannot be made (a dtype
        that the cipher refuses, an order that cannot be read) has passed, with NaN as `found`,
        and says so. A cipher that is in order fails one of them with a probability below 1e-6:
        each check bounds its own by 1e-8, with Hoeffding's inequality for shares of bits and with
        ``P(k agree) <= b**k / k!`` for permutations in ``b`` blocks of up to 4,096 units.

    Raises:
        ValueError: the cipher refuses float32 rings of 48 weights and more.
        TypeError: not an object with the methods of `Cipher`.
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
        for check in _checks(_Network.make(cipher, dtype, seed))
    ]


def _skipped(name: str, why: str) -> CipherCheck:
    return CipherCheck(name, True, math.nan, f"does not apply: {why}")


class _Network(NamedTuple):
    """Synthetic weights, and the cipher that is tried on them.

    ``twin`` is ``conv`` once more, so that only the leaf's name can make their ciphertexts differ.

    Attributes:
        cipher: see `check_cipher`.
        params: name → NumPy array.
        masks: of two levels.
        groups: ring → flat positions of its weights, ``[groups, weights in a group]``.
    """

    cipher: Cipher
    params: dict[str, np.ndarray]
    masks: tuple[Any, ...]
    groups: dict[_Where, np.ndarray]

    @classmethod
    def make(cls, cipher: Cipher, dtype: str, seed: int) -> "_Network":
        rng = np.random.default_rng(seed)
        scale = 40 if DTYPES[dtype].kind == "integer" else 0.05
        params, scores = {}, {}
        for name, shape in _SHAPES.items():
            if name == "dense" and dtype != "float32":
                continue  # most of the time goes into compiling, for each shape and dtype
            params[name] = (scale * rng.standard_normal(shape)).clip(-127, 127).astype(dtype)
            scores[name] = rng.random(group_shape(shape, "kernel", "HWIO"))
        params["twin"], scores["twin"] = params["conv"], scores["conv"]
        masks = nested_masks(scores, _SHARES)
        groups = {
            (ring.name, ring.level): group_positions(_SHAPES[ring.name], ring.mask)
            for ring in split_rings(named_leaves(params), masks)
        }
        return cls(cipher, params, masks, groups)

    @property
    def dtype(self) -> np.dtype:
        return self.params["conv"].dtype

    def refusal(self) -> str | None:
        """Why the cipher does not take this dtype, or None if it does."""
        if isinstance(self.cipher, GaussianCipher):
            return None if self.dtype == np.float32 else "too coarse for the Gaussian cipher"
        try:
            for ring in split_rings(named_leaves(self.params), self.masks):
                self.cipher.check(ring, self.params[ring.name])
        except ValueError as error:
            if self.dtype == np.float32:
                raise
            return f"the cipher refuses it ({error})"
        return None

    def weights(self, where: _Where) -> np.ndarray:
        """Flat positions of the weights of a ring, ascending."""
        return np.sort(self.groups[where], axis=None)

    def words(self, params: Mapping[str, np.ndarray], where: _Where) -> np.ndarray:
        """The bits of the weights of a ring."""
        return _bits(params[where[0]]).ravel()[self.weights(where)]

    def fitted(self, params: Mapping[str, np.ndarray]) -> Cipher:
        if isinstance(self.cipher, GaussianCipher):
            return GaussianCipher.fit(params, self.masks, wrap=self.cipher.wrap)
        return self.cipher

    def encrypt_with(self, values: Mapping[_Where, Any], keys: Any) -> dict[_Where, np.ndarray]:
        """The bits of every ring, weight by weight, if its weights are these."""
        params = {name: leaf.copy() for name, leaf in self.params.items()}
        for (name, level), chosen in values.items():
            params[name].reshape(-1)[self.weights((name, level))] = chosen
        public = _host(encrypt(params, self.masks, keys, cipher=self.fitted(params)))
        return {where: self.words(public, where) for where in values}


def _host(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in jax.device_get(tree).items()}


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"uint{8 * array.dtype.itemsize}")


def _checks(network: _Network) -> Iterator[CipherCheck]:
    refusal = network.refusal()
    if refusal is not None:
        yield _skipped("every check", refusal)
        return
    secret = Secret.generate()
    models = [ring_keys(level_key(secret, new_model_id(), levels=len(_SHARES))) for _ in range(2)]
    yield from _exactness(network, models[0])
    ones = {where: np.ones((), network.dtype) for where in network.groups}
    streams = [network.encrypt_with(ones, keys) for keys in models]
    masked = _masked_bits(network, streams[0])
    yield from _keystream(network, streams, masked)
    yield _own_ring(network, models[0], masked)
    yield from _order(network, models)


# --- does it decrypt ----------------------------------------------------------------------------


def _exactness(network: _Network, keys: Any) -> Iterator[CipherCheck]:
    plain, masks = network.params, network.masks
    cipher = network.fitted(plain)
    encrypted = encrypt(plain, masks, keys, cipher=cipher)
    public = _host(encrypted)
    opened = _host(decrypt(encrypted, masks, keys, cipher=cipher))
    differing, error = 0, 0.0
    for name, leaf in plain.items():
        differing += int((_bits(opened[name]) != _bits(leaf)).sum())
        wide, right = opened[name].astype(np.float64), leaf.astype(np.float64)
        distance = np.nan_to_num(np.abs(wide - right), nan=math.inf).max()
        error = max(error, float(distance) / float(right.std()))
    name = "decrypts to what was encrypted"
    if isinstance(cipher, GaussianCipher):
        text = f"error of at most {_CLOSE:g} standard deviations: this cipher is not exact"
        yield CipherCheck(name, error <= _CLOSE, error, text)
    else:
        yield CipherCheck(name, differing == 0, float(differing), "0 weights that differ")
    changed = 0
    for name, leaf in plain.items():
        outside = ~np.broadcast_to(masks[-1][name], leaf.shape)
        changed += int((_bits(public[name]) != _bits(leaf))[outside].sum())
    name = "weights outside of the masks stay"
    yield CipherCheck(name, changed == 0, float(changed), "0 weights that changed")


# --- the keystream ------------------------------------------------------------------------------


def _masked_bits(network: _Network, stream: Mapping[_Where, np.ndarray]) -> dict[_Where, int]:
    """The bits of each ring that are not the same in all its weights, though the weights are.

    Of floats the fine ones: what else is masked need not be balanced.
    """
    fine = LosslessCipher().fine_mask(network.dtype)
    result = {}
    for where, words in stream.items():
        varying = int(np.bitwise_or.reduce(words ^ words[0]))
        result[where] = varying & fine or varying
    return result


def _agreeing(one: np.ndarray, other: np.ndarray, bits: int) -> tuple[float, int]:
    """Share of these bits that are equal in two lists of weights; of how many."""
    count = min(len(one), len(other))
    differing = np.bitwise_count((one[:count] ^ other[:count]) & one.dtype.type(bits))
    total = count * bits.bit_count()
    return 1 - float(differing.sum(dtype=np.int64)) / max(total, 1), total


def _near_half(
    name: str, shares: Iterable[tuple[float, int]], what: str, skew: float = 0.0
) -> CipherCheck:
    """Whether all shares, each of so many fair bits, are what chance gives.

    `found` is the share over all, or the one that is furthest off if that is too far.
    """
    found = np.array([(share, bits) for share, bits in shares if bits], float)
    if not found.size:
        return _skipped(name, "no bit is masked")
    share, bits = found.T
    deviations = np.maximum(np.abs(2 * share - 1) - 2 * skew, 0) * np.sqrt(bits)
    limit = math.sqrt(2 * math.log(2 * len(share) / _ALARM))  # Hoeffding, in standard deviations
    worst = int(deviations.argmax())
    half = f"0.5 ± {skew:g}" if skew else "0.5"
    text = f"{half} {what}, within {limit:.1f} standard deviations in {len(share):,} comparisons"
    passed = bool(deviations[worst] <= limit)
    return CipherCheck(
        name, passed, float(share @ bits / bits.sum() if passed else share[worst]), text
    )


def _pairs(rings: Iterable[_Where], shared: int) -> list[tuple[_Where, _Where]]:
    """Pairs of rings of the same leaf (shared 0) or of the same level (shared 1)."""
    return [(a, b) for a, b in itertools.combinations(rings, 2) if a[shared] == b[shared]]


def _keystream(
    network: _Network, streams: Sequence[Mapping[_Where, np.ndarray]], masked: Mapping[_Where, int]
) -> Iterator[CipherCheck]:
    stream, second = streams
    fine = LosslessCipher().fine_mask(network.dtype)
    name = "fine bits are masked"
    if fine:
        least = min((bits & fine).bit_count() for bits in masked.values())
        text = f"1 to {fine.bit_count()} bits that differ between equal weights, in every ring"
        yield CipherCheck(name, least >= 1, float(least), text)
    else:
        yield _skipped(name, "whole numbers have none")
    shares = (pair for where, words in stream.items() for pair in _set_bits(words, masked[where]))
    name = "keystream: as many ones as zeros"
    yield _near_half(name, shares, "of the weights with a masked bit set", _SKEW)
    equal = "of the masked bits equal"
    for name, shared in (("ring", 0), ("leaf", 1)):
        pairs = _pairs(stream, shared)
        shares = (_agreeing(stream[a], stream[b], masked[a] & masked[b]) for a, b in pairs)
        yield _near_half(f"keystream: another in every {name}", shares, equal)
    shares = (_agreeing(stream[where], second[where], masked[where]) for where in stream)
    yield _near_half("keystream: another for every model id", shares, equal)
    shares = (pair for where, words in stream.items() for pair in _repeats(words, masked[where]))
    name = "keystream: does not repeat within a ring"
    yield _near_half(name, shares, f"{equal} at any distance")


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """0 or 1, ``[bits, weights]``."""
    chosen = np.array([b for b in range(bits.bit_length()) if bits >> b & 1], words.dtype)
    return words >> chosen[:, None] & 1


def _set_bits(words: np.ndarray, bits: int) -> list[tuple[float, int]]:
    """Share of the weights in which a bit is set, bit by bit; of how many."""
    return [(float(column.mean()), len(words)) for column in _unpacked(words, bits)]


def _repeats(words: np.ndarray, bits: int) -> list[tuple[float, int]]:
    """As `_agreeing`, of a ring and itself moved by 1, 2, ... weights."""
    signs = 1 - 2.0 * _unpacked(words, bits)
    count = len(words)
    size = 1 << (2 * count - 1).bit_length()  # room enough that nothing wraps around
    spectrum = np.square(np.abs(np.fft.rfft(signs, size))).sum(0)
    pairs = len(signs) * np.arange(count - 1, 0, -1)
    shares = (1 + np.fft.irfft(spectrum, size)[1:count] / np.maximum(pairs, 1)) / 2
    return list(zip(shares.tolist(), pairs.tolist(), strict=True))


def _own_ring(network: _Network, keys: Any, masked: Mapping[_Where, int]) -> CipherCheck:
    """Whether the key of a ring opens the other one of the leaf."""
    plain, (low, high) = network.params, network.masks
    cipher = network.fitted(plain)
    public = encrypt(plain, network.masks, keys, cipher=cipher)
    exchanged = {name: high[name] & ~low[name] for name in high}, high
    opened = _host(decrypt(public, exchanged, keys, cipher=cipher))
    shares = (
        _agreeing(network.words(opened, where), network.words(plain, where), bits)
        for where, bits in masked.items()
    )
    return _near_half("a key opens no other ring", shares, "of the masked bits right")


# --- the permutation ----------------------------------------------------------------------------


def _marked(digits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats between 2⁻¹⁵ and 2 with the digit in the exponent; integers with it on top."""
    width, mantissa = 8 * dtype.itemsize, DTYPES[dtype.name].mantissa
    if mantissa:
        words = digits << mantissa | 0b0111 << (mantissa + _DIGIT) | _COARSE << (mantissa - 3)
    else:
        words = digits << (width - _DIGIT)
    return words.astype(f"uint{width}").view(dtype)


class _Orders(NamedTuple):
    """Where the weights at each place of a ring came from, of the rings that tell.

    ``stream``: exponents stay in place while the rest of the coarse bits is masked. Such a cipher
    permutes nothing, and says so.
    """

    sources: dict[_Where, np.ndarray]
    stream: bool


def _orders(network: _Network, keys: Any) -> _Orders:
    dtype = network.dtype
    mantissa = DTYPES[dtype.name].mantissa
    sizes = {where: groups.size for where, groups in network.groups.items()}
    found = {where: np.zeros(size, np.int64) for where, size in sizes.items()}
    survive = True
    for shift in range(0, max(sizes.values()).bit_length(), _DIGIT):
        chosen = {
            where: _marked(np.arange(size) >> shift & (1 << _DIGIT) - 1, dtype)
            for where, size in sizes.items()
        }
        for where, words in network.encrypt_with(chosen, keys).items():
            digit = mantissa or 8 * dtype.itemsize - _DIGIT
            found[where] |= (words.astype(np.int64) >> digit & (1 << _DIGIT) - 1) << shift
            if mantissa:
                survive = survive and bool((words >> (mantissa - 3) & 7 == _COARSE).all())
    places = {where: np.arange(size) for where, size in sizes.items()}
    in_place = all(np.array_equal(found[where], places[where]) for where in found)
    sources = {
        where: _as_units(network, where, source)
        for where, source in found.items()
        if np.array_equal(np.sort(source), places[where])
    }
    return _Orders(sources, stream=in_place and not survive)


def _as_units(network: _Network, where: _Where, source: np.ndarray) -> np.ndarray:
    """The same of groups, if those move as a whole."""
    groups = np.searchsorted(network.weights(where), network.groups[where])
    number = np.empty(source.size, np.int64)
    number[groups] = np.arange(len(groups))[:, None]
    from_group = number[source[groups]]
    whole = (from_group == from_group[:, :1]).all()
    if whole and (source[groups] == groups[from_group[:, 0]]).all():
        return from_group[:, 0]
    return source


class _Count(NamedTuple):
    """How many of ``of`` units agree by chance alone, if those of a permutation in blocks do."""

    agreeing: int
    of: int
    blocks: int

    def log_chance(self) -> float:
        """Of so many or more: E[C(X, k)] is at most b**k / k!."""
        if self.agreeing <= self.blocks:
            return 0.0
        return self.agreeing * math.log(self.blocks) - math.lgamma(self.agreeing + 1)


def _few(name: str, counts: Sequence[_Count], what: str) -> CipherCheck:
    """Whether all agree in few units only; `found` as in `_near_half`."""
    if not counts:
        return _skipped(name, "no ring is large enough")
    worst = min(counts, key=_Count.log_chance)
    passed = worst.log_chance() >= math.log(_ALARM / len(counts))
    shown = counts if passed else [worst]
    share = sum(count.agreeing for count in shown) / sum(count.of for count in shown)
    text = f"share of {what}: no more than chance gives, in {len(counts):,} comparisons"
    return CipherCheck(name, passed, share, text)


def _order(network: _Network, models: Sequence[Any]) -> Iterator[CipherCheck]:
    names = [
        f"order: {what}"
        for what in (
            "weights leave their places",
            "every stretch is moved",
            "weights go everywhere",
            "another in every block",
            "another in every ring",
            "another in every leaf",
            "another for every model id",
        )
    ]
    (first, stream), (second, _) = (_orders(network, keys) for keys in models)
    if stream or not first:
        why = "exponents do not survive"
        if stream:
            why = "exponents stay in place: each weight is known to a factor of two"
        yield from (_skipped(name, why) for name in names)
        return
    stay, stretch, spread, blocks, rings, leaves, ids = names
    large = {where: source for where, source in first.items() if len(source) >= _LARGE}
    same = "units from the same place"
    places = {where: np.arange(len(source)) for where, source in first.items()}
    yield _few(stay, [_same(first[w], places[w]) for w in first], "units in place")
    pieces = [
        _Count(int(piece.sum()), len(piece), block_count(len(source)))
        for where, source in large.items()
        for piece in np.array_split(source == places[where], _PIECES)
    ]
    yield _few(stretch, pieces, "units of an eighth of a ring in place")
    yield _spread(spread, list(large.values()))
    yield _few(blocks, list(_displacements(first)), "equal displacements at a distance")
    for name, shared in ((rings, 0), (leaves, 1)):
        yield _few(name, [_same(first[a], first[b]) for a, b in _pairs(first, shared)], same)
    yield _few(ids, [_same(first[w], second[w]) for w in first if w in second], same)


def _same(one: np.ndarray, other: np.ndarray) -> _Count:
    count = min(len(one), len(other))
    return _Count(int((one[:count] == other[:count]).sum()), count, block_count(count))


def _spread(name: str, sources: Sequence[np.ndarray]) -> CipherCheck:
    """Pearson's χ² of the piece that a unit comes from against the piece that it is in."""
    if not sources:
        return _skipped(name, "no ring is large enough")
    degrees = (_PIECES - 1) ** 2
    x = math.log(len(sources) / _ALARM)
    limit = degrees + 2 * math.sqrt(degrees * x) + 2 * x  # Laurent and Massart, 2000, lemma 1
    worst = 0.0
    for source in sources:
        piece = np.arange(len(source)) * _PIECES // len(source)
        table = np.bincount(piece * _PIECES + piece[source], minlength=_PIECES**2)
        expected = np.outer(np.bincount(piece), np.bincount(piece)).ravel() / len(source)
        worst = max(worst, float((np.square(table - expected) / expected).sum()))
    text = f"χ² of about {degrees}, at most {limit:.0f}, between eighths of a ring"
    return CipherCheck(name, worst <= limit, worst, text)


def _displacements(sources: Mapping[_Where, np.ndarray]) -> Iterator[_Count]:
    """Pairs at each distance that are moved equally far: all of them, where blocks are alike."""
    for source in sources.values():
        moved = source - np.arange(len(source))
        doubling = {1 << power for power in range(len(source).bit_length())}
        for lag in sorted({*range(1, _LAGS), *doubling}):
            if lag < len(moved):
                equal = int(np.count_nonzero(moved[lag:] == moved[:-lag]))
                yield _Count(equal, len(moved) - lag, 2 * block_count(len(moved)))
