"""Likely mistakes: the answer to each is one line that says what is wrong and what to do."""

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import selcrypt_jax
from selcrypt_jax import importance
from selcrypt_jax.cli import main

sj: Any = selcrypt_jax  # its types would tell most of these mistakes before they are made

PROTECT = "protect model.safetensors -o new --secret keys/secret.key"
UNLOCK = "unlock public.safetensors -o new --grant"
GRANT = "grant public.safetensors -o new --level 1 --secret"
CALIBRATE = "calibrate model.safetensors"
VERIFY = "verify public.safetensors --signer"
ROTATE = "rotate public.safetensors --secret"

COMMANDS = {
    # --- the wrong file
    "protect what is protected": (
        PROTECT.replace("model", "public"),
        r"public.safetensors: is already a protected file, .* Unlock it at the top level first"),
    "unlock what is not protected": (
        "unlock model.safetensors -o new -g alice.grant",
        r"model.safetensors: is not a protected file: .* Expected a file written by"),
    "verify what is not protected": (
        "verify model.safetensors", r"model.safetensors: is not a protected .* Expected a file"),
    "PyTorch file": (
        PROTECT.replace("model.safetensors", "model.pt"),
        r"model.pt: .* a zip archive, such as a PyTorch .pt, .* save it with safetensors.torch"),
    "PyTorch file, called .bin": (
        PROTECT.replace("model.safetensors", "pytorch_model.bin"),
        r"pytorch_model.bin: .* PyTorch .pt, .* save it with safetensors.torch"),
    "old PyTorch file": (
        PROTECT.replace("model.safetensors", "old.pt"),
        r"old.pt: .* a Python pickle, .* save it with safetensors.torch"),
    "NumPy archive": (
        PROTECT.replace("model.safetensors", "model.npz"),
        r"model.npz: .* a NumPy .npz file\. .* save it with .* safetensors.numpy"),
    "NumPy array": (
        PROTECT.replace("model.safetensors", "kernel.npy"),
        r"kernel.npy: .* a NumPy .npy file. Save it with safetensors.numpy"),
    "web page instead of the download": (
        PROTECT.replace("model.safetensors", "page.safetensors"),
        r"page.safetensors: .* a web page. Download the file itself"),
    "Git LFS pointer": (
        PROTECT.replace("model.safetensors", "lfs.safetensors"),
        r"lfs.safetensors: .* Git LFS pointer\. .* `git lfs pull`"),
    "key instead of the model": (
        PROTECT.replace("model.safetensors", "keys/secret.key"),
        r"keys/secret.key: .* a selcrypt key or grant. Name the model's file"),
    "empty file": (
        PROTECT.replace("model.safetensors", "empty.safetensors"),
        r"empty.safetensors: expected at least 8 bytes, got 0. It is empty; download it again"),
    "truncated download": (
        PROTECT.replace("model.safetensors", "half.safetensors"),
        r"half.safetensors: tensor '.*': .* expected at most .* It is truncated; download"),
    "download that hardly began": (
        PROTECT.replace("model.safetensors", "start.safetensors"),
        r"start.safetensors: header: expected 240 bytes.* got 42. It is truncated.*again"),
    "no such file": (
        PROTECT.replace("model", "modle"),
        r"modle.safetensors: there is no such file. Check its name"),
    "links in a circle": (
        PROTECT.replace("model.safetensors", "circle"),
        r"circle: expected a file, got a loop of symbolic links. Name the file itself"),
    "header that is no JSON": (
        PROTECT.replace("model.safetensors", "header.safetensors"),
        r"header.safetensors: header: expected UTF-8 JSON, .* damaged: download the file again"),
    "index of nothing": (
        PROTECT.replace("model.safetensors", "nothing.safetensors.index.json"),
        r"nothing.*json: weight_map: expected an object .*, got \{\}. .*: download it again"),
    "folder without an index": (
        PROTECT.replace("model.safetensors", "folder"),
        r"folder: expected one \*.safetensors.index.json .* \['a.*', 'b.*'\]. Name the file to"),
    "missing shard": (
        PROTECT.replace("model.safetensors", "sharded"),
        r"sharded/.*index.json: expected 2 shards .* got 1; missing: \['2.*'\]. Download them"),
    "altered after protection": (
        "unlock altered.safetensors -o new -g alice.grant",
        r"altered.safetensors: tensor 'classifier.weight': expected SHA-256 .* download it again"),
    # --- the wrong grant or level
    "grant of another model": (
        f"{UNLOCK} bob.grant",
        r"public.safetensors: is model \w+, but the grant is for model \w+. Ask the owner for a"),
    "grant from before rotate": (
        "unlock rotated.safetensors -o new -g alice.grant",
        r"rotated.safetensors: is model \w+, but the grant is for model \w+. Ask the owner for a"),
    "level above the grant's": (
        f"{UNLOCK} alice.grant --level 3", r"level: expected 1..2, got 3. .* ask the owner for"),
    "unlock level 0": (
        f"{UNLOCK} alice.grant --level 0", r"level: expected 1..2, got 0. Level 0 needs no key"),
    "grant a level that is not there": (
        f"{GRANT} keys/secret.key --level 4",
        r"public.safetensors: --level: expected 1..3, got 4. Name one of these"),
    "grant level 0": (
        f"{GRANT} keys/secret.key --level 0", r"level: expected 1..3, got 0. .* needs no key"),
    "grant a negative level": (
        f"{GRANT} keys/secret.key --level -1", r"level: expected 1..3, got -1. Name one of these"),
    "files in the wrong order": (
        "unlock alice.grant -o new -g public.safetensors",
        r"public.safetensors: expected UTF-8 text, a grant, got .* Name the file that selcrypt"),
    "grant of another owner": (
        f"{UNLOCK} other.grant",
        r"public.safetensors: expected a file signed by .* or the grant .* another owner's: get"),
    "grant pasted on one line": (
        f"{UNLOCK} pasted.grant", r"pasted.grant: .* a grant whose line breaks were lost. Copy it"),
    "grant folded by a mail program": (
        f"{UNLOCK} folded.grant", r"folded.grant: .* broken lines: .*, signer, key. Join each"),
    "grant quoted in a mail": (
        f"{UNLOCK} quoted.grant", r'quoted.grant: .* Keep only its own lines, without "> " and'),
    # --- the wrong key
    "grant as secret": (
        f"{GRANT} alice.grant", r"alice.grant: expected a secret, .* got a grant. Name the secret"),
    "secret as grant": (
        f"{UNLOCK} keys/secret.key",
        r"keys/secret.key: expected a grant, .* got a secret. Name the file that selcrypt grant"),
    "verify key as signing key": (
        f"{PROTECT} --signing keys/signing.pub",
        r"signing.pub: expected a signing key .* got a verify key .* Name the signing.key"),
    "signing key as verify key": (
        f"{VERIFY} keys/signing.key",
        r"signing.key: expected a verify key .* got a signing key .* Name the signing.pub"),
    "signing key as secret": (
        f"{GRANT} keys/signing.key",
        r"signing.key: expected a secret, .* got a signing key .* Name the secret.key"),
    "secret of another owner": (
        f"{GRANT} other/secret.key",
        r"public.safetensors: .* this secret did not protect this file.* Use the secret that"),
    "another signer": (
        f"{VERIFY} other/signing.pub",
        r"public.safetensors: expected a file signed by \w+, got .* download it from its owner"),
    "rotate without a signing key": (
        f"{ROTATE} keys/secret.key", r"public.safetensors: is signed by .* Pass the owner's sig"),
    "key with a typing error": (
        f"{GRANT} typo.key", r"typo.key: the checksum does not match. .* use another copy"),
    "key that was cut off": (
        f"{GRANT} cut.key", r"cut.key: expected the fields .* got no checksum. .* another copy"),
    "key in hex": (
        f"{GRANT} hex.key", r"hex.key: expected a secret, .* got a file .* Name the secret"),
    "32 raw bytes": (
        f"{GRANT} raw.key", r"raw.key: expected UTF-8 text, a secret, got 32 .* Name the secret"),
    "key in PEM": (
        f"{GRANT} pem.key", r"pem.key: expected a secret, .* got a PEM file. Name the secret.key"),
    "empty key": (
        f"{GRANT} empty.key", r"empty.key: expected a secret, .* got an empty file. Name the sec"),
    "key in UTF-16": (
        f"{GRANT} utf16.key", r"utf16.key: expected UTF-8 text, a secret, got UTF-16. Save it as"),
    "folder of keys as key": (
        f"{GRANT} keys", r"keys: expected a file, got a folder. Name a file in it"),
    "wrong passphrase": (
        f"{UNLOCK} locked.grant --passphrase-file bad_words",
        r"locked.grant: wrong passphrase. Type exactly the one that the file was locked with"),
    "no passphrase": (
        f"{UNLOCK} locked.grant", r"locked.grant: locked with .* Use --passphrase-file"),
    "two passphrases": (
        f"{UNLOCK} locked.grant --passphrase-file two_lines",
        r"two_lines: expected one line .* got 2 lines. Put nothing else into the file"),
    "age identity as secret": (
        f"{GRANT} id.txt", r"id.txt: expected a secret, .* got an age identity .* Name the secret"),
    "sealed grant without the identity": (
        f"{UNLOCK} sealed.grant",
        r"sealed.grant: is sealed .* got none. Pass it: --identity FILE\.$"),
    "sealed grant, another identity": (
        f"{UNLOCK} sealed.grant --identity wrong.txt",
        r"sealed.grant: is not sealed to .* wrong.txt, .* Name another identity, or send"),
    "sealed grant, public key as identity": (
        f"{UNLOCK} sealed.grant --identity id.pub",
        r"id.pub: expected an age identity .* Name the file with your private key"),
    "recipient that is none": (
        f"{GRANT} keys/secret.key --to alice@example.com",
        r"--to: expected a public key .* got 'alice@example.com'.* Ask the customer"),
    "recipient with a typing error": (
        f"{GRANT} keys/secret.key --to age1qqqq", r"recipient: expected an age .* Copy it again"),
    "private key as recipient": (
        f"{GRANT} keys/secret.key --to id.txt",
        r"id.txt: expected a file with one public key .* Ask the customer for their public key"),
    # --- the wrong place
    "output exists": (
        f"{UNLOCK} alice.grant --out model.safetensors",
        r"model.safetensors: the output already exists. Name another file, or .*--force"),
    "grant exists": (
        f"{GRANT} keys/secret.key --out alice.grant",
        r"alice.grant: already exists, .* Name another file; with --force it is replaced"),
    "keys exist": (
        "keygen -o keys", r"keys/secret.key: already exists. Name another folder; --force would"),
    "output onto the input": (
        f"{UNLOCK} alice.grant --out public.safetensors --force",
        r"public.safetensors: expected a different file from the input, .* Name another output"),
    "output onto a key": (
        f"{PROTECT} --out keys/secret.key --force",
        r"keys/secret.key: expected a different file from the input, .* Name another output"),
    "output is a folder": (
        f"{UNLOCK} alice.grant --out folder", r"folder: expected a file .* Name a file in it"),
    "protect a folder into a file": (
        "protect single -o new.safetensors --secret keys/secret.key",
        r"new.safetensors: expected a folder .* name a folder, or single/a.safetensors as the in"),
    "unlock a folder into a file": (
        "unlock opened -o new.safetensors -g opened.grant",
        r"new.safetensors: expected a folder .* name a folder, or opened/a.safetensors as the in"),
    "rotate a folder into a file": (
        "rotate opened -o new.safetensors --secret keys/secret.key --signing keys/signing.key",
        r"new.safetensors: expected a folder .* name a folder, or opened/a.safetensors as the in"),
    "unlock shards into a file": (
        "unlock released -o new.safetensors -g released.grant",
        r"new.safetensors: expected a folder .* The input is a folder, so .* name a folder$"),
    "keys into one file": (
        "keygen -o new.key", r"new.key: expected a folder as the output, .* Name a folder"),
    "audit into a page": (
        "audit demo -o new.html", r"new.html: expected a folder as the output, .* Name a folder"),
    "demo into a picture": (
        "demo -o new.png", r"new.png: expected a folder as the output, .* Name a folder"),
    "output folder missing": (
        f"{PROTECT} --out no/new", r"/no: no such folder for the output; create it first"),
    "output folder closed": (
        f"{PROTECT} --out closed/new", r"closed: the folder .* is read-only; name another one"),
    "keys into a file": (
        "keygen -o model.safetensors",
        r"model.safetensors: expected a folder, got a file. Name another one"),
    # --- the wrong choice
    "no tensors": (
        PROTECT.replace("model.safetensors", "none.safetensors"),
        r"none.safetensors: has no tensors, expected some to encrypt. Check that"),
    "select matches nothing": (
        f"{PROTECT} --select conv",
        r"--select: the regular expression 'conv' matches no leaf. .* change --select\.$"),
    "select is a shell pattern": (
        f"{PROTECT} --select *.weight", r"--select '\*.weight' is not a regular .* Write '\.\*'"),
    "budget in percent": (
        f"{PROTECT} --budget 8", r"budget: expected a share .* got 8.0. For 8 % pass 0.08"),
    "budget of nothing": (
        f"{PROTECT} --budget 0", r"budget: expected a share .* \(0, 1\], got 0.0. 0.08 is 8 %"),
    "budget that selects too little": (
        f"{PROTECT} --budget 0.001", r"level 5: too small to hide in.* Select more groups"),
    "no levels": (
        f"{PROTECT} --levels 0", r"levels: expected at least 1, got 0. Level 0 needs no key"),
    "more levels than groups": (
        f"{PROTECT} --levels 5000", r"level 1 adds no groups.* Encrypt a larger share, use fewer"),
    "shares in percent": (
        f"{PROTECT} --levels 2 5 8", r"--levels, value 1: .* got 2.0. For 2 % pass 0.02"),
    "shares that descend": (
        f"{PROTECT} --levels 0.3 0.2", r"levels: expected ascending .* 0.2 after 0.3. Sort"),
    "shares and a budget": (
        f"{PROTECT} --levels 0.2 0.3 --budget 0.3",
        r"budget: expected only with a number of levels, .* Omit the budget"),
    "filters of what layout": (
        "protect dense.safetensors -o new --secret keys/secret.key --granularity filter",
        r"dense.safetensors: --layout: cannot tell .* Name it \(--layout\): OIHW .* or HWIO"),
    "nothing but integers": (
        "protect integers.safetensors -o new --secret keys/secret.key",
        r"integers.safetensors: --select: expected floats .* 'ids \(int64.* with --select"),
    "weights that are NaN": (
        "protect nan.safetensors -o new --secret keys/secret.key",
        r"nan.safetensors: .*'features.0.weight': expected numbers, got NaN .* repair them"),
    "scores of another model": (
        f"{PROTECT} --importance scores_other.safetensors",
        r"scores_other.safetensors: expected scores .* got 'encoder'. Save them under the same"),
    "scores of another layout": (
        f"{PROTECT} --importance scores_hwio.safetensors",
        r"scores_hwio.safetensors: 'features.0.weight': expected scores .* layout: score this one"),
    "masks as scores": (
        f"{PROTECT} --importance scores_bool.safetensors",
        r"scores_bool.safetensors: .*: expected numbers, .* got BOOL. Save scores, not masks"),
    "checkpoint as scores": (
        f"{PROTECT} --importance model.safetensors",
        r"model.safetensors: expected scores, got the checkpoint itself. Save scores"),
    # --- the wrong function
    "metric without a colon": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken",
        r"evaluate: expected an import path module:function, got 'mistaken'. .* write mine:psnr"),
    "metric by the name of its file": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken.py:array",
        r"evaluate: expected an import path .* got 'mistaken.py:array'. .* write mine:psnr"),
    "metric that does not exist": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:nothing",
        r"evaluate: expected 'mistaken:nothing' to import, got Attribute.* Correct the path"),
    "module that does not exist": (
        f"{CALIBRATE} --targets 20 24 --evaluate nowhere_at_all:psnr",
        r"evaluate: expected 'nowhere_at_all:psnr' to import, got ModuleNot.* Correct the path"),
    "metric that is no function": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:VALUE",
        r"evaluate: expected a function, got 'mistaken:VALUE', which is int. Name a function"),
    "metric that raises": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:raises",
        r"mistaken:raises raised KeyError in line \d+ of mistaken.py: 'conv'. Correct it there"),
    "metric that raises a sentence": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:says",
        r"mistaken:says raised ValueError in line \d+ of mistaken.py: Two lines\. And a stop\. C"),
    "metric that raises nothing": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:bare",
        r"mistaken:bare raised AssertionError in line \d+ of mistaken.py\. Correct it there"),
    "metric that gives an array": (
        f"{CALIBRATE} --targets 20 24 --evaluate mistaken:array",
        r"mistaken:array: .* expected a number, got ndarray. Return the metric alone"),
    "targets that descend": (
        f"{CALIBRATE} --targets 24 20 --evaluate mistaken:array",
        r"--targets, value 2: expected ascending .* Sort"),
    "a target without advice": (
        "audit demo -o report --target-advantage 0.2",
        "--target-advantage: expected only with --advise"),
    "a first target that no encryption meets": (
        f"{CALIBRATE} --targets 0.5 0.9 --evaluate mistaken:steps",
        r"--targets, value 1: .* \(--small 0\), make the first target any, use smaller groups"),
    "a target that is no number": (
        f"{CALIBRATE} --targets 1 nan --evaluate mistaken:steps",
        "--targets, value 2: expected a finite number, got nan. Only the first may be any, as bad"),
    "a tolerance without targets": (
        f"{PROTECT} --tolerance 1 --lower-is-better",
        "^selcrypt: --tolerance, --lower-is-better: expected targets too, got none"),
    "no such audit": (
        "audit nothing.toml -o report",
        r"nothing.toml: expected demo, .* or a TOML file, got no .* Write one .* or try .* demo"),
    "audit of a checkpoint": (
        "audit model.safetensors -o report",
        r"model.safetensors: expected TOML as in docs/audit.md, .* the TOML file names it"),
}  # fmt: skip

