"""The owner's commands: keys, protecting, granting, rotating, planning levels."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from .._ciphers.lossless import LosslessCipher
from .._format.manifest import Rest
from .._keys.files import MAX_BYTES
from .._keys.owner import PUBLIC_FILE, SECRET_FILE, SIGNING_FILE, write_owner_keys
from .._release.use import inspect_file, issue_grant, rotate_file
from ._options import Flat, Locking, Output, OwnerKeys, OwnerSecret, Printing, Writing, spare
from ._selection import Goal, Levels, Selection, Unit, check_like_alone, levels_of
from ._tables import calibration_as_dict, print_inspection, print_levels
from ._text import note, printable

_SHOWN = 8  # tensors that are like others, of which there may be thousands


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


def protect(
    file: Positional[Path],
    out: Output,
    keys: Annotated[OwnerKeys, Flat],
    selection: Annotated[Selection, Flat] = Selection(),
    levels: Annotated[
        Levels, arg(metavar="INT|SHARE [SHARE ...]", help_behavior_hint="(default: 5)")
    ] = None,
    goal: Annotated[Goal, Flat] = Goal(),
    like: Path | None = None,
    old_signer: str | None = None,
    unit: Unit = "weight",
    rest: Rest = "sealed",
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Protects a checkpoint: encrypts its most important weights in place, in levels.

    The output has the same tensors and loads in every program that reads safetensors. Sealed, it
    is of no use without a key; with --rest plain anyone can run it, badly. Sign it, so that
    everybody can check that it is yours.

    How bad a level is says little about what an attacker can get back from there by fine-tuning:
    selcrypt audit measures that. Encrypting more makes it harder. Never publish
    the same weights in two forms, plain or with another selection: the difference tells.

    Args:
        file: A .safetensors file; or the index, or the folder, of one in several files; or the
            folder of an Orbax checkpoint. From a folder, only weights are read and written.
        out: The protected file; a new folder for a checkpoint in a folder.
        keys: Your keys.
        selection: What is encrypted.
        levels: How many levels of quality. Each opens an equal part of the budget; in small
            tensors, where a part would be too little to hide, the next higher level opens it. Or
            the share of the groups that each level opens, ascending, such as 0.02 0.05 0.08; the
            last one is all that is encrypted. selcrypt calibrate finds such shares.
        goal: What levels shall give.
        like: Your protected file of an earlier version: the same weights are graded again, and
            opened by the same levels, in place of a new selection. Weights change little from
            version to version: what is encrypted in one and plain in the next is as good as plain.
        old_signer: With --like: the signing.pub of the earlier version, if it is signed with
            another key of yours; or "unsigned", if it never was signed and this is your own copy.
        unit: What the cipher permutes: single weights, or whole groups, which leave less of a
            trace and have fewer orders.
        rest: What becomes of all other weights. Sealed: encrypted too, under the key of level 1.
            Plain: left as they are, so that anyone can run level 0 (for a free tier); what is
            plain helps an attacker.
        writing: How it is written.
    """
    from .._release.files import protect_file  # the start of JAX, which other commands don't need
    from .._tree.names import listed

    wanted: Any = None
    if like is not None:
        check_like_alone(levels, goal, selection)
    else:
        wanted = levels_of(levels, goal)
    spare(out, *keys.files)
    with goal.named():
        selected = protect_file(
            file,
            out,
            secret=keys.read_secret(),
            levels=wanted,
            selection=selection if like is None else None,
            like=like,
            old_signer=old_signer,
            signing=keys.read_signing(),
            cipher=LosslessCipher(unit=unit),
            rest=rest,
            force=writing.force,
        )
    made = inspect_file(out)
    found = selected.calibration
    print_inspection(
        made,
        writing.as_json,
        {
            "layout": selected.layout,
            "selected": dict(selected.groups),
            "untouched": dict(selected.untouched),
            **({} if selected.plain_change is None else {"plain_change": selected.plain_change}),
            **({"new": list(selected.new)} if selected.new else {}),
            **({"similar": list(selected.similar)} if selected.similar else {}),
            **({"random_keys": list(selected.random_keys)} if selected.random_keys else {}),
        },
        found
        and calibration_as_dict(
            found, wanted.targets, spreads=False, first=1 if rest == "sealed" else 0
        ),
    )
    if selected.new and selection.base is not None:
        note(
            f"The base has no such tensors: {listed(selected.new)}. All of them counts as changed."
        )
    elif selected.new:
        now = "plain: use --rest sealed" if rest == "plain" else "sealed, and opened by level 1"
        note(f"The earlier version has no such tensors: {listed(selected.new)}. They are {now}.")
    if found is not None and wanted.targets[0] is None and selection.budget is None:
        note(
            "any: all groups are graded, since no budget was given. To grade less, add a share of "
            "them, such as --budget 0.3."
        )
    if found is not None and rest == "sealed" and wanted.targets[0] is None:
        note(
            "Level 1 opens the seal alone, and gives what the budget leaves of the network: to a "
            "customer it may be worth nothing. Name what it shall give in place of any."
        )
    if selected.random_keys:
        note(
            f"These look like random keys, and level 1 opens them: {listed(selected.random_keys)}. "
            "Leave them out if anything is to stay secret that was made with them."
        )
    for text in selected.similar[:_SHOWN]:
        note(text)
    if (more := len(selected.similar) - _SHOWN) > 0:
        note(f"The same holds for {more} more tensors: --json lists them.")
    integers = {t: n for t, n in selected.untouched.items() if t.startswith(("I", "U"))}
    # A quantised checkpoint: only its scales take part by themselves.
    given = selection.select is not None or selection.scores_file is not None
    if not given and sum(integers.values()) > made.weights / 2:
        note(
            f"Most weights are integers ({', '.join(integers)}), which take part only if --select "
            "names their tensors: none of them is encrypted."
        )
    if (change := selected.plain_change) is not None and change > 0.05:
        note(
            f"{change:.0%} of what changed from the base stays plain. Whoever has the base gets "
            "nearly all of your network out of this file: use --rest sealed."
        )
    if keys.signing is None:
        note("Not signed: only the holder of a grant will notice if it is altered. Use --signing.")


