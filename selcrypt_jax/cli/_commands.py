"""The commands around a protected file."""

import getpass
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from .._ciphers.lossless import LosslessCipher
from .._io.atomic import check_output
from .._keys.grant import Grant
from .._keys.keys import Secret
from .._keys.signing import SigningKey
from .._release.use import (
    Inspection,
    inspect_file,
    issue_grant,
    rotate_file,
    unlock_file,
    verify_file,
)

Output = Annotated[Path, arg(aliases=["-o"])]
Json = Annotated[bool, arg(name="json")]
Strategy = Literal["l2", "random", "ascend", "descend", "mean"]


def _passphrase(file: Path | None, what: str) -> Callable[[], str]:
    """Asks for a passphrase once it is needed. Never an argument: other users see those."""

    def ask() -> str:
        if file is not None:
            return _read_passphrase(file)
        if not sys.stdin.isatty():
            raise ValueError(
                f"{what}: is locked with a passphrase, and there is nobody to ask for it. Use "
                "--passphrase-file."
            )
        return getpass.getpass(f"Passphrase of {what}: ")

    return ask


def _read_passphrase(file: Path) -> str:
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{file}: expected a passphrase in UTF-8, got something else. Save it as UTF-8 text."
        ) from None
    if len(lines) != 1 or not lines[0].strip():
        raise ValueError(
            f"{file}: expected one line with a passphrase, got {len(lines)} lines. Put nothing "
            "else into the file."
        )
    return lines[0]


def _new_passphrase(asked: bool, file: Path | None) -> str | None:
    if file is not None:
        return _read_passphrase(file)
    if not asked:
        return None
    if not sys.stdin.isatty():
        raise ValueError(
            "passphrase: there is nobody to ask for it. Put it into a file, and name that "
            "(see --help)."
        )
    first = getpass.getpass("New passphrase: ")
    if not first.strip():
        raise ValueError("passphrase: expected some text, got an empty one; nothing was written.")
    if getpass.getpass("Once more: ") != first:
        raise ValueError("passphrase: the two are not the same; nothing was written.")
    return first


def _check_output(out: Path, *inputs: Path | None) -> None:
    """Keys are inputs too: even with --force none of them is replaced by an output."""
    check_output(out, *(path for path in inputs if path is not None))


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)


