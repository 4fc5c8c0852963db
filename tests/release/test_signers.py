"""Signers: files that customers sealed again, and earlier releases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protected_files import ATTACKER, LEVELS, SECRET, SIGNING, Parts, checkpoint

import selcrypt_jax as sj
from selcrypt_jax import Grant, GrantError, IntegrityError, LevelKey, Protected, SigningKey
from selcrypt_jax._format.boxes import open_box, seal_box
from selcrypt_jax._format.envelope import Envelope, signed_message
from selcrypt_jax.cli import main

PUBLIC = SIGNING.public


def protected(folder: Path, name: str, signing: SigningKey | None = SIGNING) -> Path:
    plain = folder / "plain"
    plain.write_bytes(checkpoint(0).to_bytes())
    options: Any = {"selection": sj.Select(layout="HWIO", select=".*kernel"), "signing": signing}
    sj.protect_file(plain, folder / name, secret=SECRET, levels=[0.2, 0.4, 0.6], **options)
    return folder / name


def key_of(path: Path, level: int) -> LevelKey:
    model_id = bytes.fromhex(sj.inspect_file(path).model_id)
    return sj.level_key(SECRET, model_id, level=level, levels=LEVELS)


def sealed_again(path: Path, key: LevelKey, signing: SigningKey | None) -> Path:
    """A customer's forgery of a file: another manifest, and the boxes that they can open."""
    parts = Parts.of(path)
    old = Envelope.from_metadata(parts.metadata, "file")
    text = replace(old.manifest, signer=signing and signing.public).to_text()
    boxes = list(old.boxes)
    for own in key.all():
        box = boxes[own.level - 1]
        rings = open_box(own, old.text, box, "file", owner=False)
        boxes[own.level - 1] = seal_box(own, text, rings)
    signature = signing and signing.sign(signed_message(text, boxes))
    manifest = replace(old.manifest, signer=signing and signing.public)
    parts.metadata = Envelope("file", text, manifest, tuple(boxes), signature, old.own).entries()
    path = path.with_name("forged")
    path.write_bytes(parts.to_bytes())
    return path


@pytest.fixture
def public(tmp_path) -> Path:
    return protected(tmp_path, "public")


# --- grants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signing", [ATTACKER, None], ids=["signed by them", "unsigned"])
@pytest.mark.parametrize("level", [1, 2])
def test_the_owner_opens_boxes_that_a_customer_cannot_seal(public, level, signing):
    """Even if the owner names the wrong signer."""
    forged = sealed_again(public, key_of(public, level), signing)
    sj.open_model(forged, key_of(public, level))  # to the customer it opens
    wrong = "unsigned" if signing is None else signing.public
    for granted in range(1, LEVELS + 1):
        with pytest.raises(GrantError, match="the manifest or the box was altered") as caught:
            sj.issue_grant(forged, level=granted, secret=SECRET, signer=wrong)
        assert caught.value.reason == "secret"


@pytest.mark.parametrize("signing", [ATTACKER, None], ids=["signed by them", "unsigned"])
def test_against_a_customer_of_the_top_level_the_owner_names_the_signer(public, signing):
    forged = sealed_again(public, key_of(public, LEVELS), signing)
    words = rf"forged: expected a file signed by {PUBLIC.hex()}, got one .*--signer signing.pub"
    with pytest.raises(IntegrityError, match=words) as caught:
        sj.issue_grant(forged, level=1, secret=SECRET, signer=PUBLIC)
    assert caught.value.reason == "signer"
    assert sj.issue_grant(public, level=1, secret=SECRET, signer=PUBLIC).signer == PUBLIC
    with pytest.raises(IntegrityError, match="expected a file without a signature"):
        sj.issue_grant(public, level=1, secret=SECRET, signer="unsigned")


def test_the_owner_has_to_name_the_signer(tmp_path, public):
    """In Python as on the command line, for a signed file and for one that never was."""
    issue: Any = sj.issue_grant
    never = protected(tmp_path, "never", None)
    for path in (public, never):
        with pytest.raises(TypeError, match="'signer'"):
            issue(path, level=1, secret=SECRET)
        with pytest.raises(TypeError, match=r"got None\. Name your signing.pub; "):
            issue(path, level=1, secret=SECRET, signer=None)
    assert sj.issue_grant(never, level=1, secret=SECRET, signer="unsigned").signer is None
    with pytest.raises(IntegrityError, match="expected a file signed by"):
        sj.issue_grant(never, level=1, secret=SECRET, signer=PUBLIC)


