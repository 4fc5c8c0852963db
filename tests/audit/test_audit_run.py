"""The runner of attacks on a toy network, its settings, and the command."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from audit_toy import toy_subject
from rich.console import Console

import selcrypt_jax as sj
from selcrypt_jax import audit
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.audit._attacks import candidates
from selcrypt_jax.audit._audit import _cells
from selcrypt_jax.audit._audit import audit as run_audit
from selcrypt_jax.audit._base import rank_by_base
from selcrypt_jax.audit._cells import Cells
from selcrypt_jax.audit._config import AuditConfig, SubjectConfig, make_subject, read_config
from selcrypt_jax.audit._file import masks_between
from selcrypt_jax.audit._finetune import warm_cosine
from selcrypt_jax.audit._grid import Grid
from selcrypt_jax.audit._results import Results
from selcrypt_jax.audit._run import ARCHITECTURE, Audit, Plan
from selcrypt_jax.audit._strategies import strategy_scores
from selcrypt_jax.audit._structure import (
    check_chain,
    in_order,
    ranked_by_siblings,
    sign_leanings,
    with_signs,
)
from selcrypt_jax.audit._subject import (
    check_subject,
    example_batches,
    normalisation_leaves,
    reset,
)
from selcrypt_jax.cli import main

SMALL = Grid(
    importance=("l2", "l2+normalisation"),
    budget=(0.2,),
    data=(0.2,),
    steps=(5, 40),
    rates=(1e-2,),
    keys=2,
    levels=2,
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def subject():
    return toy_subject()


# --- attacks ------------------------------------------------------------------------------------


def test_normalisation_is_found_and_reset(subject):
    found = normalisation_leaves(subject.params)
    assert list(found) == ["norm/bias", "norm/mean", "norm/scale", "norm/var"]
    norm = {name: float(reset(name, leaf).mean()) for name, leaf in found.items()}
    assert norm == {"norm/scale": 1, "norm/var": 1, "norm/bias": 0, "norm/mean": 0}
    names = ["bn1/weight", "layers.3.bn.running_var", "batch_norm/mean", "layernorm_2/scale"]
    assert set(normalisation_leaves({n: np.zeros(3, np.float32) for n in names})) == set(names)
    others = ["abnormal/bias", "subnormal", "conv/bias", "dnbn"]
    assert not normalisation_leaves({n: np.zeros(3, np.float32) for n in others})


def test_statistics_are_estimated_anew(subject):
    """Who has the kernels gets running statistics for nothing, without moving a weight."""
    params = subject.params | {
        "norm": subject.params["norm"]
        | {"mean": subject.params["norm"]["mean"] + 1, "var": subject.params["norm"]["var"] * 9}
    }
    loot = audit.Loot(subject, params, True, jax.random.key(0))
    _, batch = example_batches(subject, 1.0, 0)
    attack = audit.ATTACKS["re-estimate statistics"]
    ((step, found),) = audit.run_attack(attack, loot, batch, rate=1.0, stops=[80])
    assert step == 80
    for name in ("first", "last"):
        np.testing.assert_array_equal(found[name]["kernel"], subject.params[name]["kernel"])
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            found["norm"][name], subject.params["norm"][name], atol=0.35, rtol=0.35
        )
    assert subject.metric(found) > subject.metric(params) + 5


def test_statistics_move_as_they_would_in_a_loop_of_ones_own(subject):
    _, batch = example_batches(subject, 1.0, 0)
    expected = jax.tree.map(jnp.asarray, subject.fresh(jax.random.key(1)))
    start = expected
    gradient = jax.jit(jax.grad(subject.training_loss_fn, has_aux=True))
    for number in (1, 2, 3):
        gradients, after = gradient(expected, batch(number))
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, expected, gradients)
        for name in ("mean", "var"):
            expected["norm"][name] = after["norm"][name]
    (found,) = audit.fine_tune(
        start, subject.training_loss_fn, batch, stops=[3], optimizer=optax.sgd(1.0), rate=0.1,
        statistics=True,
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("better", ["last", "average"])
def test_an_attacker_keeps_the_better_of_last_weights_and_average(subject, better):
    """The other one gives NaN, which is no better than anything."""
    _, batch = example_batches(subject, 1.0, 0)
    loot = audit.Loot(subject, subject.fresh(jax.random.key(1)), True, jax.random.key(0))
    attack = audit.ATTACKS["fine-tune all, batch statistics"]
    ((_, tried),) = candidates(attack, loot, batch, rate=1e-2, stops=[12])
    last, average = (np.asarray(params["last"]["kernel"]) for params in tried)
    kernels = {"last": last, "average": average}
    assert not np.array_equal(last, average)
    for name in ("mean", "var"):
        assert not np.array_equal(*(np.asarray(params["norm"][name]) for params in tried))

    def metric(params):
        close = np.allclose(params["last"]["kernel"], kernels[better], rtol=1e-5)
        return -50.0 if close else math.nan

    rated = subject._replace(metric=metric)
    ((_, found),) = audit.run_attack(
        attack, loot._replace(subject=rated), batch, rate=1e-2, stops=[12]
    )
    np.testing.assert_allclose(found["last"]["kernel"], kernels[better], rtol=1e-5)


def test_the_reference_gets_the_better_of_both_too(subject):
    """Whatever trains is judged alike, with the file and without."""
    run = Audit("toy", subject, dataclasses.replace(SMALL, keys=1, steps=(12,), rates=(1e-2,)))
    cells = {
        "from scratch": (ARCHITECTURE, 0.1),
        "fine-tune all, batch statistics": (Plan("l2", 0.2), 0.1),
    }
    for name, (plan, data) in cells.items():
        found = run._attempt(plan, 0, name, data, 1e-2)["12"]
        file = run.protected(plan, 0)
        loot = audit.Loot(run.subject, file.opened(0), file.closed(0), jax.random.key(0))
        batch = example_batches(run.subject, data, 0)[1]
        ((_, tried),) = candidates(audit.ATTACKS[name], loot, batch, rate=1e-2, stops=[12])
        assert len(tried) == 2
        assert found == pytest.approx([max(map(subject.metric, tried))], rel=1e-4)


def test_rates_share_a_compiled_step(subject):
    compiled = []

    def loss_fn(params, batch):
        compiled.append(1)
        return subject.loss_fn(params, batch)

    _, batch = example_batches(subject, 0.1, 0)
    optimizer = optax.adam(1.0)
    for rate in (1e-3, 1e-2):
        list(audit.fine_tune(
            subject.params, loss_fn, batch, stops=[2], optimizer=optimizer, rate=rate
        ))  # fmt: skip
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", audit.ATTACKS)
def test_every_attack_runs_and_leaves_the_file_alone(subject, name):
    attack = audit.ATTACKS[name]
    chain = [audit.Link("first/kernel", "norm/scale", "last/kernel", "norm/bias")]
    siblings = [moved(subject.params, 0.5)]
    subject = subject._replace(base=moved(subject.params, 0.02), chain=chain, siblings=siblings)
    masks = Audit("toy", subject, SMALL).masks(Plan("l2+normalisation", 0.2))
    keys = sj.ring_keys(sj.level_key(bytes(32), bytes(16), levels=2))
    file = sj.encrypt(subject.params, masks, keys)
    before = jax.tree.map(np.array, file)
    loot = audit.Loot(subject, file, masks[-1], jax.random.key(0))
    _, batch = example_batches(subject, 0.5, 0)
    reached = list(audit.run_attack(attack, loot, batch, rate=1e-3, stops=[1, 3]))
    trains = attack.trains != "nothing" or attack.statistics
    assert [step for step, _ in reached] == ([1, 3] if trains else [0])
    changed = {
        name: (np.asarray(a) != b).mean()
        for (name, a), b in zip(
            named_leaves(reached[-1][1]).leaves.items(),
            jax.tree.leaves(before),
            strict=True,
        )
    }
    # Within few steps no better order may be found.
    assert any(changed.values()) or attack.trains == "order"
    if attack.trains == "normalisation":
        assert not changed["first/kernel"]
        assert not changed["last/kernel"]
    if attack.trains == "suspected":
        np.testing.assert_allclose(changed["first/kernel"], 0.2, atol=0.05)
    if attack.trains == "order":
        values = [np.asarray(tree["first"]["kernel"]) for tree in (file, reached[-1][1])]
        np.testing.assert_array_equal(*(np.sort(v.ravel()) for v in values))
    for a, b in zip(jax.tree.leaves(file), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_between_two_levels():
    lower = {"a": np.array([True, False, False]), "b": False, "c": False}
    upper = {"a": np.array([True, True, False]), "b": np.array([True]), "c": False}
    between = masks_between(lower, upper)
    np.testing.assert_array_equal(between["a"], [False, True, False])
    np.testing.assert_array_equal(between["b"], [True])
    assert between["b"].dtype == bool
    assert between["c"] is False


def test_pruning_guesses_the_largest(subject):
    mask = {"first": {"kernel": False}, "norm": False, "last": {"kernel": False}}
    chosen = np.zeros((24, 64), bool)
    chosen.flat[:100] = True
    mask["first"] = {"kernel": chosen}
    loot = audit.Loot(subject, subject.params, mask, jax.random.key(0))
    ((_, found),) = audit.run_attack(
        audit.ATTACKS["prune largest"], loot, lambda _: None, rate=0, stops=[]
    )
    size = np.abs(subject.params["first"]["kernel"])
    np.testing.assert_array_equal(
        np.asarray(found["first"]["kernel"]) == 0, size >= np.sort(size.ravel())[-100]
    )


# --- what comes out -----------------------------------------------------------------------------


class Identity:
    """A cipher that encrypts nothing."""

    def check(self, ring, leaf): ...

    def run(self, leaves, rings, keys, *, inverse, donate=()):
        return dict(leaves)


def report_of(subject, grid, cipher=None):
    whole = Audit("toy", subject, grid, cipher)
    plans = whole.plans()
    cells = {cell.name: cell.run() for cell in whole.work([*plans, ARCHITECTURE])}
    return Results(whole, cells).report(plans, 0.0)


@pytest.mark.slow
def test_a_report_of_a_toy(subject):
    report = report_of(subject, SMALL)
    assert report.weights == 24 * 64 + 4 * 64 + 64 * 8
    assert report.clean == pytest.approx(30, abs=0.1)
    kernels, both = report.protections
    assert kernels.share == pytest.approx(0.2 * (24 * 64 + 64 * 8) / report.weights, abs=1e-3)
    assert both.share == pytest.approx(kernels.share + 4 * 64 / report.weights, abs=1e-6)
    for protection in report.protections:
        metrics = [level.metric for level in protection.levels]
        assert metrics[-1] == pytest.approx(report.clean)
        assert metrics[0] == pytest.approx(np.mean(protection.shipped))
        assert metrics[0] < report.clean - 10
        assert [best.steps for best in protection.best] == [0, 5, 40]
        for best in protection.best:
            (floor,) = (b for b in report.baseline if (b.data, b.steps) == (best.data, best.steps))
            expected = (np.mean(best.recovered) - np.mean(floor.recovered)) / (
                report.clean - np.mean(floor.recovered)
            )
            assert best.advantage.mean == pytest.approx(expected)
            # An attacker may leave the file alone.
            every = [
                values
                for attempt in protection.attempts
                for step, values in attempt.steps.items()
                if step <= best.steps or not attempt.rate
            ]
            every += [protection.shipped, floor.recovered]
            np.testing.assert_allclose(best.recovered, np.max(every, axis=0))
            assert best.same_recipe is None or best.same_recipe.mean >= best.advantage.mean
        # More steps give no less.
        for less, more in itertools.pairwise(protection.best):
            assert more.recovered >= less.recovered
        assert 0 <= protection.detection["auc"] <= 1
        (holder,) = protection.holders  # of two levels, the first
        assert holder.level == 1
        assert np.mean(holder.opened) == pytest.approx(metrics[1])
        assert holder.above == pytest.approx(metrics[2])
        assert holder.reference == pytest.approx(np.mean(report.baseline[-1].recovered))
        assert holder.is_worthless == (metrics[1] <= holder.reference)
        floor = max(metrics[1], holder.reference)
        gain = (np.mean(holder.best.recovered) - floor) / (metrics[2] - floor)
        assert holder.gain == pytest.approx(gain)
        assert gain >= 0
    assert [best.steps for best in report.everything] == [0, 5, 40]


@pytest.mark.parametrize(
    ("shape", "layout", "groups"),
    [
        ((32, 16, 3, 3), None, (32, 16, 1, 1)),  # as `protect_file` tells it
        ((3, 3, 16, 32), None, (1, 1, 16, 32)),
        ((5, 5, 5, 5), "OIHW", (5, 5, 1, 1)),
        ((5, 5, 5, 5), "HWIO", (1, 1, 5, 5)),
    ],
)
def test_kernels_are_selected_in_their_layout(subject, shape, layout, groups):
    params = {"conv": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    own = subject._replace(params=params, layout=layout)
    assert strategy_scores(own, "l2", 0)["conv"].shape == groups


def test_a_layout_that_cannot_be_told_is_asked_for(subject):
    own = subject._replace(params={"conv": np.ones((5, 5, 5, 5), np.float32)})
    with pytest.raises(ValueError, match=r"Set the subject's layout: OIHW as in PyTorch"):
        strategy_scores(own, "l2", 0)


def test_an_error_of_a_subject_is_its_own(monkeypatch):
    import audit_toy

    def broken(params):
        raise KeyError("conv")

    monkeypatch.setattr(
        audit_toy, "broken_subject", lambda: toy_subject()._replace(metric=broken), raising=False
    )
    config = SubjectConfig("mine", "audit_toy:broken_subject", {})
    made = make_subject(config)
    with pytest.raises(ValueError, match=r"\[subjects.mine\]: metric of the Subject raised KeyErr"):
        made.metric(made.params)
    assert np.isfinite(made.loss_fn(made.params, made.batch(np.arange(9), np.random.default_rng())))


def test_where_all_is_encrypted_there_is_nothing_to_detect(subject):
    assert Audit("toy", subject, SMALL)._detection(Plan("l2", 1.0)) == {}


@pytest.mark.slow
def test_no_encryption_is_seen(subject):
    grid = dataclasses.replace(
        SMALL, detection=False, attacks=("fine-tune all",), keys=1, climbing=False
    )
    for protection in report_of(subject, grid, Identity()).protections:
        assert all(best.advantage.mean == pytest.approx(1, abs=1e-3) for best in protection.best)


def test_a_network_that_is_worth_nothing_is_refused(subject):
    untrained = subject._replace(params=jax.tree.map(jnp.zeros_like, subject.params))
    with pytest.raises(ValueError, match="better than guessing"):
        Audit("toy", untrained, SMALL)


BROKEN = {
    "metric: expected a number, got tuple": {"metric": lambda params: (1.0, 2)},
    "metric: expected a number, got str": {"metric": lambda params: "30"},
    "better than guessing": {"metric": lambda params: np.inf},
    "worthless: expected the metric of guessing": {"worthless": np.nan},
    "examples: expected at least 1": {"examples": 0},
    "layout: expected one of": {"layout": "OIWH"},
    r"fresh: 'first/kernel': expected shape \(24, 64\) as in params, got no such leaf": {
        "fresh": lambda key: {"first": {}}
    },
    "training_loss_fn: expected the loss and the parameters": {
        "training_loss_fn": lambda params, batch: jnp.zeros(())
    },
    "training_loss_fn: expected its second result to have": {
        "training_loss_fn": lambda params, batch: (jnp.zeros(()), params["norm"])
    },
    "siblings: expected a chain too": {"siblings": [{}]},
    r"siblings\[0\]: 'first/kernel': expected shape": {
        "siblings": [{"a": np.ones(3)}],
        "chain": [("first/kernel", "norm/scale", "last/kernel")],
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_subject_is_refused_at_once(subject, message):
    with pytest.raises(ValueError, match=message):
        Audit("toy", subject._replace(**BROKEN[message]), SMALL)


@pytest.mark.parametrize("number", [float, np.float32, jnp.asarray, lambda v: np.array([v])[0]])
def test_a_metric_may_be_any_number(subject, number):
    run = Audit("toy", subject._replace(metric=lambda p: number(subject.metric(p))), SMALL)
    rows = run._levels(Plan("l2", 0.2))
    assert json.loads(json.dumps(rows)) == rows


def test_what_gives_no_number_is_worth_nothing(subject):
    def metric(params):
        found = subject.metric(params)
        return found if found > 15 else np.nan

    grid = dataclasses.replace(
        SMALL, importance=("l2",), steps=(2,), keys=2, detection=False, attacks=("fine-tune all",)
    )
    report = report_of(subject._replace(metric=metric), grid)
    (found,) = report.protections
    assert np.isnan(found.shipped).all()
    for best in found.best:
        np.testing.assert_array_equal(best.recovered, subject.worthless)
        assert best.advantage.mean == 0
        assert best.attack == "guessing"
    assert found.holders[0].is_worthless


def test_nobody_does_worse_than_knowing_nothing(subject):
    """With a bar for that which no attack reaches, the advantage is 0 and not below."""
    grid = dataclasses.replace(
        SMALL, importance=("l2",), steps=(2,), detection=False, climbing=False,
        attacks=("fine-tune all",),
    )  # fmt: skip
    report = report_of(subject._replace(worthless=15.0), grid)
    for best in (*report.protections[0].best, *report.everything, *report.baseline):
        assert best.recovered == [15.0, 15.0]
    assert {best.advantage for best in report.protections[0].best} == {(0.0, 0.0, 0.0)}


def test_attacks_that_do_not_apply_are_no_audit(subject):
    grid = dataclasses.replace(SMALL, attacks=("sign recovery", "fill from base"))
    with pytest.raises(ValueError, match="toy: attacks: expected some that apply to this"):
        Audit("toy", subject, grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": "("}, "is not a regular expression"),
        ({"budget": (1e-4,)}, "level 1 adds no groups"),
        ({"importance": ("scores:none.safetensors",)}, "expected scores in a .safetensors file"),
    ],
)
def test_what_cannot_be_protected_is_refused_before_it_is_attacked(tmp_path, change, message):
    grid = dataclasses.replace(CONFIG.grid, **change)
    with pytest.raises(ValueError, match=f"toy: .*{message}"):
        run_audit(dataclasses.replace(CONFIG, grid=grid), tmp_path, console=QUIET)
    (cells,) = tmp_path.glob(".audit*")
    assert len(cells.read_text().splitlines()) == 1, "something was attacked"


@pytest.mark.slow
def test_training_that_blows_up_does_not_count(subject):
    grid = dataclasses.replace(
        SMALL, rates=(1e-2, 1e30), attacks=("fine-tune all",), detection=False, climbing=False,
        keys=1,
    )  # fmt: skip
    report = report_of(subject, grid)
    (wild,) = (a for a in report.protections[0].attempts if a.rate == 1e30)
    assert np.isnan(wild.steps[40]).all()
    assert np.isfinite(report.protections[0].best[-1].recovered).all()


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": ("best",)}, "importance: expected"),
        ({"attacks": ("magic",)}, "attacks: expected"),
        ({"rest": "open"}, "rest: expected one of"),
        ({"budget": (0.0,)}, r"budget: expected shares in \(0, 1\]"),
        ({"data": (1.5,)}, "data: expected shares"),
        ({"steps": (10, 5)}, "steps: expected ascending"),
        ({"rates": (float("nan"),)}, "rates: expected positive"),
        ({"rates": ()}, "rates: expected at least one"),
        ({"keys": 0}, "keys: expected at least 1"),
        ({"scope": "tensor"}, "scope: expected one of"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"importance": ("l2", "l2")}, "importance: expected no duplicates"),
        ({"importance": ("l2+small+normalisation",)}, "importance: expected random"),
        ({"importance": ("l2+normalisation+small",)}, "importance: expected random"),
        ({"data": (0.1, 0.1)}, "data: expected no duplicates"),
    ],
)
def test_a_bad_grid(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Grid(), **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subjects = 3", r"expected a table \[subjects.NAME\]"),
        ("[subject.a]\nmake='dncnn'", "expected only subjects, grid, got 'subject'"),
        ("[subjects.a]\nmake=3", "expected make"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nkeys=1.5", "keys: expected int"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nbudget=0.1", "budget: expected a list of float"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nshare=[0.1]", "expected only .*, got 'share'"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nshares=[0.1]", "'shares' is now called 'budget'"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nstrategies=['l2']", "now called 'importance'"),
        ("[subjects.a]\nmake='dncnn'\n[grid]\nsteps=[5, 1]", "steps: expected ascending"),
        ("[subjects.a", "expected TOML"),
    ],
)
def test_a_bad_configuration(tmp_path, text, message):
    path = tmp_path / "audit.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(str(path))
    assert str(path) in str(caught.value)


def test_the_strongest_attacker_comes_last():
    """So that a key holder and who has no file are compared with the same data."""
    grid = dataclasses.replace(Grid(), data=(0.2, 0.01), budget=(0.3, 0.02))
    assert grid.data == (0.01, 0.2)
    assert grid.budget == (0.02, 0.3)


def test_a_key_holder_attacks_with_the_data_of_the_reference(subject):
    grid = dataclasses.replace(
        SMALL, data=(0.5, 0.05), steps=(5,), importance=("l2",), keys=1, detection=False,
        attacks=("fine-tune all",),
    )  # fmt: skip
    (found,) = report_of(subject, grid).protections
    (holder,) = found.holders
    assert holder.best.data == 0.5


def test_a_key_holder_tries_all_that_is_about_kernels(subject):
    """What is closed to them is little, and to put it in order gives more than to train it all."""
    grid = dataclasses.replace(
        SMALL, importance=("l2",), budget=(0.3,), data=(0.1,), steps=(50,), keys=1, levels=3
    )
    run = Audit("toy", subject, grid)
    (plan,) = run.plans()
    tried = {attack for attack, _, _ in run.attempts(plan, 2)}
    assert {"zero-fill", "fine-tune encrypted weights", "unshuffle", "fine-tune all"} <= tried
    assert not [name for name in tried if "normalisation" in name or audit.ATTACKS[name].chain]

    def reached(attack):
        return run._attempt(plan, 2, attack, 0.1, 1e-2)["50"][0]

    assert reached("unshuffle") > reached("fine-tune all") + 3


def test_toml_may_hold_dates_and_begin_with_a_mark(tmp_path):
    path = tmp_path / "audit.toml"
    path.write_text('[subjects.a]\nmake="m:f"\nday=2020-01-02\nat=[07:30:00]\n', "utf-8-sig")
    (described,) = read_config(str(path)).subjects
    settings = json.loads(_cells(tmp_path, described, SMALL).path.read_text().splitlines()[0])
    assert settings["subject"]["arguments"] == {"day": "2020-01-02", "at": ["07:30:00"]}


def test_no_such_configuration():
    with pytest.raises(FileNotFoundError, match="expected demo"):
        read_config("nothing.toml")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        ("nothing", {}, "import path module:function"),
        ("no_such_module:subject", {}, "expected 'no_such_module:subject' to import"),
        ("audit_toy:toy_subject", {"wrong": 1}, "wrong"),
        ("audit_toy:INPUTS", {}, "expected a function"),
        ("builtins:dict", {}, "to return a Subject, got dict"),
        ("dncnn", {"weights": "a"}, "missing a required argument: 'images'"),
        ("dncnn", {"weights": "a", "images": "b", "tests": "c"}, "a: expected a .safetensors file"),
    ],
)
def test_a_bad_subject(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_subject(SubjectConfig("mine", make, arguments))


def test_the_demo_is_built_in():
    config = read_config("demo")
    assert [subject.make for subject in config.subjects] == [
        "demo-vgg19",
        "demo-dncnn",
        "demo-transformer",
    ]
    quick = config.grid.quick()
    assert quick.budget == (0.08,)
    assert quick.keys == 1
    assert set(quick.attacks) < set(config.grid.attacks)


# --- whole runs ---------------------------------------------------------------------------------

CONFIG = AuditConfig(
    (SubjectConfig("toy", "audit_toy:toy_subject", {"examples": 256}),),
    dataclasses.replace(
        SMALL, attacks=("resample", "fine-tune all"), detection=False, climbing=False
    ),
)


def test_cells_survive_a_kill(tmp_path):
    path = tmp_path / "new" / ".x.jsonl"
    first = Cells(path, {"keys": 1})
    assert [first.get(name, lambda n=name: [n]) for name in "ab"] == [["a"], ["b"]]
    with path.open("a") as file:
        file.write('["c", [1')  # killed as it wrote
    second = Cells(path, {"keys": 1})
    assert second.found == {"a": ["a"], "b": ["b"]}
    second.get("c", lambda: 3)
    assert Cells(path, {"keys": 1}).found == {"a": ["a"], "b": ["b"], "c": 3}
    assert Cells(path, {"keys": 2}).found == {}
    second.done()
    assert not path.exists()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    whole = run_audit(CONFIG, tmp_path / "whole", console=QUIET)
    calls = []
    attempt = Audit._attempt

    def dying(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attempt(self, *arguments)

    monkeypatch.setattr(Audit, "_attempt", dying)
    with pytest.raises(KeyboardInterrupt):
        run_audit(CONFIG, tmp_path / "killed", console=QUIET)
    again = run_audit(CONFIG, tmp_path / "killed", console=QUIET)
    # What was done is kept: only the attempt that was killed is made twice.
    assert len(calls) == len(set(calls)) + 1
    assert len(set(calls)) > sum(len(p.attempts) for p in again.subjects[0].protections)
    strip = {"seconds": 0.0}
    assert [dataclasses.replace(s, **strip) for s in again.subjects] == [
        dataclasses.replace(s, **strip) for s in whole.subjects
    ]
    assert not list((tmp_path / "killed").glob(".audit*"))


def test_what_was_found_of_another_network_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, scores = tmp_path / "model.safetensors", tmp_path / "scores.safetensors"
    config = SubjectConfig("mine", "mine:subject", {"weights": str(weights), "siblings": ["a", 3]})
    grid = dataclasses.replace(SMALL, importance=("l2", "scores:scores.safetensors+small"))

    def cells():
        return _cells(tmp_path / "out", config, grid).path

    places = [cells()]
    for path in (weights, scores, tmp_path / "mine.py"):
        for content in ("one", "two"):
            path.write_text(content)
            places.append(cells())
    assert len(set(places)) == len(places)
    assert cells() == places[-1]


@pytest.mark.slow
def test_advice_is_the_smallest_share_that_meets_the_target(tmp_path):
    report = run_audit(CONFIG, tmp_path, target_advantage=0.02, console=QUIET)
    assert [row["strategy"] for row in report.advice] == list(SMALL.importance)
    for row in report.advice:
        gains = {
            p.name: p.best[-1].advantage.mean
            for p in report.subjects[0].protections
            if p.strategy == row["strategy"]
        }
        assert len(gains) >= 2
        if row["protection"] is None:
            assert min(gains.values()) > 0.02
        else:
            assert row["advantage"]["mean"] <= 0.02
            assert gains[row["protection"]] == pytest.approx(row["advantage"]["mean"])


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("from audit_toy import toy_subject\n")
    (tmp_path / "audit.toml").write_text(
        '[subjects.mine]\nmake = "mine:toy_subject"\nexamples = 128\n'
        '[grid]\nimportance = ["l2"]\nbudget = [0.2]\ndata = [0.5]\nsteps = [5]\nrates = [0.01]\n'
        "keys = 1\nlevels = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "audit.toml", "-o", "out", "--quick"]) == 0
    assert "report.html" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert content["subjects"][0]["title"] == "a teacher of 2,304 weights"
    assert not [check["name"] for check in content["cipher"] if check["passed"] is False]
    assert main(["audit", "none.toml", "-o", "out"]) == 1
    assert "expected demo" in capsys.readouterr().err


# --- a base -------------------------------------------------------------------------------------


def moved(params, by):
    """Every weight by this share of its leaf's spread; a variance stays one."""
    rng = np.random.default_rng(5)

    def near(path, leaf):
        new = leaf + by * leaf.std() * rng.standard_normal(leaf.shape).astype(np.float32)
        return np.abs(new) if path[-1].key == "var" else new

    return jax.tree_util.tree_map_with_path(near, params)


