"""Keys and grants as text files: what is read, what is refused, and that no secret is shown."""

import base64
import os
import stat
import string
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selcrypt_jax import (
    Grant,
    LevelKey,
    Secret,
    SigningKey,
    read_grant,
    read_secret,
    read_signing_key,
    read_verify_key,
    write_grant,
    write_secret,
    write_signing_key,
    write_verify_key,
)

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(range(32, 64)))
GRANT = Grant(LevelKey(bytes(range(64, 96)), level=2, model_id=bytes(16)), SIGNING.public)

# kind → write, read, the value
KINDS = {
    "secret": (write_secret, read_secret, SECRET),
    "signing key": (write_signing_key, read_signing_key, SIGNING),
    "verify key": (write_verify_key, read_verify_key, SIGNING.public),
    "grant": (write_grant, read_grant, GRANT),
}
PRIVATE = [kind for kind in KINDS if kind != "verify key"]
HIDDEN = [bytes(SECRET), bytes(SIGNING), bytes(GRANT.key)]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def text_of(path: Path, kind: str = "grant") -> str:
    write, _, value = KINDS[kind]
    write(path, value, force=True)
    return path.read_text()


def put(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(0o600)
    return path


def assert_hidden(text: str) -> None:
    for secret in HIDDEN:
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:20]):
            assert form[:16] not in text


