"""Attacks on the cipher, with two files and on keys: each fault is found by its name."""

import importlib
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selcrypt_jax as sj
from selcrypt_jax._ciphers.lossless import LosslessCipher
from selcrypt_jax._format.envelope import Envelope
from selcrypt_jax._tree.groups import group_positions
from selcrypt_jax.audit._cipher import check_cipher
from selcrypt_jax.audit._keysearch import key_search
from selcrypt_jax.audit._twofiles import changed, merge, shared_keystream

# --- ciphers that are in order ------------------------------------------------------------------

GOOD = {
    "default": LosslessCipher(),
    "group": LosslessCipher(unit="group"),
    "stream": LosslessCipher(permute=False),
    "one bit": LosslessCipher(fine_bits=1),
    "four bits": LosslessCipher(fine_bits=4),
    "whole mantissa": LosslessCipher(fine_bits=23),
    "group, four bits": LosslessCipher(unit="group", fine_bits=4),
    "gaussian": sj.GaussianCipher({}),
    "gaussian, wrapped": sj.GaussianCipher({}, wrap=True),
}


def failed(checks):
    return {check.name for check in checks if check.passed is False}


def skipped(checks):
    return {check.name for check in checks if check.passed is None}


def test_the_default_passes_and_every_check_was_made():
    checks = check_cipher()
    assert failed(checks) == set()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) == 48
    assert {name for name in skipped(checks) if not name.startswith("int8")} == set()
    # By default nothing of an integer is masked.
    assert len(skipped(checks)) == 7
    for check in checks:
        applies = not check.expected.startswith("does not apply: ")
        assert applies == (check.passed is not None) == (not math.isnan(check.found))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_good_ciphers_pass(name):
    for seed in range(12):
        checks = check_cipher(GOOD[name], seed=seed)
        assert failed(checks) == set(), seed
        skip = {name for name in skipped(checks) if name.startswith("float32")}
        in_place = name == "stream" or name.startswith("gaussian")
        assert len(skip) == (7 if in_place else 0)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["weight", "group"])
def test_without_fine_bits_the_missing_mask_is_reported(unit):
    checks = check_cipher(LosslessCipher(unit=unit, fine_bits=0))
    assert failed(checks) == {
        "float32: fine bits are masked",
        "bfloat16: fine bits are masked",
    }


def test_a_cipher_that_takes_nothing():
    with pytest.raises(ValueError, match="expected a cipher that changes more than fine bits"):
        check_cipher(LosslessCipher(permute=False, fine_bits=4))
    with pytest.raises(TypeError, match="cipher: expected an object with check and run"):
        check_cipher(LosslessCipher)  # pyright: ignore[reportArgumentType]


# --- ciphers that are broken --------------------------------------------------------------------


class Toy:
    """Permutes and masks like `LosslessCipher`, with NumPy; parts of it can be replaced."""

    def check(self, ring, leaf):
        pass

    def seed(self, ring, key):
        return key

    def order(self, rng, count):
        return rng.permutation(count)

    def words(self, rng, count, dtype):
        return rng.integers(0, 1 << 8 * dtype.itemsize, count, dtype)

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        seeds = np.asarray(jax.random.key_data(getattr(keys, "array", keys)))
        bits: dict[str, Any] = {
            name: np.array(leaf).view(f"uint{8 * leaf.dtype.itemsize}")
            for name, leaf in leaves.items()
        }
        for ring, key in zip(rings, seeds, strict=False):
            flat, dtype = bits[ring.name].reshape(-1), leaves[ring.name].dtype
            positions = np.sort(group_positions(leaves[ring.name].shape, ring.mask), axis=None)
            rng = np.random.default_rng(self.seed(ring, key))
            source = self.order(rng, len(positions))
            words = self.words(rng, len(positions), flat.dtype) & LosslessCipher().fine_mask(dtype)
            words = words.astype(flat.dtype)
            if inverse:
                flat[positions[source]] = flat[positions] ^ words
            else:
                flat[positions] = flat[positions[source]] ^ words
        return {name: jnp.asarray(bits[name].view(leaf.dtype)) for name, leaf in leaves.items()}


class NoMask(Toy):
    def words(self, rng, count, dtype):
        return np.zeros(count, dtype)


