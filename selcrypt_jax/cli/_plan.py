"""The commands that measure levels: calibrate before a release, levels after it."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from .._ciphers.lossless import LosslessCipher
from .._io.errors import counted
from .._io.imported import imported
from ._options import Flat, Maybe, OwnerSecret, Printing, Switch
from ._selection import Goal, Selection, Unit, naming, said
from ._tables import calibration_as_dict, print_levels, print_measured
from ._text import printable


def calibrate(
    file: Positional[Path],
    goal: Annotated[Goal, Flat],
    selection: Annotated[Selection, Flat] = Selection(),
    keys: int = 16,
    seed: int = 0,
    unit: Unit = "weight",
    printing: Annotated[Printing, Flat] = Printing(),
) -> None:
    """Finds how much each level has to open to give the quality that you name.

    Encrypts the checkpoint in memory with up to 8 shares per level, under new keys each time,
    measures the result, and prints the shares for selcrypt protect. Writes nothing.

      selcrypt calibrate model.safetensors --targets 20 24 28 --evaluate my:psnr

    The results are averages over keys, for planning. A single file has one key, under which a level
    may be far off: selcrypt protect --targets makes a file whose own levels meet the targets.

    Args:
        file: The checkpoint, as for selcrypt protect.
        goal: The quality of the levels.
        selection: What is encrypted, as for selcrypt protect. To plan with random scores, which
            differ each time, save them (selcrypt_jax.importance.random).
        keys: Maximum number of encryptions to average a value over; three if they agree.
        seed: Seed of the keys that are tried.
        unit: As for selcrypt protect.
        printing: How it is printed.
    """
    from .._release.files import calibrate_file

    wanted = goal.read()
    with naming(goal.evaluate):
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
    print(f"\n{counted(found.evaluations, 'evaluation')}, {counted(found.calls, 'call')}.")
    print("To protect it this way:\n")
    print(f"  {printable(command)}")


def levels(
    file: Positional[Path],
    owner: Annotated[OwnerSecret, Flat],
    evaluate: str,
    reference: Maybe[float] = None,
    lower_is_better: Switch = False,
    printing: Annotated[Printing, Flat] = Printing(),
) -> None:
    """Measures every level of a protected file: the quality that each customer gets.

    Decrypts one level after the other in memory, from the top level (the original) down to level 0
    (the file without a key), and calls your metric once for each. Writes nothing.

      selcrypt levels public.safetensors --secret keys/secret.key --evaluate my:psnr

    The value of level 0 of a sealed file is meaningless, and may be NaN. If levels hardly differ,
    selcrypt protect --targets makes a file whose levels meet the targets that you name.

    Args:
        file: The protected file; if sharded, its index or folder; for Orbax, the folder. Each
            level has to fit into memory.
        owner: Your secret.
        evaluate: Import path module:function of your metric, which takes a dict from tensor names
            to arrays; the working folder is searched too. Use data that the network was not
            trained on.
        reference: The metric that your customers reach without the file, from the architecture or
            a public base, with data of their own. Levels that give no more are marked: they are
            worth nothing to them. selcrypt audit measures it.
        lower_is_better: With a reference: the metric is a loss.
        printing: How it is printed.
    """
    from .._release.measure import measure_levels  # the start of JAX

    metric = imported("evaluate", evaluate)
    with naming(evaluate):
        found = measure_levels(
            file,
            metric,
            secret=owner.read_secret(),
            reference=reference,
            lower_is_better=lower_is_better,
            progress=said(lambda found: f"level {found.level}: {found.value:.6g}"),
        )
    print_measured(str(file), evaluate, found, reference, printing.as_json)
