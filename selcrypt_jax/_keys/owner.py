"""The owner's three key files, which are made together."""

from contextlib import suppress
from pathlib import Path

from .._io.atomic import new_files
from .._io.places import check_folder_name
from .files import Passphrase, key_text
from .keys import Secret
from .material import forgetting
from .signing import SigningKey, VerifyKey
from .text import SECRET, SIGNING, VERIFY

SECRET_FILE, SIGNING_FILE, PUBLIC_FILE = "secret.key", "signing.key", "signing.pub"


@forgetting
def write_owner_keys(folder: Path, *, passphrase: Passphrase, force: bool) -> VerifyKey:
    """Makes a secret and a signing pair, and writes all three files or none.

    Args:
        folder: the folder for the files; created if it does not exist.
        passphrase: locks the private files; or a function that returns it.
        force: replace existing files.

    Returns:
        The public key.

    Raises:
        FileExistsError: one of the files exists, and `force` is not set.
        OSError: the files cannot be written; or the folder has the name of a file.
    """
    for name in (SECRET_FILE, SIGNING_FILE, PUBLIC_FILE):
        if not force and (folder / name).exists():
            raise FileExistsError(
                f"{folder / name}: already exists. Name another folder; --force would replace it, "
                "and models protected with it could never be opened again."
            )
    check_folder_name(folder)
    there = folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing = SigningKey.generate()
    try:
        with new_files() as create:
            for name, kind, value in (
                (SECRET_FILE, SECRET, Secret.generate()),
                (SIGNING_FILE, SIGNING, signing),
                (PUBLIC_FILE, VERIFY, signing.public),
            ):
                file = create(folder / name, force=force, private=kind.private, keep=False)
                words = passphrase if kind.private else None
                file.write(key_text(kind, bytes(value), passphrase=words))
    except BaseException:
        if not there:
            with suppress(OSError):
                folder.rmdir()
        raise
    return signing.public
