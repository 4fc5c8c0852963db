"""Crash reporters print local variables: no error's frames hold a key or passphrase."""

import base64
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import selcrypt_jax as sj
from selcrypt_jax import Grant, LevelKey, Secret, Select, SigningKey, Targets
from selcrypt_jax._keys.chacha import chacha20_key
from selcrypt_jax._keys.owner import write_owner_keys
from selcrypt_jax.cli import command
from selcrypt_jax.cli._options import Locking, OwnerSecret

WORDS = "correct horse battery staple"
VALUE = bytes(range(100, 132))
SECRET, SIGNING = Secret(VALUE), SigningKey(bytes(range(32, 64)))
MODEL = bytes(16)


def forms(value: bytes) -> list[bytes]:
    """Printed forms of any 16 consecutive bytes of a key."""
    words = np.frombuffer(value[:16], "<u4")
    shown = [value[:16], value[:16].hex().encode(), base64.b64encode(value)[:20], repr(value)[2:18]]
    shown += [", ".join(map(str, value[:6])), ", ".join(map(str, words[:2])), repr(words)[7:30]]
    return [form if isinstance(form, bytes) else form.encode() for form in shown]


def frames(error: BaseException | None, seen: set[int]) -> Iterator[dict[str, Any]]:
    """Local variables in the frames of an error and its causes, except those of tests."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    at: TracebackType | None = error.__traceback__
    while at is not None:
        if os.sep + "tests" + os.sep not in at.tb_frame.f_code.co_filename:
            yield at.tb_frame.f_locals
        at = at.tb_next
    yield vars(error) | {"text": repr(error), "object": getattr(error, "object", b"")}
    yield from frames(error.__cause__, seen)
    yield from frames(error.__context__, seen)


def shown(value: Any, depth: int = 4) -> Iterator[bytes]:
    """What may be printed of a value: its repr, and that of its contents."""
    yield repr(value).encode(errors="backslashreplace")
    if isinstance(value, bytes | bytearray | memoryview | np.ndarray):
        yield bytes(memoryview(np.ascontiguousarray(value)).cast("B")) if len(value) else b""
    if depth and isinstance(value, dict | list | tuple | set | frozenset):
        for each in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from shown(each, depth - 1)


def assert_forgotten(error: BaseException, *secrets: bytes) -> None:
    hidden = [form for secret in secrets for form in forms(secret)] + [WORDS.encode()]
    for variables in frames(error, set()):
        for name, value in variables.items():
            for text in shown(value):
                for form in hidden:
                    assert form not in text, (name, type(value))


# --- key files and values -----------------------------------------------------------------------


def text_of(folder: Path, value: Any, **options: Any) -> str:
    value.write(folder / "good", force=True, **options)
    return (folder / "good").read_text()


DAMAGES: dict[str, Callable[[str], bytes]] = {
    "cut": lambda t: t[:-30].encode(),
    "checksum": lambda t: t.replace("checksum: ", "checksum: 0").encode(),
    "a field more": lambda t: (t + "more: 1\n").encode(),
    "another version": lambda t: t.replace("-v1", "-v9").encode(),
    "no kind": lambda t: t.split("\n", 1)[1].encode(),
    "UTF-16": lambda t: t.encode("utf-16"),
    "Latin-1": lambda t: t.encode() + b"\xe9",
    "two keys": lambda t: (t + t).encode(),
    "too long": lambda t: t.encode() + b"#" * (1 << 16),
    "field": lambda t: t.replace("key: ", "key: A", 1).replace("sealed: ", "sealed: A").encode(),
}
GRANT = Grant(LevelKey(VALUE, level=2, model_id=MODEL))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("value", [SECRET, GRANT], ids=["secret", "grant"])
@pytest.mark.parametrize("lock", [None, WORDS], ids=["open", "locked"])
def test_damaged_files(tmp_path, damage, value, lock):
    path = tmp_path / "bad"
    path.write_bytes(damage(text_of(tmp_path, value, passphrase=lock)))
    path.chmod(0o600)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        type(value).read(path, passphrase=lock)
    assert_forgotten(caught.value, VALUE)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def passphrase_fails() -> str:
    raise KeyError("mine")


CALLS: dict[str, Callable[[Path], object]] = {
    "wrong passphrase": lambda f: Secret.read(f / "locked", passphrase=WORDS + "!"),
    "no passphrase": lambda f: Secret.read(f / "locked"),
    "a passphrase that cannot be had": lambda f: Secret.read(
        f / "locked", passphrase=passphrase_fails
    ),
    "passphrase of bytes": lambda f: Secret.read(f / "locked", passphrase=WORDS.encode()),  # pyright: ignore
    "passphrase that nobody types": lambda f: SECRET.write(f / "new", passphrase=WORDS + "\n"),
    "file exists": lambda f: SECRET.write(f / "locked", passphrase=WORDS),
    "no folder": lambda f: GRANT.write(f / "no" / "g", passphrase=WORDS),
    "wrong kind": lambda f: SigningKey.read(f / "open"),
    "salt": lambda _: Secret.from_passphrase(WORDS, b"short"),
    "costs": lambda _: Secret.from_passphrase(WORDS, bytes(16), memory_kib=1),
    "recipient": lambda f: GRANT.write(f / "g", recipients=["age1nobody"]),
    "short value": lambda _: Secret(VALUE[:31]),
    "passphrase for a value": lambda _: Secret(WORDS),  # pyright: ignore
    "level": lambda _: LevelKey(VALUE, level=0, model_id=MODEL),
    "model id": lambda _: LevelKey(VALUE, level=1, model_id=b"short"),
    "level_key": lambda _: sj.level_key(VALUE, b"short", levels=2),
    "level_key, level": lambda _: sj.level_key(VALUE, MODEL, level=3, levels=2),
    "lower": lambda _: GRANT.key.lower(3),
    "jax key": lambda _: chacha20_key(VALUE + b"0"),
    "owner's keys": lambda f: write_owner_keys(f / "open", passphrase=WORDS, force=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    SECRET.write(folder / "open")
    SECRET.write(folder / "locked", passphrase=WORDS)
    return folder


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(folder, call):
    if call is CALLS["recipient"]:
        pytest.importorskip("pyrage")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(folder)
    assert_forgotten(caught.value, VALUE)


@pytest.mark.parametrize("name", ["fsync", "link", "fstat"])
def test_a_disk_that_fails_while_keys_are_written(tmp_path, monkeypatch, name):
    for write in (
        lambda: SECRET.write(tmp_path / "s", passphrase=WORDS),
        lambda: GRANT.write(tmp_path / "g"),
        lambda: write_owner_keys(tmp_path / "k", passphrase=WORDS, force=False),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError) as caught:  # noqa: PT011
                write()
        assert_forgotten(caught.value, VALUE)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((16, 16, 3, 3)).astype("f4"), "b": np.ones(16, "f4")}
    safetensors.numpy.save_file(tensors, folder / "plain")
    for name in ("public", "other"):
        options: Any = {"levels": 2, "signing": SIGNING, "selection": Select(budget=0.5)}
        sj.protect_file(folder / "plain", folder / name, secret=SECRET, **options)
    data = (folder / "public").read_bytes()
    (folder / "altered").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "words").write_text(WORDS)
    (folder / "two").write_text(WORDS + "\nx")
    (folder / "bytes").write_bytes(WORDS.encode() + b"\xff")
    SECRET.write(folder / "secret.key")
    SIGNING.public.write(folder / "signing.pub")
    return folder


def grant_of(path: Path, level: int = 2) -> Grant:
    model_id = bytes.fromhex(sj.inspect_file(path).model_id)
    return Grant(sj.level_key(SECRET, model_id, level=level, levels=2), SIGNING.public)


def derived(path: Path) -> list[bytes]:
    keys = grant_of(path).key.all()
    return [v for key in keys for v in (bytes(key), key.cipher_key(), key.seal_key())]


def metric_fails(_: Any) -> float:
    raise KeyError("mine")


def wrong_digests(path: Path) -> object:
    """The errors of a file that was forged up to the digests of the plaintext."""
    from selcrypt_jax._format import rings

    real = rings.hashlib.sha256
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rings.hashlib, "sha256", lambda data: real(data + b"!"))
        return sj.open_model(path, grant_of(path))


def on_a_full_disk(call: Callable[[], object]) -> object:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("selcrypt_jax._io.atomic._Output.write", full)
        return call()


FILES: dict[str, Callable[[Path], object]] = {
    "digest": lambda w: sj.open_model(w / "altered", grant_of(w / "public")),
    "digest of a file": lambda w: sj.unlock_file(w / "altered", w / "o", grant_of(w / "public")),
    "plaintext": lambda w: wrong_digests(w / "public"),
    "model": lambda w: sj.open_model(w / "other", grant_of(w / "public")),
    "secret": lambda w: sj.issue_grant(
        w / "public", level=1, secret=Secret(VALUE[::-1]), signer="unsigned"
    ),
    "level": lambda w: sj.issue_grant(w / "public", level=9, secret=SECRET, signer="unsigned"),
    "signer": lambda w: sj.verify_file(w / "public", signer=SigningKey(VALUE).public),
    "full disk, unlock": lambda w: on_a_full_disk(
        lambda: sj.unlock_file(w / "public", w / "o", grant_of(w / "public"))
    ),
    "full disk, protect": lambda w: on_a_full_disk(
        lambda: sj.protect_file(w / "plain", w / "o", secret=SECRET, signing=SIGNING)
    ),
    "full disk, rotate": lambda w: on_a_full_disk(
        lambda: sj.rotate_file(w / "public", w / "o", secret=SECRET, signing=SIGNING)
    ),
    "metric": lambda w: sj.protect_file(
        w / "plain", w / "o", secret=SECRET, levels=Targets([1, 2], metric_fails)
    ),
    "command, two lines": lambda w: Locking(new_passphrase_file=w / "two").read(),
    "command, other bytes": lambda w: Locking(new_passphrase_file=w / "bytes").read(),
    "command, grant": lambda w: command("grant")(
        w / "public", 9, OwnerSecret(w / "secret.key"), w / "g",
        lock=Locking(new_passphrase_file=w / "words"),
    ),
    "command, keygen": lambda w: command("keygen")(w, Locking(new_passphrase_file=w / "words")),
}  # fmt: skip


@pytest.mark.parametrize("call", FILES.values(), ids=FILES)
def test_files(world, call):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(world)
    assert_forgotten(caught.value, VALUE, bytes(SIGNING), *derived(world / "public"))


def test_a_metric_that_fails_late(world):
    """The metric fails after keys have been drawn."""
    drawn: list[bytes] = []
    real = sj.chacha20_key

    def evaluate(params: Any) -> float:
        if drawn:
            raise KeyError("mine")
        return 10.0

    def noted(secret: bytes) -> Any:
        drawn.append(secret)
        return real(secret)

    with pytest.MonkeyPatch.context() as patched:
        for module in ("_calibrate.network", "_keys.chacha"):
            patched.setattr(f"selcrypt_jax.{module}.chacha20_key", noted)
        with pytest.raises(KeyError) as caught:
            sj.protect_file(
                world / "plain", world / "o", secret=SECRET, levels=Targets([1, 2], evaluate)
            )
    assert drawn
    assert_forgotten(caught.value, VALUE, *drawn)


def test_the_test_finds_what_is_there():
    def leaks(value: bytes) -> None:
        raise KeyError("mine")

    frame_file = leaks.__code__.replace(co_filename="elsewhere.py")
    leaks.__code__ = frame_file
    for value in (VALUE, {"k": [VALUE.hex()]}, np.frombuffer(VALUE, "<u4"), memoryview(VALUE)):
        with pytest.raises(KeyError) as caught:
            leaks(value)  # pyright: ignore
        with pytest.raises(AssertionError):
            assert_forgotten(caught.value, VALUE)
