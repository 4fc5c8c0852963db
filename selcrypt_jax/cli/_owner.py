"""The owner's commands for keys and grants: keygen, grant, rotate."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from .._keys.files import MAX_BYTES
from .._keys.owner import PUBLIC_FILE, SECRET_FILE, SIGNING_FILE, write_owner_keys
from .._release.use import issue_grant, rotate_file
from ._options import Flat, Locking, Output, OwnerKeys, OwnerSecret, Writing, spare


def keygen(
    out: Output,
    lock: Annotated[Locking, Flat] = Locking(),
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Makes the owner's keys: secret.key, and the signing pair signing.key and signing.pub.

    Keep secret.key and signing.key safe and secret: all grants come from the first, and the second
    signs in your name. Give signing.pub to everybody. One pair of keys serves all your models.
    With --force keys that are there are replaced, and what was protected with them can never be
    opened again.

    Args:
        out: Folder for the keys; made if it does not exist.
        lock: How the private keys are locked.
        writing: How they are written.
    """
    public = write_owner_keys(out, passphrase=lock.read(), force=writing.force)
    paths = {name: out / name for name in (SECRET_FILE, SIGNING_FILE, PUBLIC_FILE)}
    signer = public.hex()
    writing.say(
        {name: str(path) for name, path in paths.items()} | {"signer": signer},
        f"Wrote {paths['secret.key']} and {paths['signing.key']}: keep them secret, and a copy of "
        "them safe.",
        f"Wrote {paths['signing.pub']}: for everybody. You sign as {signer}.",
    )


def grant(
    file: Positional[Path],
    level: int,
    owner: Annotated[OwnerSecret, Flat],
    out: Output,
    signer: str | None = None,
    to: UseAppendAction[tuple[str, ...]] = (),
    lock: Annotated[Locking, Flat] = Locking(),
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Issues a level: writes the key that opens levels 1 to this one of one protected file.

    The file must be signed by you, since a customer could have altered it, and the grant would then
    vouch for that.

    Args:
        file: The protected file.
        level: The highest level that the grant opens.
        owner: Your secret.
        out: The grant file.
        signer: Your signing.pub; by default the one beside your secret. Or "unsigned", if the file
            never was signed and this is your own copy.
        to: Seal the grant to this recipient, so that it can travel in the open: an age public key
            (age1...), an SSH public key ("ssh-ed25519 ..."), or a file that holds one. May be
            given several times.
        lock: How the grant is locked.
        writing: How it is written.
    """
    spare(out, file, Path(signer) if signer else None, lock.new_passphrase_file, *owner.files)
    recipients = [_recipient(text) for text in to]
    words = lock.read()
    secret, own = owner.read_secret(), signer or _own_public(owner.secret)
    made = issue_grant(file, level=level, secret=secret, signer=own)
    made.write(out, recipients=recipients, passphrase=words, force=writing.force)
    model, signer_hex = made.key.model_id.hex(), made.signer and made.signer.hex()
    whose = f"signed by {signer_hex}" if signer_hex else "not signed"
    secrecy = "Only the recipients can read it." if to else "Anyone who has it can use it."
    writing.say(
        {
            "grant": str(out),
            "model_id": model,
            "level": level,
            "signer": signer_hex,
            "recipients": len(to),
        },
        f"Wrote {out}: opens levels 1 to {level} of model {model}, {whose}. "
        + ("It is locked with a passphrase." if words and not to else secrecy),
    )


def rotate(
    file: Positional[Path],
    keys: Annotated[OwnerKeys, Flat],
    old_signer: Path | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Gives a protected file a new model id, keys and ciphertext; old grants do not open it.

    With new keys, levels below the top give another quality, by as much as keys matter: measure it
    again.

    An old copy of the file can still be opened with an old grant. To whoever can see what is not
    graded (anyone with a plain rest, level 1 of a sealed file) both files together show where the
    graded weights are, and many of them also which level opens what.

    Args:
        file: The protected file; or the index or folder of one in several files, or of Orbax.
        keys: Your keys; the signing key is needed if the file is signed, by the same key.
        old_signer: The signing.pub of the old file, if it is signed with another key of yours.
        out: Where to write it; by default it takes the place of the old file. A new folder for a
            checkpoint in a folder.
        writing: How it is written.
    """
    if out is not None:
        spare(out, old_signer, *keys.files)
    model_id = rotate_file(
        file,
        out,
        old_signer=old_signer,
        secret=keys.read_secret(),
        signing=keys.read_signing(),
        force=writing.force,
    )
    where = file if out is None else out
    writing.say(
        {"out": str(where), "model_id": model_id.hex()},
        f"Wrote {where}: is now model {model_id.hex()}. Issue new grants. Below the top "
        "level, new keys give another quality: measure it.",
    )


def _own_public(secret: Path) -> Path:
    """The owner's public key, where keygen puts it."""
    public = secret.parent / PUBLIC_FILE
    if not public.exists():
        raise ValueError(
            f"--signer: expected your {PUBLIC_FILE} beside {secret}, got no such file. Name it, or "
            "say --signer unsigned if the file never was signed and this is your own copy."
        )
    return public


def _recipient(text: str) -> str:
    """A public key, or that in a file. No message shows it: it may be a private one."""
    if text.startswith(("age1", "ssh-")):
        return text
    if text.upper().startswith("AGE-SECRET-KEY-") or text.startswith("-----BEGIN"):
        raise ValueError(
            "--to: expected a public key (age1... or ssh-...), got a private one. Keep that one to "
            "yourself, and name the public one."
        )
    try:
        with Path(text).open("rb") as file:
            lines = file.read(MAX_BYTES).decode("utf-8-sig", "replace").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"--to: expected a public key (age1... or ssh-...) or a file with one, got {text!r}, "
            "which is neither. Ask the customer for their public key."
        ) from None
    lines = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].startswith(("age1", "ssh-")):
        raise ValueError(
            f"{text}: expected a file with one public key (age1... or ssh-...), got another. Ask "
            "the customer for their public key."
        )
    return lines[0]
