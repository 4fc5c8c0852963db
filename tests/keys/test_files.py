"""Key files and grants: what is read, what is refused, and that no secret is shown."""

import base64
import os
import stat
import string
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selcrypt_jax import (
    Grant,
    GrantError,
    LevelKey,
    Secret,
    SigningKey,
    VerifyKey,
    open_model,
    verify_file,
)
from selcrypt_jax._keys.text import checksum
from selcrypt_jax.cli import main

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(range(32, 64)))
PUBLIC = SIGNING.public
GRANT = Grant(LevelKey(bytes(range(64, 96)), level=2, model_id=bytes(16)), PUBLIC)
VALUES: dict[str, Any] = {
    "secret": SECRET, "signing key": SIGNING, "verify key": PUBLIC, "grant": GRANT
}  # fmt: skip
PRIVATE = [value for value in VALUES.values() if value != PUBLIC]
HIDDEN = [bytes(SECRET), bytes(SIGNING), bytes(GRANT.key)]


@pytest.fixture(params=VALUES.values(), ids=VALUES)
def value(request) -> Any:
    return request.param


def text_of(path: Path, value: Any = GRANT) -> str:
    value.write(path, force=True)
    return path.read_text()


def put(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(0o600)
    return path


def assert_hidden(text: str) -> None:
    for secret in HIDDEN:
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:20]):
            assert form[:16] not in text


def assert_refused(kind: type, path: Path, reason: str, words: str = "", **options: Any) -> None:
    with pytest.raises(GrantError, match=words) as caught:
        kind.read(path, **options)
    assert caught.value.reason == reason
    assert str(path) in str(caught.value)
    # The code that raised may have been a line with the key as a constant: not in these tests.
    shown = "".join(traceback.format_exception_only(caught.value))
    assert_hidden(shown + repr(caught.value))


# --- there and back -----------------------------------------------------------------------------


def test_round_trip_and_permissions(tmp_path, value):
    old = os.umask(0)
    try:
        value.write(tmp_path / "a")
    finally:
        os.umask(old)
    assert type(value).read(tmp_path / "a") == value
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == (0o666 if value == PUBLIC else 0o600)
    assert (tmp_path / "a").read_text().isascii()


def test_a_grant_without_a_signer(tmp_path):
    assert "signer" not in text_of(tmp_path / "g", Grant(GRANT.key))
    assert Grant.read(tmp_path / "g") == Grant(GRANT.key, None)


