"""The documents' code runs: every block in README and docs, and all examples."""

import doctest
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import selcrypt_jax as sj
from selcrypt_jax import audit, models
from selcrypt_jax.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent


# --- pages ----------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block in a language, what prepares it in a comment that readers do not see, or a comment that
# says which test runs the next block in the page's place.
PIECE = re.compile(
    r"^<!-- (?P<marker>elsewhere: \S+|demo|tests) -->\n(?=```)"
    r"|^<!-- set-up\n(?P<setup>.*?)^-->$"
    r"|^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
START = """\
import os, pathlib, subprocess, sys
blocks, instead = [], {}
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
"""
RUN = {
    "python": "{code}",
    "sh": """\
command = {code!r}
for old, new in instead.items():
    command = command.replace(old, new)
subprocess.run(["bash", "-euxo", "pipefail", "-c", command], check=True)
""",
    "toml": """\
pathlib.Path("block.toml").write_text({code!r})
from selcrypt_jax.audit._config import read_config
assert read_config("block.toml").subjects
""",
}
SHOWN_ONLY = {"bibtex", "text"}


def run(code: str, folder: Path) -> str:
    # A process of its own: readers do not have this suite's strict settings.
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def script_of(page: Path) -> str:
    """All code that a page has its reader run, as one program; empty if there is none."""
    lines, found, marker = [START], False, None
    for piece in PIECE.finditer(page.read_text(encoding="utf-8")):
        if piece["setup"] is not None:
            lines.append(piece["setup"])
        elif piece["marker"] is not None:
            marker = piece["marker"]
        elif marker is not None:
            assert marker in ("demo", "tests") or any(
                (ROOT / "tests").glob(f"*/{marker.split()[1]}")
            )
            marker = None
        elif piece["language"] not in SHOWN_ONLY:
            assert piece["language"] in RUN, f"{page.name}: a block in {piece['language']!r}"
            lines.append(f"blocks.append({piece['code']!r})")
            lines.append(RUN[piece["language"]].format(code=piece["code"]))
            found = True
    return "\n".join(lines) if found else ""


def pages_with_code() -> list[Any]:
    found = []
    for page in PAGES:
        if page.name == "recipes.md" or not script_of(page):  # see test_recipes
            continue
        found.append(pytest.param(page, id=page.relative_to(ROOT).as_posix()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_code())
def test_every_block_of_a_page_runs(page, tmp_path):
    (tmp_path / "train").symlink_to(ROOT / "train")
    run(script_of(page), tmp_path)


def test_every_fence_is_seen():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = len(re.findall(r"^ *```", text, re.MULTILINE))
        assert fences == 2 * sum(m["code"] is not None for m in PIECE.finditer(text)), page.name


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_pages_beside_the_site(page):
    # Those inside of docs/ are checked where the site is built.
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# --- the reference --------------------------------------------------------------------------------

MODULES = [sj, sj.importance, audit, models]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in dir(module)
    if not name.startswith("_") and not inspect.ismodule(getattr(module, name))
}


def in_reference() -> list[str]:
    pages = (ROOT / "docs" / "api").glob("*.md")
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]


def test_the_reference_has_every_public_name_once():
    assert sorted(in_reference()) == sorted(PUBLIC)


def test_the_reference_has_every_command():
    text = (ROOT / "docs" / "api" / "commands.md").read_text()
    assert set(re.findall(r"<!-- help (\w+) -->", text)) == set(COMMANDS) - {"version"}


def members(value: Any) -> dict[str, Any]:
    """Public methods and properties that a class defines itself."""
    return {
        name: member
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (isinstance(member, property | staticmethod | classmethod) or callable(member))
    }


def complaints(name: str, value: Any) -> Iterator[str]:
    doc = inspect.getdoc(value) or ""
    if not (inspect.isclass(value) or inspect.isfunction(value)):  # a type, or a table
        return
    if len(doc) <= 20:
        yield f"{name} has no docstring"
    # Read as a type and cut off, where a colon follows.
    first = re.search(r"^Returns:\n +(.*)$", doc, re.MULTILINE)
    if first and ": " in first[1]:
        yield f"{name}: what it returns begins with a colon"
    if not inspect.isclass(value):
        return
    yield from (
        f"{name}.{m} has no docstring" for m, v in members(value).items() if not inspect.getdoc(v)
    )
    fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", {})
    for field in fields:
        if not field.startswith("_") and not re.search(rf"\b{field}\b", doc):
            yield f"{name}.{field} is not described"


def test_what_is_public_has_a_docstring():
    assert not [text for name, value in PUBLIC.items() for text in complaints(name, value)]


EXAMPLES = {
    name: doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    for name, value in PUBLIC.items()
}


