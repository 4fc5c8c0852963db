"""Secrets and level keys: the chain, its domains, and that nothing is printed."""

import hashlib
import hmac
import pickle

import jax
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

import selcrypt_jax as sj

SECRET = bytes(range(32))
MODEL = bytes(range(16))


def hkdf(key: bytes, info: bytes, salt: bytes = bytes(32)) -> bytes:
    """RFC 5869 for one block of output, from its text and the standard library alone."""
    extracted = hmac.digest(salt, key, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_hkdf_oracle_on_rfc_5869_test_case_3():
    okm = hkdf(b"\x0b" * 22, b"")
    assert okm.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_chain_is_what_the_documentation_says():
    value = hkdf(SECRET, b"selcrypt/v1/top" + (5).to_bytes(4, "little"), MODEL)
    for level in range(5, 0, -1):
        key = sj.level_key(SECRET, MODEL, level=level, levels=5)
        assert bytes(key) == value
        assert key.cipher_key() == hkdf(value, b"selcrypt/v1/cipher")
        value = hkdf(value, b"selcrypt/v1/down")


def test_a_level_key_gives_the_lower_ones_and_no_higher_one():
    levels = [sj.level_key(SECRET, MODEL, level=level, levels=4) for level in range(1, 5)]
    for high in levels:
        for low in levels[: high.level]:
            assert high.lower(low.level) == low
    for level, words in {3: "lower levels only", 0: "Level 0 needs no key"}.items():
        with pytest.raises(
            sj.GrantError, match=rf"expected 1\.\.2, got {level}.*{words}"
        ) as caught:
            levels[1].lower(level)
        assert caught.value.reason == "level"


def test_ring_keys_of_a_level_are_the_first_keys_of_the_owner():
    owner = [
        jax.random.key_data(key) for key in sj.ring_keys(sj.level_key(SECRET, MODEL, levels=4))
    ]
    for level in range(1, 5):
        grant = sj.level_key(SECRET, MODEL, level=level, levels=4)
        customer = [jax.random.key_data(key) for key in sj.ring_keys(grant)]
        np.testing.assert_array_equal(customer, owner[:level])


def test_ring_keys_are_chacha20_keys_of_the_cipher_key():
    grant = sj.level_key(SECRET, MODEL, level=1, levels=1)
    (key,) = sj.ring_keys(grant)
    stream = Cipher(algorithms.ChaCha20(grant.cipher_key(), bytes(4) + b"random_bits\0"), None)
    expected = np.frombuffer(stream.encryptor().update(bytes(64)), "<u4")
    np.testing.assert_array_equal(jax.random.bits(key, (16,), "uint32"), expected)


def test_everything_enters_the_keys():
    def flipped(value: bytes, byte: int) -> bytes:
        return value[:byte] + bytes([value[byte] ^ 0x80]) + value[byte + 1 :]

    keys = [sj.level_key(SECRET, MODEL, level=level, levels=3) for level in (1, 2, 3)]
    keys += [sj.level_key(flipped(SECRET, i), MODEL, level=3, levels=3) for i in (0, 4, 31)]
    keys += [sj.level_key(SECRET, flipped(MODEL, i), level=3, levels=3) for i in (0, 15)]
    keys += [sj.level_key(SECRET, MODEL, level=3, levels=4)]
    values = {bytes(key) for key in keys} | {key.cipher_key() for key in keys}
    assert len(values) == 2 * len(keys)


def test_generated_secrets_and_model_ids_differ():
    assert sj.Secret.generate() != sj.Secret.generate()
    assert sj.new_model_id() != sj.new_model_id()
    assert len(bytes(sj.Secret.generate())) == 32
    assert len(sj.new_model_id()) == 16


def test_passphrase_depends_on_all_of_its_arguments():
    cheap = {"iterations": 1, "lanes": 1, "memory_kib": 8}
    salt = bytes(16)
    secrets = [
        sj.Secret.from_passphrase("correct horse", salt, **cheap),
        sj.Secret.from_passphrase("correct horse ", salt, **cheap),
        sj.Secret.from_passphrase("correct horse", b"\x01" * 16, **cheap),
        sj.Secret.from_passphrase("correct horse", salt, **cheap | {"iterations": 2}),
        sj.Secret.from_passphrase("correct horse", salt, **cheap | {"memory_kib": 16}),
    ]
    assert len({bytes(secret) for secret in secrets}) == len(secrets)
    assert secrets[0] == sj.Secret.from_passphrase("correct horse", salt, **cheap)


def test_passphrase_in_either_unicode_form_is_one_passphrase():
    cheap = {"iterations": 1, "lanes": 1, "memory_kib": 8}
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert sj.Secret.from_passphrase(composed, bytes(16), **cheap) == sj.Secret.from_passphrase(
        decomposed, bytes(16), **cheap
    )


@pytest.mark.parametrize("passphrase", ["", "  \n"])
def test_empty_passphrase(passphrase):
    with pytest.raises(ValueError, match=r"passphrase: expected one line .*got an empty one"):
        sj.Secret.from_passphrase(passphrase, bytes(16))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sj.Secret(bytes(31)), ValueError, "expected 32 bytes, got 31"),
        (lambda: sj.Secret("hunter2" * 5), TypeError, "expected 32 bytes, got str"),
        (lambda: sj.Secret.from_passphrase(b"hunter2", bytes(16)), TypeError, "got bytes"),
        (lambda: sj.Secret.from_passphrase("hunter2", bytes(8)), ValueError, "os.urandom"),
        (
            lambda: sj.ring_keys(sj.level_key(SECRET, b"short", levels=2)),
            ValueError,
            "new_model_id",
        ),
        (lambda: sj.level_key(SECRET, "model", levels=2), TypeError, "new_model_id"),
        (
            lambda: sj.ring_keys(sj.level_key(SECRET, MODEL, levels=0)),
            ValueError,
            r"levels: expected 1\.\.",
        ),
        (lambda: sj.level_key(SECRET, MODEL, level=0, levels=2), ValueError, "needs no key"),
        (lambda: sj.level_key(SECRET, MODEL, level=3, levels=2), ValueError, r"1\.\.2, got 3"),
        (lambda: sj.level_key(SECRET, MODEL, level=1, levels=3.0), TypeError, "integer"),
        (lambda: sj.ring_keys(sj.Secret(SECRET)), TypeError, "expected a LevelKey, got Secret"),
        (lambda: sj.Secret.from_passphrase("hunter2", None), TypeError, "salt: expected random"),
        (lambda: sj.LevelKey(bytes(32), level=0, model_id=MODEL), ValueError, "needs no key"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_printed():
    secret = sj.Secret(SECRET)
    key = sj.level_key(secret, MODEL, level=1, levels=1)
    for value in (secret, key):
        for text in (repr(value), str(value), f"{value}", f"{value!r:>80}"):
            for printed in (bytes(value).hex(), str(bytes(value)), repr(bytes(value))[2:20]):
                assert printed not in text
    assert MODEL.hex() in repr(key)


def test_secrets_do_not_compare_with_bytes_or_hash():
    assert sj.Secret(SECRET) != SECRET
    with pytest.raises(TypeError):
        hash(sj.Secret(SECRET))
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(sj.Secret(SECRET))
