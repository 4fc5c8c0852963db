"""New versions: what an earlier release encrypts, the next one encrypts as well."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from selcrypt_jax import (
    GrantError,
    IntegrityError,
    LosslessCipher,
    Secret,
    Select,
    SigningKey,
    inspect_file,
    level_key,
    open_model,
    protect,
    protect_file,
    unlock,
)
from selcrypt_jax.cli import main

SECRET, SIGNING = Secret(bytes(range(32))), SigningKey(bytes(32))
rng = np.random.default_rng(0)
FIRST = {
    "conv.weight": (0.1 * rng.standard_normal((64, 32, 3, 3))).astype(np.float32),
    "out.weight": (0.1 * rng.standard_normal((40, 256))).astype(np.float32),
    "norm.weight": rng.uniform(0.5, 2, 64).astype(np.float32),
}
SELECT = Select(budget=0.2, layout="OIHW")


def changed(by: float) -> dict[str, np.ndarray]:
    """The next version: every tensor moved by this share of its size."""
    rng = np.random.default_rng(1)
    return {
        name: leaf + (by * leaf.std() * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in FIRST.items()
    }


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(tensors, path)
    return path


def encrypted(path: Path, plain: dict[str, np.ndarray]) -> np.ndarray:
    """The weights of the convolution and the dense layer that have changed."""
    shipped = open_model(path)
    return np.concatenate([(shipped[n] != plain[n]).ravel() for n in FIRST if "norm" not in n])


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A release with a plain rest."""
    plain = save(tmp_path / "first", FIRST)
    protect_file(
        plain, tmp_path / "v1", secret=SECRET, levels=3, selection=SELECT, signing=SIGNING,
        rest="plain",
    )  # fmt: skip
    return tmp_path / "v1"


@pytest.mark.parametrize("by", [0.001, 0.01, 0.05, 0.16])
def test_what_was_encrypted_is_encrypted(first, tmp_path, by):
    second = changed(by)
    options = {"secret": SECRET, "signing": SIGNING, "rest": "plain"}
    plain, found = save(tmp_path / "second", second), {}
    for name, how in {
        "like": {"like": first},
        "anew": {"levels": 3, "selection": SELECT},
    }.items():
        protect_file(plain, tmp_path / name, **how, **options)
        found[name] = encrypted(tmp_path / name, second)
    before = encrypted(first, FIRST)
    # Masked bits agree by chance once in a million weights.
    assert (before & ~found["like"]).sum() <= 3
    assert (found["like"] & ~before).sum() <= 3
    if by == 0.16:  # without it this would fail
        assert (before & ~found["anew"]).sum() > 0.05 * before.sum()
    assert inspect_file(tmp_path / "like").levels == inspect_file(first).levels


@pytest.mark.parametrize("rest", ["sealed", "plain"])
def test_levels_open_the_same_weights(first, tmp_path, rest):
    second = changed(0.05)
    protect_file(
        save(tmp_path / "second", second), tmp_path / "v2", secret=SECRET, like=first, rest=rest,
        signing=SIGNING,
    )  # fmt: skip
    for level in (1, 2, 3):
        closed = []
        for path, plain in ((first, FIRST), (tmp_path / "v2", second)):
            model_id = bytes.fromhex(inspect_file(path).model_id)
            opened = open_model(path, level_key(SECRET, model_id, level=level, levels=3))
            closed.append(np.concatenate([(opened[n] != plain[n]).ravel() for n in FIRST]))
        assert (closed[0] != closed[1]).sum() <= 3
    assert not closed[1].any()


