"""The customer's commands: unlock, inspect, verify."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .._release.use import inspect_file, unlock_file, verify_file
from ._options import (
    AnyGrantFile,
    Flat,
    Maybe,
    Opening,
    Output,
    Printing,
    Switch,
    Writing,
    beside_as_dict,
    beside_as_text,
    spare,
)
from ._tables import inspection_as_dict, print_inspection


def unlock(
    file: Positional[Path],
    grant: Annotated[Path, arg(aliases=["-g"])],
    out: Output,
    level: Maybe[int] = None,
    signer: Maybe[Path] = None,
    exact_bytes: Switch = False,
    copy_config: Switch = False,
    opening: Annotated[Opening, Flat] = Opening(),
    writing: Annotated[Writing, Flat] = Writing(),
) -> None:
    """Writes the checkpoint that a grant opens; at the top level it is the original.

    Signature, digests and decrypted weights are all checked before the output appears.

    Args:
        file: The protected file; if sharded, its index or folder; for Orbax, the folder.
        grant: The grant file.
        out: Where to write the checkpoint; a new folder if the input is one.
        level: Open this level, if lower than the grant's.
        signer: The owner's signing.pub: refuse a file that is unsigned or signed by anyone else.
            Grants of signed files enforce this by themselves.
        exact_bytes: Leave out the metadata entry selcrypt-unlocked, which names the level and the
            model of a file below the top level. A file whose original had no metadata never gets
            it, since some loaders refuse metadata that names no framework.
        copy_config: Also copy the other files of a folder: configuration, tokenizer, and
            everything else that cannot be weights. Only the weights are checked.
        opening: How the grant is opened.
        writing: How it is written.
    """
    spare(out, grant, signer, opening.passphrase_file, *opening.identity)
    opened = opening.read(grant)
    assert opened is not None
    beside = unlock_file(
        file,
        out,
        opened,
        level=level,
        signer=signer,
        exact_bytes=exact_bytes,
        copy_config=copy_config,
        force=writing.force,
    )
    level = opened.key.level if level is None else level
    model_id = opened.key.model_id.hex()
    writing.say(
        {"out": str(out), "model_id": model_id, "level": level} | beside_as_dict(beside),
        f"Wrote {out}: level {level} of model {model_id}.",
        *beside_as_text(beside),
    )


def inspect(
    file: Positional[Path],
    grant: AnyGrantFile = None,
    opening: Annotated[Opening, Flat] = Opening(),
    printing: Annotated[Printing, Flat] = Printing(),
) -> None:
    """Shows levels, shares, cipher, signer and sizes; with a grant, also what it opens.

    Args:
        file: The protected file; if sharded, its index or folder; for Orbax, the folder.
        grant: A grant file.
        opening: How the grant is opened.
        printing: How it is printed.
    """
    print_inspection(inspect_file(file, opening.read(grant)), printing.as_json)


def verify(
    file: Positional[Path],
    signer: Maybe[Path] = None,
    model_id: Maybe[str] = None,
    grant: AnyGrantFile = None,
    opening: Annotated[Opening, Flat] = Opening(),
    printing: Annotated[Printing, Flat] = Printing(),
) -> None:
    """Checks the signature and every digest; with a grant, also everything that it opens.

    Without --signer, this shows that the file is intact, not whose it is: compare the signer shown.
    An earlier release by the same owner passes too, unless --model-id names the release.

    Args:
        file: The protected file; if sharded, its index or folder; for Orbax, the folder.
        signer: The owner's signing.pub.
        model_id: The model id of the expected release, as its owner published it.
        grant: A grant file.
        opening: How the grant is opened.
        printing: How it is printed.
    """
    opened = opening.read(grant)
    found = verify_file(file, signer=signer, model_id=model_id, grant=opened)
    known = signer is not None or (opened is not None and opened.signer is not None)
    text = f"{file}: all digests match."
    if found.signer is not None:
        whose = ", as expected" if known else "; compare this with the owner's published key"
        text += f" Signed by {found.signer}{whose}."
    else:
        text += " Not signed; the grant vouches for it."
    if opened is not None:
        top = opened.key.level
        text += (
            f" Level{'s 1 to' * (top > 1)} {top} decrypt{'s' * (top == 1)} to the original weights."
        )
    Writing(as_json=printing.as_json).say(inspection_as_dict(found) | {"signer_known": known}, text)