@pytest.mark.parametrize(
    "cipher", [sj.LosslessCipher(), sj.LosslessCipher("group"), sj.LosslessCipher(permute=False)]
)
def test_a_base_gives_back_what_lies_near_to_it(subject, cipher):
    plan, grid = Plan("l2", 0.5), SMALL
    near = subject._replace(base=moved(subject.params, 0.02))
    run = Audit("toy", near, grid, cipher)
    file = run.protected(plan, 0)
    loot = audit.Loot(near, file.params, file.masks[-1], jax.random.key(0), cipher)
    found = {}
    for name in ("fill from base", "rank matching"):
        ((_, params),) = audit.run_attack(audit.ATTACKS[name], loot, None, rate=0, stops=[])
        found[name] = {n: np.asarray(leaf) for n, leaf in named_leaves(params).leaves.items()}
    true, base = (named_leaves(tree).leaves for tree in (subject.params, near.base))
    for name, mask in named_leaves(file.masks[-1]).leaves.items():
        where = np.broadcast_to(mask, true[name].shape)
        filled = found["fill from base"][name]
        np.testing.assert_array_equal(filled[where], base[name][where])
        np.testing.assert_array_equal(filled[~where], true[name][~where])
        if where.any() and cipher.unit == "weight":
            # No further than the base, but for the few whose ranks are others in it.
            error, before = (
                np.abs(x[name][where] - true[name][where]) for x in (found["rank matching"], base)
            )
            assert error.mean() < 1.3 * before.mean()
    assert subject.metric(named_leaves(subject.params).rebuild(found["rank matching"])) > (
        subject.metric(file.params) + 3
    )