def test_versions_go_on_from_each_other(first, tmp_path):
    """Sealed from the second version on, whose level 1 has no ring; another cipher and dtype."""
    halves = {name: leaf.astype(np.float16) for name, leaf in changed(0.01).items()}
    third = {name: leaf.astype(np.float32) for name, leaf in halves.items()}
    options = {"secret": SECRET, "signing": SIGNING}
    stream = LosslessCipher(permute=False)
    protect_file(
        save(tmp_path / "a", halves), tmp_path / "v2", like=first, cipher=stream, **options
    )
    protect_file(save(tmp_path / "b", third), tmp_path / "v3", like=tmp_path / "v2", **options)
    found = [inspect_file(path).levels for path in (first, tmp_path / "v2", tmp_path / "v3")]
    assert [level.groups for level in found[2]][1:] == [level.groups for level in found[0]][1:]
    assert found[1] == found[2]


def test_of_a_tree(first, tmp_path):
    second = changed(0.01)
    released = protect(second, secret=SECRET, like=first, rest="plain")
    wrong = np.concatenate(
        [(np.asarray(released.params[n]) != second[n]).ravel() for n in FIRST if "norm" not in n]
    )
    assert (wrong != encrypted(first, FIRST)).sum() <= 3
    key = level_key(SECRET, released.model_id, levels=3)
    assert all(np.array_equal(leaf, second[n]) for n, leaf in unlock(released, key).items())


def test_an_owner_may_have_changed_the_key_or_begun_without_one(first, tmp_path, capsys):
    second = save(tmp_path / "second", changed(0.01))
    unsigned, other = tmp_path / "unsigned", SigningKey(bytes(range(32)))
    protect_file(tmp_path / "first", unsigned, secret=SECRET, levels=3, selection=SELECT)
    SIGNING.public.write(tmp_path / "old.pub")
    options = {"secret": SECRET, "signing": other, "force": True}
    for old, how in (
        (first, SIGNING.public),
        (first, tmp_path / "old.pub"),
        (unsigned, "unsigned"),
    ):
        protect_file(second, tmp_path / "v2", like=old, old_signer=how, **options)
        groups = ([x.groups for x in inspect_file(p).levels[1:]] for p in (tmp_path / "v2", old))
        assert len({*map(tuple, groups)}) == 1
        protect(changed(0.01), secret=SECRET, signing=other, like=old, old_signer=how)
    for old, how in ((unsigned, None), (first, "unsigned"), (unsigned, SIGNING.public)):
        with pytest.raises(IntegrityError, match=r'--old-signer signing.pub.*or "unsigned"'):
            protect_file(second, tmp_path / "v2", like=old, old_signer=how, **options)
    for call in (protect_file, protect):
        with pytest.raises(ValueError, match="old_signer: expected only with like"):
            call(
                *((second, tmp_path / "v3") if call is protect_file else (changed(0.01),)),
                secret=SECRET, old_signer="unsigned",
            )  # fmt: skip
    SECRET.write(tmp_path / "secret.key")
    other.write(tmp_path / "signing.key")
    words = ["protect", str(second), "-o", str(tmp_path / "v4"), "--like", str(unsigned)]
    words += ["--secret", str(tmp_path / "secret.key"), "--signing", str(tmp_path / "signing.key")]
    assert main(words) == 1
    assert main([*words, "--old-signer", "unsigned"]) == 0


def test_what_the_earlier_release_did_not_have_is_named(first, tmp_path, capsys):
    second = changed(0.01) | {"head.weight": np.ones((32, 16), np.float32)}
    plain = save(tmp_path / "second", second)
    for rest, said in (("plain", "They are plain: use --rest sealed"), ("sealed", "are sealed")):
        done = protect_file(plain, tmp_path / rest, secret=SECRET, like=first, rest=rest)
        assert done.new == ("head.weight",)
        SECRET.write(tmp_path / "secret.key", force=True)
        words = ["protect", str(plain), "-o", str(tmp_path / "p"), "--like", str(first), "--force"]
        assert main([*words, "--secret", str(tmp_path / "secret.key"), "--rest", rest]) == 0
        err = capsys.readouterr().err
        assert "'head.weight'" in err
        assert said in err
    with pytest.warns(UserWarning, match="lacks 'head.weight', which stay plain"):
        protect(second, secret=SECRET, like=first, rest="plain")


