"""A file is sealed and signed once, and read once: its header's length is known before."""

from collections import Counter

import numpy as np
import pytest
from protected_files import SECRET, SIGNING, checkpoint, protected

from selcrypt_jax import SigningKey, issue_grant, rotate_file, unlock_file, verify_file
from selcrypt_jax._ciphers.lossless import LosslessCipher
from selcrypt_jax._format import envelope as _envelope
from selcrypt_jax._format.envelope import Envelope
from selcrypt_jax._format.manifest import NO_DIGEST, LevelSize, Manifest, Tensor
from selcrypt_jax._format.rings import seal_mask
from selcrypt_jax._io.safetensors import SafetensorsFile
from selcrypt_jax._keys.keys import level_key


def test_a_file_is_sealed_and_signed_and_read_once(tmp_path, monkeypatch):
    done: Counter[str] = Counter()

    def count(holder, name, of):
        function = getattr(holder, name)

        def counted(*args, **kwargs):
            done[of(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(holder, name, counted)

    path = protected(tmp_path, checkpoint(0), SIGNING)
    grant = issue_grant(path, level=3, secret=SECRET, signer=SIGNING.public)
    names = {name for name, tensor in checkpoint(0).tensors.items() if tensor.data}
    count(_envelope, "seal_box", lambda key, *_: f"box {key.level}")
    count(SigningKey, "sign", lambda *_: "signature")
    count(
        SafetensorsFile,
        "_fill",
        lambda file, buffer, start: f"{file.path.name}: {start, len(buffer)}",
    )
    with SafetensorsFile(path) as file:
        spans = {n: f"{path.name}: {i.start, i.stop - i.start}" for n, i in file.tensors.items()}
    for run in (
        lambda: verify_file(path, grant=grant),
        lambda: unlock_file(path, tmp_path / "out", grant),
        lambda: rotate_file(path, tmp_path / "new", secret=SECRET, signing=SIGNING),
    ):
        done.clear()
        run()
        assert {name: done[spans[name]] for name in names} == dict.fromkeys(names, 1)
    assert {name: n for name, n in done.items() if ": " not in name} == {
        "box 1": 1, "box 2": 1, "box 3": 1, "signature": 1
    }  # fmt: skip


@pytest.mark.parametrize("signing", [SIGNING, None], ids=["signed", "unsigned"])
@pytest.mark.parametrize("groups", [1, 2, 3, 1000])
def test_the_blank_one_is_as_long(groups, signing):
    key = level_key(SECRET, bytes(16), levels=2)
    ring = seal_mask('ü"', np.arange(1024) < groups)

    def manifest(digest: str) -> Manifest:
        return Manifest(
            key.model_id,
            LosslessCipher(),
            "plain",
            (LevelSize(groups, groups), LevelSize(0, 0)),
            {'ü"': Tensor("F32", (1024,), (digest,))},
            signer=None if signing is None else signing.public,
        )

    blank = Envelope.blank(manifest(NO_DIGEST), {"a": "b"}, [[ring], []], "test")
    done = ring._replace(sha256="f" * 64)
    sealed = Envelope.seal(manifest("f" * 64), {"a": "b"}, [[done], []], key, signing, "test")
    lengths = {name: len(text) for name, text in sealed.entries().items()}
    assert lengths == {name: len(text) for name, text in blank.entries().items()}