def test_coarse_bits_bound_what_is_taken_from_the_base():
    """Signs and octaves that a stream leaves are the file's; eighths of octaves of the default."""
    seen = np.array([1.0, -1.0, 3.0, -0.3], np.float32)
    known = np.array([1.01, 1.2, 100.0, -0.31], np.float32)
    default = rank_by_base({"w": seen}, {"w": known}, True, sj.LosslessCipher(fine_bits=20))["w"]
    ordered = np.sort(seen)[np.argsort(np.argsort(known))]
    np.testing.assert_array_equal(np.sign(default), np.sign(ordered))
    stream = rank_by_base({"w": seen}, {"w": known}, True, sj.LosslessCipher(permute=False))["w"]
    np.testing.assert_allclose(
        stream, [1.01, 1.2, np.nextafter(np.float32(4), 0), -0.31], rtol=1e-6
    )


@pytest.mark.slow
def test_a_base_that_is_the_original_and_one_that_is_no_base(subject):
    grid = dataclasses.replace(
        SMALL, importance=("l2",), detection=False, climbing=False,
        attacks=("fill from base", "rank matching", "fine-tune all, batch statistics"),
    )  # fmt: skip
    bases = {
        "none": None,
        "original": subject.params,
        "random": subject.fresh(jax.random.key(9)),
    }
    found = {}
    for name, base in bases.items():
        report = report_of(subject._replace(base=base), grid)
        assert report.base == (base is not None)
        found[name] = report.protections[0].best[-1]
    assert found["original"].over_architecture.mean == pytest.approx(1, abs=0.02)
    assert found["original"].advantage is None  # whoever has that needs no file
    for best in (found["random"].advantage, found["random"].over_architecture):
        assert best.mean == pytest.approx(found["none"].advantage.mean, abs=0.1)
    assert found["none"].over_architecture is None


