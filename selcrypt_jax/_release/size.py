"""What fills the header of a protected file, which holds 100 MB at most."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._format.envelope import Envelope
from .._format.manifest import chunk_count
from .._io.safetensors import MAX_HEADER, header

if TYPE_CHECKING:
    from .._masks.levels import Levels

_TENSORS = "names, shapes and digests"
_POSITIONS = "positions of what is encrypted"
_OWN = "the file's own metadata"
_REMEDIES = {
    _TENSORS: "Put the tensors into several files with an index, or join small ones.",
    _POSITIONS: "Select larger groups (--granularity filter), a smaller share or fewer tensors, or "
    "split the checkpoint.",
    _OWN: "Keep less in the metadata.",
}


def header_length(
    layout: Sequence[tuple[str, str, tuple[int, ...]]], envelope: Envelope, what: str
) -> int:
    """How many bytes of a file come before its data.

    Args:
        layout: of its tensors, see `header`.
        envelope: blank.
        what: the file, for messages.

    Raises:
        ValueError: more than the format allows.
    """
    try:
        return len(header(layout, envelope.entries()))
    except ValueError:
        own = sum(len(k.encode()) + len(v.encode()) for k, v in (envelope.own or {}).items())
        parts = {
            # Each tensor is named in the header itself too, with what is about the same again.
            _TENSORS: len(envelope.text.encode()) + sum(len(n.encode()) + 70 for n, *_ in layout),
            _POSITIONS: sum(map(len, envelope.boxes)),
            _OWN: own,
        }
        if sum(parts.values()) <= MAX_HEADER // 2:  # it was refused for something else
            raise
        raise ValueError(_too_much(parts, len(layout), what)) from None


def check_header(
    tensors: Mapping[str, Any],
    shapes: Iterable[Sequence[int]],
    levels: "Levels | None",
    what: str,
) -> None:
    """Refuses what would not fit into a file's header, before it is computed.

    Args:
        tensors: of the file, with dtype and shape.
        shapes: of the scores of each tensor that takes part.
        levels: how many groups each level opens in every tensor; None if that is not known yet.
        what: the checkpoint's file, for messages.

    Raises:
        ValueError: more than the 100 MB that the format allows.
    """
    bits = 0.0
    for size in map(math.prod, shapes):
        counts = () if levels is None else levels.counts(size)
        for below, count in itertools.pairwise((0, *counts)):
            share = (count - below) / max(size, 1)
            if 0 < share < 1:
                bits -= size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    parts = {
        # Twice the name, a digest in hex for each chunk, and about 130 signs around them.
        _TENSORS: sum(
            2 * len(name.encode()) + 64 * chunk_count(info.dtype, tuple(info.shape)) + 130
            for name, info in tensors.items()
        ),
        _POSITIONS: int(bits / 8 * 4 / 3),  # no coding takes less; base64 takes a third more
    }
    if sum(parts.values()) > MAX_HEADER:
        raise ValueError(_too_much(parts, len(tensors), what))


def _too_much(parts: Mapping[str, int], count: int, what: str) -> str:
    shown = ", ".join(f"{size / 1e6:,.1f} MB {part}" for part, size in parts.items() if size)
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"{what}: header: expected at most {MAX_HEADER / 1e6:,.3g} MB, got "
        f"{sum(parts.values()) / 1e6:,.1f} MB or more for its {count} tensors: {shown}. "
        f"{_REMEDIES[largest]}"
    )