def keygen(
    out: Output,
    passphrase: bool = False,
    passphrase_file: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Makes the owner's keys: secret.key, and the signing pair signing.key and signing.pub.

    Keep secret.key and signing.key safe and secret: all grants come from the first, and whoever
    has the second can sign in your name. Give signing.pub to everybody. One pair of keys serves
    for all your models.

    Args:
        out: Folder for the keys; made if it does not exist.
        passphrase: Lock both private keys with a passphrase; you are asked for it.
        passphrase_file: Lock them with the passphrase in this file.
        force: Replace keys that are there. What was protected with them can never be opened again.
        as_json: Print JSON.
    """
    words = _new_passphrase(passphrase, passphrase_file)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {name: out / name for name in ("secret.key", "signing.key", "signing.pub")}
    if not force:  # all or nothing
        for path in paths.values():
            if path.exists():
                raise FileExistsError(
                    f"{path}: exists already. Name another folder; --force would replace it, and "
                    "what was protected with it could never be opened again."
                )
    signing = SigningKey.generate()
    Secret.generate().write(paths["secret.key"], passphrase=words, force=force)
    signing.write(paths["signing.key"], passphrase=words, force=force)
    signing.public.write(paths["signing.pub"], force=force)
    _print(
        {name: str(path) for name, path in paths.items()} | {"signer": signing.public.hex()},
        as_json,
        f"Wrote {paths['secret.key']} and {paths['signing.key']}: keep them secret, and a copy of "
        f"them safe.\nWrote {paths['signing.pub']}: for everybody. You sign as "
        f"{signing.public.hex()}.",
    )


def protect(
    file: Positional[Path],
    out: Output,
    secret: Path,
    signing: Path | None = None,
    importance: Path | None = None,
    strategy: Strategy | None = None,
    budget: float | None = None,
    levels: int | None = None,
    fractions: tuple[float, ...] = (),
    targets: tuple[str, ...] = (),
    evaluate: str | None = None,
    tolerance: float | None = None,
    evaluations: int | None = None,
    lower_is_better: bool = False,
    granularity: Literal["kernel", "filter", "weight"] | None = None,
    layout: Literal["OIHW", "HWIO"] | None = None,
    select: str | None = None,
    scope: Literal["leaf", "model"] = "leaf",
    small: float | None = None,
    unit: Literal["weight", "group"] = "weight",
    passphrase_file: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Protects a checkpoint: encrypts its most important weights in place, in levels.

    The output has the same tensors and runs, badly, in every program that reads safetensors.
    Sign it, so that everybody can check that it is yours.

    How bad it is without a key says little about what a thief can get back by fine-tuning:
    selcrypt audit measures that. Encrypting more makes it harder. Never publish
    the same weights in two forms, plain or with another selection: the difference tells.

    Args:
        file: A .safetensors file; or the index, or the folder, of one in several files; or the
            folder of an Orbax checkpoint. Of a folder, weights alone are read and written.
        out: The protected file; a new folder for what comes from a folder.
        secret: Your secret.key.
        signing: Your signing.key.
        importance: Learned or measured scores in a .safetensors file, under the names of the
            tensors that take part; in place of strategy, granularity and layout.
        strategy: How importance is judged without data. l2, the default, takes the kernels of
            largest norm. These stay large, so a thief can guess where they are, though not what
            they were; random tells nothing.
        budget: Share of the groups that is encrypted, in every tensor that takes part; 0.08 by
            default. With targets it is the most that may be encrypted, 1 by default.
        levels: How many levels of quality, 5 by default. Each opens an equal part of the budget; in
            small tensors, where a part would be too little to hide, the next higher level opens it.
        fractions: Share of the groups that each level opens, ascending; the last one is all that is
            encrypted. In place of budget and levels. selcrypt calibrate finds them.
        targets: What levels 0, 1, ... of this very file shall give, from the worst to the best; one
            more level gives the original. The first may be "any": as bad as the budget makes it.
            In place of fractions and levels, with --evaluate. The checkpoint has to fit into
            memory.
        evaluate: With targets: import path module:function of your metric, a function of a dict
            from the names of the tensors to arrays; the working folder is searched. Let it measure
            on data that the network was not trained on.
        tolerance: With targets: how far a level may be from its own. By default 2 % of the way from
            the first target to the original.
        evaluations: With targets: how often the metric may be called; 8 times a target and 8 more
            by default.
        lower_is_better: With targets: whether the metric is a loss; targets then descend.
        granularity: What is selected: kernels (the default; of a dense layer, single weights),
            whole filters, or weights. Positions of single weights take about a bit a weight.
        layout: Order of the axes of a kernel: OIHW as in PyTorch, HWIO as in JAX. By default it is
            told from the shapes.
        select: Which tensors take part: a regular expression, searched in their names; "^(?!fc)"
            takes all that do not begin with fc. By default all floats with two axes or more.
        scope: Whether the budget holds in every tensor, or over all of them.
        small: Share of all weights. The smallest tensors that together have no more are encrypted
            as a whole, beside the budget: normalisation, biases, often the first and the last
            layer. Level 1 opens them.
            By default 0.02; 0 with targets, unless the first is "any", since small tensors make
            level 0 hard to steer.
        unit: What the cipher moves about: single weights, or whole groups, which leave less of a
            trace and have fewer orders.
        passphrase_file: Of the keys, if they have a passphrase and nobody is there to type it.
        force: Replace an existing output file. (A folder is never replaced.)
        as_json: Print JSON.
    """
    from .._release.protect import (
        protect_file,  # the start of JAX, which the other commands don't need
    )

    goal = {
        "evaluate": evaluate,
        "tolerance": tolerance,
        "evaluations": evaluations,
        "lower_is_better": lower_is_better or None,
    }
    shares = _shares(budget, levels, fractions, targets, goal)
    _check_output(out, secret, signing, importance, passphrase_file)
    options: dict[str, Any] = {
        "secret": _read_secret(secret, passphrase_file),
        "signing": _read_signing(signing, passphrase_file),
        "importance": importance,
        "strategy": strategy,
        "granularity": granularity,
        "layout": layout,
        "select": select,
        "scope": scope,
        "cipher": LosslessCipher(unit=unit),
        "force": force,
    }
    found: dict[str, Any] = {}
    if shares:
        small = 0.02 if small is None else small
        chosen = protect_file(file, out, fractions=shares, small=small, **options)
    else:
        from ._calibrate import protect_to_targets

        options |= {"budget": 1.0 if budget is None else budget, "small": small}
        chosen, found = protect_to_targets(file, out, targets, options=options, **goal)
    made = inspect_file(out)
    details = {"layout": chosen.layout, "selected": dict(chosen.groups)}
    _print_inspection(made, as_json, details | {"untouched": dict(chosen.untouched)}, found)
    integers = {t: n for t, n in chosen.untouched.items() if t.startswith(("I", "U"))}
    # A quantised checkpoint: only its scales take part by themselves.
    if select is None and importance is None and sum(integers.values()) > made.weights / 2:
        print(
            f"Most weights are integers ({', '.join(integers)}), which take part only if --select "
            "names their tensors: nothing of them is encrypted.",
            file=sys.stderr,
        )
    if signing is None:
        print(
            "Not signed: only who has a grant will notice if it is altered. Use --signing.",
            file=sys.stderr,
        )


def _shares(
    budget: float | None,
    levels: int | None,
    fractions: Sequence[float],
    targets: Sequence[str],
    goal: Mapping[str, Any],
) -> list[float]:
    """What each level opens; nothing where targets decide that."""
    from .._masks.levels import check_share

    options: dict[str, Any] = {"levels": levels, "fractions": fractions or None}
    wrong = [n for n, value in (options if targets else goal).items() if value is not None]
    if wrong:
        names = ", ".join(name.replace("_", "-") for name in wrong)
        raise ValueError(
            f"targets: expected them alone, got {names} too, which they decide. Leave those out."
            if targets
            else f"{names}: is of use with targets only, got none. Add --targets."
        )
    if targets:
        if goal["evaluate"] is None:
            raise ValueError(
                "targets: expected a metric to measure them by, got none. Add --evaluate "
                "module:function."
            )
        return []
    if fractions:
        if budget is not None or levels is not None:
            raise ValueError(
                "fractions: expected them alone, got budget or levels too, which they decide. "
                "Leave those out."
            )
        return list(fractions)
    budget = 0.08 if budget is None else budget
    levels = 5 if levels is None else levels
    if levels < 1:
        raise ValueError(f"levels: expected at least 1, got {levels}. Level 0 is there anyway.")
    check_share("budget", budget)
    return [budget * level / levels for level in range(1, levels + 1)]


def grant(
    file: Positional[Path],
    level: int,
    secret: Path,
    out: Output,
    signer: Path | None = None,
    to: UseAppendAction[tuple[str, ...]] = (),
    passphrase: bool = False,
    new_passphrase_file: Path | None = None,
    passphrase_file: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Issues a level: writes the key that opens levels 1 to this one of one protected file.

    Args:
        file: The protected file.
        level: The highest level that the grant opens.
        secret: Your secret.key.
        out: The grant file.
        signer: Your signing.pub: refuse a file that you did not sign. Use it where the file comes
            from others' hands.
        to: Seal the grant to this recipient, so that it can travel in the open: an age public key
            (age1...), an SSH public key ("ssh-ed25519 ..."), or a file that holds one. May be
            given several times.
        passphrase: Lock the grant with a passphrase; you are asked for it.
        new_passphrase_file: Lock the grant with the passphrase in this file.
        passphrase_file: Of the secret, if it has a passphrase and nobody is there to type it.
        force: Replace an existing grant.
        as_json: Print JSON.
    """
    _check_output(out, file, secret, signer, passphrase_file, new_passphrase_file)
    recipients = [_recipient(text) for text in to]
    words = _new_passphrase(passphrase, new_passphrase_file)
    owner = _read_secret(secret, passphrase_file)
    made = issue_grant(file, level=level, secret=owner, signer=signer)
    made.write(out, recipients=recipients, passphrase=words, force=force)
    model = made.key.model_id.hex()
    whose = "not signed" if made.signer is None else f"signed by {made.signer.hex()}"
    who = "Only the recipients can read it." if to else "Whoever has it can use it."
    _print(
        {
            "grant": str(out),
            "model_id": model,
            "level": level,
            "signer": None if made.signer is None else made.signer.hex(),
            "recipients": len(to),
        },
        as_json,
        f"Wrote {out}: opens levels 1 to {level} of model {model}, {whose}. "
        + ("It is locked with a passphrase." if words and not to else who),
    )


def unlock(
    file: Positional[Path],
    grant: Annotated[Path, arg(aliases=["-g"])],
    out: Output,
    level: int | None = None,
    identity: UseAppendAction[tuple[Path, ...]] = (),
    passphrase_file: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Writes the checkpoint that a grant opens; at the top level it is the original.

    Signature, digests and decrypted weights are all checked before the output appears.

    Args:
        file: The protected file; or the index or folder of one in several files, or of Orbax.
        grant: The grant file.
        out: The checkpoint; a new folder for what comes from a folder.
        level: A lower level than the grant's.
        identity: Your age or SSH private key, for a grant that is sealed to you. May be given
            several times.
        passphrase_file: Of the grant, if it has a passphrase and nobody is there to type it.
        force: Replace an existing output file. (A folder is never replaced.)
        as_json: Print JSON.
    """
    _check_output(out, grant, passphrase_file, *identity)
    opened = _read_grant(grant, identity, passphrase_file)
    unlock_file(file, out, opened, level=level, force=force)
    level = opened.key.level if level is None else level
    _print(
        {"out": str(out), "model_id": opened.key.model_id.hex(), "level": level},
        as_json,
        f"Wrote {out}: level {level} of model {opened.key.model_id.hex()}.",
    )


def inspect(
    file: Positional[Path],
    grant: Annotated[Path | None, arg(aliases=["-g"])] = None,
    identity: UseAppendAction[tuple[Path, ...]] = (),
    passphrase_file: Path | None = None,
    as_json: Json = False,
) -> None:
    """Shows levels, shares, cipher, signer and sizes; with a grant, also what it opens.

    Args:
        file: The protected file; or the index or folder of one in several files, or of Orbax.
        grant: A grant file.
        identity: Your age or SSH private key, for a grant that is sealed to you. May be given
            several times.
        passphrase_file: Of the grant, if it has a passphrase and nobody is there to type it.
        as_json: Print JSON.
    """
    opened = None if grant is None else _read_grant(grant, identity, passphrase_file)
    _print_inspection(inspect_file(file, opened), as_json)


def verify(
    file: Positional[Path],
    signer: Path | None = None,
    grant: Annotated[Path | None, arg(aliases=["-g"])] = None,
    identity: UseAppendAction[tuple[Path, ...]] = (),
    passphrase_file: Path | None = None,
    as_json: Json = False,
) -> None:
    """Checks the signature and every digest; with a grant, also all that it opens.

    Without --signer the file is sound but may be anybody's: compare the signer that is shown.

    Args:
        file: The protected file; or the index or folder of one in several files, or of Orbax.
        signer: The owner's signing.pub.
        grant: A grant file.
        identity: Your age or SSH private key, for a grant that is sealed to you. May be given
            several times.
        passphrase_file: Of the grant, if it has a passphrase and nobody is there to type it.
        as_json: Print JSON.
    """
    opened = None if grant is None else _read_grant(grant, identity, passphrase_file)
    found = verify_file(file, signer=signer, grant=opened)
    known = signer is not None or (opened is not None and opened.signer is not None)
    text = f"{file}: every digest fits."
    if found.signer is not None:
        whose = ", as expected" if known else "; compare that with what the owner says"
        text += f" Signed by {found.signer}{whose}."
    else:
        text += " Not signed; the grant vouches for it."
    if opened is not None:
        text += f" Levels 1 to {opened.key.level} open to what was encrypted."
    _print(_as_dict(found) | {"signer_known": known}, as_json, text)


def rotate(
    file: Positional[Path],
    secret: Path,
    signing: Path | None = None,
    old_signer: Path | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    passphrase_file: Path | None = None,
    force: bool = False,
    as_json: Json = False,
) -> None:
    """Gives a protected file a new model id, keys and ciphertext; old grants do not open it.

    With new keys, levels below the top give another quality, by as much as keys matter: measure it
    anew.

    Whoever kept the old file can still open that one with an old grant; and who has both files sees
    which weights are encrypted, since these alone differ.

    Args:
        file: The protected file; or the index or folder of one in several files, or of Orbax.
        secret: Your secret.key.
        signing: Your signing.key; needed if the file is signed, by the same key.
        old_signer: The signing.pub of the old file, if it is signed with another key of yours.
        out: Where to write it; by default it takes the place of the old file. A new folder for what
            comes from a folder.
        passphrase_file: Of the keys, if they have a passphrase and nobody is there to type it.
        force: Replace an existing output file. (A folder is never replaced.)
        as_json: Print JSON.
    """
    if out is not None:
        _check_output(out, secret, signing, old_signer, passphrase_file)
    model_id = rotate_file(
        file,
        out,
        old_signer=old_signer,
        secret=_read_secret(secret, passphrase_file),
        signing=_read_signing(signing, passphrase_file),
        force=force,
    )
    where = file if out is None else out
    _print(
        {"out": str(where), "model_id": model_id.hex()},
        as_json,
        f"Wrote {where}: is now model {model_id.hex()}. Issue new grants. Below the top "
        "level, new keys give another quality: measure it.",
    )


def _read_secret(path: Path, passphrase_file: Path | None) -> Secret:
    return Secret.read(path, passphrase=_passphrase(passphrase_file, str(path)))


def _read_signing(path: Path | None, passphrase_file: Path | None) -> SigningKey | None:
    if path is None:
        return None
    return SigningKey.read(path, passphrase=_passphrase(passphrase_file, str(path)))


def _read_grant(path: Path, identity: tuple[Path, ...], passphrase_file: Path | None) -> Grant:
    return Grant.read(path, identities=identity, passphrase=_passphrase(passphrase_file, str(path)))


def _recipient(text: str) -> str:
    """A public key, or what a file with one says. No message shows it: it may be a private one."""
    if text.startswith(("age1", "ssh-")):
        return text
    if text.upper().startswith("AGE-SECRET-KEY-") or text.startswith("-----BEGIN"):
        raise ValueError(
            "--to: expected a public key (age1... or ssh-...), got a private one. Keep that one to "
            "yourself, and name the public one."
        )
    try:
        lines = Path(text).read_bytes().decode("utf-8-sig", "replace").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"--to: expected a public key (age1... or ssh-...) or a file with one, got {text!r}, "
            "which is neither. Ask the customer for their public key."
        ) from None
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].startswith(("age1", "ssh-")):
        raise ValueError(
            f"{text}: expected a file with one public key (age1... or ssh-...), got another. Ask "
            "the customer for their public key."
        )
    return lines[0]


