"""The commands, as a vendor and a customer run them."""

import base64
import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from selcrypt_jax import Grant, Secret, open_model
from selcrypt_jax.cli import COMMANDS, main

# A slow machine may take long enough for a line of progress.
LOGGED = tuple(f"{number}: level" for number in range(1, 100))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {
        "features.0.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "features.0.bias": rng.standard_normal(32).astype(np.float32),
        "classifier.weight": rng.standard_normal((40, 64)).astype(np.float16),
    }
    safetensors.numpy.save_file(tensors, "model.safetensors")
    return tmp_path


@pytest.fixture
def selcrypt(capsys):
    def run(line: str, *, fails: str | None = None) -> str:
        status = main(line.split())
        out = capsys.readouterr()
        if fails is None:
            assert status == 0, out.err
            known = ("Not signed", "The quality of these levels was not measured", *LOGGED)
            assert all(line.startswith(known) for line in out.err.splitlines()), out.err
        else:
            assert status == 1
            assert fails in out.err
            assert out.err.startswith("selcrypt: ")
            assert "Traceback" not in out.err
        run.error = out.err
        return out.out

    run: Any
    return run


PROTECT = "protect model.safetensors -o public.safetensors --secret keys/secret.key"
PROTECT += " --signing keys/signing.key --budget 0.3 --levels 3"


@pytest.fixture
def public(selcrypt):
    selcrypt("keygen -o keys")
    selcrypt(PROTECT)
    return Path("public.safetensors")


def test_the_whole_way(selcrypt, public):
    for level in (1, 2, 3):
        selcrypt(f"grant {public} --level {level} --secret keys/secret.key -o {level}.grant")
        selcrypt(f"unlock {public} --grant {level}.grant -o {level}.safetensors")
    original = Path("model.safetensors").read_bytes()
    assert Path("3.safetensors").read_bytes() == original
    assert len({Path(f"{m}.safetensors").read_bytes() for m in (1, 2, 3)}) == 3
    selcrypt(f"unlock {public} -g 3.grant --level 2 -o two.safetensors")
    assert Path("two.safetensors").read_bytes() == Path("2.safetensors").read_bytes()
    assert "stays closed" in selcrypt(f"inspect {public} -g 2.grant")
    assert "Signed by" in selcrypt(f"verify {public}")
    assert "as expected" in selcrypt(f"verify {public} --signer keys/signing.pub -g 2.grant")
    arrays = open_model(public, "3.grant")
    stock = safetensors.numpy.load_file("model.safetensors")
    assert all((arrays[name] == leaf).all() for name, leaf in stock.items())
    selcrypt(f"rotate {public} --secret keys/secret.key --signing keys/signing.key")
    selcrypt(f"unlock {public} -g 3.grant -o x", fails="but the grant is for model")
    assert not Path("x").exists()


def test_whole_groups_move(selcrypt):
    selcrypt("keygen -o keys")
    selcrypt(f"{PROTECT} --unit group --small 0 --rest plain")
    selcrypt("grant public.safetensors --level 3 --secret keys/secret.key -o 3.grant")
    selcrypt("unlock public.safetensors --grant 3.grant -o 3.safetensors")
    assert Path("3.safetensors").read_bytes() == Path("model.safetensors").read_bytes()
    plain, moved = (
        safetensors.numpy.load_file(name)["features.0.weight"]
        for name in ("model.safetensors", "public.safetensors")
    )
    # Kernels changed places; each is still one, up to its fine bits.
    changed = moved[(moved != plain).any((2, 3))]
    distance = np.abs(changed[:, None] / plain.reshape(1, -1, 3, 3) - 1).max((2, 3)).min(1)
    assert len(changed) > 100
    assert (distance < 1 / 8).all()


