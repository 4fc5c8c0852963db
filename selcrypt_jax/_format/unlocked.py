"""The mark of a file that was unlocked below the top level: it is not the original."""

import json
import re

from .._io.strict_json import json_object
from .._keys.keys import MODEL_ID_BYTES
from .envelope import Own
from .manifest import Manifest

UNLOCKED = "selcrypt-unlocked"
"""The entry of ``__metadata__``. From then on it is the caller's, not a protected file's."""


def unlocked_entries(own: Own, manifest: Manifest, level: int) -> Own:
    """The entries of a file that is unlocked at a level: at the top, only the caller's.

    Args:
        own: the caller's, or None if the checkpoint had no ``__metadata__``.
        manifest: the protected file's manifest.
        level: 1..M.
    """
    levels = len(manifest.levels)
    if level == levels:
        return own
    says = {"model_id": manifest.model_id.hex(), "level": level, "levels": levels}
    return {**(own or {}), UNLOCKED: json.dumps(says, separators=(",", ":"))}


def unlocked_level(metadata: Own) -> str | None:
    """The entry's content, for messages; None if there is none, or it is not ours."""
    try:
        says = json_object((metadata or {}).get(UNLOCKED, "").encode(), UNLOCKED)
    except ValueError:
        return None
    level, levels, model_id = (says.get(name) for name in ("level", "levels", "model_id"))
    good = all(type(number) is int and 0 < number < 1000 for number in (level, levels))
    if not good or not re.fullmatch(f"[0-9a-f]{{{2 * MODEL_ID_BYTES}}}", str(model_id)):
        return None
    return f"level {level} of {levels} of model {model_id}, unlocked"


def check_original(metadata: Own, what: str) -> None:
    """Refuses to protect a level instead of the original: its top level would be the damaged one.

    Raises:
        ValueError: the file says that it was unlocked below the top level.
    """
    if (found := unlocked_level(metadata)) is not None:
        raise ValueError(
            f"{what}: expected the original, got {found}: the weights of higher levels are still "
            "encrypted in it. Protect the original, or unlock the top level. If you do want to "
            "protect this level, unlock it with exact_bytes=True."
        )
