"""JSON that takes far more memory than its text, or is nested too deeply."""

import json
import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selcrypt_jax._io.safetensors import SafetensorsFile, header
from selcrypt_jax._io.strict_json import check_json, json_object, show

MANY = 500_000
DENSE = {
    "lists": b'{"a":[' + b"[]," * MANY + b"[]]}",
    "objects": b'{"a":[' + b"{}," * MANY + b"{}]}",
    "objects of one": b'{"a":[' + b'{"a":0},' * MANY + b"{}]}",
    "strings between": b'{"a":[' + b'["\\"["],' * MANY + b"0]}",
    "escapes before": b'{"a\\"\\\\\\\\\\"":[' + b"[]," * MANY + b"[]]}",
    "open lists": b'{"a":' + b"[" * MANY,
    "open objects": b'{"a":' * MANY,
    "not UTF-8": b'{"\xff":[' + b"[]," * MANY + b"[]]}",
}


@pytest.mark.parametrize("parse", [json_object, check_json])
@pytest.mark.parametrize("name", DENSE)
def test_many_lists_and_objects_are_refused(name, parse):
    raw = DENSE[name]
    most = 100_000 + len(raw) // 16
    words = f"^x: expected at most {most} lists and objects in {len(raw)} bytes of JSON, got "
    with pytest.raises(ValueError, match=words) as caught:
        parse(raw, "x")
    assert "download it again from its owner" in str(caught.value)


@given(st.recursive(st.text('a[{"\\', max_size=4), lambda inner: st.lists(inner, max_size=4)))
def test_only_what_is_outside_of_strings_counts(value):
    """Against a count by the parser itself."""
    from selcrypt_jax._io.strict_json import _brackets_outside_strings

    def lists(value):
        return 1 + sum(map(lists, value)) if isinstance(value, list) else 0

    for text in (json.dumps(value), json.dumps({json.dumps(value): value}, indent=1)):
        expected = lists(value) + text.startswith("{")
        assert _brackets_outside_strings(text.encode()) == expected


def test_text_may_hold_as_many_as_it_likes():
    vocabulary = json.dumps([[word] for word in range(MANY)])
    found = json_object(json.dumps({"a": vocabulary, "b": "[{" * MANY}).encode(), "x")
    assert found == {"a": vocabulary, "b": "[{" * MANY}


@pytest.mark.slow
def test_the_densest_headers_are_read(tmp_path):
    """A header with the shortest names, scalars and empty tensors."""
    for shape in ((), (0,)):
        names = (f"{number:x}" for number in range(150_000))
        tensors = [(name, "U8", shape) for name in names]
        path = tmp_path / "a.safetensors"
        data = bytes(len(tensors)) if shape == () else b""
        path.write_bytes(header(tensors, {"box": "QUJD" * 1_000_000, "[": '[{"' * MANY}) + data)
        with SafetensorsFile(path) as file:
            assert len(file.tensors) == len(tensors)


DEPTHS = [10, 500, 900, 950, *range(960, 1000), 1010, 5_000, 90_000]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_no_depth_ends_in_another_error(opening):
    closing = "]" if opening == "[" else "}"
    for depth in DEPTHS:
        for text in (opening * depth, opening * depth + "0" + closing * depth):
            for parse in (json_object, check_json):
                try:
                    parse(f'{{"a":{text}}}'.encode(), "x")
                except ValueError as error:
                    assert str(error).startswith("x: ")  # noqa: PT017
    for depth in DEPTHS:
        with pytest.raises(ValueError, match=r"^x: expected"):
            json_object(f"[{'[' * depth}{']' * depth}]".encode(), "x")


def test_nested_values_are_shown():
    value = []
    for _ in range(100_000):
        value = [value]
    assert show(value) == "a list that is nested too deeply to show"
    while value:  # freed one by one
        value = value.pop()


def peak(raw: str, parse: bool) -> int:
    program = f"""
import resource
from selcrypt_jax._io.strict_json import json_object
raw = {raw}
try:
    {parse} and json_object(raw, "x")
except ValueError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return int(ran.stdout) * unit


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="no such measure")
@pytest.mark.parametrize(
    "one", ['b"[],"', 'b"{},"', """b'{"a":0},' """, """b'{"a":0}         ,' """, """b'"abc",' """]
)
def test_json_takes_a_bounded_multiple_of_its_size(one):
    raw = f"""b'{{"a":[' + {one} * (20_000_000 // len({one})) + b'0]}}'"""
    took = peak(raw, True) - peak(raw, False)
    assert took < 16 * 20_000_000
