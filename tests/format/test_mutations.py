"""Whatever is done to a protected file: it opens to the same tensors, or is refused."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from protected_files import (
    LEVELS,
    Parts,
    World,
    check_refusal,
    children,
    peak_memory,
    to_json,
)

from selcrypt_jax import Grant, unlock_file

Mutation = Callable[[random.Random, bytes], bytes]


def place(rng: random.Random, data: bytes) -> int:
    """Positions are as often in the header as in the data, which are longer."""
    end = min(8 + int.from_bytes(data[:8], "little"), len(data))
    return rng.randrange(end if rng.random() < 0.5 else len(data))


def piece(rng: random.Random, data: bytes) -> slice:
    start = place(rng, data)
    return slice(start, min(start + rng.choice([1, 2, 8, 64, 1000]), len(data)))


def flip(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def set_byte(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.choice([b"\0", b"\xff", b" ", b'"', b"0", b"}"]) + data[at + 1 :]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 8, 64])) + data[at:]


def delete(rng: random.Random, data: bytes) -> bytes:
    part = piece(rng, data)
    return data[: part.start] + data[part.stop :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    part, at = piece(rng, data), place(rng, data)
    return data[:at] + data[part] + data[at:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    part, at = piece(rng, data), place(rng, data)
    return data[:at] + data[part] + data[at + part.stop - part.start :]


def swap(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([1, 4, 64, 1000])
    one, two = sorted(place(rng, data) // size * size for _ in range(2))
    changed = bytearray(data)
    a, b = changed[one : one + size], changed[two : two + size]
    changed[two : two + size], changed[one : one + size] = a, b
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: place(rng, data)]


def in_header(change: Callable[[random.Random, str], str]) -> Mutation:
    """Changes the text of the header, and its length accordingly; nothing if there is none."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        try:
            text = change(rng, data[8:end].decode()).encode()
        except (ValueError, IndexError, TypeError):
            return data
        return len(text).to_bytes(8, "little") + text + data[end:]

    return mutate


def tokens(rng: random.Random, text: str) -> str:
    """Replaces a token with another one, or inserts one."""
    found = re.findall(r"[\w./+=-]+|\W", text)
    at = rng.randrange(len(found))
    found[at : at + rng.randrange(2)] = [rng.choice(found)]
    return "".join(found)


def space(rng: random.Random, text: str) -> str:
    at = rng.choice([match.end() for match in re.finditer(r"[{},:\]]", text)])
    return text[:at] + rng.choice([" ", "\n", "\t", "  "]) + text[at:]


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: its container, and its key."""
    for key in children(value):
        yield value, key
        yield from spots(value[key])


def edit_json(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """A document in another order, or with another value, mostly from elsewhere in the document."""
    found = list(spots(value))
    (one, a), (two, b) = rng.choice(found), rng.choice(found)
    match rng.randrange(5):
        case 0:
            value = dict(rng.sample(list(value.items()), len(value)))
        case 1:
            one[a], two[b] = copy.deepcopy(two[b]), copy.deepcopy(one[a])
        case 2:
            one[a] = copy.deepcopy(two[b])
        case 3:
            del one[a]
        case _:
            one[a] = rng.choice([None, 0, -1, 2**63, 2**64, 1.5, "", "x", True, [], {}])
    return value


def header_json(rng: random.Random, text: str) -> str:
    return to_json(edit_json(rng, json.loads(text)))


def manifest_json(rng: random.Random, text: str) -> str:
    fields = json.loads(text)
    manifest = json.loads(fields["__metadata__"]["selcrypt"])
    fields["__metadata__"]["selcrypt"] = to_json(edit_json(rng, manifest))
    return to_json(fields)


MUTATIONS: list[Mutation] = [
    flip, set_byte, insert, delete, repeat, overwrite, swap, truncate,
    *map(in_header, [tokens, space, header_json, manifest_json]),
]  # fmt: skip


class Figures(NamedTuple):
    """How many mutations there were, how many were harmless, and the most memory of any."""

    runs: int
    opened: int
    peak: int


def fuzz(world: World, seeds: range, *, measure_every: int) -> Figures:
    """Tries mutations on customers of the top level and the lowest level in turn."""
    path, out = world.folder / "mutated.safetensors", world.folder / "out"
    original = world.model.parts.to_bytes()
    path.write_bytes(original)
    right = {}
    for level in (1, LEVELS):
        unlock_file(path, out, Grant(world.model.key.lower(level), world.model.signer), force=True)
        right[level] = Parts.of(out)
    out.unlink()
    assert right[1] != right[LEVELS] == world.plain
    runs = opened = peak = 0

    def attempt() -> bool:
        try:
            unlock_file(path, out, grant)
        except (ValueError, OSError) as error:
            check_refusal(error, path, world.model)
            return False
        return True

    for seed in seeds:
        rng = random.Random(seed)
        level = LEVELS if seed % 3 else 1
        grant = Grant(world.model.key.lower(level), world.model.signer)
        data = original
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = rng.choice(MUTATIONS)(rng, data) or data
        if data == original:
            continue
        runs += 1
        path.write_bytes(data)
        try:
            if attempt():
                opened += 1
                assert Parts.of(out) == right[level]
                out.unlink()
            if seed % measure_every == 0:
                peak = max(peak, peak_memory(attempt) - 2 * len(data))
                out.unlink(missing_ok=True)
        except BaseException as error:
            error.add_note(f"{world.kind}, mutation {seed}; the file is {path}")
            raise
    return Figures(runs, opened, peak)


def test_random_mutations(world):
    figures = fuzz(world, range(320), measure_every=10)
    assert figures.runs >= 300
    assert 0 < figures.opened < figures.runs / 2  # there are harmless ones among them
    assert figures.peak < 1 << 20  # beyond twice the file


@pytest.mark.slow
def test_ten_thousand_random_mutations(world):
    figures = fuzz(world, range(1_000, 6_300), measure_every=50)
    assert figures.runs >= 5_000  # of each kind
    assert figures.peak < 1 << 20