FORMS: dict[str, Callable[[str], bytes]] = {
    "CRLF": lambda t: t.replace("\n", "\r\n").encode(),
    "BOM": lambda t: t.encode("utf-8-sig"),
    "no final newline": lambda t: t.rstrip("\n").encode(),
    "blank lines and comments": lambda t: t.replace("\n", "\n\n# é\n").encode(),
    "spaces": lambda t: t.replace(": ", " :   ").replace("\n", "  \n ").encode(),
    "another order": lambda t: "\n".join([t.split("\n")[0], *t.split("\n")[:0:-1]]).encode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_harmless_forms_are_read(tmp_path, value, form):
    path = put(tmp_path / "b", form(text_of(tmp_path / "a", value)))
    assert type(value).read(path) == value


def test_a_pipe_is_read_once(tmp_path):
    text = text_of(tmp_path / "g")
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    try:
        assert Grant.read(f"/dev/fd/{reader}") == GRANT
    finally:
        os.close(reader)


# --- refused ------------------------------------------------------------------------------------

SEALED = "-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n-----END AGE ENCRYPTED FILE-----\n"


def quoted(text: str) -> str:
    return "".join(f"> {line}\n" for line in text.splitlines())


def folded(text: str, width: int) -> bytes:
    lines = [
        line[at : at + width] for line in text.split("\n") for at in range(0, len(line), width)
    ]
    return "\n".join(lines).encode()


BAD: dict[str, tuple[Callable[[str], bytes], str, str]] = {
    "UTF-16": (lambda t: t.encode("utf-16"), "kind", "UTF-16"),
    "UTF-16 without a mark": (lambda t: t.encode("utf-16-le"), "kind", "file that is not selc"),
    "Latin-1": (lambda t: t.encode() + b"# \xe9\n", "kind", "expected UTF-8 text"),
    "empty": (lambda t: b"", "kind", "got an empty file"),
    "too long": (lambda t: t.encode() + b"#" * 70_000, "kind", "more than 65536 bytes"),
    "another program's": (lambda t: b"hello\n", "kind", "a file that is not selcrypt"),
    "in a mail": (lambda t: b"Hello,\n\n" + t.encode(), "kind", "other text .* only its own lines"),
    "quoted": (lambda t: quoted(t).encode(), "kind", 'got other text or a > .* without "> "'),
    "quoted, sealed": (lambda t: quoted(SEALED).encode(), "kind", "got other text or a > before"),
    "a mail's end": (lambda t: t.encode() + b"-- \nBob\n", "damaged", "nothing below the checksum"),
    "on one line": (
        lambda t: t.replace("\n", " ").encode(), "kind", "line breaks were lost. Copy it again"),
    "in one piece": (lambda t: t.replace("\n", "").encode(), "kind", "line breaks were lost"),
    "folded": (lambda t: folded(t, 40), "damaged",
               "broken lines: comment, model-id, signer, key. Join each with the lines below"),
    "folded once": (lambda t: folded(t, 70), "damaged", "broken lines: signer. Join"),
    "folded at words": (lambda t: t.replace(": ", ":\n").encode(), "damaged",
                        "broken lines: comment, model-id, level, signer, key, checksum. Join"),
    "a later version": (lambda t: t.replace("-v1", "-v2").encode(), "kind", "version 2. Update"),
    "two in one": (lambda t: (t + t).encode(), "kind", "got more than one. Split the file"),
    "age identity": (lambda t: b"AGE-SECRET-KEY-1QQQ", "kind", "got an age identity"),
    "PEM": (lambda t: b"-----BEGIN OPENSSH PRIVATE KEY-----", "kind", "got a PEM file"),
    "recipient": (lambda t: b"age1qqq", "kind", "got the public key of a recipient"),
    "age file": (lambda t: b"-----BEGIN AGE ENCRYPTED FILE-----", "recipient", "private key"),
    "cut off": (lambda t: t[: t.index("key:")].encode(), "damaged", "got no checksum, key"),
    "cut in the key": (lambda t: t[: t.index("key:") + 20].encode(), "damaged", "got no checksum"),
    "unknown field": (lambda t: t.replace("key:", "kez:").encode(), "damaged", "got no key"),
    "a lock's field": (lambda t: (t + "kdf: x").encode(), "damaged", "unknown or repeated ones"),
    "no colon": (lambda t: t.replace("key:", "key").encode(), "damaged", "got no key"),
    "twice": (lambda t: (t + t.split("\n")[-2]).encode(), "damaged", "unknown or repeated ones"),
    "checksum": (lambda t: t.replace("level: 2", "level: 3").encode(), "damaged", "checksum"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason", "words"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_and_named(tmp_path, damage, reason, words):
    path = put(tmp_path / "bad", damage(text_of(tmp_path / "g")))
    assert_refused(Grant, path, reason, words)


@pytest.mark.parametrize("actual", VALUES)
def test_another_kind_is_named(tmp_path, value, actual):
    if VALUES[actual] != value:
        text_of(tmp_path / "a", VALUES[actual])
        words = f"expected a.* got a.*{actual.split()[-1]}"
        assert_refused(type(value), tmp_path / "a", "kind", words)


@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_lines_end_with_line_feeds_alone(tmp_path, end):
    text = text_of(tmp_path / "g")
    with pytest.raises(GrantError):
        Grant.read(put(tmp_path / "h", text.replace("\n", end)))
    comment = text.replace("# Opens", f"# Opens{end} or not", 1)
    assert comment != text
    assert Grant.read(put(tmp_path / "i", comment)) == GRANT


KEY = bytes(range(224, 256))


@pytest.mark.parametrize(
    "key",
    [
        "AGE-SECRET-KEY-1QQQ",
        base64.b64encode(KEY).decode(),
        base64.urlsafe_b64encode(KEY).decode(),
        KEY.hex(),
        KEY.hex().upper() + "\n",
        f"selcrypt-secret-v1\n# kept\nkey: {base64.b64encode(KEY).decode()}\n",
        f"# without its first line\nkey: {base64.b64encode(KEY).decode()}\n",
        f"key: {base64.b64encode(KEY).decode()}",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n",
    ],
)
def test_a_key_in_the_place_of_its_file_is_not_shown(key):
    for what, read in (
        ("secret", Secret.read),
        ("signing key", SigningKey.read),
        ("verify key", VerifyKey.read),
        ("grant", Grant.read),
        ("grant", lambda text: open_model("public.safetensors", text)),
        ("grant", lambda text: verify_file("public.safetensors", grant=text)),
        ("verify key", lambda text: verify_file("public.safetensors", signer=text)),
    ):
        with pytest.raises(ValueError, match=f"^{what}: expected the path of a file, ") as caught:
            read(key)
        assert key not in str(caught.value)
        assert_hidden(str(caught.value))


def test_a_grant_in_the_place_of_its_file_is_not_shown_by_a_command(tmp_path, capsys):
    text, out = text_of(tmp_path / "g"), put(tmp_path / "out", "old")
    for words in (
        ["unlock", "public.safetensors", "-g", text, "-o", str(out), "--force"],
        ["inspect", "public.safetensors", "-g", text.partition("\n")[2]],
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "grant: expected the path of a file" in error
        assert_hidden(error)
    assert out.read_text() == "old"


ALPHABET = "AZaz09+/=: \n#-é"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_character_never_gives_another_grant(tmp_path, data):
    text = text_of(tmp_path / "g")
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from(ALPHABET)) + text[at + 1 :]
    try:
        found = Grant.read(put(tmp_path / "h", changed))
    except GrantError as error:
        assert_hidden(str(error))  # most are refused, some changes are harmless
    else:
        assert found == GRANT


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"selcrypt-grant-v1\n"]))
def test_random_bytes_are_refused(tmp_path, data, start):
    with pytest.raises(GrantError):
        Grant.read(put(tmp_path / "x", start + data))


