"""ONNX initialisers and Flax msgpack files: every array is read bit for bit, or refused."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from strategies import SMALL, octets, payload

import selcrypt_jax as sj
from selcrypt_jax import Select, Targets, protect_file, unlock_file
from selcrypt_jax._io.converted import ConvertedFile
from selcrypt_jax._io.foreign import FLAX, ONNX
from selcrypt_jax._release.files import calibrate_file
from selcrypt_jax.cli import main

SECRET = sj.Secret.generate()
DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "int64", "bool", "uint8"]
HALF = Select(budget=0.5, small=0)
# The folder is the same for all examples; each writes its own files.
PROPERTY = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any bit patterns; for booleans, only valid ones."""
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    return payload(seed, shape, dtype)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.sampled_from([*SMALL, (7, 31), (2, 3, 4)]))
    return random(draw(st.integers(0, 2**32 - 1)), shape, draw(st.sampled_from(DTYPES)))


def assert_read(file: ConvertedFile, expected: dict[str, np.ndarray]) -> None:
    assert file.tensors.keys() == expected.keys()
    for name, array in expected.items():
        info = file.tensors[name]
        assert sj._tree.dtypes.SAFETENSORS[info.dtype].name == array.dtype.name, name
        assert info.shape == array.shape, name
        assert bytes(file.read(name)) == octets(array), name


# --- Flax -----------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=8)
TREES = st.recursive(arrays(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3))


def flattened(tree: Any, *steps: str) -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {"/".join(steps): tree}
    return {n: a for key, sub in tree.items() for n, a in flattened(sub, *steps, key).items()}


@PROPERTY
@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=3))
def test_flax_names_and_bits(tmp_path, tree):
    (tmp_path / "m").write_bytes(serialization.to_bytes(tree))
    assert_read(ConvertedFile(tmp_path / "m", FLAX), flattened(tree))


def test_large_arrays_of_flax_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    tree = {"a": {"kernel": normal(0, 7, 11)}}
    (tmp_path / "m").write_bytes(serialization.to_bytes(tree))
    assert b"chunk" in (tmp_path / "m").read_bytes()
    assert_read(ConvertedFile(tmp_path / "m", FLAX), {"a/kernel": tree["a"]["kernel"]})


def test_flax_without_arrays_in_places(tmp_path):
    tree = {"params": {"w": normal(0, 3)}, "batch_stats": None, "opt_state": {"0": {}}}
    (tmp_path / "m").write_bytes(serialization.to_bytes(tree))
    assert_read(ConvertedFile(tmp_path / "m", FLAX), {"params/w": normal(0, 3)})


BAD_FLAX: dict[str, tuple[Any, str]] = {
    "a number": ({"params": {"w": np.ones(3)}, "step": 3}, "'step': expected an array, got int"),
    "text": ({"a": {"b": "x"}}, "'a/b': expected an array, got str"),
    "bytes": ({"a": {"b": b"x"}}, "'a/b': expected an array, got bytes"),
    "complex": ({"a": {"b": 1j}}, "'a/b': expected an array, got complex"),
    "in a list": ({"a": [np.ones(2), 7]}, "'a/1': expected an array, got int"),
    "nothing": ({}, "expected nested dicts of arrays, got none"),
    "empty": ({"a": {}, "b": None}, "expected nested dicts of arrays, got none"),
    "no dict": (np.ones(3), "expected nested dicts of arrays, got none"),
    "one name twice": ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two leaves are called 'a/b'"),
    "dates": ({"a": np.zeros(2, "M8[s]")}, "'a': expected a NumPy or JAX array of one of"),
    "int4": ({"a": np.zeros(2, jnp.int4)}, "'a': expected a NumPy or JAX array of one of"),
}


