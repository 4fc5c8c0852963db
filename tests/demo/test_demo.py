"""The demo and the program around it."""

import io
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

import selcrypt_jax as sj
from selcrypt_jax import cli
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.demo import _data, _draw, _paper, _report, _tiers, _train
from selcrypt_jax.models._network import Network, psnr


def test_photographs_that_are_tested_on_are_never_trained_on():
    assert not set(_data.TEST_PHOTOGRAPHS) & set(_data.TRAIN_PHOTOGRAPHS)
    crops = _data.test_photographs(64)
    assert crops.shape == (2, 64, 64, 1)
    assert crops.dtype == np.float32
    assert crops.min() >= 0
    assert crops.max() <= 1


def test_patches_depend_on_the_seed():
    first, again, other = (_data.training_patches(5, 16, seed) for seed in (0, 0, 1))
    assert first.shape == (5, 16, 16, 1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_digits_are_split_once():
    train, test = _data.digits(0)
    assert (len(train.images), len(test.images)) == (1437, 360)
    assert set(test.labels) == set(range(10))
    assert train.images.shape[1:] == (32, 32, 1)
    known = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in known for image in test.images) == 0


def test_what_is_calibrated_on_is_not_held_out():
    black, white = _data.chessboard(32)
    assert black.shape[1:] == white.shape[1:] == (32, 32, 1)
    assert abs(len(black) - len(white)) <= 4
    known = {square.tobytes() for square in black}
    assert not any(square.tobytes() in known for square in white)
    train, test = _data.digits(0, 0.5)
    assert (len(train.images), len(test.images)) == (898, 899)


def test_psnr():
    clean = jnp.zeros((2, 4, 4, 1))
    np.testing.assert_allclose(psnr(clean + 0.1, clean), [20, 20], rtol=1e-5)