def grants(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a refused grant; nothing if it was written."""
    status = main(f"grant {line} --level 1 -o new.grant --force".split())
    error = capsys.readouterr().err
    assert status == bool(error), error
    return error


def test_the_command_names_the_owner_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("keys").mkdir()
    SECRET.write("keys/secret.key")
    PUBLIC.write("keys/signing.pub")
    public = protected(tmp_path, "public")
    mine = "--secret keys/secret.key"
    for signing in (ATTACKER, None):
        sealed_again(public, key_of(public, LEVELS), signing)
        assert "expected a file signed by" in grants(f"forged {mine}", capsys)
        assert not Path("new.grant").exists()
    assert grants(f"public {mine}", capsys) == ""
    assert Grant.read("new.grant").signer == PUBLIC
    protected(tmp_path, "never", None)
    assert '"unsigned" if it was never' in grants(f"never {mine}", capsys)
    assert grants(f"never {mine} --signer unsigned", capsys) == ""
    Path("keys/signing.pub").rename("away.pub")  # or a secret from a pipe
    assert "expected your signing.pub next to keys/secret.key" in grants(f"public {mine}", capsys)
    assert grants(f"public {mine} --signer away.pub", capsys) == ""


# --- opening ------------------------------------------------------------------------------------

Open = Callable[[Path, Any], object]
OPENINGS: dict[str, Open] = {
    "open_model, level 0": lambda path, signer: sj.open_model(path, signer=signer),
    "open_model, level key": lambda path, signer: sj.open_model(
        path, key_of(path, LEVELS), signer=signer
    ),
    "LazyModel": lambda path, signer: sj.LazyModel(path, signer=signer).close(),
    "unlock_file": lambda path, signer: sj.unlock_file(
        path, path.with_name("out"), key_of(path, LEVELS), signer=signer
    ),
    "unlock": lambda path, signer: sj.unlock(
        Protected(sj.open_model(path), Parts.of(path).entries), key_of(path, LEVELS), signer=signer
    ),
    "verify_file": lambda path, signer: sj.verify_file(
        path, grant=key_of(path, LEVELS), signer=signer
    ),
}  # fmt: skip


@pytest.mark.parametrize("opens", OPENINGS.values(), ids=OPENINGS)
@pytest.mark.parametrize("signing", [ATTACKER, None], ids=["signed by them", "unsigned"])
def test_a_signer_can_be_insisted_on(public, opens, signing):
    forged = sealed_again(public, key_of(public, LEVELS), signing)
    with pytest.raises(IntegrityError, match="expected a file signed by") as caught:
        opens(forged, PUBLIC)
    assert caught.value.reason == "signer"
    assert not public.with_name("out").exists()
    PUBLIC.write(public.with_name("signing.pub"))
    opens(public, public.with_name("signing.pub"))


def test_a_grant_and_a_caller_that_disagree(public, tmp_path):
    grant = sj.issue_grant(public, level=1, secret=SECRET, signer=PUBLIC)
    for opens in (
        lambda: sj.open_model(public, grant, signer=ATTACKER.public),
        lambda: sj.unlock_file(public, tmp_path / "out", grant, signer=ATTACKER.public),
        lambda: sj.verify_file(public, grant=grant, signer=ATTACKER.public),
    ):
        with pytest.raises(GrantError, match="leave signer out or correct") as caught:
            opens()
        assert caught.value.reason == "signer"


def test_the_command_insists_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Grant(key_of(public := protected(tmp_path, "public"), 1)).write("g")  # it names nobody
    ATTACKER.public.write("other.pub")
    PUBLIC.write("signing.pub")
    assert main(["unlock", str(public), "-g", "g", "-o", "out", "--signer", "other.pub"]) == 1
    assert "expected a file signed by" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main(["unlock", str(public), "-g", "g", "-o", "out", "--signer", "signing.pub"]) == 0


# --- earlier releases ---------------------------------------------------------------------------


def test_an_earlier_release_is_not_the_current_one(tmp_path, monkeypatch, capsys):
    """Its signature is just as valid: only the model id differs."""
    monkeypatch.chdir(tmp_path)
    old, new = (protected(tmp_path, name) for name in ("old", "new"))
    PUBLIC.write("signing.pub")
    wanted = sj.inspect_file(new).model_id
    for model_id in (wanted, wanted.upper(), f" {wanted}\n", bytes.fromhex(wanted)):
        assert sj.verify_file(new, signer=PUBLIC, model_id=model_id).model_id == wanted
        with pytest.raises(IntegrityError, match=f"expected model {wanted}, got model") as caught:
            sj.verify_file(old, signer=PUBLIC, model_id=model_id)
        assert caught.value.reason == "model"
    for bad in ("", wanted[:-1], wanted + "00", "g" * 32, b"short"):
        with pytest.raises(ValueError, match="model_id: expected 32 digits in hex"):
            sj.verify_file(new, signer=PUBLIC, model_id=bad)
    assert main(["verify", "old", "--signer", "signing.pub", "--model-id", wanted]) == 1
    assert "It is another release" in capsys.readouterr().err
    assert main(["verify", "new", "--signer", "signing.pub", "--model-id", wanted]) == 0


def test_level_0_with_the_right_signer_is_the_file(public):
    stock = {n: t.data for n, t in Parts.of(public).tensors.items()}
    opened = sj.open_model(public, signer=PUBLIC)
    assert {n: np.asarray(a).tobytes() for n, a in opened.items()} == stock