def _as_dict(found: Inspection) -> dict[str, Any]:
    cipher = {"name": "lossless"} | vars(found.cipher)
    return found._asdict() | {
        "cipher": cipher,
        "levels": [level._asdict() for level in found.levels],
    }


def _print_inspection(
    found: Inspection,
    as_json: bool,
    chosen: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
) -> None:
    if as_json:
        more = {"calibration": calibration} if calibration else {}
        print(json.dumps(_as_dict(found) | (chosen or {}) | more, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cipher = f"lossless, permuted by {found.cipher.unit}" if found.cipher.permute else "stream"
    lines = Table.grid(padding=(0, 2))
    for name, value in {
        "file": found.path + (f" ({found.files} files)" if found.files > 1 else ""),
        "model": found.model_id,
        "signer": found.signer or "not signed",
        "cipher": cipher,
        "tensors": f"{found.tensors}, {found.weights:,} weights",
        "size": f"{found.file_bytes:,} bytes, {found.manifest_bytes:,} of them manifest",
    }.items():
        lines.add_row(name, Text(value))  # as text: a name of a file may hold markup
    if chosen is not None:
        names = ", ".join(f"{name} ({groups:,})" for name, groups in chosen["selected"].items())
        layout = f", layout {chosen['layout']}" if chosen["layout"] else ""
        count = len(chosen["selected"])
        tensors = f"{count} tensor{'s' * (count != 1)}"
        lines.add_row("selected", Text(f"groups in {tensors}{layout}: {names}"))
        if chosen["untouched"]:
            rest = ", ".join(f"{n:,} {dtype}" for dtype, n in chosen["untouched"].items())
            lines.add_row("untouched", Text(f"in the other tensors: {rest}"))
    table = Table(box=None, pad_edge=False)
    for title in ("level", "groups", "weights", "of all weights"):
        table.add_column(title, justify="right")
    grant = any(level.opens is not None for level in found.levels)
    if grant:
        table.add_column("with this grant")
    for level in found.levels:
        row = [str(level.level), f"{level.groups:,}", f"{level.weights:,}", f"{level.share:.3%}"]
        table.add_row(*row, *(["opens" if level.opens else "stays closed"] if grant else []))
    console = Console(highlight=False, soft_wrap=True)
    console.print(lines)
    console.print()
    console.print(table)
    if calibration:
        from ._calibrate import print_levels

        console.print()
        print_levels(calibration, console)