def test_json_says_the_same(selcrypt):
    made = json.loads(selcrypt("keygen -o keys --json"))
    found = json.loads(selcrypt(PROTECT + " --json"))
    assert found["signer"] == made["signer"]
    assert found.pop("layout") == "OIHW"
    assert found.pop("selected") == {
        "classifier.weight": 768, "features.0.weight": 153, "features.0.bias": 32
    }  # fmt: skip
    assert found.pop("whole") == ["features.0.bias"]
    assert found.pop("untouched") == {}
    assert found == json.loads(selcrypt("inspect public.safetensors --json"))
    assert [level["level"] for level in found["levels"]] == [1, 2, 3]
    grant = json.loads(
        selcrypt("grant public.safetensors --level 2 --secret keys/secret.key -o g --json")
    )
    assert grant == {
        "grant": "g", "model_id": found["model_id"], "level": 2, "recipients": 0,
        "signer": made["signer"],
    }  # fmt: skip
    opened = json.loads(selcrypt("unlock public.safetensors -g g -o out --json"))
    assert opened == {"out": "out", "model_id": found["model_id"], "level": 2}
    checked = json.loads(selcrypt("verify public.safetensors -g g --json"))
    assert checked["signer_known"] is True
    assert [level["opens"] for level in checked["levels"]] == [True, True, False]
    rotated = json.loads(
        selcrypt(
            "rotate public.safetensors --secret keys/secret.key --signing keys/signing.key "
            "-o new --json"
        )
    )
    assert rotated["model_id"] == json.loads(selcrypt("inspect new --json"))["model_id"]
    assert rotated["model_id"] != found["model_id"]


@pytest.mark.parametrize("strategy", ["l2", "random", "ascend", "descend", "mean"])
def test_strategies_need_no_data(selcrypt, strategy):
    selcrypt("keygen -o keys")
    selcrypt(PROTECT + f" --importance {strategy} --granularity filter")
    found = json.loads(selcrypt("inspect public.safetensors --json"))
    assert found["levels"][-1]["groups"] > 0


def test_passphrases_from_a_file(selcrypt):
    Path("words").write_text("correct horse\n")
    Path("other").write_text("battery staple")
    selcrypt("keygen -o keys --new-passphrase-file words")
    selcrypt(PROTECT + " --passphrase-file words")
    selcrypt(PROTECT + " --passphrase-file other --force", fails="secret.key: wrong passphrase")
    selcrypt(PROTECT + " --force", fails="--passphrase-file")
    grant = "grant public.safetensors --level 1 --secret keys/secret.key --passphrase-file words"
    told = selcrypt(f"{grant} -o g --new-passphrase-file other")
    assert "locked with a passphrase" in told
    selcrypt("unlock public.safetensors -g g -o out --passphrase-file other")
    selcrypt("unlock public.safetensors -g g -o out2 --passphrase-file words", fails="g: wrong")
    for content, got in {
        b"": "got an empty one", b"\n": "got an empty one", b"one\ntwo\n": "got 2 lines",
        b"one\n\n": "got 2 lines", b"a\x0cb\n": "got a control", b"a\xc2\x85b": "got a control",
        b"\xff": "in UTF-8, got something else", b"x" * 1001: "got 1001 bytes",
        b"x" * 10000: "got more than 4000 bytes",
    }.items():  # fmt: skip
        Path("bad").write_bytes(content)
        selcrypt("keygen -o more --new-passphrase-file bad", fails="bad: ")
        assert got in selcrypt.error
        assert not Path("more").exists()
    assert "correct horse" not in Path("keys/secret.key").read_text()
    for content in (b"battery staple\r\n", b"\xef\xbb\xbfbattery staple\n"):
        Path("same").write_bytes(content)
        selcrypt("unlock public.safetensors -g g -o out --passphrase-file same --force")