def small_model() -> models.DnCNN:
    model = models.DnCNN(depth=3, width=16, channels=3, eps=1e-4, first_bias=True, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A protected file, its owner's keys, and a grant for level 2 of 3."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "keys").mkdir()
    secret, signing = sj.Secret.generate(), sj.SigningKey.generate()
    secret.write(folder / "keys" / "secret.key")
    signing.write(folder / "keys" / "signing.key")
    signing.public.write(folder / "keys" / "signing.pub")
    state = nnx.state(small_model())
    masks = sj.nested_masks(sj.importance.l2(state), [0.2, 0.3, 0.5])
    path = folder / "model.safetensors"
    sj.protect(state, masks, secret=secret, signing=signing).save(path)
    sj.issue_grant(path, level=2, secret=secret, signer=signing.public).write(
        folder / "alice.grant"
    )
    return folder


@pytest.fixture
def scope(shipped, tmp_path, monkeypatch) -> dict[str, Any]:
    """The names that the docstrings' examples assume."""
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    model = small_model()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    whole = models.DnCNN(channels=3, eps=1e-4, first_bias=True, rngs=nnx.Rngs(0))
    for path in ("torch.safetensors", "plain.safetensors"):
        safetensors.numpy.save_file(models.to_torch(whole), path)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 12, 12, 3)), jnp.float32)
    scores = sj.importance.l2(params, granularity="weight")
    masks = sj.nested_masks(scores, [0.1, 0.3, 0.5])
    secret, model_id = sj.Secret.read("keys/secret.key"), sj.new_model_id()
    keys = sj.ring_keys(sj.level_key(secret, model_id, levels=3))
    other_keys = sj.ring_keys(sj.level_key(secret, sj.new_model_id(), levels=3))

    def apply(params: Any, images: Any) -> Any:
        return nnx.merge(graph, params, rest)(images)

    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.square(apply(params, batch)).mean()

    def psnr_of(other: Any) -> float:
        same = jax.tree.map(lambda a, b: (a == b).mean(), params, other)
        return 20 + 10 * min(float(share) for share in jax.tree.leaves(same))

    return {
        **{name.rpartition(".")[2]: value for name, value in PUBLIC.items()},
        **{"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "optax": optax},
        **{"safetensors": safetensors, "path": "torch.safetensors"},
        "save_file": safetensors.numpy.save_file,
        "importance": sj.importance,
        "key": jax.random.key(1),
        "signing": sj.SigningKey.read("keys/signing.key"),
        "apply": apply,
        "loss_fn": loss_fn,
        "batches": images,
        "images": images[0],
        "protected": sj.encrypt(params, masks, keys),
        "protected_again": sj.encrypt(params, masks, other_keys),
        "other_keys": other_keys,
        "batch": lambda step: images[step % 2],
        "subject": audit.Subject(
            "",
            params,
            loss_fn,
            psnr_of,
            "dB",
            20.0,
            2,
            lambda which, rng: images[rng.choice(which)],
            lambda key: jax.tree.map(jnp.zeros_like, params),
        ),
        **{"model": model, "params": params, "scores": scores, "masks": masks, "keys": keys},
        **{"secret": secret, "model_id": model_id, "psnr_of": psnr_of},
    }


def test_what_can_be_called_has_an_example():
    assert not [name for name in EXAMPLES if callable(PUBLIC[name]) and not EXAMPLES[name]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, found in EXAMPLES.items() if found])
def test_examples_of_docstrings(name, scope):
    test = doctest.DocTest(EXAMPLES[name], scope, name, None, 0, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


def test_names_in_the_reference_exist():
    page = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    section = page.partition("## What there is\n")[2]
    assert section
    named = set(re.findall(r"`(?:selcrypt_jax\.)?([A-Za-z]\w*)(?:\.\w+)*`", section))
    here = {*dir(sj), *dir(sj.importance), *dir(sj.LosslessCipher), *dir(audit)}
    parts = {"DnCNN", "models", "audit", "run", "read", "write", "reason"}  # of other objects
    assert named - parts - here == set()


def test_attacks_have_the_names_of_the_audit():
    """In italics on the page of figures, so that each can be repeated."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    _, _, figures = text.partition("## A stronger adversary")
    italics = r"(?<!\*)\*([^*\n]+)\*(?!\*)"
    named = set(re.findall(italics, figures))
    words = {"Structure.", "Training.", "noise", "italics"}
    assert named - words <= set(audit.ATTACKS)
    assert len(named - words) > 12
    # A name without its italics would not be checked.
    longest = sorted(audit.ATTACKS, key=len, reverse=True)[:20]
    plain = re.sub(italics, "", figures)
    assert not [name for name in longest if name in plain]