def test_missing_and_unreadable_paths(tmp_path, value):
    with pytest.raises(FileNotFoundError, match="nothing"):
        type(value).read(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        type(value).read(tmp_path)


# --- fields that a checksum vouches for ---------------------------------------------------------


def with_field(path: Path, text: str, field: str, value: str) -> Path:
    """A key file with another text in a field, and the matching checksum."""
    lines = [ln for ln in text.split("\n") if ln and not ln.startswith(("#", "checksum"))]
    lines = [f"{field}: {value}" if ln.startswith(f"{field}:") else ln for ln in lines]
    return put(path, "\n".join([*lines, f"checksum: {checksum(lines)}"]))


@pytest.mark.parametrize("field", ["model-id", "signer"])
def test_an_id_has_one_text(tmp_path, field):
    text = text_of(tmp_path / "g")
    (line,) = (ln for ln in text.split("\n") if ln.startswith(field))
    value = line.split(": ")[1].replace("00", "ab")
    for other in (value.upper(), value[:2] + " " + value[2:], value[:-2], value + "00"):
        path = with_field(tmp_path / "h", text, field, other)
        assert_refused(Grant, path, "damaged", f"{field}: expected")


@pytest.mark.parametrize(
    "level",
    ["two", "+2", "0_2", "02", "0000000010", "\u0662", "0", "65537", "9" * 3000, "9" * 5000],
)
def test_levels_are_plain_numbers_within_bounds(tmp_path, level):
    path = with_field(tmp_path / "h", text_of(tmp_path / "g"), "level", level)
    words = r"level: expected a number 1\.\.256, got something else"
    assert_refused(Grant, path, "damaged", words)


def test_a_key_has_one_encoding(tmp_path):
    text, key = text_of(tmp_path / "g"), base64.b64encode(bytes(GRANT.key)).decode()
    assert Grant.read(with_field(tmp_path / "h", text, "key", key)) == GRANT
    # 32 bytes leave two bits of the last digit that say nothing.
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    other = key[:-2] + digits[digits.index(key[-2]) + 1] + "="
    assert base64.b64decode(other) == bytes(GRANT.key)
    path = with_field(tmp_path / "h", text, "key", other)
    assert_refused(Grant, path, "damaged", "32 bytes in base64")


@pytest.mark.parametrize(
    "costs",
    [
        "argon2id iterations=3 lanes=4 memory-kib=99999999",
        "argon2id iterations=99 lanes=4 memory-kib=65536",
        "argon2id iterations=0 lanes=4 memory-kib=65536",
        "argon2id iterations=3 lanes=4 memory-kib=8",
        "argon2id iterations=16 lanes=16 memory-kib=1048576",  # a minute
        "argon2id iterations=3 lanes=1 memory-kib=1048576",
        "argon2id iterations=3 lanes=4",
        "scrypt iterations=3 lanes=4 memory-kib=65536",
    ],
)
def test_costs_are_bounded(tmp_path, costs):
    SECRET.write(tmp_path / "a", passphrase="p")
    path = with_field(tmp_path / "b", (tmp_path / "a").read_text(), "kdf", costs)
    assert_refused(Secret, path, "damaged", "field 'kdf'", passphrase=pytest.fail)


# --- files --------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_forced(tmp_path, value):
    put(tmp_path / "a", "precious").chmod(0o644)
    with pytest.raises(FileExistsError, match="already exists") as caught:
        value.write(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert (tmp_path / "a").read_text() == "precious"
    value.write(tmp_path / "a", force=True)
    assert type(value).read(tmp_path / "a") == value
    if value != PUBLIC:
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_others_who_can_read_a_secret_are_warned_about(tmp_path, value):
    value.write(tmp_path / "a")
    (tmp_path / "a").chmod(0o640)
    if value == PUBLIC:
        assert type(value).read(tmp_path / "a") == value
        return
    with pytest.warns(UserWarning, match="others may read this file.*chmod 600") as caught:
        assert type(value).read(tmp_path / "a") == value
    assert_hidden(str(caught[0].message))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", PRIVATE, ids=lambda value: type(value).__name__)
def test_passphrases(tmp_path, value):
    kind, path = type(value), tmp_path / "a"
    value.write(path, passphrase="zaffe\u0301!")
    text = path.read_text()
    assert_hidden(text)
    assert "zaff" not in text
    assert kind.read(path, passphrase="zaff\u00e9!") == value  # the same text, composed
    assert kind.read(path, passphrase=lambda: "zaff\u00e9!") == value
    assert_refused(kind, path, "passphrase", "wrong passphrase", passphrase="other")
    assert_refused(kind, path, "passphrase", "locked with a passphrase, got none.*passphrase=")
    value.write(tmp_path / "b")
    assert kind.read(tmp_path / "b", passphrase=pytest.fail) == value  # not asked for in vain


def test_strong_locks_of_other_writers_are_not_refused(tmp_path):
    SECRET.write(tmp_path / "a", passphrase="p")
    for costs in ("iterations=16 lanes=1 memory-kib=8", "iterations=2 lanes=16 memory-kib=1048576"):
        text = (tmp_path / "a").read_text()
        path = with_field(tmp_path / "b", text, "kdf", f"argon2id {costs}")
        assert_refused(Secret, path, "passphrase", "got none")  # asked for: the costs will do


ACCEPTED = {
    "a space": "a b", "spaces at its ends": "  a ", "a letter": "a", "the longest": "x" * 1000,
    "no-break space": "a\u00a0b", "emoji": "\U0001f600", "joiner": "\u0646\u200c\u0645",
    "longest once composed": "e\u0301" * 500, "private use": "\ue000", "hash": "# not a comment",
}  # fmt: skip
REFUSED = {
    "empty": "", "spaces": "  ", "ideographic space": "\u3000", "too long": "x" * 1001,
    "too long in UTF-8": "é" * 501, "line feed": "a\n", "carriage return": "a\rb", "tab": "a\tb",
    "NUL": "a\0b", "escape": "\x1b[A", "delete": "\x7f", "next line": "a\x85b",
    "line separator": "a\u2028b", "paragraph separator": "a\u2029b", "surrogate": "a\udcffb",
    "no character": "a\uffffb",
}  # fmt: skip


@pytest.mark.parametrize("words", ACCEPTED.values(), ids=ACCEPTED)
def test_a_passphrase_is_a_line_that_can_be_typed(tmp_path, words):
    SECRET.write(tmp_path / "a", passphrase=words)
    assert Secret.read(tmp_path / "a", passphrase=words) == SECRET
    assert_refused(Secret, tmp_path / "a", "passphrase", "wrong", passphrase=words[:-1] + "?")


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_no_terminal_types_is_no_passphrase(tmp_path, words):
    with pytest.raises(ValueError, match="passphrase: expected one line of at most 1000 bytes"):
        SECRET.write(tmp_path / "a", passphrase=words)
    with pytest.raises(ValueError, match="passphrase: expected") as caught:
        Secret.from_passphrase(words, bytes(16))
    assert not words.strip() or words not in str(caught.value)
    assert not (tmp_path / "a").exists()


# --- age ----------------------------------------------------------------------------------------


@pytest.fixture
def pyrage():
    return pytest.importorskip("pyrage")


def test_grants_sealed_with_age(tmp_path, pyrage):
    one, two, three = (pyrage.x25519.Identity.generate() for _ in range(3))
    path = tmp_path / "g"
    GRANT.write(path, recipients=[str(one.to_public()), str(two.to_public())])
    text = path.read_text()
    assert text.startswith("-----BEGIN AGE ENCRYPTED FILE-----")
    assert_hidden(text)
    for form in ("\ufeff" + text, "\n" + text, text.replace("\n", "\r\n"), text.rstrip()):
        put(tmp_path / "form", form)
        put(tmp_path / "key", str(one))
        assert Grant.read(tmp_path / "form", identities=[tmp_path / "key"]) == GRANT
    path.chmod(0o644)  # may travel in the open: no warning
    for number, identity in enumerate((one, two, three)):
        put(tmp_path / f"{number}", f"# created: today\n{identity}\n")
    assert Grant.read(path, identities=[tmp_path / "0"]) == GRANT
    assert Grant.read(path, identities=[tmp_path / "2", tmp_path / "1"]) == GRANT
    assert_refused(Grant, path, "recipient", "is not sealed to", identities=[tmp_path / "2"])
    assert_refused(Grant, path, "recipient", "expected the matching private key, got none")
    with pytest.raises(GrantError, match="expected an age identity") as caught:
        Grant.read(path, identities=[put(tmp_path / "no", "nothing")])
    assert caught.value.reason == "recipient"
    with pytest.raises(ValueError, match="recipient: expected") as refused:
        GRANT.write(tmp_path / "h", recipients=[str(one)])
    assert str(one) not in str(refused.value)
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
    GRANT.write(tmp_path / "g", recipients=[public.decode()])
    put(tmp_path / "id", private)
    assert Grant.read(tmp_path / "g", identities=[tmp_path / "id"]) == GRANT


def test_age_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrage", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[age\]'"):
        GRANT.write(tmp_path / "g", recipients=["age1xyz"])
    assert not list(tmp_path.iterdir())