class NoOrder(Toy):
    def order(self, rng, count):
        return np.arange(count)


class Identity(NoOrder, NoMask):
    pass


class SameWord(Toy):
    def words(self, rng, count, dtype):
        return np.full(count, rng.integers(0, 1 << 8 * dtype.itemsize), dtype)


class ShortKeystream(Toy):
    period = 300

    def words(self, rng, count, dtype):
        return np.resize(super().words(rng, self.period, dtype), count)


class SkewedKeystream(Toy):
    def words(self, rng, count, dtype):
        return super().words(rng, count, dtype) | super().words(rng, count, dtype)


class HalfMasked(Toy):
    def words(self, rng, count, dtype):
        words = super().words(rng, count, dtype)
        words[count // 2 :] = 0
        return words


class Blocks(Toy):
    """Only the first block is permuted, or all alike; blocks of neighbours or spread out."""

    def __init__(self, *, spread=False, same=False, size=1024):
        self.spread, self.same, self.size = spread, same, size

    def order(self, rng, count):
        source = np.arange(count)
        state = rng.integers(0, 2**63)
        blocks = -(-count // self.size)
        for block in range(blocks if self.same else 1):
            place = slice(block, None, blocks)
            if not self.spread:
                place = slice(block * self.size, (block + 1) * self.size)
            again = np.random.default_rng(state)
            inside = source[place]
            order = again.permutation(self.size)
            source[place] = inside[order[order < len(inside)]]
        return source


class Neighbours(Toy):
    """Nothing stays, nothing goes far."""

    def order(self, rng, count):
        near = np.arange(count) + 20 * rng.random(count)
        return np.argsort(near)


class ConstantKey(Toy):
    def seed(self, ring, key):
        return 5


class KeyOfLevel(Toy):
    """The same in every leaf: only the first leaf's keys count, as if names were left out."""

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        first = {}
        for index, ring in enumerate(rings):
            first.setdefault(ring.level, index)
        which = [first[ring.level] for ring in rings]
        return super().run(leaves, rings, keys.array[np.array(which)], inverse=inverse)


class KeyOfLeaf(Toy):
    """The same in every ring of a leaf, so that the lowest key opens all of it."""

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        first = {}
        for index, ring in enumerate(rings):
            first.setdefault(ring.name, index)
        which = [first[ring.name] for ring in rings]
        return super().run(leaves, rings, keys.array[np.array(which)], inverse=inverse)


class NoKey(Toy):
    """Another in every ring and leaf, and the same for everybody."""

    def seed(self, ring, key):
        return [*ring.name.encode(), ring.level]


class OneKeyForAll(LosslessCipher):
    """The library's own, with the first ring's key for all."""

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        first = SimpleNamespace(array=keys.array[np.zeros(len(keys.array), int)], secrets=None)
        return super().run(leaves, rings, first, inverse=inverse)


class ChangesPlain(Toy):
    def run(self, leaves, rings, keys, *, inverse, donate=()):
        result = super().run(leaves, rings, keys, inverse=inverse)
        leaf = result["conv"]
        outside = ~np.logical_or.reduce(
            [np.broadcast_to(ring.mask, leaf.shape) for ring in rings if ring.name == "conv"]
        )
        place = tuple(np.argwhere(outside)[0])
        # Taken back by decryption, so that only a look at the file shows it.
        result["conv"] = leaf.at[place].set(-leaf[place])
        return result


class DoesNotDecrypt(Toy):
    def run(self, leaves, rings, keys, *, inverse, donate=()):
        result = super().run(leaves, rings, keys, inverse=inverse)
        if inverse:
            place = (0,) * result["bias"].ndim
            result["bias"] = result["bias"].at[place].set(result["bias"][place] + 1)
        return result


KEYSTREAM = {
    "keystream: different in every ring",
    "keystream: different in every leaf",
    "keystream: different for every model id",
}
UNEVEN = KEYSTREAM | {
    "keystream: as many ones as zeros",
    "keystream: does not repeat within a ring",
}
OTHERS = {
    "order: different in every ring",
    "order: different in every leaf",
    "order: different for every model id",
}
STUCK = {
    "order: weights move",
    "order: every part is permuted",
    "order: weights spread over the ring",
    "order: different in every block",
} | OTHERS
ALIKE = {"order: weights spread over the ring", "order: different in every block"}

# What must be found, and what may be besides; nothing else.
BROKEN = {
    "identity": (Identity(), {"fine bits are masked"} | STUCK, set()),
    "no masking": (NoMask(), {"fine bits are masked"}, set()),
    "no permutation": (NoOrder(), STUCK, set()),
    "the same word for all": (SameWord(), {"fine bits are masked"}, set()),
    # So few words are not balanced, as it happens.
    "short keystream": (
        ShortKeystream(),
        {"keystream: does not repeat within a ring"},
        UNEVEN,
    ),
    "skewed keystream": (SkewedKeystream(), UNEVEN, set()),
    "half of a ring masked": (HalfMasked(), UNEVEN, set()),
    "first block permuted": (Blocks(), STUCK, set()),
    "first block permuted, spread": (Blocks(spread=True), STUCK, set()),
    "blocks alike": (Blocks(same=True), ALIKE, STUCK),
    "blocks alike, spread": (Blocks(same=True, spread=True), ALIKE, STUCK),
    "blocks alike, of 700": (Blocks(same=True, size=700), ALIKE, STUCK),
    "blocks alike, of 7": (Blocks(same=True, size=7), ALIKE, STUCK),
    "neighbours permuted": (Neighbours(), STUCK, set()),
    "one key": (ConstantKey(), KEYSTREAM | {"a key decrypts its own ring only"} | OTHERS, set()),
    "key of the level": (
        KeyOfLevel(),
        {"keystream: different in every leaf", "order: different in every leaf"},
        set(),
    ),
    "key of the leaf": (
        KeyOfLeaf(),
        {
            "keystream: different in every ring",
            "a key decrypts its own ring only",
            "order: different in every ring",
        },
        set(),
    ),
    "no key": (
        NoKey(),
        {"keystream: different for every model id", "order: different for every model id"},
        set(),
    ),
    "plain weights change": (ChangesPlain(), {"weights outside the masks are unchanged"}, set()),
    "does not decrypt": (DoesNotDecrypt(), {"decryption restores the weights"}, set()),
}


def test_a_toy_without_a_fault_passes():
    assert failed(check_cipher(Toy())) == set()


FAST = ["no masking", "no permutation", "short keystream", "blocks alike", "one key",
        "plain weights change", "does not decrypt"]  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BROKEN]
)
def test_each_fault_is_found_by_its_name(name):
    cipher, faults, also = BROKEN[name]
    checks = check_cipher(cipher)
    for dtype in ("float32", "bfloat16"):
        found = {name.partition(": ")[2] for name in failed(checks) if name.startswith(dtype)}
        assert faults <= found <= faults | also
    # Integers have nothing that is masked.
    found = {name.partition(": ")[2] for name in failed(checks) if name.startswith("int8")}
    whole = {n for n in faults if not n.startswith(("keystream", "fine", "a key"))}
    assert whole <= found <= faults | also