METRICS = """
import numpy as np

VALUE = 3

def array(tensors):
    return np.ones(3)

def raises(tensors):
    return tensors["conv"]

def says(tensors):
    raise ValueError("Two lines.\\nAnd a stop.")

def steps(tensors):
    original = np.load("kernel.npy")
    same = np.array_equal(tensors["features.0.weight"], original)
    return 1.0 if same else 0.0

def bare(tensors):
    raise AssertionError
"""


def secret_forms(*secrets: bytes) -> list[str]:
    forms = (form for s in secrets for form in (s.hex(), base64.b64encode(s).decode(), repr(s)[2:]))
    return [form[:16] for form in forms]


def assert_helpful(text: str, message: str, hidden: list[str]) -> None:
    """One short line with the expected words, and no secret."""
    assert re.search(message, text), text
    assert "\n" not in text
    assert not re.search(r"(?<!\.)[.:] ?\.(?!\.)( |$)", text), text  # a stop after a stop
    assert "Traceback" not in text
    assert len(text) <= 320, len(text)
    assert not [form for form in hidden if form in text]


def run(line: str) -> None:
    assert main(line.split()) == 0, line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files of a vendor and a customer, and files mistaken for them."""
    folder = tmp_path_factory.mktemp("mistakes")
    before = Path.cwd()
    os.chdir(folder)
    try:
        hidden = fill()
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=folder, hidden=hidden)


def fill() -> list[str]:
    """Puts everything into the working folder; returns the secrets that no message may show."""
    rng = np.random.default_rng(0)
    save = safetensors.numpy.save_file
    kernel = rng.standard_normal((32, 16, 3, 3)).astype(np.float32)
    dense = rng.standard_normal((40, 64)).astype(np.float16)
    bias = rng.standard_normal(32).astype(np.float32)
    tensors = {"features.0.weight": kernel, "features.0.bias": bias, "classifier.weight": dense}
    save(tensors, "model.safetensors")
    save(tensors | {"features.0.weight": kernel + 1}, "second.safetensors")
    save({}, "none.safetensors")
    save({"fc.weight": dense}, "dense.safetensors")
    save({"ids": np.arange(1000).reshape(10, 100)}, "integers.safetensors")
    broken = kernel.copy()
    broken[3, 4] = np.nan
    save(tensors | {"features.0.weight": broken}, "nan.safetensors")
    save({"encoder": np.ones((32, 16, 1, 1), np.float32)}, "scores_other.safetensors")
    save({"features.0.weight": np.ones((1, 1, 16, 32), np.float32)}, "scores_hwio.safetensors")
    save({"features.0.weight": np.ones((32, 16, 1, 1), bool)}, "scores_bool.safetensors")

    run("keygen -o keys")
    run("keygen -o other")
    secret = "--secret keys/secret.key"
    for source, output in (("model", "public"), ("second", "public2")):
        run(
            f"protect {source}.safetensors -o {output}.safetensors {secret} "
            "--signing keys/signing.key --budget 0.3 --levels 3"
        )
    run(f"grant public.safetensors --level 2 {secret} -o alice.grant")
    run(f"grant public2.safetensors --level 2 {secret} -o bob.grant")
    run(f"rotate public.safetensors {secret} --signing keys/signing.key -o rotated.safetensors")
    run(
        "protect model.safetensors -o theirs --secret other/secret.key "
        "--signing other/signing.key --budget 0.3 --levels 3"
    )
    run("grant theirs --level 2 --secret other/secret.key -o other.grant")
    grant = Path("alice.grant").read_text()
    Path("pasted.grant").write_text(grant.replace("\n", " "))
    Path("folded.grant").write_text(re.sub("(.{40})", r"\1\n", grant))
    Path("quoted.grant").write_text(re.sub("^", "> ", grant, flags=re.MULTILINE))
    for name in ("pasted", "folded", "quoted"):
        Path(f"{name}.grant").chmod(0o600)
    Path("words").write_text("correct horse\n")
    Path("bad_words").write_text("battery staple\n")
    Path("two_lines").write_text("correct\nhorse\n")
    run(f"grant public.safetensors --level 2 {secret} -o locked.grant --new-passphrase-file words")

    # Files of other programs, by their first bytes.
    with zipfile.ZipFile("model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100))
    shutil.copy("model.pt", "pytorch_model.bin")
    Path("old.pt").write_bytes(pickle.dumps({"weights": list(range(500))}))
    np.savez("model.npz", kernel=kernel)
    np.save("kernel.npy", kernel)
    Path("page.safetensors").write_text(f"<!DOCTYPE html><title>404</title>{' ' * 500}")
    Path("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    # Files that were damaged on their way.
    data = Path("model.safetensors").read_bytes()
    Path("empty.safetensors").touch()
    Path("half.safetensors").write_bytes(data[: len(data) // 2])
    Path("start.safetensors").write_bytes(data[:50])
    altered = bytearray(Path("public.safetensors").read_bytes())
    altered[-10] ^= 1
    Path("altered.safetensors").write_bytes(altered)
    Path("folder").mkdir()
    for name in "ab":
        shutil.copy("model.safetensors", f"folder/{name}.safetensors")
    Path("sharded").mkdir()
    save({"a": kernel}, "sharded/1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("single", "shards"):
        Path(name).mkdir()
    shutil.copy("model.safetensors", "single/a.safetensors")
    save({"a": kernel}, "shards/1.safetensors")
    save({"b": kernel + 1}, "shards/2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    for source, output in (("single", "opened"), ("shards", "released")):
        run(f"protect {source} -o {output} {secret} --signing keys/signing.key --budget 0.3")
        run(f"grant {output} --level 2 {secret} -o {output}.grant")
    Path("circle").symlink_to("circle")
    Path("header.safetensors").write_bytes((7).to_bytes(8, "little") + b'{"\xff":1}')
    Path("nothing.safetensors.index.json").write_text('{"weight_map": {}}')
    Path("closed").mkdir(0o555)
    Path("mistaken.py").write_text(METRICS)

    # Keys of other programs, and damaged ones.
    text = Path("keys/secret.key").read_text()
    raw = rng.bytes(32)
    place = text.index("key: ") + 8
    keys = {
        "typo.key": text[:place] + ("B" if text[place] == "A" else "A") + text[place + 1 :],
        "cut.key": text[: text.index("checksum")],
        "hex.key": f"{raw.hex()}\n",
        "pem.key": f"-----BEGIN PRIVATE KEY-----\n{base64.b64encode(raw).decode()}\n",
        "empty.key": "",
        "id.txt": "AGE-SECRET-KEY-1QQQ\n",
    }
    Path("raw.key").write_bytes(raw)
    Path("utf16.key").write_bytes(text.encode("utf-16"))
    for name, content in keys.items():
        Path(name).write_text(content)
    hidden = secret_forms(raw, bytes(sj.Secret.read("keys/secret.key")))
    hidden += secret_forms(bytes(sj.SigningKey.read("keys/signing.key")))
    hidden += secret_forms(bytes(sj.Grant.read("alice.grant").key))

    try:
        import pyrage
    except ModuleNotFoundError:
        return hidden
    identity, wrong = (pyrage.x25519.Identity.generate() for _ in range(2))
    Path("id.txt").write_text(f"{identity}\n")
    Path("id.pub").write_text(f"{identity.to_public()}\n")
    Path("wrong.txt").write_text(f"{wrong}\n")
    run(f"grant public.safetensors --level 2 {secret} -o sealed.grant --to id.pub")
    return [*hidden, str(identity)[:30], str(wrong)[:30]]


@pytest.fixture
def here(workplace, monkeypatch):
    """A working folder in which nothing can be written."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the working folder is added
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for path in workplace.folder.glob("*.key"):
        path.chmod(0o600)  # of no interest here: a warning about permissions
    (workplace.folder / "id.txt").chmod(0o600)

    def content() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}

    before = content()
    yield workplace
    assert content() == before


