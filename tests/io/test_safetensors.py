"""Safetensors files: hostile ones, and agreement with the stock library."""

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from selcrypt_jax._io import safetensors as stf
from selcrypt_jax._io.safetensors import SafetensorsFile, header
from selcrypt_jax._io.shards import ShardIndex, check_shards, find_shards
from selcrypt_jax._tree.dtypes import SAFETENSORS


def build(head, data=b"", length=None):
    """A file with any header, valid or not."""
    if not isinstance(head, bytes):
        head = json.dumps(head).encode()
    length = len(head) if length is None else length
    return length.to_bytes(8, "little") + head + data


def entry(shape, start, stop, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def one(**changes):
    return build({"w": entry([2], 0, 2) | changes}, b"ab")


def text_of(shape):
    return build(b'{"w":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}' % shape)


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
GOOD = build(
    {"__metadata__": {"k": "é"}, "w": entry([2], 0, 2), "v": entry([1], 2, 6, "F32")}, b"6" * 6
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123abcd\nsize 12345\n"

HOSTILE = {
    "empty": (b"", "at least 8 bytes, got 0. It is empty"),
    "7 bytes": (b"\0" * 7, "at least 8 bytes, got 7"),
    "no header": (b"\0" * 8, "expected '{' first, got b''"),
    "header of 2^63": (build(b"{}", length=2**63), f"at most 100000000 bytes, got {2**63}"),
    "header above the bound": (build(b"{}", length=100_000_001), "got 100000001"),
    "header past the end": (build(b"{}", length=100_000_000), "expected 100000000 bytes, its own"),
    "cut-off header of 128 bytes": (b"\x80" + GOOD[1:50], "It is truncated"),
    "space first": (build(b' {"w":1}'), "expected '{' first, got b' '"),
    "byte order mark": (build(b"\xef\xbb\xbf{}"), "expected '{' first"),
    "a list": (build(b"[]"), "expected '{' first, got b'['"),
    "Git LFS": (LFS, "a Git LFS pointer. Get the file itself with `git lfs pull`"),
    "zip": (b"PK\x03\x04\x14\x00\x08\x08\x08\x00", "PyTorch .pt"),
    "pickle": (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0}", "Python pickle"),
    "old PyTorch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "Python pickle"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
    "GGUF": (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "gzip"),
    "index": (b'{"weight_map": {"w": "a.safetensors"}}', "index of a sharded model"),
    "not UTF-8": (build(b'{"\xff":1}'), "expected UTF-8 JSON"),
    "surrogate in UTF-8": (build(b'{"\xed\xa0\x80":1}'), "expected UTF-8 JSON"),
    "not JSON": (build(b"{'w': 1}"), "expected UTF-8 JSON, each key once, got: Expecting"),
    "cut-off JSON": (build(b'{"w":'), "Expecting value"),
    "control character": (build(b'{"a\nb":1}'), "Invalid control character"),
    "bytes behind the JSON": (build(b"{}\0\0"), "Extra data"),
    "nested": (build(b'{"w":' + b"[" * 100_000), "recursion"),
    "key twice": (build(b'{"w":%s,"w":%s}' % (ENTRY, ENTRY), b"a"), "'w' twice"),
    "key twice, escaped": (build(b'{"w":%s,"\\u0077":%s}' % (ENTRY, ENTRY), b"a"), "'w' twice"),
    "field twice": (build(b'{"w":{"dtype":"U8","dtype":"I8"}}'), "'dtype' twice"),
    "metadata key twice": (build(b'{"__metadata__":{"a":"","a":""}}'), "'a' twice"),
    "lone surrogate": (build(b'{"\\ud800":%s}' % ENTRY, b"a"), "got a lone surrogate"),
    "no object": (build({"w": 1}), "tensor 'w': expected an object of dtype, shape and"),
    "entry as list": (build({"w": ["U8", [0], [0, 0]]}), "expected an object of dtype"),
    "field missing": (build({"w": {"dtype": "U8", "shape": [0]}}), "expected an object of dtype"),
    "field too many": (one(x=1), "expected an object of dtype"),
    "unknown dtype": (one(dtype="F6_X"), "expected one of F64, F32"),
    "dtype null": (one(dtype=None), "got None"),
    "dtype list": (one(dtype=["U8"]), "got ['U8']"),
    "shape number": (one(shape=2), "shape: expected a list, got 2"),
    "shape negative": (one(shape=[-1, -2]), "non-negative integers, got [-1, -2]"),
    "shape -0": (text_of(b"[-0]"), "got [-0.0]"),
    "shape float": (one(shape=[2.0]), "non-negative integers, got [2.0]"),
    "shape bool": (one(shape=[True, 2]), "non-negative integers, got [True, 2]"),
    "shape NaN": (text_of(b"[NaN]"), "got: NaN"),
    "shape overflow": (one(shape=[2**40, 2**40]), "less than 2^63 elements"),
    "shape overflow, empty": (text_of(b"[%d,%d,0]" % (2**40, 2**40)), "less than 2^63"),
    "shape 2^63": (text_of(b"[0,9223372036854775808]"), "less than 2^63 elements"),
    "shape 5000 digits": (text_of(b"[%s]" % (b"9" * 5000)), "non-negative integers, got [inf]"),
    "half a byte": (one(dtype="F4", shape=[3]), "whole bytes of F4, got 12 bits"),
    "6 bits": (one(dtype="F6_E2M3", shape=[2]), "whole bytes of F6_E2M3, got 12 bits"),
    "offsets null": (one(data_offsets=None), "two whole numbers, got None"),
    "offsets float": (one(data_offsets=[0, 2.0]), "two whole numbers, got [0, 2.0]"),
    "offsets bool": (one(data_offsets=[False, 2]), "two whole numbers"),
    "three offsets": (one(data_offsets=[0, 1, 2]), "two whole numbers"),
    "offsets negative": (one(data_offsets=[-1, 1]), "0 <= start <= stop, got [-1, 1]"),
    "offsets reversed": (one(data_offsets=[2, 0]), "0 <= start <= stop, got [2, 0]"),
    "other size": (one(shape=[3]), "expected 3 bytes for U8[3], got 2"),
    "1 byte short": (GOOD[:-1], "tensor 'v': data_offsets: expected at most the 5 bytes of data"),
    "1 byte more": (GOOD + b"x", "1 bytes after the last tensor"),
    "only data": (build(b"{}", b"x"), "1 bytes after the last tensor"),
    "overlap": (build({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"abc"), "an overlap"),
    "same data": (build({"a": entry([1], 0, 1), "b": entry([1], 0, 1)}, b"a"), "an overlap"),
    "empty inside": (build({"a": entry([2], 0, 2), "b": entry([0], 1, 1)}, b"ab"), "an overlap"),
    "hole": (build({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, b"abc"), "a hole before it"),
    "hole first": (build({"a": entry([1], 1, 2)}, b"ab"), "start at byte 0, got 1: a hole"),
    "metadata null": (build({"__metadata__": None}), "expected an object, or no entry, got None"),
    "metadata number": (build({"__metadata__": {"step": 3}}), "expected text, got 3 for 'step'"),
    "metadata tensor": (build({"__metadata__": entry([1], 0, 1)}, b"a"), "expected text, got"),
    "metadata surrogate": (build(b'{"__metadata__":{"a":"\\udc00"}}'), "lone surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_named_and_costs_no_memory(name, tmp_path):
    content, words = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    remedy = r"(?i)\b(get|use|load|unpack|save|download|is called)\b"
    assert re.search(remedy, str(caught.value).removeprefix(f"{path}: "))
    assert peak < 1 << 22


def test_folders_pipes_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="got a folder"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="expected a regular file, got a pipe or device"):
        SafetensorsFile(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SafetensorsFile(tmp_path / "nowhere")


def test_the_stock_reader_has_the_last_word(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(b'{"w":[]}'))
    monkeypatch.setattr(stf, "_parse_header", lambda *_: ({}, None))
    message = r"model.safetensors: the safetensors library refuses it: "
    with SafetensorsFile(path) as file, pytest.raises(ValueError, match=message):
        file.ask_stock_reader()


def test_a_limit_on_address_space_does_not_keep_a_file_closed(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("Cannot allocate memory (os error 12)")

    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with SafetensorsFile(path) as file:
        file.ask_stock_reader()
        assert list(file.tensors) == ["w", "v"]


def test_reading(tmp_path):
    path = tmp_path / "model.safetensors"
    head = {
        "b": entry([3], 2, 5),
        "__metadata__": {},
        "a": entry([1, 2], 0, 2),
        "": entry([0], 0, 0),
    }
    path.write_bytes(build(head, b"12345"))
    with SafetensorsFile(path) as file:
        start = path.stat().st_size - 5
        assert list(file.tensors) == ["b", "a", ""]  # the order of the header
        assert file.tensors["b"] == ("b", "U8", (3,), start + 2, start + 5)
        assert file.metadata == {}
        assert file.size == start + 5
        assert file.read("b") == b"345"
        assert not file.read("a").readonly
        part = memoryview(bytearray(2))
        file.read_into("b", 1, part)
        assert part == b"45"
        assert file.read("") == b""
        with pytest.raises(KeyError):
            file.read("c")


def test_a_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    with SafetensorsFile(path) as file:
        other = tmp_path / "other"
        other.write_bytes(b"")
        os.replace(other, path)
        assert file.read("w") == b"66"  # of the file that was checked
    path.write_bytes(GOOD)
    with SafetensorsFile(path) as file:
        os.truncate(path, len(GOOD) - 1)
        assert file.read("w") == b"66"
        with pytest.raises(ValueError, match=f"expected {len(GOOD)} bytes .* got {len(GOOD) - 1}"):
            file.read("v")


def test_a_part_of_a_file_of_2_gb(tmp_path):
    path = tmp_path / "model.safetensors"
    shape = (1 << 29,)
    start = header([("w", "F32", shape)], None)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + (1 << 31))  # sparse
    tracemalloc.start()
    try:
        with SafetensorsFile(path) as file:
            chunk = memoryview(bytearray(1 << 24))
            file.read_into("w", 1 << 30, chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(chunk) == 1 << 24
    assert peak < 1 << 25


def test_names_are_kept_code_point_by_code_point(tmp_path):
    names = ["é", "e\u0301", "", ".", "..", "a/b", "l[0].w", 'q"\n\\', "\U0001f600", "\x7f\u2028\0"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(header([(name, "U8", ()) for name in names], {"é": "ü"}) + bytes(len(names)))
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == names
        assert file.metadata == {"é": "ü"}
    assert dict(safetensors.deserialize(path.read_bytes())).keys() == set(names)


# What readers of JSON may disagree on, and what changes nothing.
WORDS = [
    b"-0", b"1e0", b"1.0", b"NaN", b"Infinity", b"true", b"null", b"[]", b"{}", b'"\\u0000"', b"0 ",
    b'"\\ud800"', b'"\\u0077"', b'"\\/"', b" ", b"\t", b"\r\n", b",", b"18446744073709551616", b"0",
    b"9223372036854775808", b"4294967296", b'"__metadata__"', b"00", b"+1", b'"F4"', b'"F6_E3M2"',
    b'"I8"', b'"BOOL"', b'"F32"', b'"\x7f"', b'"\xc3"', b'"\xc3\xa9"', b"\0", b"\x0b",
]  # fmt: skip
VALID = [
    GOOD,
    build(b"{}      "),
    build({"a": entry([0], 0, 0), "w": entry([], 0, 1), "b": entry([4, 0], 1, 1, "F64")}, b"1"),
    build({"w": entry([2, 2], 3, 5, "F4"), "v": entry([4], 0, 3, "F6_E2M3")}, b"12345"),
]


@st.composite
def mutated(draw):
    """A valid file after some changes to its bytes, or to words of its header."""
    content = draw(st.sampled_from(VALID))
    start = 8 + int.from_bytes(content[:8], "little")
    by_word = draw(st.booleans())
    if by_word:
        parts = re.findall(rb'"[^"]*"|[0-9]+|.', content[8:start])
    else:
        parts = [bytes([byte]) for byte in content]
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.integers(0, len(parts) - 1))
        new = draw(st.sampled_from(WORDS) | (st.sampled_from(parts) if by_word else st.binary()))
        parts[where : where + draw(st.integers(0, 1))] = [new]
    return build(b"".join(parts), content[start:]) if by_word else b"".join(parts)


@settings(max_examples=1000)
@given(content=mutated())
def test_what_we_accept_the_stock_reader_accepts(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - it may also be accepted
        return
    with file:
        ours = {
            name: {"dtype": info.dtype, "shape": list(info.shape), "data": file.read(name)}
            for name, info in file.tensors.items()
        }
        assert ours == dict(safetensors.deserialize(content))
        with safetensors.safe_open(path, framework="numpy") as stock:
            assert (stock.metadata() or {}) == (file.metadata or {})


texts = st.text(st.characters(codec="utf-8"), max_size=8)
STOCK_DTYPES = {
    dtype.name: code
    for code, dtype in SAFETENSORS.items()
    if code in safetensors.numpy._TYPES  # of this version of the library
}


@settings(max_examples=200)
@given(
    tensors=st.dictionaries(
        texts.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(STOCK_DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=4,
    ),
    metadata=st.none() | st.dictionaries(texts, texts, min_size=1, max_size=3),
)
def test_the_header_is_that_of_the_stock_library(tensors, metadata, tmp_path_factory):
    arrays = {
        name: np.zeros(shape, getattr(ml_dtypes, dtype, dtype))
        for name, (dtype, shape) in tensors.items()
    }
    content = safetensors.numpy.save(arrays, metadata)
    path = tmp_path_factory.getbasetemp() / "stock.safetensors"
    path.write_bytes(content)
    with SafetensorsFile(path) as file:
        assert file.metadata == metadata
        assert {name: info.dtype for name, info in file.tensors.items()} == {
            name: STOCK_DTYPES[dtype] for name, (dtype, _) in tensors.items()
        }
        rebuilt = header([info[:3] for info in file.tensors.values()], file.metadata)
        assert rebuilt == content[: len(rebuilt)]
        assert rebuilt + b"".join(file.read(name) for name in file.tensors) == content


def test_the_escapes_are_those_of_the_stock_library_for_every_code_point():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    stock = safetensors.numpy.save({every: np.zeros(0, np.uint8)}, {every: every})
    ours = header([(every, "U8", (0,))], {every: every})
    assert ours == stock


@pytest.mark.parametrize("code", SAFETENSORS)
def test_every_dtype_in_every_kind_of_shape(code, tmp_path):
    bits = SAFETENSORS[code].bits
    shapes = [(2, 8), (0,), (3, 0), (0, 3, 3, 64), (), (1,)]
    whole = {str(shape): shape for shape in shapes if math.prod(shape) * bits % 8 == 0}
    data = {name: os.urandom(math.prod(shape) * bits // 8) for name, shape in whole.items()}
    path = tmp_path / "model.safetensors"
    head = header([(name, code, shape) for name, shape in whole.items()], {})
    path.write_bytes(head + b"".join(data.values()))
    with SafetensorsFile(path) as file:
        for name, shape in whole.items():
            assert file.tensors[name][:3] == (name, code, shape)
            assert file.read(name) == data[name]
    stock = dict(safetensors.deserialize(path.read_bytes()))
    assert {n: (t["dtype"], tuple(t["shape"]), t["data"]) for n, t in stock.items()} == {
        name: (code, shape, data[name]) for name, shape in whole.items()
    }
    for shape in set(shapes) - set(whole.values()):
        with pytest.raises(ValueError, match=f"tensor 'w': shape: expected whole bytes of {code}"):
            header([("w", code, shape)], None)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "note": "ü"}])
def test_no_tensors(metadata, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header([], metadata))
    with SafetensorsFile(path) as file:
        assert file.tensors == {}
        assert file.metadata == metadata


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ([("w", "U8", ()), ("w", "U8", ())], None, "tensor 'w': expected each name once"),
        ([("__metadata__", "U8", ())], None, "the format reserves it"),
        ([("__metadata__", "U8", ())], {}, "the format reserves it"),
        ([("w", "F6_X", ())], None, "tensor 'w': dtype: expected one of"),
        ([("w", "U8", (-1,))], None, "non-negative integers"),
        ([("\ud800", "U8", ())], None, "lone surrogate"),
        ([], {"a": "\ud800"}, "lone surrogate"),
        ([], {"step": 3}, "expected text, got 3 for 'step'"),
        ([], {"a": "x" * 100_000_000}, "at most 100000000 bytes, got 100000032"),
    ],
)
def test_headers_that_nobody_could_read(tensors, metadata, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        header(tensors, metadata)
    assert words in str(caught.value)


@pytest.fixture
def sharded(tmp_path):
    for number in (1, 2):
        content = header([(f"w{number}", "U8", (1,)), (f"v{number}", "U8", (0,))], None) + b"x"
        (tmp_path / f"model-{number}.safetensors").write_bytes(content)
    weight_map = {f"{c}{n}": f"model-{n}.safetensors" for n in (2, 1) for c in "wv"}
    index = {"metadata": {"total_size": 2}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def open_shards(index):
    return {name: SafetensorsFile(path) for name, path in index.shards.items()}


def close(files):
    for file in files.values():
        file.close()


def test_shards(sharded):
    index = find_shards(sharded)
    assert isinstance(index, ShardIndex)
    assert index == find_shards(str(index.path))
    assert index.path == sharded / "model.safetensors.index.json"
    assert index.text == index.path.read_bytes()
    assert list(index.shards) == ["model-1.safetensors", "model-2.safetensors"]
    assert index.shards["model-1.safetensors"] == sharded / "model-1.safetensors"
    assert index.weight_map["w2"] == "model-2.safetensors"
    assert find_shards(sharded / "model-1.safetensors") == sharded / "model-1.safetensors"
    files = open_shards(index)
    check_shards(index, files)
    close(files)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (["w1"], r"Only listed: \[\('v1', 'model-1.safetensors'\)\]. Only held: \[\]"),
        (["w1", "v1", "w2"], r"Only listed: \[\]. Only held: \[\('w2', 'model-1.safetensors'\)\]"),
        (["w1", "v1", "x"], r"Only held: \[\('x', 'model-1.safetensors'\)\]"),
    ],
)
def test_shards_that_differ_from_their_index(tensors, words, sharded):
    content = header([(name, "U8", (0,)) for name in tensors], None)
    (sharded / "model-1.safetensors").write_bytes(content)
    index = find_shards(sharded)
    assert isinstance(index, ShardIndex)
    files = open_shards(index)
    with pytest.raises(ValueError, match=words):
        check_shards(index, files)
    close(files)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "index: expected UTF-8 JSON"),
        (b"[]", "index: expected a JSON object"),
        (b"{}", "weight_map: expected an object of tensors, got None"),
        (b'{"weight_map":{}}', "weight_map: expected an object of tensors"),
        (b'{"weight_map":{"w":"a","\\u0077":"b"}}', "'w' twice"),
        (b'{"weight_map":{"\\ud800":"a"}}', "lone surrogate"),
        (b'{"weight_map":{"w":"gone.safetensors"}}', "got 0; missing: ['gone.safetensors']"),
        *(
            (json.dumps({"weight_map": {"w": name}}).encode(), "tensor 'w': expected the name of a")
            for name in ["../m", "/etc/x", "a/b", "a\\b", "C:a", "..", ".", "", "a\0", "a\nb", 3]
        ),
    ],
)  # fmt: skip
def test_indexes_that_are_refused(content, words, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        find_shards(tmp_path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(("download it again.", "Download them first."))


def test_shards_that_are_no_files(sharded):
    (sharded / "model-1.safetensors").unlink()
    os.mkfifo(sharded / "model-1.safetensors")
    (sharded / "model-2.safetensors").unlink()
    (sharded / "model-2.safetensors").symlink_to("model-2.safetensors")
    with pytest.raises(ValueError, match=r"got \['model-1.*', 'model-2.*'\]: folders, .* Put the"):
        find_shards(sharded)


def test_many_names_are_shown_whole(tmp_path):
    for number in range(30):
        (tmp_path / f"model-{number:05d}-of-00030.safetensors").touch()
    with pytest.raises(ValueError, match=r"'model-00005-of-00030.safetensors'\] and 24 more. Name"):
        find_shards(tmp_path)


def test_folders_that_say_too_little(sharded):
    (sharded / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected one index .* got \['model.*', 'other.*'\]"):
        find_shards(sharded)
    for path in sharded.glob("*.json"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"one \*.safetensors in .* got \['model-1.*', 'model-2.*'\]. Name the"
    ):
        find_shards(sharded)
    with pytest.raises(FileNotFoundError):
        find_shards(sharded / "gone.safetensors")
    with pytest.raises(FileNotFoundError):
        find_shards(sharded / "gone.safetensors.index.json")
    (sharded / "a.safetensors.index.json").mkdir()
    with pytest.raises(ValueError, match=r"expected a regular file, got a folder, .* Save it to"):
        find_shards(sharded)


def test_neither_jax_nor_numpy_nor_the_locale(tmp_path):
    (tmp_path / "é.safetensors").write_bytes(header([("é", "U8", (1,))], {"ü": ""}) + b"x")
    # A package without its __init__, which starts JAX.
    code = (
        "import sys, types, os; p = types.ModuleType('selcrypt_jax'); "
        "p.__path__ = [sys.argv[1]]; sys.modules['selcrypt_jax'] = p; "
        "from selcrypt_jax._io import atomic, safetensors as s; "
        "f = s.SafetensorsFile(os.listdir()[0]); "
        "print(ascii(list(f.tensors)), bytearray(f.read('\\xe9'))); "
        "f.close(); print([m for m in ('jax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(stf.__file__).parent.parent)],
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [r"['\xe9'] bytearray(b'x')", "[]"], done.stderr