def test_a_bad_base_is_refused(subject):
    base = subject.params | {"last": {"kernel": np.zeros((3, 8), np.float32)}}
    with pytest.raises(ValueError, match=r"toy: base: 'last/kernel': expected shape \(64, 8\)"):
        Audit("toy", subject._replace(base=base), SMALL)


def test_what_takes_part_and_what_is_small_can_be_said(subject):
    grid = dataclasses.replace(SMALL, select="^first", small=0.04)
    run = Audit("toy", subject, grid)
    chosen = named_leaves(run.masks(Plan("l2", 0.2))[-1]).leaves
    assert np.any(chosen["first/kernel"])
    assert not np.any(chosen["last/kernel"])
    small = named_leaves(run.masks(Plan("l2+small", 0.2))[-1]).leaves
    whole = {name for name, each in small.items() if np.all(each)}
    assert whole == {"norm/bias"}  # 64 weights of 2,304, and no more fit
    with pytest.raises(ValueError, match="small: expected a share"):
        dataclasses.replace(SMALL, small=0.0)


def test_a_broken_base_is_refused(subject):
    base = jax.tree.map(np.copy, subject.params)
    base["last"]["kernel"][3, 3] = np.nan
    with pytest.raises(ValueError, match="toy: base: 'last/kernel': expected finite weights"):
        Audit("toy", subject._replace(base=base), SMALL)