def calibrate(
    file: Positional[Path],
    goal: Annotated[Goal, Flat],
    selection: Annotated[Selection, Flat] = Selection(),
    keys: int = 16,
    seed: int = 0,
    unit: Unit = "weight",
    printing: Annotated[Printing, Flat] = Printing(),
) -> None:
    """Finds what each level has to open so that it gives the quality that you name.

    Encrypts the checkpoint in memory in up to 8 ways a level, under new keys each time, measures
    the result, and prints the shares for selcrypt protect. Writes nothing.

      selcrypt calibrate model.safetensors --targets 20 24 28 --evaluate mine:psnr

    These are averages over keys, for planning. A file has one key, with which a level may be far
    off: selcrypt protect --targets makes a file whose own levels are as you say.

    Args:
        file: The checkpoint, as for selcrypt protect.
        goal: What levels shall give.
        selection: What is encrypted, as for selcrypt protect. To plan with random scores, which
            differ each time, save them (selcrypt_jax.importance.random).
        keys: How many encryptions a value is averaged over, at most; three where they agree.
        seed: For the keys that are tried.
        unit: As for selcrypt protect.
        printing: How it is printed.
    """
    from .._release.files import calibrate_file

    wanted = goal.read()
    with goal.named():
        found = calibrate_file(
            file,
            wanted,
            seed=seed,
            keys=keys,
            selection=selection,
            cipher=LosslessCipher(unit=unit),
        )
    plain = replace(selection, budget=None)
    flags = ["--levels", *map(repr, found.levels), *plain.flags(), "--unit", unit]
    flags += ["--rest", "plain"]  # the first target is that of level 0
    if selection.small is None:
        flags += ["--small", str(wanted.small)]
    result = calibration_as_dict(found, wanted.targets, spreads=True)
    if printing.as_json:
        print(json.dumps(result | {"shares": list(found.levels), "protect": flags}, indent=2))
        return
    print_levels(result)
    command = f"selcrypt protect {shlex.quote(str(file))} -o public.safetensors "
    command += f"--secret keys/secret.key {shlex.join(flags)}"
    print(f"\n{found.evaluations} evaluations, {found.calls} calls. To protect it so:\n")
    print(f"  {printable(command)}")


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
