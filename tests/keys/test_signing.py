"""Signing keys, verify keys and grants as values."""

import pickle

import pytest

from selcrypt_jax import Grant, GrantError, IntegrityError, LevelKey, Secret, SigningKey, VerifyKey

SIGNING = SigningKey(bytes(range(32)))
KEY = LevelKey(bytes(32), level=1, model_id=bytes(16))


def test_signing_key_is_that_of_rfc_8032():
    """Section 7.1, test 2."""
    key = SigningKey(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.public == VerifyKey(bytes.fromhex(public))
    assert key.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert repr(key) == "SigningKey(<32 bytes>)"
    assert repr(key.public) == f"VerifyKey({public})"
    assert key.public.hex() == bytes(key.public).hex() == public


def test_verify():
    public, signature = SIGNING.public, SIGNING.sign(b"text")
    assert public.verify(b"text", signature)
    assert not public.verify(b"texts", signature)
    assert not public.verify(b"text", signature[:-1])
    assert not public.verify(b"text", b"")
    assert not VerifyKey(bytes([2]) + bytes(31)).verify(b"text", signature)  # not on the curve
    assert not SigningKey.generate().public.verify(b"text", signature)


def test_a_verify_key_is_a_value():
    public = SIGNING.public
    assert {public, VerifyKey(bytearray(bytes(public)))} == {public}
    assert public != bytes(public)
    assert pickle.loads(pickle.dumps(public)) == public


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VerifyKey(b"abc"), ValueError, "VerifyKey: expected 32 bytes, got 3"),
        (lambda: VerifyKey("x" * 32), TypeError, "expected 32 bytes, got str.*VerifyKey.read"),
        (lambda: Grant(Secret(bytes(32))), TypeError, "key: expected a LevelKey, got Secret"),
        (lambda: Grant(KEY, b"abc"), TypeError, "signer: expected a VerifyKey, got bytes"),
        (lambda: Grant(KEY, SIGNING), TypeError, "signer: expected a VerifyKey, got SigningKey"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "error", [GrantError("text", reason="level"), IntegrityError("text", reason="digest")]
)
def test_errors_travel_between_processes(error):
    found = pickle.loads(pickle.dumps(error))
    assert isinstance(found, ValueError)
    assert (type(found), str(found), found.reason) == (type(error), "text", error.reason)