@pytest.mark.slow
def test_the_librarys_own_cipher_with_one_key_for_all():
    found = failed(check_cipher(OneKeyForAll()))
    faults = {
        "keystream: different in every ring",
        "keystream: different in every leaf",
        "a key decrypts its own ring only",
        "order: different in every ring",
        "order: different in every leaf",
    }
    assert {f"float32: {name}" for name in faults} == {n for n in found if n.startswith("float32")}


# --- two files ----------------------------------------------------------------------------------


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SECRET = sj.Secret(bytes(range(32)))
ID, OTHER_ID = bytes(16), bytes([1] * 16)


def network(seed=0, dtype="float32"):
    leaf = (0.05 * normal(seed, (3, 3, 16, 16))).astype(dtype)
    return {"conv": leaf, "bias": normal(seed + 1, (200,)), "act": jnp.tanh}


def selection(seed=0, share=0.3):
    rng = np.random.default_rng(seed)
    return {"conv": rng.random((1, 1, 16, 16)) < share, "bias": np.ones(200, bool), "act": False}


def protect(params, mask, model_id, cipher=None):
    keys = sj.ring_keys(sj.level_key(SECRET, model_id, levels=1))
    return sj.encrypt(params, (mask,), keys, cipher=cipher)


def words(leaf):
    array = np.asarray(leaf)
    return array.view(f"uint{8 * array.dtype.itemsize}")