def test_leaves_that_are_too_small_to_hide_in_stay_plain(subject):
    """The bias of a head of two classes."""
    params = subject.params | {"head": {"bias": np.array([0.5, -0.5], np.float32)}}
    run = Audit("toy", subject._replace(params=params, fresh=lambda key: params), SMALL)
    file = run.protected(ARCHITECTURE, 0).params
    np.testing.assert_array_equal(file["head"]["bias"], params["head"]["bias"])
    same = np.asarray(file["first"]["kernel"]) == params["first"]["kernel"]
    assert same.mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True])
def test_a_sealed_file_is_worth_no_more_than_what_is_known_without_it(subject, base):
    grid = dataclasses.replace(
        SMALL, importance=("l2",), rest="sealed", steps=(40,),
        attacks=("fine-tune all, batch statistics", "rank matching, fine-tune all", "zero-fill"),
    )  # fmt: skip
    report = report_of(subject._replace(base=moved(subject.params, 0.1) if base else None), grid)
    (found,) = report.protections
    assert found.name == "l2 20 %, sealed"
    assert found.detection == {}
    assert {attempt.attack for attempt in found.attempts} <= set(grid.attacks) - {"zero-fill"}
    assert max(found.shipped) < subject.worthless
    assert 0 <= found.best[-1].advantage.mean <= 0.05
    assert report.everything == []
    shares = [level.share for level in found.levels]
    assert shares[0] == 0
    assert 0.85 < shares[1] < shares[2] == 1
    assert found.levels[2].metric == pytest.approx(report.clean)
    # Who has a key has what it opens of a plain rest.
    plain, sealed = (
        Audit("toy", subject, dataclasses.replace(grid, rest=rest)) for rest in ("plain", "sealed")
    )
    for level in (1, 2):
        files = [run.protected(Plan("l2", 0.2), 0).opened(level) for run in (plain, sealed)]
        for one, other in zip(*map(jax.tree.leaves, files), strict=True):
            np.testing.assert_array_equal(one, other)