@pytest.mark.parametrize("case", BAD_FLAX)
def test_bad_leaves_of_flax_are_refused_with_their_path(case, tmp_path):
    tree, words = BAD_FLAX[case]
    path = tmp_path / "m.msgpack"
    path.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match=rf"^{path}: .*") as caught:
        ConvertedFile(path, FLAX)
    assert words in str(caught.value)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut off, with a few bytes changed, or something else altogether."""
    places = st.integers(0, len(content) - 1)

    def change(edits: list[tuple[int, int]]) -> bytes:
        found = bytearray(content)
        for place, byte in edits:
            found[place] = byte
        return bytes(found)

    return st.one_of(
        places.map(lambda stop: content[:stop]),
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(change),
        st.binary(max_size=60),
        st.builds(lambda at, more: content[:at] + more + content[at:], places, st.binary()),
    )


def assert_refused_or_read(path: Path, kind: Any) -> None:
    message = f"{path}: expected"
    try:
        ConvertedFile(path, kind)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    assert "expected" in message


TREE = {"params": {"conv": {"kernel": normal(0, 2, 3)}, "n": np.float32(2)}, "b": np.array([True])}


@PROPERTY
@given(data=damaged(serialization.msgpack_serialize(TREE)))
def test_damaged_files_of_flax_are_refused_in_words(data, tmp_path):
    (tmp_path / "m.msgpack").write_bytes(data)
    assert_refused_or_read(tmp_path / "m.msgpack", FLAX)


def test_deep_nesting_of_msgpack_is_refused(tmp_path):
    path = tmp_path / "m.msgpack"
    for depth in (900, 100_000):
        path.write_bytes(b"\x81\xa1a" * depth + b"\xc0")
        with pytest.raises(ValueError, match=r"expected (a msgpack file|nested dicts)"):
            ConvertedFile(path, FLAX)


# --- ONNX -----------------------------------------------------------------------------------------


@pytest.fixture
def onnx() -> Any:
    return pytest.importorskip("onnx")


def typed(onnx: Any, name: str, array: np.ndarray) -> Any:
    """A tensor whose numbers are in the field for their type."""
    code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=code, dims=array.shape)
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.view(np.uint16)
    elif array.dtype == bool:
        array = array.astype(np.uint8)
    field = getattr(tensor, onnx.helper.tensor_dtype_to_field(code))
    field.extend(array.reshape(-1).tolist())
    return tensor


def raw(onnx: Any, name: str, array: np.ndarray) -> Any:
    code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.TensorProto(name=name, data_type=code, dims=array.shape, raw_data=octets(array))


def external(onnx: Any, name: str, array: np.ndarray, file: str, **place: int) -> Any:
    tensor = raw(onnx, name, array)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": file, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(onnx: Any, initialisers: Any, nodes: Any = (), **more: Any) -> Any:
    graph = onnx.helper.make_graph(nodes, "g", [], [], initialisers, **more)
    opsets = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets)


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@PROPERTY
@given(
    found=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(arrays(), st.sampled_from(["raw", "typed", "external"])),
        min_size=1,
        max_size=4,
    )
)
def test_onnx_names_and_bits(onnx, found, tmp_path):
    tensors, expected, data = [], {}, b""
    for name, (array, kind) in found.items():
        if kind == "external":
            place = {"offset": len(data), "length": array.nbytes}
            tensors.append(external(onnx, name, array, "weights.bin", **place))
            data += octets(array)
        elif kind == "typed":
            if array.dtype.kind == "f" and array.itemsize > 2:
                array = np.nan_to_num(array)  # protobuf's Python has no signalling NaN
            tensors.append(typed(onnx, name, array))
        else:
            tensors.append(raw(onnx, name, array))
        expected[name] = array
    (tmp_path / "weights.bin").write_bytes(data)
    file = ConvertedFile(write(tmp_path / "m.onnx", model_of(onnx, tensors)), ONNX)
    assert_read(file, expected)
    assert file.size >= sum(array.nbytes for array in expected.values())


def test_external_data_of_onnx_itself(onnx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {"w": normal(0, 40, 40), "b": normal(1, 40), "empty": normal(2, 0, 3)}
    model = model_of(onnx, [onnx.numpy_helper.from_array(a, n) for n, a in found.items()])
    onnx.save(model, "m.onnx", save_as_external_data=True, size_threshold=0)
    assert Path("m.onnx").stat().st_size < 1000
    Path("link").symlink_to(".")
    Path("sub").mkdir()
    for path in ("m.onnx", tmp_path / "m.onnx", "link/m.onnx", "sub/../m.onnx"):
        assert_read(ConvertedFile(path, ONNX), found)
    others = [path for path in tmp_path.iterdir() if path.name not in ("m.onnx", "link", "sub")]
    read = ConvertedFile("m.onnx", ONNX)  # many tensors, one file of data
    assert [path.name for path in read.inputs] == ["m.onnx", others[0].name]
    assert read.size == Path("m.onnx").stat().st_size + others[0].stat().st_size
    with pytest.raises(ValueError, match="expected a different file from the input"):
        protect_file("m.onnx", others[0], secret=SECRET, selection=HALF, force=True)


def escapes(folder: Path) -> dict[str, Callable[[], str]]:
    def linked(function: Callable[..., None], target: Path) -> str:
        function(target, folder / "link")
        return "link"

    outside = folder.parent / "outside"
    return {
        "above": lambda: "../outside",
        "absolute": lambda: str(outside),
        "a link": lambda: linked(os.symlink, outside),
        "a hard link": lambda: linked(os.link, outside),
        "a linked folder": lambda: linked(os.symlink, folder.parent) + "/outside",
        "nothing": lambda: "missing",
        "a folder": lambda: ".",
        "no name": lambda: "",
    }


@pytest.mark.parametrize("case", escapes(Path("x/y")))
def test_external_data_stays_in_the_folder_of_the_model(case, onnx, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(16))
    tensor = external(onnx, "w", np.zeros(4, np.float32), escapes(folder)[case]())
    path = write(folder / "m.onnx", model_of(onnx, [tensor]))
    said = "expected data that onnx can read, got: .*plain files in the folder"
    words = rf"^{path}: initialiser 'w': {said}"
    with pytest.raises(ValueError, match=words):
        protect_file(path, tmp_path / "out", secret=SECRET)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_external_data_that_would_make_it_wait(onnx, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    tensor = external(onnx, "w", np.zeros(4, np.float32), "pipe")
    with pytest.raises(ValueError, match=r"expected data that onnx can read, got: .*regular file"):
        ConvertedFile(write(tmp_path / "m.onnx", model_of(onnx, [tensor])), ONNX)


def bad_onnx(onnx: Any) -> dict[str, tuple[Any, str]]:
    t, make = onnx.TensorProto, onnx.helper.make_tensor
    good = raw(onnx, "w", normal(0, 4))
    sparse = onnx.SparseTensorProto(
        values=raw(onnx, "s", normal(0, 2)), indices=typed(onnx, "", np.array([1, 3])), dims=[9]
    )
    short, many, none = raw(onnx, "w", normal(0, 4)), raw(onnx, "w", normal(0, 4)), t(name="w")
    short.dims[0], many.dims[0] = 5, 2**60
    odd = raw(onnx, "w", normal(0, 4))
    odd.data_type = 99
    negative = raw(onnx, "w", normal(0, 4))
    negative.dims[:] = [-1, 2]
    large = onnx.helper.make_node("Constant", [], ["c"], value=raw(onnx, "", normal(0, 64, 16)))
    return {
        "sparse": (
            model_of(onnx, [good], sparse_initializer=[sparse]),
            r"got sparse ones: \['s'\]",
        ),
        "text": (model_of(onnx, [make("w", t.STRING, [1], [b"a"])]), "'w':.*8 bits.* got STRING"),
        "int4": (model_of(onnx, [make("w", t.INT4, [2], [1, 2])]), "'w':.*8 bits or .* got INT4"),
        "complex": (model_of(onnx, [make("w", t.COMPLEX128, [1], [1j])]), "got COMPLEX128"),
        "no type": (model_of(onnx, [none]), "got UNDEFINED"),
        "unknown type": (model_of(onnx, [odd]), "'w': expected data that onnx can read, got: .*99"),
        "too short": (
            model_of(onnx, [short]),
            "'w': expected data that onnx can read, got: cannot reshape",
        ),
        "huge": (model_of(onnx, [many]), "'w': expected data that onnx can read, got: "),
        "negative": (
            model_of(onnx, [negative]),
            r"'w': .*expected non-negative lengths, got shape \[-1, 2",
        ),
        "twice": (model_of(onnx, [good, good]), "'w': .*expected each name once, got it twice"),
        "none": (model_of(onnx, []), "expected initialisers, got none. Export"),
        "constants": (model_of(onnx, [], [large]), r"got none; weights seem to be in \['c'\]"),
        "no model": (onnx.ModelProto(), "expected initialisers, got none"),
    }


BAD_ONNX = ["sparse", "text", "int4", "complex", "no type", "unknown type", "too short", "huge"]
BAD_ONNX += ["negative", "twice", "none", "constants", "no model"]


@pytest.mark.parametrize("case", BAD_ONNX)
def test_bad_initialisers_are_refused(case, onnx, tmp_path):
    cases = bad_onnx(onnx)
    assert set(cases) == set(BAD_ONNX)
    path = write(tmp_path / "m.onnx", cases[case][0])
    with pytest.raises(ValueError, match=rf"^{path}: .*{cases[case][1]}"):
        ConvertedFile(path, ONNX)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data", "ignore:.*only initialisers")
@settings(PROPERTY, max_examples=100)
@given(data=st.data())
def test_damaged_models_are_refused_in_words(data, onnx, tmp_path):
    (tmp_path / "d").write_bytes(bytes(64))
    tensors = [raw(onnx, "w", normal(0, 4)), typed(onnx, "b", np.arange(3))]
    tensors.append(external(onnx, "e", np.zeros(4, "f4"), "d", offset=16, length=16))
    node = onnx.helper.make_node("Constant", [], ["c"], value=raw(onnx, "", normal(0, 4)))
    content = model_of(onnx, tensors, [node]).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data.draw(damaged(content)))
    assert_refused_or_read(tmp_path / "m.onnx", ONNX)


def test_weights_elsewhere_are_named(onnx, tmp_path):
    large, small = normal(0, 32, 32), normal(0, 31, 33)
    node, graph = onnx.helper.make_node, onnx.helper.make_graph
    inner = graph([], "then", [], [], [raw(onnx, "inner", large)])
    deeper = node(
        "If", ["x"], ["y"], then_branch=graph([node("If", [], [], then_branch=inner)], "g", [], [])
    )
    nodes = [
        node("Constant", [], ["constant"], value=raw(onnx, "", large)),
        node("Constant", [], ["little"], value=raw(onnx, "", small)),
        node("Constant", [], ["floats"], value_floats=[1.5] * 2000),
        node("Forest", [], ["forest"], name="named", nodes_values=[1.5] * 2000),
        deeper,
    ]
    model = model_of(onnx, [raw(onnx, "w", large)], nodes)
    function = onnx.helper.make_function(
        "d", "f", [], ["z"], [node("Constant", [], ["z"], value=raw(onnx, "", large))],
        [onnx.helper.make_opsetid("", 17)],
    )  # fmt: skip
    model.functions.append(function)
    path = write(tmp_path / "m.onnx", model)
    words = r"not \['constant', 'floats', 'inner', 'named', 'z'\], of 1024 elements or more"
    with pytest.warns(UserWarning, match=words):
        file = ConvertedFile(path, ONNX)
    assert_read(file, {"w": large})


def test_constants_become_initialisers_as_the_recipe_says(onnx, tmp_path):
    array = normal(0, 32, 32)
    node = onnx.helper.make_node("Constant", [], ["c"], value=raw(onnx, "", array))
    model = model_of(onnx, [], [node])
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    assert_read(ConvertedFile(write(tmp_path / "m.onnx", model), ONNX), {"c": array})


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"^m.onnx: .*pip install '\.\[onnx\]'"):
        protect_file("m.onnx", "out", secret=SECRET)
    main(["keygen", "-o", "k"])
    assert main(["protect", "m.onnx", "-o", "out", "--secret", "k/secret.key"]) == 1
    assert "m.onnx: is an ONNX model, and the package onnx is not" in capsys.readouterr().err


def test_an_old_library_is_refused(onnx, tmp_path, monkeypatch):
    # It would read bfloat16 as float32, and follow links.
    monkeypatch.setattr(onnx, "__version__", "1.20.1")
    path = write(tmp_path / "m.onnx", model_of(onnx, [raw(onnx, "w", normal(0, 4))]))
    with pytest.raises(ModuleNotFoundError, match=r"expected onnx 1\.21 or later .*got 1\.20\.1"):
        ConvertedFile(path, ONNX)


# --- releases -------------------------------------------------------------------------------------

WEIGHTS = {"conv.w": normal(0, 16, 3, 3, 3), "conv.b": normal(1, 16), "axes": np.array([2, -1])}


@pytest.fixture(params=["onnx", "msgpack", "checkpoint_100"])
def source(request, tmp_path, monkeypatch) -> tuple[str, dict[str, np.ndarray]]:
    """A file in the working folder, whose name may or may not show its format; and its arrays."""
    monkeypatch.chdir(tmp_path)
    if request.param == "onnx":
        onnx = pytest.importorskip("onnx")
        model = model_of(onnx, [raw(onnx, n, a) for n, a in WEIGHTS.items()])
        return str(write(Path("m.onnx"), model)), WEIGHTS
    name = "m.msgpack" if request.param == "msgpack" else request.param
    tree = {"conv": {"w": np.moveaxis(WEIGHTS["conv.w"], (0, 1), (3, 2)), "b": WEIGHTS["conv.b"]}}
    Path(name).write_bytes(serialization.to_bytes(tree | {"axes": WEIGHTS["axes"]}))
    return name, flattened(tree) | {"axes": WEIGHTS["axes"]}


def test_a_release_opens_to_the_original(source):
    path, expected = source
    done = protect_file(path, "public", secret=SECRET, levels=2, selection=HALF)
    assert done.layout == ("OIHW" if path == "m.onnx" else "HWIO")
    assert set(done.groups.values()) == {24}  # pairs of channels, of 48
    grant = sj.issue_grant("public", level=2, secret=SECRET, signer="unsigned")
    unlock_file("public", "opened", grant)
    with safe_open("opened", "np") as file:
        assert file.metadata() == {"format": "onnx" if path == "m.onnx" else "flax"}
        assert set(file.keys()) == set(expected)
        for name, array in expected.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert octets(found) == octets(array), name
    again = protect_file(path, "public", secret=SECRET, levels=2, selection=HALF, force=True)
    assert again.model_id != done.model_id
    with pytest.raises(ValueError, match="expected a different file from the input"):
        protect_file(path, path, secret=SECRET, selection=HALF, force=True)
    with pytest.raises(ValueError, match="copy_config: expected the folder of a model"):
        protect_file(path, "other", secret=SECRET, selection=HALF, copy_config=True)


def test_commands(source, capsys):
    path, _ = source
    main(["keygen", "-o", "k"])
    options = ["--secret", "k/secret.key", "--budget", "0.5", "--levels", "2", "--small", "0"]
    assert main(["protect", path, "-o", "public", *options]) == 0
    assert main(["inspect", "public"]) == 0
    capsys.readouterr()
    assert main(["inspect", path]) == 1
    err = capsys.readouterr().err
    assert f"{path}: expected a safetensors file, got what looks like" in err
    assert "Only selcrypt protect and calibrate read such files" in err


def test_calibration(source):
    path, expected = source
    kernel = next(name for name in expected if "w" in name)

    def kept(params: Any) -> float:
        return float(np.mean(np.asarray(params[kernel]) == expected[kernel]))

    found = calibrate_file(
        path, Targets([0.6], kept, tolerance=0.05), seed=0, keys=2, selection=HALF,
        cipher=sj.LosslessCipher(),
    )  # fmt: skip
    assert found.untouched == 1
    assert found.values[0] == pytest.approx(0.6, abs=0.06)


def test_a_shard_of_another_format_stays_refused(tmp_path):
    text = '{"weight_map": {"w": "a.onnx"}}'
    (tmp_path / "m.safetensors.index.json").write_text(text)
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10")
    with pytest.raises(ValueError, match=r"a.onnx: expected a safetensors file, got what looks"):
        protect_file(tmp_path, tmp_path / "out", secret=SECRET)