@pytest.mark.slow
def test_two_selections_of_one_network_open_each_other():
    params, mask_a, mask_b = network(), selection(1), selection(2)
    mask_b["bias"] = False
    a, b = protect(params, mask_a, ID), protect(params, mask_b, OTHER_ID)
    kept = {name: words(leaf).copy() for name, leaf in a.items() if name != "act"}
    found = merge(a, b, mask_a, mask_b)
    open_now = np.broadcast_to(mask_a["conv"] & ~mask_b["conv"], (3, 3, 16, 16))
    assert open_now.any()
    np.testing.assert_array_equal(words(found["conv"])[open_now], words(params["conv"])[open_now])
    np.testing.assert_array_equal(words(found["conv"])[~open_now], kept["conv"][~open_now])
    np.testing.assert_array_equal(found["bias"], params["bias"])
    assert found["act"] is jnp.tanh
    for name, before in kept.items():
        np.testing.assert_array_equal(words(a[name]), before)


def test_one_selection_opens_nothing():
    params, mask = network(), selection()
    a, b = protect(params, mask, ID), protect(params, mask, OTHER_ID)
    found = merge(a, b, mask, mask)
    assert all(found[name] is a[name] for name in a)


def successor(params, change=1e-3):
    """After a little training: a tenth of a percent."""
    moved = params["conv"].astype(np.float32) * (1 + change * normal(9, params["conv"].shape))
    return params | {"conv": moved.astype(params["conv"].dtype)}