def toy() -> tuple[_train.Subject, dict]:
    """A "network" whose metric is the share of its weights that are correct."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 10, 20)).astype(np.float32)
    params = {"convs": {"0": {"kernel": kernel}}, "head": {"kernel": np.ones((4, 4), np.float32)}}

    def scores(half, params):
        right = np.asarray(params["convs"]["0"]["kernel"]) == kernel
        return 100 * right.mean((0, 1)).ravel()[half]

    def metric(params):
        return float(scores(slice(None), params).mean())

    subject = _train.Subject(
        network=Network(None, params, None),
        loss=lambda model, batch: 0.0,
        fresh=lambda rngs: None,
        batches=(),
        examples=np.zeros(40),
        metric=metric,
        unit="%",
        worthless=0.0,
        calibration=lambda params: scores(slice(0, None, 2), params),
        held_out=lambda params: scores(slice(None), params),
        without_file=lambda share, steps, advance: sj.encrypt(
            params, sj.nested_masks(sj.importance.l2(params), [0.5]), KEYS
        ),
    )
    return subject, sj.importance.l2(params, select=_paper.SELECT)


KEYS = [sj.chacha20_key(bytes(32))]
GOAL = _tiers.Goal((40, 55, 70, 85), tolerance=2, select=_paper.SELECT, steps=3)


@pytest.fixture(scope="module")
def toy_results():
    subject, scores = toy()
    without_file = _tiers.train_without_file(subject, GOAL, lambda: None)
    tiers, opened = _tiers.tiers_by_target(subject, GOAL, without_file, advance=lambda: None)
    paper = _paper.protect_and_measure(
        subject, scores, budget=0.25, budgets=(0.25,), keys=1, seed=0, advance=lambda: None
    )
    return subject, _report.Result("toy", tiers, paper, 1.23), opened


@pytest.mark.slow
def test_tiers_meet_their_targets(toy_results):
    subject, result, opened = toy_results
    tiers = result.tiers
    assert [tier.name for tier in tiers.tiers] == list(_tiers.NAMES)
    for tier, params in zip(tiers.tiers, opened[1:], strict=True):
        assert tier.calibration.mean == subject.calibration(params).mean()
        assert tier.held_out.mean == subject.held_out(params).mean()
        errors = tier.calibration.error, tier.held_out.error
        assert tier.difference_error == pytest.approx(np.hypot(*errors))
        if tier.target is not None:
            assert tier.calibration.mean == pytest.approx(tier.target, abs=2)
    assert tiers.tiers[-1].target is None
    assert tiers.tiers[-1].held_out.mean == 100
    assert tiers.top_bit_exact
    assert tiers.sealed.mean < 1
    assert (tiers.calibrated_on, tiers.held_out) == (100, 200)
    assert set(tiers.pointless) < {"public", "free", "basic"}


def test_the_standard_error_is_that_of_the_mean():
    assert _tiers.Measured.of(np.array([0.0, 100.0])) == pytest.approx((50, 50))


@pytest.mark.slow
def test_levels_and_strategies_of_a_toy():
    subject, scores = toy()
    calls = []
    paper = _paper.protect_and_measure(
        subject,
        scores,
        budget=0.25,
        budgets=(0.25, 0.5),
        keys=2,
        seed=0,
        advance=lambda: calls.append(1),
    )
    assert len(calls) == _paper.measurements((0.25, 0.5), 2)
    # 200 kernels: 50 are encrypted, of which 34, 38, 42, 46 and 50 are opened.
    assert [level.groups for level in paper.levels] == [0, 34, 38, 42, 46, 50]
    assert [level.fraction for level in paper.levels] == pytest.approx(
        [0, 0.17, 0.19, 0.21, 0.23, 0.25]
    )
    assert [level.metric for level in paper.levels] == pytest.approx(
        [75, 92, 94, 96, 98, 100], abs=0.5
    )
    assert paper.fraction == pytest.approx(0.25)
    assert paper.top_bit_exact
    for metrics in paper.strategies.values():
        assert metrics == pytest.approx({0.25: 75, 0.5: 50}, abs=0.5)


@pytest.mark.slow
def test_results_are_written(tmp_path, toy_results):
    _, result, _ = toy_results
    results = {"toy": result}
    _report.write_json(tmp_path / "tiers.json", results)
    written = json.loads((tmp_path / "tiers.json").read_text())["toy"]
    assert written["tiers"][1]["target"] == 55
    assert written["tiers"][4]["held_out"] == {"mean": 100, "error": 0}
    assert written["paper"]["levels"][5]["groups"] == 50
    assert written["paper"]["strategies"]["pss"][0]["fraction"] == 0.25
    assert written["seconds"] == 1.2
    _draw.draw_tiers(tmp_path / "tiers.png", results)
    _draw.draw_paper(tmp_path / "paper.png", results)
    clean = jnp.full((1, 32, 32, 1), 0.5)
    pictures = _train.Pictures(clean, clean + 0.1, lambda params: clean + 0.01)
    _draw.draw_photographs(tmp_path / "denoised.png", pictures, [None] * 6)
    for name in ("tiers.png", "paper.png", "denoised.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = io.StringIO()
    console = Console(file=text, width=80)
    console.print(_report.tier_table(result))
    console.print(_report.paper_table(result))
    assert "…" not in text.getvalue()  # nothing is cut
    said = " ".join(text.getvalue().split())  # captions are wrapped
    assert "│ 3: pro │" in said
    assert "│ 100.00 ± 0.00 │" in said
    for words in ("held out 200 others", "bit-exact: yes", "25.000% of the convolution"):
        assert words in said
    assert "averaged over 1 key; top level bit-exact" in said


def test_tiers_below_what_training_reaches_are_named(toy_results):
    _, result, _ = toy_results
    low, high = (
        result._replace(tiers=result.tiers._replace(without_file=_tiers.Measured(v, 0.0)))
        for v in (-1, 75)
    )
    assert _report.warning(low).endswith("longer training may catch up.")
    assert _report.warning(high).endswith("worth nothing: public, free, basic.")


def test_a_directory_that_cannot_be_made_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    assert "file" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    for name in ("_run", "_data", "_train", "_report", "_draw", "_paper", "_tiers"):
        monkeypatch.delitem(sys.modules, f"selcrypt_jax.demo.{name}", raising=False)
        monkeypatch.delattr(f"selcrypt_jax.demo.{name}", raising=False)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "skimage" in message
    assert "pip install '.[demo]' in your copy" in message


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == sj.__version__


def test_help_of_the_program():
    result = subprocess.run(
        [sys.executable, "-m", "selcrypt_jax", "demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--quick" in result.stdout


@pytest.mark.slow
def test_quick_demo(tmp_path):
    out = tmp_path / "new" / "out"
    # A process of its own: users do not have this suite's strict settings.
    command = [sys.executable, "-m", "selcrypt_jax", "demo", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Top level bit-exact: yes" in " ".join(result.stdout.split())
    assert "without the file" in result.stdout
    written = json.loads((out / "tiers.json").read_text())
    assert set(written) == {"vgg19", "dncnn"}
    for name, result in written.items():
        assert result["top_bit_exact"], name
        assert [tier["name"] for tier in result["tiers"]] == list(_tiers.NAMES)
        *graded, top = result["tiers"]
        for tier in graded:
            off = abs(tier["calibration"]["mean"] - tier["target"])
            assert off <= result["tolerance"], (name, tier["name"])
            off = abs(tier["held_out"]["mean"] - tier["target"])
            assert off < 5 * tier["difference_error"], (name, tier["name"])
        assert top["target"] is None
        assert result["sealed"]["mean"] < top["held_out"]["mean"]
        paper = result["paper"]
        assert paper["top_bit_exact"], name
        assert [level["level"] for level in paper["levels"]] == list(range(6))
        groups = [level["groups"] for level in paper["levels"]]
        assert groups == sorted(groups)
        assert groups[0] == 0
        assert paper["levels"][5]["metric"] == top["held_out"]["mean"]
        assert paper["levels"][0]["metric"] < top["held_out"]["mean"]
        assert set(paper["strategies"]) == {"pss", "random", "descend", "ascend", "mean"}
        assert paper["levels"][5]["fraction"] <= 0.08
    for name in ("tiers.png", "paper.png", "denoised.png"):
        assert (out / name).stat().st_size > 10_000


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    return scipy.stats.ks_2samp(one, other, method="asymp").pvalue


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.08, 0.3])
def test_distribution_of_trained_networks_is_kept(trained, share):
    chosen_alone = []
    for subject, number in itertools.product(trained, range(10)):
        scores = sj.importance.l2(subject.params, select=_paper.SELECT)
        masks = sj.nested_masks(scores, [share])
        keys = sj.ring_keys(sj.level_key(bytes([number]) * 32, bytes(16), levels=1))
        protected = sj.encrypt(subject.params, masks, keys)
        after_by_name = named_leaves(protected).leaves
        for name, before in named_leaves(subject.params).leaves.items():
            mask = np.asarray(named_leaves(masks[0]).leaves[name])
            if not mask.any():
                continue
            before, after = np.asarray(before), np.asarray(after_by_name[name])
            chosen = np.broadcast_to(mask, before.shape)
            assert (before != after).any()
            np.testing.assert_array_equal(before[~chosen], after[~chosen])
            # Sign, exponent and three mantissa bits: eighths of an octave.
            np.testing.assert_array_equal(
                np.sort(before[chosen].view(np.uint32) >> 20),
                np.sort(after[chosen].view(np.uint32) >> 20),
            )
            assert similarity(before.ravel(), after.ravel()) >= 0.9, name
            chosen_alone.append(similarity(before[chosen], after[chosen]))
    # Inside an eighth of an octave the bits are random, so that p is: of weights selected by
    # their norm, which crowd into few eighths, one leaf in twenty falls below 0.9 (44 of 840 with
    # 40 keys at 30 %). That is why one key says little.
    assert np.median(chosen_alone) >= 0.999
    assert np.mean(np.array(chosen_alone) >= 0.9) >= 0.9


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"):  # for optax
        return (
            _train.train_vgg19(width=0.125, steps=20, seed=0),
            _train.train_dncnn(depth=5, width=24, steps=40, crop=32, seed=0),
        )