def test_passphrases_from_a_terminal(selcrypt, monkeypatch):
    typed: list[str | Exception] = []

    def answer(prompt: str) -> str:
        if isinstance(word := typed.pop(0), Exception):
            raise word
        return word

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", answer)
    for words, fails in {
        ("a", "b"): "expected the same one twice",
        ("",): "got an empty one",
        ("a\x1b[A",): "got a control character",
        (UnicodeDecodeError("utf-8", b"my secret", 3, 4, "bad"),): "Set LANG",
    }.items():
        typed[:] = words
        selcrypt("keygen -o keys --passphrase", fails=fails)
        assert "secret" not in selcrypt.error
        assert not Path("keys").exists()
        assert not typed
    typed[:] = [" two  spaces ", " two  spaces "]
    selcrypt("keygen -o keys --passphrase")
    Path("words").write_text(" two  spaces \n")
    selcrypt(PROTECT + " --passphrase-file words")
    monkeypatch.setattr("sys.stdin", None)  # closed, as in some services
    selcrypt(PROTECT + " --force", fails="there is no terminal to ask")
    selcrypt("keygen -o more --passphrase", fails="there is no terminal to ask")


def test_grants_that_are_sealed_to_a_recipient(selcrypt, public, capsys):
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    Path("id.txt").write_text(f"# mine\n{identity}\n")
    Path("id.pub").write_text(f"{identity.to_public()}\n")
    grant = f"grant {public} --level 3 --secret keys/secret.key"
    selcrypt(f"{grant} -o a.grant --to {identity.to_public()}")
    selcrypt(f"{grant} -o b.grant --to id.pub")
    for name in ("a.grant", "b.grant"):
        assert "model-id" not in Path(name).read_text()
        selcrypt(f"unlock --identity id.txt {public} -g {name} -o {name}.out")
        assert Path(f"{name}.out").read_bytes() == Path("model.safetensors").read_bytes()
    selcrypt(f"unlock {public} -g a.grant -o x", fails="--identity")
    Path("other.txt").write_text(str(pyrage.x25519.Identity.generate()))
    selcrypt(f"unlock {public} -g a.grant -o x --identity other.txt", fails="not sealed to")
    selcrypt(f"{grant} -o c.grant --to nonsense", fails="nonsense")
    for private in (str(identity), "id.txt"):
        main(f"{grant} -o c.grant --to {private}".split())
        error = capsys.readouterr().err
        assert "expected a" in error
        assert str(identity) not in error
    assert not Path("c.grant").exists()