def assert_refused(read, path: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    # The code that raised may have been a line with the key as a constant: not in these tests.
    shown = "".join(traceback.format_exception_only(caught.value))
    assert_hidden(shown + repr(caught.value))


# --- there and back -----------------------------------------------------------------------------


def test_round_trip_and_permissions(tmp_path, kind):
    write, read, value = kind
    old = os.umask(0)
    try:
        write(tmp_path / "a", value)
    finally:
        os.umask(old)
    assert read(tmp_path / "a") == value
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == (0o666 if value == SIGNING.public else 0o600)
    assert (tmp_path / "a").read_text().isascii()


def test_a_grant_without_a_signer(tmp_path):
    write_grant(tmp_path / "g", Grant(GRANT.key))
    assert read_grant(tmp_path / "g") == Grant(GRANT.key, None)
    assert "signer" not in (tmp_path / "g").read_text()


FORMS = {
    "CRLF": lambda t: t.replace("\n", "\r\n").encode(),
    "BOM": lambda t: t.encode("utf-8-sig"),
    "no final newline": lambda t: t.rstrip("\n").encode(),
    "blank lines and comments": lambda t: t.replace("\n", "\n\n# é\n").encode(),
    "spaces": lambda t: t.replace(": ", " :   ").replace("\n", "  \n ").encode(),
    "another order": lambda t: "\n".join([t.split("\n")[0], *t.split("\n")[:0:-1]]).encode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_harmless_forms_are_read(tmp_path, kind, form):
    write, read, value = kind
    write(tmp_path / "a", value)
    assert read(put(tmp_path / "b", form((tmp_path / "a").read_text()))) == value


@pytest.mark.parametrize("field", ["model-id", "signer"])
def test_of_an_id_there_is_one_text(tmp_path, field):
    (line,) = (ln for ln in text_of(tmp_path / "g").split("\n") if ln.startswith(field))
    text = line.split(": ")[1].replace("00", "AB")
    assert_refused(read_grant, grant_with(tmp_path, field, text.upper()), "hex in lower case")
    spaced = grant_with(tmp_path, field, text[:2] + " " + text[2:])
    assert_refused(read_grant, spaced, "hex in lower case")


@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_lines_end_with_line_feeds_alone(tmp_path, end):
    text = text_of(tmp_path / "g")
    with pytest.raises(ValueError, match="expected"):
        read_grant(put(tmp_path / "h", text.replace("\n", end)))
    comment = text.replace("# Opens", f"# Opens{end} or not", 1)
    assert comment != text
    assert read_grant(put(tmp_path / "i", comment)) == GRANT


@pytest.mark.parametrize("key", ["AGE-SECRET-KEY-1QQQ", base64.b64encode(bytes(32)).decode()])
def test_a_key_in_the_place_of_its_file_is_not_shown(tmp_path, key):
    with pytest.raises(ValueError, match="expected the path of a file, got a key itself") as caught:
        read_secret(key)
    assert key not in str(caught.value)


def test_a_pipe_is_read_once(tmp_path):
    text = text_of(tmp_path / "g")
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    try:
        assert read_grant(f"/dev/fd/{reader}") == GRANT
    finally:
        os.close(reader)


# --- refused ------------------------------------------------------------------------------------

BAD = {
    "UTF-16": (lambda t: t.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (lambda t: t.encode("utf-16-le"), "UTF-16"),
    "Latin-1": (lambda t: t.encode() + b"# \xe9\n", "expected UTF-8 text"),
    "empty": (lambda t: b"", "got an empty file"),
    "too long": (lambda t: t.encode() + b"#" * 70_000, "more than 65536 bytes"),
    "cut off": (lambda t: t[: t.index("key:")].encode(), "expected the fields"),
    "cut in the key": (lambda t: t[: t.index("key:") + 20].encode(), "expected the fields"),
    "a later version": (lambda t: t.replace("-v1", "-v2").encode(), "got version 2. Update"),
    "another program's": (lambda t: b"hello\n" + t.encode(), "got no file of selcrypt's"),
    "two in one": (lambda t: (t + t).encode(), "got another. Split them"),
    "unknown field": (lambda t: t.replace("key:", "kez:").encode(), "one of the names"),
    "no colon": (lambda t: t.replace("key:", "key").encode(), "one of the names"),
    "twice": (lambda t: (t + t.split("\n")[-2]).encode(), "'checksum': expected it once"),
    "checksum": (lambda t: t.replace("level: 2", "level: 3").encode(), "checksum does not fit"),
    "age identity": (lambda t: b"AGE-SECRET-KEY-1QQQ", "got an age identity"),
    "age file": (lambda t: b"-----BEGIN AGE ENCRYPTED FILE-----", "expected that private key"),
    "PEM": (lambda t: b"-----BEGIN OPENSSH PRIVATE KEY-----", "got a PEM file"),
    "recipient": (lambda t: b"age1qqq", "got the public key of a recipient"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_and_named(tmp_path, damage, message):
    path = put(tmp_path / "bad", damage(text_of(tmp_path / "g")))
    assert_refused(read_grant, path, message)


@pytest.mark.parametrize("actual", KINDS)
def test_another_kind_is_named(tmp_path, kind, actual):
    _, read, value = kind
    if KINDS[actual][2] == value:
        return
    text_of(tmp_path / "a", actual)
    assert_refused(read, tmp_path / "a", f"expected a.* got a.*{actual.split()[-1]}")


ALPHABET = "AZaz09+/=: \n#-é"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_character_never_gives_another_grant(tmp_path, data):
    text = text_of(tmp_path / "g")
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from(ALPHABET)) + text[at + 1 :]
    try:
        found = read_grant(put(tmp_path / "h", changed))
    except ValueError as error:
        assert_hidden(str(error))  # most are refused, some changes are harmless
    else:
        assert found == GRANT


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"selcrypt-grant-v1\n"]))
def test_random_bytes_are_refused(tmp_path, data, start):
    with pytest.raises(ValueError, match="expected"):
        read_grant(put(tmp_path / "x", start + data))


def test_missing_and_unreadable_paths(tmp_path):
    for _, read, _ in KINDS.values():
        with pytest.raises(FileNotFoundError, match="nothing"):
            read(tmp_path / "nothing")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)
    with pytest.raises(ValueError, match="public: expected 32 bytes, got 3"):
        write_verify_key(tmp_path / "a", b"abc")


