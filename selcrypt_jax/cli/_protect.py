"""The command that makes a release: protect."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from .._ciphers.lossless import LosslessCipher
from .._format.manifest import Rest
from .._io.errors import counted
from .._release.use import inspect_file
from ._options import (
    Flat,
    Maybe,
    Output,
    OwnerKeys,
    Switch,
    Writing,
    beside_as_dict,
    beside_as_text,
    spare,
)
from ._selection import Goal, Levels, Selection, Unit, check_like_alone, levels_of, naming
from ._tables import calibration_as_dict, print_inspection
from ._text import note, printable

_SHOWN = 8  # notes on similar tensors, of which there may be thousands


def protect(
    file: Positional[Path],
    out: Output,
    keys: Annotated[OwnerKeys, Flat],
    selection: Annotated[Selection, Flat] = Selection(),
    levels: Annotated[
        Levels, arg(metavar="INT|SHARE [SHARE ...]", help_behavior_hint="(default: 5)")
    ] = None,
    goal: Annotated[Goal, Flat] = Goal(),
    like: Maybe[Path] = None,
    old_signer: Maybe[str] = None,
    unit: Unit = "weight",
    rest: Rest = "sealed",
    copy_config: Switch = False,
    verbose: Switch = False,
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Protects a checkpoint: encrypts its most important weights in place, in levels.

    The output has the same tensors and loads in every program that reads safetensors. Sealed, it
    is useless without a key; with --rest plain anyone can run it, at reduced quality. Sign it, so
    that anyone can check that it is yours.

    How bad a level is says little about how much an attacker can recover from it by fine-tuning;
    selcrypt audit measures that. Encrypting more makes it harder. Never publish the same weights in
    two forms, plain or with another selection: comparing them reveals what is encrypted.

    Args:
        file: A .safetensors file; the index or folder of a checkpoint in several files; the folder
            of an Orbax checkpoint; an ONNX model; or a Flax msgpack file. From a folder, only the
            weights are read and written. For ONNX and Flax, the output is a .safetensors file.
        out: The protected file; a new folder for a checkpoint in a folder.
        keys: Your keys.
        selection: What is encrypted.
        levels: Number of quality levels. Each opens an equal part of the budget; in small tensors,
            a part that is too small to hide goes to the next higher level. Or the share of the
            groups that each level opens, ascending, such as 0.02 0.05 0.08; the last one is
            everything that is encrypted. selcrypt calibrate finds such shares.
        goal: The quality of the levels.
        like: Your protected file of an earlier version: the same weights are graded again, and
            opened by the same levels, instead of a new selection. Weights change little between
            versions, so a weight that is encrypted in one and plain in the next is as good as
            plain.
        old_signer: With --like: the signing.pub of the earlier version, if it is signed with
            another key of yours; or "unsigned", if it was never signed and this is your own copy.
        unit: What the cipher permutes: single weights, or whole groups, which leave less of a
            trace but have fewer possible orders.
        rest: What happens to all other weights. Sealed: encrypted too, under the key of level 1.
            Plain: left as they are, so that anyone can run level 0 (for a free tier); plain weights
            help an attacker.
        copy_config: Also copy the other files of a folder: configuration, tokenizer, and
            everything else that cannot be weights. They are not encrypted: check the list.
        verbose: List every selected tensor, instead of a summary by kind.
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
    with naming(goal.evaluate):
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
            copy_config=copy_config,
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
            "whole": list(selected.whole),
            "untouched": dict(selected.untouched),
            **({} if selected.plain_change is None else {"plain_change": selected.plain_change}),
            **({"new": list(selected.new)} if selected.new else {}),
            **({"similar": list(selected.similar)} if selected.similar else {}),
            **({"random_keys": list(selected.random_keys)} if selected.random_keys else {}),
            **beside_as_dict(selected.beside),
        },
        found
        and calibration_as_dict(
            found, wanted.targets, spreads=False, first=1 if rest == "sealed" else 0
        ),
        verbose,
    )
    if not writing.as_json:
        for text in beside_as_text(selected.beside):
            print(printable(text))
    if selected.new and selection.base is not None:
        note(
            f"The base lacks these tensors: {listed(selected.new)}. They count as changed in full."
        )
    elif selected.new:
        now = "plain: use --rest sealed" if rest == "plain" else "sealed, and opened by level 1"
        note(f"The earlier version lacks these tensors: {listed(selected.new)}. They are {now}.")
    if found is not None and wanted.targets[0] is None and selection.budget is None:
        note(
            "any: all groups are graded, since no budget was given. To grade fewer, add a budget, "
            "such as --budget 0.3."
        )
    if found is not None and rest == "sealed" and wanted.targets[0] is None:
        note(
            "Level 1 only removes the seal. Its quality is what the budget leaves of the network, "
            "which may be worthless to a customer. To set it, give a number instead of any."
        )
    if selected.random_keys:
        note(
            f"These look like random keys, and level 1 opens them: {listed(selected.random_keys)}. "
            "Leave them out if anything made with them has to stay secret."
        )
    for text in selected.similar[:_SHOWN]:
        note(text)
    if (more := len(selected.similar) - _SHOWN) > 0:
        note(f"The same holds for {counted(more, 'more tensor')}: --json lists all.")
    integers = {t: n for t, n in selected.untouched.items() if t.startswith(("I", "U"))}
    # A quantised checkpoint: only its scales take part by themselves.
    given = selection.select is not None or selection.scores_file is not None
    if not given and sum(integers.values()) > made.weights / 2:
        note(
            f"Most weights are integers ({', '.join(integers)}), which are graded only if --select "
            "names their tensors: none of these is."
        )
    if (change := selected.plain_change) is not None and change > 0.05:
        note(
            f"{change:.0%} of the change from the base stays plain. An attacker "
            "with the base recovers nearly all of your network from this file: use --rest sealed."
        )
    if keys.signing is None:
        note("Not signed: only grant holders can tell if the file was altered. Use --signing.")
    if found is None:
        command = shlex.join(["levels", str(out), "--secret", str(keys.secret)])
        note(
            f"The quality of these levels was not measured. To measure it: selcrypt {command} "
            "--evaluate module:function"
        )