CIPHERS = [
    sj.LosslessCipher(),
    sj.LosslessCipher(permute=False),
    pytest.param(sj.LosslessCipher(unit="group"), marks=pytest.mark.slow),
    pytest.param(sj.LosslessCipher(fine_bits=18), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_model_id_used_twice_shows_in_a_successor(cipher):
    params, mask = network(), selection()
    a = protect(params, mask, ID, cipher)
    twice = protect(successor(params), mask, ID, cipher)
    check = shared_keystream(a, twice, mask, cipher=cipher)
    assert not check.passed
    assert check.found < 0.3
    again = shared_keystream(a, protect(params, mask, ID, cipher), mask, cipher=cipher)
    assert (again.passed, again.found) == (False, 0.0)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_new_model_id_shows_nothing(cipher):
    params, mask = network(), selection()
    a = protect(params, mask, ID, cipher)
    for number in range(12):
        other = params if number % 2 else successor(params)
        b = protect(other, mask, bytes([number + 1] * 16), cipher)
        check = shared_keystream(a, b, mask, cipher=cipher)
        assert check.passed
        assert 0.4 < check.found < 0.6


def test_unrelated_networks_show_a_keystream_where_they_are_rounded():
    mask = selection() | {"bias": False}
    rounded = [
        network(seed, "bfloat16") | {"conv": network(seed, "bfloat16")["conv"].astype(np.float32)}
        for seed in (0, 5)
    ]
    a, b = (protect(params, mask, ID) for params in rounded)
    assert not shared_keystream(a, b, mask).passed
    # With full mantissas there is nothing to see, and nothing to gain.
    a, b = (protect(network(seed), mask, ID) for seed in (0, 5))
    assert shared_keystream(a, b, mask).passed


def test_where_no_bit_is_masked_there_is_no_keystream():
    params = {"w": np.arange(100, dtype=np.int8)}
    a, b = (protect(params, {"w": True}, model_id) for model_id in (ID, OTHER_ID))
    check = shared_keystream(a, b, {"w": True})
    assert check.passed is None
    assert math.isnan(check.found)


def test_a_network_protected_twice_shows_what_is_encrypted():
    params, mask = network(), selection()
    a, b = protect(params, mask, ID), protect(params, mask, OTHER_ID)
    found = changed(a, b, mask)
    assert 0.999 < found.found <= 1
    assert found.precision == 1
    assert found.mask["act"] is False
    assert found.mask["conv"].shape == (3, 3, 16, 16)
    truth = np.broadcast_to(mask["conv"], (3, 3, 16, 16))
    assert not found.mask["conv"][~truth].any()
    blind = changed(a, b)
    assert math.isnan(blind.found)
    np.testing.assert_array_equal(blind.mask["conv"], found.mask["conv"])
    # The share is of weights, not of groups.
    half = changed(a, b, mask | {"bias": False})
    assert half.precision == pytest.approx(truth.sum() / (truth.sum() + 200), abs=1e-3)


def test_a_successor_hides_the_selection_among_what_was_trained():
    params, mask = network(), selection()
    a, b = protect(params, mask, ID), protect(successor(params), mask, OTHER_ID)
    found = changed(a, b, mask)
    assert found.found > 0.99
    assert found.precision < 0.5


def test_a_model_id_used_twice_gives_the_same_file_twice():
    params, mask = network(), selection()
    found = changed(protect(params, mask, ID), protect(params, mask, ID), mask)
    assert found.found == 0
    assert math.isnan(found.precision)


def test_random_state_takes_no_part():
    a = {"w": normal(0, (100,)), "rng": jax.random.key(0)}
    found = changed(
        a, {"w": normal(1, (100,)), "rng": jax.random.key(1)}, {"w": True, "rng": False}
    )
    assert found.found == 1
    assert found.mask["rng"] is False


def test_files_that_do_not_fit():
    params, mask = network(), selection()
    with pytest.raises(ValueError, match=r"expected the same paths in both, got \['extra'\]"):
        changed(params, params | {"extra": np.zeros(3)})
    with pytest.raises(ValueError, match=r"'bias': expected the same shape and dtype in both"):
        merge(params, params | {"bias": normal(0, (7,))}, mask, mask)
    with pytest.raises(ValueError, match=r"'bias': expected the same shape and dtype.* and str"):
        shared_keystream(params, params | {"bias": "none"}, mask)
    nothing = dict.fromkeys(params, False)
    with pytest.raises(ValueError, match="truth: expected a mask that selects some weights"):
        changed(params, params, nothing)


# --- guessing keys ------------------------------------------------------------------------------


def test_guesses_use_the_librarys_own_functions(monkeypatch):
    calls = dict.fromkeys(["level_key", "open", "passphrase"], 0)

    def count(name, function):
        def counted(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return counted

    module = importlib.import_module("selcrypt_jax.audit._keysearch")
    monkeypatch.setattr(module, "level_key", count("level_key", module.level_key))
    opened = []

    def open_box(self, key, **options):
        calls["open"] += 1
        try:
            return Envelope.open(self, key, **options)
        except sj.IntegrityError:
            opened.append(False)
            raise

    class Counted(Envelope):
        open = open_box

    monkeypatch.setattr(module, "Envelope", Counted)
    original = sj.Secret.from_passphrase
    monkeypatch.setattr(sj.Secret, "from_passphrase", count("passphrase", original))
    found = key_search(seconds=0.05)
    assert [record.key for record in found] == ["random secret", "level key", "passphrase"]
    assert calls["passphrase"] >= 2
    assert calls["level_key"] > 20
    # Every guess is tried on the file, and is wrong.
    assert calls["open"] == len(opened) > calls["level_key"] > calls["passphrase"]


def test_years_follow_from_rate_and_entropy():
    secret, level, passphrase = key_search(seconds=0.02, passphrase_bits=20)
    assert (secret.bits, level.bits, passphrase.bits) == (256, 256, 20)
    for record in (secret, level, passphrase):
        half = 2.0 ** (record.bits - 1)
        assert record.years == pytest.approx(half / record.guesses_per_second / 3.156e7)
    assert 100 < secret.guesses_per_second < 1e7
    assert 0.05 < passphrase.guesses_per_second < 1000
    assert passphrase.guesses_per_second < secret.guesses_per_second / 20
    assert [record.key for record in key_search(seconds=0.01, passphrase_bits=None)] == [
        "random secret",
        "level key",
    ]
    assert key_search(seconds=0.01, passphrase_bits=5000)[2].years == math.inf


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_guessing_takes_time(seconds):
    with pytest.raises(ValueError, match="seconds: expected a positive number"):
        key_search(seconds=seconds)


@pytest.mark.parametrize("bits", [0, -3, math.inf, math.nan])
def test_entropy_is_positive(bits):
    with pytest.raises(ValueError, match="passphrase_bits: expected a positive number"):
        key_search(passphrase_bits=bits)
