"""The owner's commands for keys and grants: keygen, grant, rotate."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from .._keys.owner import PUBLIC_FILE, SECRET_FILE, SIGNING_FILE, write_owner_keys
from .._keys.text import MAX_BYTES
from .._release.rotate import rotate_file
from .._release.use import issue_grant
from ._options import (
    Flat,
    Locking,
    Maybe,
    Output,
    OwnerKeys,
    OwnerSecret,
    Switch,
    Writing,
    beside_as_dict,
    beside_as_text,
    spare,
)


def keygen(
    out: Output,
    lock: Annotated[Locking, Flat] = Locking(),
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Creates your keys: secret.key, and the signing pair signing.key and signing.pub.

    Keep secret.key and signing.key safe and secret: every grant is derived from
    the first, and the second signs files in your name. Publish signing.pub. One set of keys serves
    all your models. --force replaces existing keys; files that were protected with the old ones can
    then never be opened again.

    Args:
        out: Folder for the keys, created if it does not exist.
        lock: How the private keys are locked.
        writing: How they are written.
    """
    public = write_owner_keys(out, passphrase=lock.read(), force=writing.force)
    paths = {name: out / name for name in (SECRET_FILE, SIGNING_FILE, PUBLIC_FILE)}
    signer = public.hex()
    writing.say(
        {name: str(path) for name, path in paths.items()} | {"signer": signer},
        f"Wrote {paths['secret.key']} and {paths['signing.key']}: keep both secret, and "
        "keep a backup.",
        f"Wrote {paths['signing.pub']}: publish it. You sign as {signer}.",
    )


def grant(
    file: Positional[Path],
    level: int,
    owner: Annotated[OwnerSecret, Flat],
    out: Output,
    signer: Maybe[str] = None,
    to: UseAppendAction[tuple[str, ...]] = (),
    lock: Annotated[Locking, Flat] = Locking(),
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Issues a grant: a key that opens levels 1 to LEVEL of one protected file.

    You must have signed the file: a customer could have altered any other, and the grant would
    vouch for the altered file.

    Args:
        file: The protected file.
        level: The highest level that the grant opens.
        owner: Your secret.
        out: Where to write the grant.
        signer: Your signing.pub; by default the one next to your secret. Or "unsigned", if the file
            was never signed and this is your own copy.
        to: Encrypt the grant to this recipient, so that it can be sent in the open: an age public
            key (age1...), an SSH public key ("ssh-ed25519 ..."), or a file that holds one.
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
        f"Wrote {out}: opens level{'s 1 to' * (level > 1)} {level} of model {model}, {whose}. "
        + ("It is locked with a passphrase." if words and not to else secrecy),
    )


def rotate(
    file: Positional[Path],
    keys: Annotated[OwnerKeys, Flat],
    old_signer: Maybe[Path] = None,
    out: Annotated[Path | None, arg(aliases=["-o"], help_behavior_hint="")] = None,
    copy_config: Switch = False,
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Re-encrypts a protected file under a new model id and new keys; old grants do not open it.

    New keys change the quality of the levels below the top: measure them again (selcrypt levels).

    An old grant still opens old copies of the file. Anyone who can see the weights that are not
    graded (everyone if the rest is plain, holders of level 1 if it is sealed) can compare the two
    files, which reveals the positions of the graded weights. Many such files also reveal which
    level opens which weights.

    Args:
        file: The protected file; if sharded, its index or folder; for Orbax, the folder.
        keys: Your keys; the signing key is needed if the file is signed, by the same key.
        old_signer: The signing.pub of the old file, if it is signed with another key of yours.
        out: Where to write the new file; a new folder if the old one is a folder. By default it
            replaces the old file.
        copy_config: Also copy the other files of a folder: configuration, tokenizer, and
            everything else that cannot be weights. Only the weights are checked.
        writing: How it is written.
    """
    if out is not None:
        spare(out, old_signer, *keys.files)
    done = rotate_file(
        file,
        out,
        old_signer=old_signer,
        secret=keys.read_secret(),
        signing=keys.read_signing(),
        copy_config=copy_config,
        force=writing.force,
    )
    where = file if out is None else out
    writing.say(
        {"out": str(where), "model_id": done.model_id.hex()} | beside_as_dict(done.beside),
        f"Wrote {where}, now model {done.model_id.hex()}. Issue new grants. New keys change "
        "the quality of levels below the top: measure them (selcrypt levels).",
        *beside_as_text(done.beside),
    )


def _own_public(secret: Path) -> Path:
    """The owner's public key, where keygen puts it."""
    public = secret.parent / PUBLIC_FILE
    if not public.exists():
        raise ValueError(
            f"--signer: expected your {PUBLIC_FILE} next to {secret}, got no such file. Name it, "
            "or pass --signer unsigned if the file was never signed and this is your own copy."
        )
    return public


def _recipient(text: str) -> str:
    """A public key, or the one in a file. No message shows it, as it may be a private key."""
    if text.startswith(("age1", "ssh-")):
        return text
    if text.upper().startswith("AGE-SECRET-KEY-") or text.startswith("-----BEGIN"):
        raise ValueError(
            "--to: expected a public key (age1... or ssh-...), got a private one. Keep that one "
            "secret, and pass the public one."
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
            f"{text}: expected a file with one public key (age1... or ssh-...), got something "
            "else. Ask the customer for their public key."
        )
    return lines[0]