# --- structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_plain_kernels_tell_the_signs_between_them(layout):
    """Kernels that share a direction, written into each channel with the sign of its scale."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 32)
    before = rng.standard_normal((3, 3, 16, 32))
    shared = rng.standard_normal((16, 24))
    own = np.einsum("hwic,io->hwco", before, shared) / 16
    after = own * signs[:, None] + 0.5 * rng.standard_normal((3, 3, 32, 24))
    if layout == "OIHW":
        before, after = (np.transpose(kernel, (3, 2, 0, 1)) for kernel in (before, after))
    found = sign_leanings(before, after, layout)
    assert abs((np.sign(found) * signs).sum()) == 32
    scale = (signs * rng.uniform(0.5, 2, 32)).astype(np.float32)
    rng.shuffle(shuffled := scale.copy())
    averaged = with_signs(shuffled, found)
    assert averaged.dtype == np.float32
    if (signs < 0).sum() != 16:  # else the number does not tell which way round
        np.testing.assert_array_equal(np.sign(averaged), signs)
    assert np.square(averaged).mean() == pytest.approx(np.square(scale).mean(), rel=1e-5)


def test_structure_is_read_in_the_layout_that_shapes_tell(subject):
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(32) < 12, -1, 1)
    rng.shuffle(signs)
    params = {
        "one/kernel": np.repeat(rng.standard_normal((1, 20, 3, 3)), 32, 0),
        "norm/scale": signs.astype(np.float32),
        "two/kernel": rng.standard_normal((24, 1, 3, 3)) * signs[:, None, None],
    }
    torch = subject._replace(
        params=params, chain=[audit.Link("one/kernel", "norm/scale", "two/kernel")], select=None
    )
    masks = {"one/kernel": False, "norm/scale": True, "two/kernel": False}
    file = params | {"norm/scale": np.sort(params["norm/scale"])}
    loot = audit.Loot(torch, file, masks, jax.random.key(0))
    ((_, found),) = audit.run_attack(
        audit.ATTACKS["sign recovery"], loot, lambda _: None, rate=0, stops=[]
    )
    np.testing.assert_array_equal(np.sign(found["norm/scale"]), signs)


@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_siblings_tell_sizes(layout):
    """Scales that go with the sizes of kernels, of which a tenth is hidden."""
    link = audit.Link("one", "scale", "two", "bias")

    def network(seed):
        rng = np.random.default_rng(seed)
        scale, bias = rng.uniform(0.2, 2, 64), rng.standard_normal(64)
        one = rng.standard_normal((3, 3, 16, 64)) * scale
        two = rng.standard_normal((3, 3, 64, 24)) * np.exp(bias)[:, None]
        scale *= rng.choice([-1, 1], 64)
        if layout == "OIHW":
            one, two = (np.transpose(kernel, (3, 2, 0, 1)) for kernel in (one, two))
        return {"one": one, "scale": scale, "two": two, "bias": bias}

    own, *others = map(network, range(3))
    hidden = {"one": np.random.default_rng(9).random(own["one"].shape) < 0.1}
    # What is hidden is not looked at, and neither is the order of scales and biases.
    seen = own | {"one": np.where(hidden["one"], np.nan, own["one"]), "scale": None, "bias": None}
    found = ranked_by_siblings(seen, others, [link], hidden, layout)
    assert np.corrcoef(found["scale"], np.abs(own["scale"]))[0, 1] > 0.9
    assert np.corrcoef(found["bias"], own["bias"])[0, 1] > 0.9
    assert ranked_by_siblings(seen, others, [link._replace(bias=None)], hidden, layout).keys() == {
        "scale"
    }
    noise = np.random.default_rng(5).standard_normal(64)
    np.testing.assert_array_equal(np.sort(in_order(noise, found["bias"])), np.sort(noise))
    ranked = in_order(noise, found["bias"])
    assert (np.argsort(ranked) == np.argsort(found["bias"], kind="stable")).all()
    with_sizes = with_signs(noise, np.sign(own["scale"]), found["scale"])
    np.testing.assert_allclose(np.sort(np.abs(with_sizes)), np.sort(np.abs(noise)))


def test_noise_tells_no_signs():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 256)
    found = sign_leanings(rng.standard_normal((16, 256)), rng.standard_normal((256, 16)), "HWIO")
    assert abs((np.sign(found) * signs).mean()) < 0.25


def test_as_many_scales_are_negative_as_the_file_shows():
    leanings = np.array([0.3, -0.1, 0.5, -0.4])
    positive = np.array([1, 2, 3, 4], np.float32)
    assert (with_signs(positive, leanings) > 0).all()
    one = np.array([1, -2, 3, 4], np.float32)
    np.testing.assert_array_equal(np.sign(with_signs(one, leanings)), [1, 1, 1, -1])


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            ("first/kernel", "norm/size", "last/kernel"),
            "chain: expected names of parameters, such as .*, got 'no",
        ),
        (
            ("first/kernel", "last/kernel", "last/kernel"),
            "chain: expected two kernels with the same number",
        ),
        (
            ("first/kernel", "norm/scale", "last/kernel", "last/kernel"),
            r"chain: .*: expected shape \(64,\), that of",
        ),
    ],
)
def test_a_bad_chain_is_refused(subject, link, message):
    with pytest.raises(ValueError, match=message):
        Audit("toy", subject._replace(chain=[audit.Link(*link)]), SMALL)


CONVOLUTIONS = {
    "HWIO": ((3, 3, 8, 16), (3, 3, 16, 24)),
    "OIHW": ((16, 8, 3, 3), (24, 16, 3, 3)),
}


@pytest.mark.parametrize("layout", CONVOLUTIONS)
def test_a_chain_of_convolutions_is_taken_in_its_layout(layout):
    shapes = dict(zip(("one", "two"), CONVOLUTIONS[layout], strict=True)) | {"scale": (16,)}
    names = ("one", "scale", "two")
    assert check_chain([names], shapes, layout, "x") == [audit.Link(*names)]
    for wrong in (("two", "scale", "one"), ("one", "scale", "one")):
        with pytest.raises(ValueError, match=f"x: chain: expected two kernels.*{layout}"):
            check_chain([wrong], shapes, layout, "x")
    for odd in ("one", [3], ["one"], [("one", "scale")], audit.Link(*names)):
        with pytest.raises(ValueError, match="x: chain: expected"):
            check_chain(odd, shapes, layout, "x")


def test_a_chain_tells_the_layout_of_dense_layers(subject):
    def made(inputs, hidden, outputs):
        params = {
            "one.weight": np.ones((hidden, inputs), np.float32),
            "norm.weight": np.ones(hidden, np.float32),
            "two.weight": np.ones((outputs, hidden), np.float32),
        }
        chain = [("one.weight", "norm.weight", "two.weight")]
        return subject._replace(
            params=params, chain=chain, fresh=lambda key: params, training_loss_fn=None
        )

    assert check_subject(made(4, 8, 2), "x").layout == "OIHW"
    with pytest.raises(ValueError, match=r"x: chain: cannot tell .* Set the subject's layout"):
        check_subject(made(8, 8, 8), "x")
    assert check_subject(made(8, 8, 8)._replace(layout="OIHW"), "x").layout == "OIHW"


def test_structure_of_wide_layers_takes_little_memory():
    """The products of these kernels are 16 GB."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 512)
    shared = rng.standard_normal((2000, 2000)).astype(np.float32)
    before = rng.standard_normal((2000, 512)).astype(np.float32)
    after = (before.T @ shared) * signs[:, None]
    found = sign_leanings(before, after, "HWIO")
    assert abs((np.sign(found) * signs).sum()) == 512


def test_the_rate_warms_up_and_falls_to_zero():
    rate = warm_cosine(0.5, 100)
    rates = [rate(step) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert [warm_cosine(1.0, 1)(1), warm_cosine(1.0, 2)(2)] == pytest.approx([1.0, 0.5])