@pytest.mark.parametrize("force", ["", " --force"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_keys_are_made_together_or_not_at_all(selcrypt, monkeypatch, step, force):
    if force:
        selcrypt("keygen -o keys")
    before = {path.name: path.read_bytes() for path in Path().glob("keys/*")}
    real, calls = os.fsync, []

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    selcrypt("keygen -o keys" + force, fails="nothing was written. Free some space")
    assert {path.name: path.read_bytes() for path in Path().glob("keys/*")} == before
    assert Path("keys").exists() == bool(force)


def test_unlocked_weights_are_for_their_owner_alone(selcrypt, public):
    selcrypt(f"grant {public} --level 3 --secret keys/secret.key -o g")
    selcrypt(f"unlock {public} -g g -o out")
    assert Path("out").stat().st_mode & 0o777 == 0o600
    Path("out").chmod(0o640)
    selcrypt(f"unlock {public} -g g -o out --force")
    assert Path("out").stat().st_mode & 0o777 == 0o640
    assert public.stat().st_mode & 0o044 == 0o044


def test_nothing_is_overwritten(selcrypt, public):
    selcrypt(f"grant {public} --level 1 --secret keys/secret.key -o g")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    selcrypt("keygen -o keys", fails="already exists")
    selcrypt(PROTECT, fails="the output already exists")
    selcrypt(f"grant {public} --level 1 --secret keys/secret.key -o g", fails="already exists")
    selcrypt(f"unlock {public} -g g -o model.safetensors", fails="the output already exists")
    selcrypt(f"unlock {public} -g g -o {public} --force", fails="expected a different file")
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    selcrypt(f"unlock {public} -g g -o model.safetensors --force")


def test_keys_are_never_an_output(selcrypt, public):
    selcrypt(f"grant {public} --level 1 --secret keys/secret.key -o g")
    keys = {path: path.read_bytes() for path in [*Path("keys").iterdir(), Path("g"), public]}
    secret, signing = "--secret keys/secret.key", "--signing keys/signing.key"
    for line in (
        f"protect model.safetensors -o keys/secret.key {secret}",
        f"protect model.safetensors -o keys/signing.key {secret} {signing}",
        f"grant {public} --level 1 {secret} -o keys/secret.key",
        f"grant {public} --level 1 {secret} -o {public}",
        f"unlock {public} -g g -o g",
        f"rotate {public} {secret} {signing} -o keys/signing.key",
    ):
        selcrypt(f"{line} --force", fails="expected a different file from the input")
    assert keys == {path: path.read_bytes() for path in keys}


def test_only_what_the_owner_signed_is_signed_anew_or_granted(selcrypt, public):
    selcrypt("keygen -o other")
    new = "--secret keys/secret.key --signing other/signing.key"
    selcrypt(f"rotate {public} {new} -o x", fails="expected a file signed by")
    selcrypt(f"rotate {public} {new} --old-signer keys/signing.pub -o moved")
    assert "as expected" in selcrypt("verify moved --signer other/signing.pub")
    grant = "--level 1 --secret keys/secret.key"
    selcrypt(f"grant moved {grant} -o g --signer keys/signing.pub", fails="expected a file signed")
    selcrypt(f"grant moved {grant} -o g --signer other/signing.pub")
    selcrypt(PROTECT.replace(" --signing keys/signing.key", "").replace("-o public", "-o plain"))
    plain = "rotate plain.safetensors --secret keys/secret.key"
    selcrypt(f"{plain} --signing keys/signing.key", fails="is not signed, so it may have been")
    selcrypt(plain)


BAD = {
    "no such file": ("verify nothing", "nothing"),
    "not a safetensors file": ("verify words", "is truncated, or not a safetensors file"),
    "not protected": ("verify model.safetensors", "is not a protected file"),
    "protected already": (
        PROTECT.replace("model.safetensors", "public.safetensors").replace("-o public", "-o x"),
        "is already a protected file",
    ),
    "level that does not exist": (
        "grant public.safetensors --level 4 --secret keys/secret.key -o x", "expected 1..3, got 4"),
    "another secret": (
        "grant public.safetensors --level 1 --secret other/secret.key -o x", "does not open"),
    "wrong kind of key": (
        "grant public.safetensors --level 1 --secret keys/signing.pub -o x",
        "expected a secret, which begins with selcrypt-secret-v1, got a verify key (public)"),
    "rotate without signing": (
        "rotate public.safetensors --secret keys/secret.key", "expected a signing key"),
    "signed by another": (
        "verify public.safetensors --signer other/signing.pub", "expected a file signed by"),
    "select nothing": (PROTECT + " --select nope --force", "matches no leaf. There are: 'class"),
    "bad regex": (PROTECT + " --select ( --force", "is not a regular expression"),
    "budget": (PROTECT.replace("0.3", "0") + " --force", "expected a share of the groups"),
    "budget that selects nothing": (
        PROTECT.replace("0.3", "0.0001") + " --force", "level 1 adds no groups"),
    "levels": (PROTECT.replace("levels 3", "levels 0") + " --force", "expected at least 1"),
    "folder missing": (PROTECT.replace("-o public", "-o no/public"), "no such folder"),
    "scores and a granularity": (
        PROTECT + " --importance scores.safetensors --granularity filter --force",
        "got granularity too"),
    "filters of what?": (
        PROTECT + " --granularity filter --select classifier --force", "OIHW as in PyTorch"),
    "later grant": ("unlock public.safetensors -g later.grant -o x", "Update selcrypt-jax"),
}  # fmt: skip


def test_bad_input_is_refused_and_nothing_is_lost(selcrypt, public):
    selcrypt("keygen -o other")
    selcrypt(f"grant {public} --level 1 --secret keys/secret.key -o g")
    text = Path("g").read_text().replace("grant-v1", "grant-v2")
    Path("later.grant").write_text(text)
    Path("later.grant").chmod(0o600)
    Path("words").write_text("these are some words and no model")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for line, message in BAD.values():
        selcrypt(line, fails=message)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_secrets_are_never_shown(selcrypt, public, capsys, monkeypatch):
    """Not by any command, in any error, or in the file."""
    selcrypt(f"grant {public} --level 2 --secret keys/secret.key -o g")
    secrets = [bytes(Secret.read("keys/secret.key")), bytes(Grant.read("g").key)]
    secrets += [base64.b64decode(Path("keys/signing.key").read_text().split("key: ")[1].split()[0])]
    lines = [
        f"inspect {public}", f"inspect {public} -g g --json", f"verify {public} -g g",
        f"unlock {public} -g g -o out", f"unlock {public} -g g -o out",
        f"grant {public} --level 2 --secret g -o x", f"unlock {public} -g keys/secret.key -o x",
        f"verify {public} --signer keys/signing.key", f"verify {public} -g keys/secret.key",
        f"grant {public} --level 9 --secret keys/secret.key -o x --json",
        f"rotate {public} --secret keys/signing.key",
    ]  # fmt: skip
    shown = public.read_bytes()
    for line in lines:
        main(line.split())
        out = capsys.readouterr()
        shown += (out.out + out.err).encode()
    # a key whose last characters were lost, and one with a typing error
    text = Path("keys/secret.key").read_text()
    for damaged in (text[:-30], text.replace("key: ", "key: A"), text.replace("key: ", "key ")):
        Path("damaged").write_text(damaged)
        Path("damaged").chmod(0o600)
        assert main(f"grant {public} --level 1 --secret damaged -o x".split()) == 1
        shown += capsys.readouterr().err.encode()
    for secret in secrets:
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert form not in shown
            assert form[:20] not in shown
    assert repr(Secret(secrets[0])) == "Secret(<32 bytes>)"


def test_a_file_that_others_can_read_is_warned_about(selcrypt, public, capsys):
    Path("keys/secret.key").chmod(0o644)
    assert main(f"grant {public} --level 1 --secret keys/secret.key -o g".split()) == 0
    assert "warning: keys/secret.key: others may read this file" in capsys.readouterr().err


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "selcrypt_jax", *args],
        capture_output=True, text=True, check=False, timeout=120, **options,
    )  # fmt: skip