def grant_with(folder, field, text):
    """A grant with another text in a field, and the checksum that this makes."""
    from selcrypt_jax._format.keyfiles import _checksum

    lines = text_of(folder / "g").split("\n")
    lines = [ln for ln in lines if ln and not ln.startswith(("#", "checksum"))]
    lines = [f"{field}: {text}" if ln.startswith(f"{field}:") else ln for ln in lines]
    return put(folder / "h", "\n".join([*lines, f"checksum: {_checksum(lines)}"]))


@pytest.mark.parametrize(
    "level",
    ["two", "+2", "0_2", "02", "0000000010", "\u0662", "0", "65537", "9" * 3000, "9" * 5000],
)
def test_levels_are_plain_numbers_within_bounds(tmp_path, level):
    path = grant_with(tmp_path, "level", level)
    assert_refused(read_grant, path, r"level: expected a number 1\.\.65536, got something else")


def test_of_a_key_there_is_one_encoding(tmp_path):
    text = base64.b64encode(bytes(GRANT.key)).decode()
    assert read_grant(grant_with(tmp_path, "key", text)) == GRANT
    # 32 bytes leave two bits of the last digit that say nothing.
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    other = text[:-2] + digits[digits.index(text[-2]) + 1] + "="
    assert base64.b64decode(other) == bytes(GRANT.key)
    assert_refused(read_grant, grant_with(tmp_path, "key", other), "32 bytes in base64")


def test_the_missing_field_is_named(tmp_path):
    text = text_of(tmp_path / "g")
    path = put(tmp_path / "h", text[: text.index("checksum")])
    assert_refused(read_grant, path, "got no checksum.*cut off")