def test_equal_tensors_stay_equal(first, tmp_path):
    """A tensor that the earlier release lacks, with the weights of one that it has."""
    second = changed(0.01)
    second["tied.weight"] = second["out.weight"]
    plain = save(tmp_path / "second", second)
    protect_file(plain, tmp_path / "v2", secret=SECRET, like=first, signing=SIGNING, rest="plain")
    shipped = open_model(tmp_path / "v2")
    for name in ("tied.weight", "out.weight"):
        assert (shipped[name] != second[name]).mean() > 0.1


def test_on_the_command_line(first, tmp_path, capsys):
    SECRET.write(tmp_path / "secret.key")
    SIGNING.write(tmp_path / "signing.key")
    plain = save(tmp_path / "second", changed(0.01))
    words = ["protect", str(plain), "-o", str(tmp_path / "v2"), "--like", str(first)]
    words += ["--secret", str(tmp_path / "secret.key"), "--signing", str(tmp_path / "signing.key")]
    assert main(words) == 0
    assert [level.groups for level in inspect_file(tmp_path / "v2").levels] == [0] + [
        level.groups for level in inspect_file(first).levels[1:]
    ]
    capsys.readouterr()
    assert main([*words, "--force", "--budget", "0.3"]) == 1
    assert "like: expected no --budget with it" in capsys.readouterr().err
    assert main([*words, "--force", "--levels", "2"]) == 1
    assert "like: expected no --levels with it" in capsys.readouterr().err
    assert main([*words, "--force", "--evaluate", "mine:metric", "--small", "0"]) == 1
    assert "like: expected no --evaluate, --small with it" in capsys.readouterr().err


def refusal(kind, first, tmp_path):
    """Arguments of a call that is refused."""
    tensors, how = changed(0.01), {"secret": SECRET, "like": first, "signing": SIGNING}
    if kind == "another secret":
        how["secret"] = Secret(bytes(32))
    elif kind == "another signer":
        how["signing"] = SigningKey(bytes(range(32)))
    elif kind == "no such tensor":
        del tensors["conv.weight"]
    elif kind == "another shape":
        tensors["out.weight"] = tensors["out.weight"].T.copy()
    elif kind == "integers":
        tensors["out.weight"] = tensors["out.weight"].astype(np.float32).view(np.int32) > 0
    elif kind == "plain like sealed":
        sealed = tmp_path / "sealed"
        protect_file(tmp_path / "first", sealed, secret=SECRET, signing=SIGNING)
        how |= {"like": sealed, "rest": "plain"}
    elif kind == "not protected":
        how["like"] = tmp_path / "first"
    elif kind == "levels":
        how["levels"] = 3
    elif kind == "no file":
        how["like"] = tmp_path / "missing"
    return save(tmp_path / "second", tensors), how


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("another secret", GrantError, "this secret did not protect this file"),
        ("another signer", IntegrityError, "expected an earlier release signed by"),
        ("no such tensor", ValueError, r"tensor 'conv.weight': expected shape \[64, 32, 3, 3\]"),
        ("another shape", ValueError, r"expected shape \[40, 256\].*got shape \[256, 40\]"),
        ("integers", ValueError, "tensor 'out.weight'"),
        ("plain like sealed", ValueError, "like: .*has a sealed rest, expected a plain one"),
        ("not protected", ValueError, "is not a protected file"),
        ("levels", ValueError, "like: expected no levels with it, since like determines"),
        ("no file", OSError, "missing"),
    ],
)
def test_bad_versions_are_refused(first, tmp_path, kind, error, message):
    plain, how = refusal(kind, first, tmp_path)
    with pytest.raises(error, match=message):
        protect_file(plain, tmp_path / "v2", **how)
    assert not (tmp_path / "v2").exists()