def test_unlock_starts_no_jax_and_needs_no_locale(selcrypt, public):
    selcrypt(f"grant {public} --level 3 --secret keys/secret.key -o g")
    code = (
        "import sys; from selcrypt_jax.cli import main; "
        "status = main(['unlock', 'public.safetensors', '-g', 'g', '-o', 'ü.safetensors']); "
        "print(status, [m for m in ('jax', 'flax', 'optax', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []"
    assert Path("ü.safetensors").read_bytes() == Path("model.safetensors").read_bytes()


def test_as_a_process(public):
    assert run("unlock", "--help").returncode == 0
    assert "selcrypt keygen -o keys" in run("--help").stdout
    wrong = run("unlock", str(public))
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    failed = run("verify", "nothing")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("selcrypt: ")


def test_help_is_for_the_command_line():
    """The help is true of the defaults, and does not mention Python."""
    start = run("--help").stdout
    assert "sealed: without a key it is worthless" in " ".join(start.split())
    for command in COMMANDS:
        text = " ".join(run(command, "--help").stdout.replace("│", " ").split())
        assert "Python" not in text, command
        assert "pytree" not in text, command
        assert "None" not in text, command
        assert "(default: )" not in text, command
        assert "(default: False)" not in text, command
        assert "--no-" not in text, command
        assert "not given" not in text, command
    assert "sealed with everything else" in " ".join(
        run("protect", "--help").stdout.replace("│", " ").split()
    )


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fills_the_terminal(command, columns, capsys, monkeypatch):
    """No line is too long, or ends where the next word would have fitted."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for line, following in itertools.pairwise(lines):
        boxed = line.startswith("│") and following.startswith("│ ")
        if boxed and line[2:16].isspace() and following[2:16].isspace():
            word = re.split(r"[ ,]", following[1:].strip())[0]
            assert len(line[:-1].rstrip()) + 1 + len(word) > len(line) - 3, (line, following)


def test_odd_surroundings(selcrypt, public):
    version = run("--version")
    assert version.returncode == 0
    closed = subprocess.run(
        f"{sys.executable} -m selcrypt_jax inspect {public} >&-",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in closed.stderr
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run("--help", env=plain).returncode == 0
    Path("[red]x[bold].safetensors").write_bytes(public.read_bytes())
    assert "[red]x[bold].safetensors" in selcrypt("inspect [red]x[bold].safetensors")


@pytest.mark.parametrize("limit", [250_000, 500_000, 1_000_000, 1_400_000])
def test_too_little_address_space_is_one_line(public, limit):
    """JAX aborts with a trace of C++ if it cannot start its threads."""
    line = f"{sys.executable} -m selcrypt_jax {PROTECT} --force"
    before = public.read_bytes()
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v {limit}; {line}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("selcrypt: memory: expected at least"), done.stderr
    assert done.stderr.count("\n") == 1
    assert public.read_bytes() == before


BROKEN = {
    "missing": "raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')",
    "a library of the system": "raise ImportError('libx.so: cannot open shared object file')",
    "an essay": "raise ImportError('\\n\\nIMPORTANT: READ\\n\\nOriginal error was: no libx\\n')",
    "nothing": "raise ImportError",
}


@pytest.mark.parametrize("module", ["numpy", "tyro", "cryptography", "jax"])
@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
def test_a_broken_installation_is_one_line(here, fault, module):
    Path(f"{module}.py").write_text(fault)
    env = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    line = [sys.executable, "-m", "selcrypt_jax", *PROTECT.split()]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("selcrypt: a library failed to load: "), done.stderr
    assert "pip install --force-reinstall" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("can't start new thread"), RuntimeError("RESOURCE_EXHAUSTED: x")],
)
def test_memory_that_runs_out_is_one_line(public, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("selcrypt_jax.cli._customer.inspect_file", fails)
    capsys.readouterr()
    assert main(["inspect", str(public)]) == 1
    assert capsys.readouterr().err.startswith("selcrypt: not enough memory")
    error.args = ("a fault of ours",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="a fault of ours"):
            main(["inspect", str(public)])


def test_every_command_teaches():
    for name, command in COMMANDS.items():
        assert command.__doc__, name


def test_a_quantised_checkpoint_is_said_to_stay_plain(here, capsys):
    rng = np.random.default_rng(0)
    tensors = {
        "fc.weight": rng.integers(-127, 127, (64, 96), np.int8),
        "fc.scale": rng.uniform(0.1, 1, (64, 1)).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, "int8.safetensors")
    assert main(["keygen", "-o", "keys"]) == 0
    line = "protect int8.safetensors --rest plain --secret keys/secret.key --budget 0.9 --levels 1 "
    line += "--small 0 -o "
    assert main([*line.split(), "plain.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert "untouched  in the other tensors: 6,144 I8" in out
    assert "only if --select names their tensors" in err
    assert main([*line.split(), "named.safetensors", "--select", "."]) == 0
    out, err = capsys.readouterr()
    assert "untouched" not in out
    assert "--select" not in err