@pytest.mark.parametrize(("line", "message"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_is_answered_by_one_line(here, capsys, line, message):
    if "sealed" in line or "--to age1" in line:
        pytest.importorskip("pyrage")
    if "closed" in line and os.geteuid() == 0:
        pytest.skip("nothing is closed to root")
    words = line.split()
    if "--out" in words:  # in place of the one before
        place = words.index("-o")
        del words[place : place + 2]
    if words.count("--level") > 1:
        place = words.index("--level")
        del words[place : place + 2]
    assert main(words) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("selcrypt: ")
    assert_helpful(error.removesuffix("\n"), message, here.hidden)


USAGE = {
    "layout that does not exist": (f"{PROTECT} --layout NHWC", "(?=.*'NHWC')(?=.*--layout).*HWIO"),
    "budget with a sign": (f"{PROTECT} --budget 8%", "--budget: expected a number, got '8%'"),
    "levels in words": (f"{PROTECT} --levels 0.1 two", "--levels: expected a number, got 'two'"),
    "level in words": (f"{GRANT} keys/secret.key --level two", "--level: expected a whole .*'two'"),
    "number of keys that is none": (
        f"{CALIBRATE} --targets 1 2 --keys 1.5",
        "--keys: expected a whole number, got '1.5'",
    ),
    "option with a typing error": (f"{PROTECT} --levls 3", "--levls.* --levels"),
    "no secret": ("protect model.safetensors -o new", "--secret"),
    "no such command": (
        "encrypt model.safetensors",
        "(?=.*encrypt).*protect'?,[ │]*'?grant",  # a line of the box may end between them
    ),
}


@pytest.mark.parametrize(("line", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_names_the_option_and_what_there_is(here, capsys, line, message):
    """In a box, since the command line's parser prints these errors."""
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.search(f"{message}.* --help", " ".join(error.split()))


# --- what is not installed -------------------------------------------------------------------

EXTRAS = {
    "age, to seal": (
        "pyrage", f"{GRANT} keys/secret.key --to age1qqqq",
        r"need pyrage, which is not installed. Install the extra: pip install '\.\[age\]' in"),
    "age, to open": (
        "pyrage", f"{UNLOCK} age.grant --identity id.txt",
        r"need pyrage, which is not installed. Install the extra: pip install '\.\[age\]' in"),
    # These first: what has been imported would not be looked for again.
    "demo, matplotlib": (
        "matplotlib", "demo -o new",
        r"the demo needs matplotlib, which is not installed. Install the extra: .*'\.\[demo\]'"),
    "audit, matplotlib": (
        "matplotlib", "audit demo -o new",
        r"the audit needs matplotlib, which is not installed. Install the .*'\.\[audit,demo\]'"),
    "demo": (
        "skimage", "demo -o new",
        r"the demo needs skimage, which is not installed. Install the extra: pip .*'\.\[demo\]'"),
    "audit": (
        "jinja2", "audit demo -o new",
        r"the audit needs jinja2, which is not installed. Install the extra: .*'\.\[audit,demo\]'"),
}  # fmt: skip

WITHOUT = """
import contextlib, io, json, sys
from selcrypt_jax.cli import main

class Finder:
    # Finds no package of that name, as if it were not installed.

    missing = None

    def find_spec(self, name, path=None, target=None):
        if name == self.missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

finder, found = Finder(), {}
sys.meta_path.insert(0, finder)
for name, (module, line) in json.loads(sys.argv[1]).items():
    finder.missing = module
    for loaded in [n for n in sys.modules if n.partition(".")[0] == module]:
        del sys.modules[loaded]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(line.split())
    found[name] = [status, error.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_extras(workplace):
    """What each command prints in a process that cannot find a package."""
    seal = "-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n-----END AGE ENCRYPTED FILE-----\n"
    (workplace.folder / "age.grant").write_text(seal)
    lines = json.dumps({name: (module, line) for name, (module, line, _) in EXTRAS.items()})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, lines],
        cwd=workplace.folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_is_missing_is_named(without_extras, here, name):
    status, error = without_extras[name]
    assert status == 1
    assert_helpful(error.removesuffix("\n"), EXTRAS[name][2], here.hidden)
    assert not Path("new").exists()


# --- in Python -------------------------------------------------------------------------------

SECRET = sj.Secret(bytes(range(32)))
OTHER = {"dense": {"kernel": jnp.ones((300, 64))}}
TREE = {"conv": {"kernel": jnp.ones((3, 3, 32, 64)), "bias": jnp.ones(64)}}


@pytest.fixture(scope="module")
def m(tmp_path_factory):
    """Parameters, and everything made from them."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, "f4")), TREE)
    scores = importance.l2(params)
    masks = sj.nested_masks(scores, [0.1, 0.2, 0.3])
    keys = sj.ring_keys(sj.level_key(SECRET, sj.new_model_id(), levels=3))
    released = sj.protect(params, masks, secret=SECRET)
    path = tmp_path_factory.mktemp("made") / "public.safetensors"
    released.save(path)
    return SimpleNamespace(
        params=params, scores=scores, masks=masks, keys=keys, released=released, path=path,
        key=sj.level_key(SECRET, released.model_id, level=2, levels=3),
        stranger=sj.level_key(SECRET, sj.new_model_id(), level=2, levels=3),
    )  # fmt: skip


def with_nan(scores: Any) -> Any:
    return jax.tree.map(lambda s: s if s is False else s.at[0, 0, 1, 2].set(jnp.nan), scores)


CALLS = {
    # --- keys
    "old-style keys": (
        lambda m: sj.encrypt(m.params, m.masks, [jax.random.PRNGKey(n) for n in range(3)]),
        TypeError, r"keys\[0\]: expected a typed key, got an array of uint32. Derive keys with"),
    "seeds as keys": (
        lambda m: sj.encrypt(m.params, m.masks, [1, 2, 3]),
        TypeError, r"keys\[0\]: expected a typed key, got int. Derive keys with ring_keys"),
    "one key for three masks": (
        lambda m: sj.encrypt(m.params, m.masks, jax.random.key(0)),
        ValueError, r"keys: expected 3, one for each mask, got a single key. For level"),
    "more masks than keys": (
        lambda m: sj.decrypt(m.params, m.masks, m.keys[:2]),
        ValueError, r"keys: expected 3, .* got 2. For level m pass masks\[:m\] and keys\[:m\]"),
    "one key for all levels": (
        lambda m: sj.encrypt(m.params, m.masks, [m.keys[0]] * 3),
        ValueError, r"keys\[1\]: expected a different key .* Derive them with ring_keys"),
    "level key in place of ring keys": (
        lambda m: sj.decrypt(m.params, m.masks[:2], m.key),
        ValueError, r"keys: expected 2, .* got LevelKey. .* for a LevelKey, pass ring_keys"),
    "seed as secret": (
        lambda m: sj.ring_keys(sj.level_key(42, sj.new_model_id(), levels=3)),
        TypeError, r"Secret: expected 32 bytes, got int. Use Secret.generate\(\)"),
    "passphrase as secret": (
        lambda m: sj.Secret("correct horse"),
        TypeError, r"Secret: expected 32 bytes, got str. Use .* Secret.from_passphrase"),
    "path as secret": (
        lambda m: sj.protect(m.params, m.masks, secret="keys/secret.key"),
        TypeError, r"Secret: expected 32 bytes, got str. Use .* Secret.read\(path\)"),
    "public key to sign": (
        lambda m: sj.protect(
            m.params, m.masks, secret=SECRET, signing=sj.SigningKey.generate().public),
        TypeError, r"signing: expected a SigningKey, got VerifyKey. Use .* SigningKey.read"),
    "signing key to verify": (
        lambda m: sj.verify_file(m.path, signer=sj.SigningKey.generate()),
        TypeError, r"signer: expected a VerifyKey or .* got SigningKey. Pass the `public`"),
    "secret as level key": (
        lambda m: sj.Grant(SECRET),
        TypeError, r"key: expected a LevelKey, got Secret. Make one with level_key"),
    "key of another model": (
        lambda m: sj.unlock(m.released, m.stranger),
        sj.GrantError, r"params: is model \w+, but the grant is for model \w+. Ask the owner"),
    "secret as grant": (
        lambda m: sj.open_model(m.path, SECRET),
        TypeError, r"grant: expected a Grant, .* got Secret. The owner makes one with issue_grant"),
    "grant without the owner's key": (
        lambda m: sj.issue_grant(m.path, level=1, secret=SECRET, signer=None),
        TypeError, r"signer: expected the owner's public key, .* got None. Name your signing.pub;"),
    "level without a grant": (
        lambda m: sj.open_model(m.path, level=1),
        ValueError, r"level: expected none without a grant, got 1. Pass the grant"),
    "seed as jax.random key": (
        lambda m: importance.random(m.params, key=0),
        TypeError, r"key: expected a jax.random key, got int. Make one .* jax.random.key\(0\)"),
    # --- masks and scores
    "mask of another tree": (
        lambda m: sj.encrypt(m.params, sj.nested_masks(importance.l2(OTHER), [0.3]), m.keys[:1]),
        ValueError, r"masks\[0\]: 'conv/bias': expected a mask .* must have the same paths"),
    "mask of another layout": (
        lambda m: sj.encrypt(
            m.params, [{"conv": {"kernel": np.ones((64, 32, 1, 1), bool), "bias": False}}],
            m.keys[:1]),
        ValueError, r"masks\[0\]: 'conv/kernel': expected .* \(3, 3, 32, 64\).* the same layout"),
    "scores as masks": (
        lambda m: sj.encrypt(m.params, [m.scores], m.keys[:1]),
        TypeError, r"masks\[0\]: 'conv/kernel': expected booleans, got float32. Make masks with"),
    "one mask in place of a list": (
        lambda m: sj.encrypt(m.params, m.masks[0], m.keys[:1]),
        TypeError, r"masks: expected a sequence .* got dict. For a single level pass \(mask,\)"),
    "masks in the wrong order": (
        lambda m: sj.decrypt(m.params, m.masks[::-1], m.keys),
        ValueError, r"masks: 'conv/kernel': masks\[1\] lacks group .* See nested_masks"),
    "masks as scores": (
        lambda m: sj.nested_masks(m.masks[0], [0.1]),
        TypeError, r"scores 'conv/kernel': expected an array of numbers, .* Pass scores"),
    "scores of another tree": (
        lambda m: sj.protect(
            m.params, secret=SECRET, levels=[0.1],
            selection=sj.Select(importance=importance.l2(OTHER), small=0)),
        ValueError, r"importance: expected scores .* got 'dense/kernel'. Save them under the same"),
    "scores with NaN": (
        lambda m: sj.nested_masks(with_nan(m.scores), [0.1]),
        ValueError, r"scores 'conv/kernel': .* NaN in 1 of 2048 .*\(0, 0, 1, 2\).* repair them"),
    "share in percent": (
        lambda m: sj.nested_masks(m.scores, [8]),
        ValueError, r"levels\[0\]: expected a share .* got 8. For 8 % pass 0.08"),
    "share as text": (
        lambda m: sj.nested_masks(m.scores, ["8"]),
        TypeError, r"levels\[0\]: expected a number in \(0, 1\], got str. Pass a share"),
    "one share in place of a list": (
        lambda m: sj.nested_masks(m.scores, 0.08),
        TypeError, r"levels: expected a number of levels, .* For a single level pass \[0.08\]"),
    "shares that descend": (
        lambda m: sj.nested_masks(m.scores, [0.2, 0.1]),
        ValueError, r"levels: expected ascending shares, .* got 0.1 after 0.2. Sort them"),
    "more levels than groups": (
        lambda m: sj.nested_masks(m.scores, [n / 5000 for n in range(1, 5001)]),
        ValueError, r"level \d+ adds no groups .* use fewer levels"),
    "too few weights to hide in": (
        lambda m: sj.encrypt(
            m.params, sj.nested_masks(importance.l2(m.params, granularity="weight"), [0.0002]),
            m.keys[:1]),
        ValueError, r"params 'conv/kernel', ring 1: too small .* Select more groups in this leaf"),
    # --- parameters
    "float64": (
        lambda m: sj.encrypt({"w": np.ones((30, 30))}, [True], m.keys[:1]),
        ValueError, r"params 'w': expected a dtype that JAX holds .* Set jax_enable_x64"),
    "integers alone": (
        lambda m: importance.l2({"ids": jnp.ones((30, 30), jnp.int32)}),
        ValueError, r"select: the default \(floating-point .* There are: 'ids'.* change `select`"),
    "numbers that are no arrays": (
        lambda m: sj.encrypt({"w": [0.5, 1.5]}, [{"w": True}], m.keys[:1]),
        ValueError, r"masks\[0\]: 'w': expected arrays in params .* got none. Convert numbers to"),
    "a key among the parameters": (
        lambda m: sj.protect({"w": jax.random.key(0)}, [{"w": True}], secret=SECRET),
        ValueError, r"masks: 'w': expected False for random keys.*Pass False there"),
    "layout that does not exist": (
        lambda m: importance.l2(m.params, layout="NHWC"),
        ValueError, r"layout: expected 'HWIO' or 'OIHW', got 'NHWC'"),
    "select that matches nothing": (
        lambda m: importance.l2(m.params, select="dense"),
        ValueError, r"select: the regular expression 'dense' matches no leaf.* change `select`"),
    "names as select": (
        lambda m: importance.l2(m.params, select=["conv", "head"]),
        TypeError, r"select: expected a regular .* got list. Join names into one expression"),
    # --- files
    "tree in place of Protected": (
        lambda m: sj.unlock(m.params, m.key),
        TypeError, r"protected: expected a Protected, got dict. For the result .* use decrypt"),
    "plain file": (
        lambda m: sj.open_model(plain(m), m.key),
        ValueError, r"plain.safetensors: is not a protected file: .* Expected a file written by"),
    "unlocked twice": (
        lambda m: sj.unlock_file(unlocked(m), m.path.with_name("new"), m.key),
        ValueError, r"opened.safetensors: is not a protected file: .* Expected a file written by"),
    "safetensors as Orbax": (
        lambda m: sj.Protected.load_orbax(m.path, m.params),
        FileNotFoundError, r"expected the folder of an Orbax .* opened with open_model"),
    "another architecture": (
        lambda m: sj.open_model(m.path, m.key, like=OTHER),
        ValueError, r"like: expected the tensors of .* 'dense/kernel'. Leave `like` out"),
    "another width": (
        lambda m: sj.open_model(
            m.path, m.key, like=jax.tree.map(lambda leaf: leaf[..., :8], m.params)),
        ValueError, r"like: 'conv/bias': expected F32\[64\] .* got F32\[8\]. Build the model as"),
    "numbers as metadata": (
        lambda m: sj.protect(m.params, m.masks, secret=SECRET, metadata={"epoch": 3}),
        TypeError, r"metadata: expected a mapping .* Convert values with str or json"),
    # --- functions
    "loss for each example": (
        lambda m: importance.fisher(lambda p, b: b.sum(1), m.params, jnp.ones((2, 4, 3))),
        TypeError, r"loss_fn: expected a scalar array, got shape \(4,\). Return the loss alone"),
    "batches of different sizes": (
        lambda m: importance.fisher(lambda p, b: b.sum(), m.params, [jnp.ones(3), jnp.ones(2)]),
        ValueError, r"batches: expected arrays with the same first axis, .* Stack batches of one"),
    "a list of batches": (
        lambda m: importance.fisher(lambda p, b: b.sum(), m.params, [(jnp.ones(3),)] * 2),
        ValueError, r"batches: expected one pytree .* got a list of 2. Stack them, .*jax.tree.map"),
    "metric that gives an array": (
        lambda m: sj.calibrate_levels(
            m.params, sj.Targets([20, 24], lambda p: jnp.ones(3)), key=jax.random.key(0),
            selection=sj.Select(importance=m.scores, small=0)),
        TypeError, r"evaluate: expected a number, got ArrayImpl. Return the metric alone"),
    "one target in place of a list": (
        lambda m: sj.calibrate_levels(
            m.params, sj.Targets(24, lambda p: 1.0), key=jax.random.key(0),
            selection=sj.Select(importance=m.scores, small=0)),
        TypeError, r"targets: expected a number for each level .* got int. Pass a list, such as"),
}  # fmt: skip


def plain(m: Any) -> Path:
    path = m.path.with_name("plain.safetensors")
    safetensors.numpy.save_file({"w": np.ones((3, 3), np.float32)}, path)
    return path


def unlocked(m: Any) -> Path:
    path = m.path.with_name("opened.safetensors")
    sj.unlock_file(m.path, path, m.key)
    return path


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_a_wrong_call_is_answered_by_one_line(m, call, error, message):
    with pytest.raises(error) as caught:
        call(m)
    assert type(caught.value) is error
    text = str(caught.value).replace(str(m.path.parent), "")
    assert_helpful(text, message, [*secret_forms(bytes(SECRET), bytes(m.key)), "correct horse"])
    assert not m.path.with_name("new").exists()
