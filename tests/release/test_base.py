"""Networks fine-tuned from a public one: the selection follows the change."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from selcrypt_jax import Secret, Select, open_model, protect, protect_file
from selcrypt_jax.cli import main

SECRET = Secret(bytes(range(32)))
rng = np.random.default_rng(0)
BASE = {
    "conv.weight": rng.standard_normal((64, 32, 3, 3)).astype(np.float32),
    "out.weight": rng.standard_normal((40, 256)).astype(np.float16),
    "norm.weight": np.ones(64, np.float32),
}
# The convolution's change is large where its weights are small; half of the rows out stay.
CHANGE = {
    "conv.weight": 0.1 / (0.1 + np.abs(BASE["conv.weight"])),
    "out.weight": 0.01 * (np.arange(40) < 20)[:, None] * rng.standard_normal((40, 256)),
    "norm.weight": 0.01 * rng.standard_normal(64),
}
TUNED = {name: (leaf + CHANGE[name]).astype(leaf.dtype) for name, leaf in BASE.items()}
SELECT = Select(layout="OIHW", small=0, budget=0.2)


def save(path: Path, tensors) -> Path:
    safetensors.numpy.save_file(dict(tensors), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "tuned", TUNED), save(tmp_path / "base", BASE)


def left(shipped: Path, base) -> float:
    """The share of squared change that is plain, averaged over weights."""
    file, size, plain = open_model(shipped), 0, 0.0
    for name, leaf in TUNED.items():
        known = base.get(name, np.zeros(()))
        known = known if known.shape == leaf.shape else np.zeros(())
        squares = np.square(leaf.astype(np.float64) - known.astype(np.float64))
        if squares.any():
            size += leaf.size
            plain += leaf.size * squares[file[name] == leaf].sum() / squares.sum()
    return plain / size


def select(**options) -> Select:
    return Select(**{**vars(SELECT), **options})


def test_groups_are_ranked_by_how_they_changed(files, tmp_path):
    tuned, base = files
    options = {"secret": SECRET, "levels": 2, "rest": "plain"}
    done = protect_file(tuned, tmp_path / "change", selection=select(base=base), **options)
    # Masked fine bits agree by chance now and then.
    assert done.plain_change == pytest.approx(left(tmp_path / "change", BASE), abs=2e-3)
    assert (open_model(tmp_path / "change")["out.weight"] == TUNED["out.weight"])[20:].all()
    done = protect_file(tuned, tmp_path / "size", selection=SELECT, **options)
    assert done.plain_change is None
    assert left(tmp_path / "change", BASE) < left(tmp_path / "size", BASE) - 0.1


def test_sealed_leaves_nothing_of_the_change(files, tmp_path):
    tuned, base = files
    done = protect_file(tuned, tmp_path / "p", secret=SECRET, selection=select(base=base))
    assert done.plain_change == 0


def test_all_forms_of_a_base_select_the_same(files, tmp_path):
    tuned, base = files
    folder = tmp_path / "several"
    folder.mkdir()
    weight_map = {}
    for number, name in enumerate(BASE):
        save(folder / f"{number}.safetensors", {name: BASE[name]})
        weight_map[name] = f"{number}.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = []
    tree = {name: jnp.asarray(leaf) for name, leaf in BASE.items()}
    for number, given in enumerate((base, str(base), index, folder, BASE, tree)):
        path = tmp_path / f"p{number}"
        protect_file(
            tuned, path, secret=SECRET, levels=1, selection=select(base=given), rest="plain"
        )
        shipped = open_model(path)
        found.append({name: shipped[name] != TUNED[name] for name in TUNED})
    released = protect(TUNED, secret=SECRET, levels=1, selection=select(base=base), rest="plain")
    found.append({name: np.asarray(released.params[name]) != TUNED[name] for name in TUNED})
    for other in found[1:]:
        assert sum((other[name] != found[0][name]).sum() for name in TUNED) < 20


def test_what_the_base_lacks_has_changed_as_a_whole(files, tmp_path):
    tuned, _ = files
    other = {"conv.weight": BASE["conv.weight"], "out.weight": np.ones(3)}
    done = protect_file(
        tuned, tmp_path / "p", secret=SECRET, levels=1, rest="plain",
        selection=select(base=save(tmp_path / "other", other)),
    )  # fmt: skip
    assert done.plain_change == pytest.approx(left(tmp_path / "p", other), abs=2e-3)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("missing", OSError, "missing"),
        ("text", ValueError, "text: "),
        ("other", ValueError, "base: expected the tensors of this network.*got 'x'"),
        ("protected", ValueError, "protected: base: is a protected file"),
        ("nan", ValueError, "base: 'out.weight': expected finite weights.*in 1 of 10240"),
        ("tuned", ValueError, "got the base itself: no weight has changed"),
    ],
)
def test_a_bad_base_is_refused(files, tmp_path, base, error, message):
    (tmp_path / "text").write_text("no checkpoint")
    save(tmp_path / "other", {"x": np.ones(3)})
    protect_file(files[1], tmp_path / "protected", secret=SECRET)
    broken = BASE["out.weight"].copy()
    broken[3, 5] = np.nan
    save(tmp_path / "nan", BASE | {"out.weight": broken})
    with pytest.raises(error, match=message):
        protect_file(
            files[0], tmp_path / "p", secret=SECRET, selection=select(base=tmp_path / base)
        )
    assert not (tmp_path / "p").exists()


def test_scores_do_not_come_from_a_protected_file(files, tmp_path):
    protect_file(files[1], tmp_path / "protected", secret=SECRET)
    with pytest.raises(ValueError, match="expected scores, got a protected file"):
        protect_file(
            files[0], tmp_path / "p", secret=SECRET, selection=Select(tmp_path / "protected")
        )


def test_a_tree_tells_what_stays_plain_too(files, tmp_path):
    tuned, _ = files
    options = {"secret": SECRET, "levels": 2, "selection": select(base=BASE)}
    done = protect_file(tuned, tmp_path / "p", rest="plain", **options)
    released = protect(TUNED, rest="plain", **options)
    assert released.plain_change == pytest.approx(done.plain_change, abs=1e-3)
    assert protect(TUNED, **options).plain_change == 0
    with pytest.raises(ValueError, match=r"params: .*got the base itself"):
        protect(TUNED, secret=SECRET, selection=select(base=TUNED))


def test_what_the_base_lacks_is_named(files, tmp_path, capsys):
    SECRET.write(tmp_path / "secret.key")
    other = {"conv.weight": BASE["conv.weight"], "out.weight": np.ones(3)}
    base = save(tmp_path / "other", other)
    done = protect_file(files[0], tmp_path / "p", secret=SECRET, selection=select(base=base))
    assert set(done.new) == {"out.weight", "norm.weight"}
    words = ["protect", str(files[0]), "-o", str(tmp_path / "q"), "--base", str(base)]
    words += ["--layout", "OIHW", "--secret", str(tmp_path / "secret.key")]
    assert main(words) == 0
    assert "The base lacks these tensors: " in capsys.readouterr().err


def test_on_the_command_line(files, tmp_path, capsys):
    SECRET.write(tmp_path / "secret.key")
    tuned, base = map(str, files)
    words = [
        "protect",
        tuned,
        "-o",
        str(tmp_path / "p"),
        "--base",
        base,
        "--layout",
        "OIHW",
        "--force",
    ]
    words += ["--secret", str(tmp_path / "secret.key"), "--small", "0"]
    assert main([*words, "--rest", "plain"]) == 0
    said = capsys.readouterr()
    assert "of the change from the base stays plain" in said.out
    assert "use --rest sealed" in said.err
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["plain_change"] == 0
    assert "use --rest sealed" not in said.err
