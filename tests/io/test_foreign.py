"""Errors name the format of other files, and how to convert them."""

import pickle
import re

import numpy as np
import pytest
from flax import serialization

from selcrypt_jax._io.safetensors import SafetensorsFile
from selcrypt_jax._io.shards import find_shards

TREE = {"params": {"Dense_0": {"kernel": np.ones((4, 4), np.float32)}}}
MSGPACK = serialization.msgpack_serialize(TREE)
# ir_version 8, producer_name "pytorch", producer_version "2.1.0", and a graph.
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10\x0a\x0e\x0a\x01x\x12\x01y"
# Without a producer: ir_version 10, and the graph at once.
BARE_ONNX = b"\x08\x0a:\x10\x0a\x0e\x0a\x01x\x12\x01y\x22\x04Relu"
# As of 16 keys and more: a map of 32-bit length, with a long key.
LARGE_MSGPACK = b"\xdf\0\0\0\x11\xd9\x28" + b"transformer" * 4
FLAX = r"a Flax msgpack file. Only selcrypt protect .*msgpack_restore.*save_file"
NUMPY = "safetensors.numpy"

FILES = {
    "Flax": ("flax_model.msgpack", MSGPACK, FLAX),
    "Flax, no suffix": ("checkpoint_100", MSGPACK, FLAX),
    "Flax, many keys": ("checkpoint_0", LARGE_MSGPACK, FLAX),
    "ONNX": ("model.onnx", ONNX, "an ONNX model. Only selcrypt protect and .*to_array"),
    "ONNX, no suffix": ("model", ONNX, "an ONNX model"),
    "ONNX, no producer": ("model", BARE_ONNX, "an ONNX model"),
    "Lightning": ("last.ckpt", b"PK\x03\x04\x14\0\x08\x08", "zip archive, such as a PyTorch .pt"),
    "old .ckpt": ("last.ckpt", pickle.dumps({"a": 1}), "Python pickle, .* PyTorch .pt or .ckpt"),
    "damaged .ckpt": ("last.ckpt", b"\xff" * 20, r"'state_dict'\) with safetensors.torch"),
    "TensorFlow": ("model.ckpt.data-00000-of-00001", b"\xff" * 20, "tf.train.load_checkpoint"),
    "TensorFlow index": ("model.ckpt-3.index", b"\xff" * 20, "tf.train.load_checkpoint"),
    "TensorFlow Lite": ("x", b"\x1c\0\0\0TFL3\x14\0\x20\0", "a TensorFlow Lite model"),
    "SavedModel": ("saved_model.pb", b"\x08\x01\x12\xff\xff", "TensorFlow checkpoint or Saved"),
    "npz": ("a.npz", b"PK\x03\x04\x14\0\x08\x08", f"zip archive.*{NUMPY}"),
    "HTML": ("a.safetensors", b"<!DOCTYPE html><html>", "a web page. Download the file itself"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_format_is_named_with_the_way_to_convert_it(case, tmp_path):
    name, content, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"got what looks like .*{words}.*\.$") as caught:
        SafetensorsFile(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "truncated" not in str(caught.value)


def test_the_way_for_flax_works(tmp_path):
    from flax import traverse_util
    from safetensors.flax import save_file

    tree = serialization.msgpack_restore(MSGPACK)
    save_file(traverse_util.flatten_dict(tree, sep="/"), tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        assert list(file.tensors) == ["params/Dense_0/kernel"]


@pytest.mark.parametrize("first", range(0x100))
def test_a_good_header_of_any_length_is_no_other_format(first, tmp_path):
    # The first byte is the lowest one of the header's length; a multiple of 8 is not needed here.
    text = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    length = 256 + first
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + text.ljust(length))
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        assert list(file.tensors) == ["w"]
    # Cut off, it is said to be, and nothing else.
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="It is truncated"):
        SafetensorsFile(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flax_model.msgpack", "Flax"),
        ("pytorch_model.bin", "PyTorch"),
        ("model.onnx", "ONNX"),
        ("tf_model.h5", "Keras"),
        ("model.gguf", "GGUF"),
        ("saved_model.pb", "TensorFlow"),
    ],
)
def test_a_folder_of_another_format(name, words, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\0" * 20)
    expected = rf"got none. \['{re.escape(name)}'\] looks like .*{words}.*; .*Name the file"
    with pytest.raises(ValueError, match=expected):
        find_shards(tmp_path)