@pytest.mark.parametrize(
    ("write", "value", "error", "message"),
    [
        (write_secret, 32, TypeError, "secret: expected a Secret, got int"),
        (write_secret, SIGNING, TypeError, "secret: expected a Secret, got SigningKey"),
        (write_secret, bytes(SECRET), TypeError, "secret: expected a Secret, got bytes"),
        (write_signing_key, SECRET, TypeError, "key: expected a SigningKey, got Secret"),
        (write_verify_key, "x" * 32, TypeError, "public: expected a bytes, got str"),
        (write_grant, GRANT.key, TypeError, "grant: expected a Grant, got LevelKey"),
        (write_grant, Grant(GRANT.key, b"abc"), ValueError, "signer: expected 32 bytes, got 3"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, write, value, error, message):
    with pytest.raises(error, match=message) as caught:
        write(tmp_path / "a", value)
    assert_hidden(repr(caught.value))
    assert not list(tmp_path.iterdir())


# --- files --------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_forced(tmp_path, kind):
    write, read, value = kind
    put(tmp_path / "a", "precious").chmod(0o644)
    with pytest.raises(FileExistsError, match="exists already") as caught:
        write(tmp_path / "a", value)
    assert str(tmp_path / "a") in str(caught.value)
    assert (tmp_path / "a").read_text() == "precious"
    write(tmp_path / "a", value, force=True)
    assert read(tmp_path / "a") == value
    if value != SIGNING.public:
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_others_who_can_read_a_secret_are_warned_about(tmp_path, kind):
    write, read, value = kind
    write(tmp_path / "a", value)
    (tmp_path / "a").chmod(0o640)
    if value == SIGNING.public:
        assert read(tmp_path / "a") == value
        return
    with pytest.warns(UserWarning, match="others may read this file.*chmod 600") as caught:
        assert read(tmp_path / "a") == value
    assert_hidden(str(caught[0].message))
    assert caught[0].filename == __file__


# --- passphrases --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIVATE)
def test_passphrases(tmp_path, name):
    write, read, value = KINDS[name]
    write(tmp_path / "a", value, passphrase="zaffe\u0301!")
    text = (tmp_path / "a").read_text()
    assert_hidden(text)
    assert "zaff" not in text
    assert read(tmp_path / "a", passphrase="zaff\u00e9!") == value  # the same text, composed
    assert read(tmp_path / "a", passphrase=lambda: "zaff\u00e9!") == value
    assert_refused(read, tmp_path / "a", "wrong passphrase", passphrase="other")
    assert_refused(read, tmp_path / "a", "locked with a passphrase, got none.*passphrase=")
    write(tmp_path / "b", value)
    assert read(tmp_path / "b", passphrase=pytest.fail) == value  # not asked for in vain


def test_costs_are_bounded(tmp_path):
    write_secret(tmp_path / "a", SECRET, passphrase="p")
    text = (tmp_path / "a").read_text()
    for costs in (
        "argon2id iterations=3 lanes=4 memory-kib=99999999",
        "argon2id iterations=99 lanes=4 memory-kib=65536",
        "argon2id iterations=0 lanes=4 memory-kib=65536",
        "argon2id iterations=3 lanes=4 memory-kib=8",
        "argon2id iterations=3 lanes=4",
        "scrypt iterations=3 lanes=4 memory-kib=65536",
    ):
        changed = text.replace("argon2id iterations=3 lanes=4 memory-kib=65536", costs)
        lines = [ln for ln in changed.split("\n") if ln and not ln.startswith(("#", "checksum"))]
        from selcrypt_jax._format.keyfiles import _checksum

        lines.append(f"checksum: {_checksum(lines)}")
        path = put(tmp_path / "b", "\n".join(lines))
        assert_refused(read_secret, path, "field 'kdf': expected argon2id", passphrase="p")


# --- age ----------------------------------------------------------------------------------------


@pytest.fixture
def pyrage():
    return pytest.importorskip("pyrage")


def test_grants_sealed_with_age(tmp_path, pyrage):
    one, two, three = (pyrage.x25519.Identity.generate() for _ in range(3))
    write_grant(tmp_path / "g", GRANT, recipients=[str(one.to_public()), str(two.to_public())])
    text = (tmp_path / "g").read_text()
    assert text.startswith("-----BEGIN AGE ENCRYPTED FILE-----")
    assert_hidden(text)
    for form in ("\ufeff" + text, "\n" + text, text.replace("\n", "\r\n"), text.rstrip()):
        put(tmp_path / "form", form)
        put(tmp_path / "key", str(one))
        assert read_grant(tmp_path / "form", identities=[tmp_path / "key"]) == GRANT
    (tmp_path / "g").chmod(0o644)  # may travel in the open: no warning
    for number, identity in enumerate((one, two, three)):
        put(tmp_path / f"{number}", f"# created: today\n{identity}\n")
    assert read_grant(tmp_path / "g", identities=[tmp_path / "0"]) == GRANT
    assert read_grant(tmp_path / "g", identities=[tmp_path / "2", tmp_path / "1"]) == GRANT
    assert_refused(read_grant, tmp_path / "g", "is not sealed to", identities=[tmp_path / "2"])
    assert_refused(read_grant, tmp_path / "g", "expected that private key, got none")
    put(tmp_path / "no", "nothing")
    with pytest.raises(ValueError, match="expected an age identity"):
        read_grant(tmp_path / "g", identities=[tmp_path / "no"])
    with pytest.raises(ValueError, match="recipient: expected") as caught:
        write_grant(tmp_path / "h", GRANT, recipients=[str(one)])
    assert str(one) not in str(caught.value)
    assert not (tmp_path / "h").exists()


def test_grants_sealed_to_an_ssh_key(tmp_path, pyrage):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_grant(tmp_path / "g", GRANT, recipients=[public.decode()])
    put(tmp_path / "id", private)
    assert read_grant(tmp_path / "g", identities=[tmp_path / "id"]) == GRANT


def test_age_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrage", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'selcrypt-jax\[age\]'"):
        write_grant(tmp_path / "g", GRANT, recipients=["age1xyz"])
    assert not list(tmp_path.iterdir())


# --- signatures ---------------------------------------------------------------------------------


def test_signing_key_is_that_of_rfc_8032():
    """Section 7.1, test 2."""
    key = SigningKey(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    assert key.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert repr(key) == "SigningKey(<32 bytes>)"
