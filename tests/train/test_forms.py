"""Every parallel form, and every pair of them, trains as one device does; or is refused before anything runs.

`FORMS` is the one table of forms. What configs say about their pairs stands in docs/parallelism.md: after a change,
`python tests/train/test_forms.py` writes it there.
"""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import random_batch, run_config

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import Model
from jaxllm.models.layout import stack, unstack
from jaxllm.train import compressed, outer, replicas
from jaxllm.train.config import RunConfig
from jaxllm.train.step import (
    Setup,
    TrainState,
    abstract_batch,
    check_batches,
    init_state,
    make_eval_step,
    make_train_step,
    place_batch,
    set_up,
)

DOCS = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- pairs: written by tests/train/test_forms.py -->", "<!-- end of pairs -->"


class Form(NamedTuple):
    overrides: tuple[str, ...] = ()
    axis: str | None = None  # mesh axis it works over
    also: tuple[str, ...] = ()  # what a run on one device is given too, to be the same run
    its_own: bool = False  # another algorithm: its reference is itself over as many devices of `axis`, and no others
    rounds: bool = False  # what is lost of the first gradient is in the state
    most: int = 4  # devices it can work over
    often: bool = False  # its pairs with others of that kind are tried in every run of the tests, not in slow ones only


def pipeline(schedule: str, most: int = 4, often: bool = False) -> Form:
    return Form((f"pipeline.schedule={schedule}", "accumulate=4"), "pipe", most=most, often=often)


FORMS = {
    "data": Form(axis="data"),
    "zero1": Form(("sharding.preset=zero1",), "fsdp"),
    "zero2": Form(("sharding.preset=zero2",), "fsdp"),
    "zero3": Form(("sharding.preset=zero3",), "fsdp", often=True),
    "tensor": Form(axis="tensor", often=True),
    "sequence": Form(("sharding.activations.norm_seq=[context, tensor]",), "tensor", often=True),
    "ring": Form(("context={kind: ring, balanced: false}",), "context"),
    "zigzag ring": Form(("context=ring",), "context", often=True),
    "ulysses": Form(("context=ulysses",), "context", often=True),
    "expert": Form(axis="expert"),
    "gpipe": pipeline("gpipe"),
    "token slices": pipeline("{kind: gpipe, slices: 2}"),
    "1f1b": pipeline("1f1b", often=True),
    "interleaved": pipeline("interleaved", most=2),
    "zero bubble": pipeline("zb_h1"),
    "offload optimizer": Form(("offload.optimizer=true",)),
    "offload weights": Form(("offload.parameters=true",)),
    "offload activations": Form(("remat=offload",)),
    "local SGD": Form(("outer={kind: local_sgd, every: 2}",), "data", its_own=True),
    "DiLoCo": Form(("outer={kind: diloco, every: 2}",), "data", its_own=True, often=True),
    "int8 gradients": Form(("compression={kind: int8, block: 64}",), "data", ("clip=null",), rounds=True, often=True),
}
DEVICES = 4
MODEL = ("model.num_layers=4", "model.block.attention={num_heads: 8, num_kv_heads: 4}")  # divide over 4 devices


def pairs() -> list[tuple[str, str]]:
    """Pairs of forms that are not two answers to one question."""
    return [(a, b) for a, b in itertools.combinations(FORMS, 2) if not alternatives(a, b)]


def alternatives(a: str, b: str) -> bool:
    """Whether two forms are ways to do the same: use one mesh axis, or set the same field."""
    fields = [{o.split("=")[0] for o in FORMS[n].overrides} for n in (a, b)]
    return FORMS[a].axis is not None and FORMS[a].axis == FORMS[b].axis or bool(fields[0] & fields[1])


def config_of(*names: str, only: str | None = None) -> RunConfig:
    """The run of these forms on 4 devices; of `only` one of them, over as many devices as it has among them.

    Raises:
      ConfigError: they do not go together.
    """
    forms = [FORMS[n] for n in names]
    axes = sorted({f.axis for f in forms if f.axis}) or ["fsdp"]
    size = min(DEVICES if len(axes) == 1 else 2, *(f.most for f in forms))
    if only is not None:
        return run_config(*FORMS[only].overrides, f"mesh.{FORMS[only].axis}={size}", *also(*names))
    return run_config(*(o for f in forms for o in f.overrides), *(f"mesh.{a}={size}" for a in axes), *also(*names))


def also(*names: str) -> tuple[str, ...]:
    return (*MODEL, *(o for n in names for o in FORMS[n].also))


def refusal(*names: str) -> str | None:
    """Why configs of these forms are refused; None: they are not."""
    try:
        config_of(*names)
    except ConfigError as e:
        return str(e)
    return None


class Run(NamedTuple):
    """Two steps. Weights by name and layer, wherever the run keeps them."""

    losses: list[float]
    weights: list[dict[str, np.ndarray]]  # at the start and after each step
    lost: dict[str, np.ndarray] | None  # of the first step's gradients, where they are rounded


@functools.cache
def trained(cfg: RunConfig) -> Run:
    setup = set_up(cfg, jax.devices()[: np.prod(cfg.mesh.sizes)])
    by_layer = functools.partial(unstack, cfg=cfg.model, places=setup.places)
    state = start(setup)
    step = make_train_step(setup).lower(setup.state, abstract_batch(setup, cfg.batch, 16)).compile()
    losses, weights, lost = [], [by_layer(jax.device_get(state.params))], None
    for i in range(2):
        state, sums = step(state, place_batch(setup, random_batch(seed=i)))
        losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
        weights.append(by_layer(jax.device_get(state.params)))
        if cfg.compression is not None and lost is None:
            residual = jax.device_get(state.opt.residual)
            lost = by_layer({n: x.sum(replicas.dim(setup.axes[n])) for n, x in residual.items()})
    return Run(losses, weights, lost)


def start(setup: Setup) -> TrainState:
    """Like init_state, which would be compiled anew for every mesh."""
    cfg, count = setup.cfg, setup.mesh.shape["data"]
    params = jax.tree.map(jnp.asarray, stack(first_weights(cfg.model), cfg.model, setup.places))
    made = TrainState(jnp.int32(0), params, setup.tx.init(params), None)
    if cfg.outer is not None:
        made = outer.start(cfg.outer, made, setup.axes, setup.opt_axes, count)
    if cfg.compression is not None:
        made = made._replace(opt=compressed.Fed(made.opt, compressed.start(params, setup.axes, count)))
    return jax.device_put(made, jax.tree.map(lambda x: x.sharding, setup.state))


@functools.cache
def first_weights(model: Model) -> dict[str, np.ndarray]:
    setup = set_up(run_config().model_copy(update={"model": model}), jax.devices()[:1])
    return unstack(jax.device_get(init_state(setup).params), model)


def assert_trains_as_one_device(*names: str) -> None:
    own = [n for n in names if FORMS[n].its_own]
    other = config_of(*names, only=own[0]) if own else run_config(*also(*names))
    mine, reference = trained(config_of(*names)), trained(other)
    steps = 1 if any(FORMS[n].rounds for n in names) else 2  # what is rounded in one step changes the next
    np.testing.assert_allclose(mine.losses[:steps], reference.losses[:steps], rtol=1e-5)
    assert mine.weights[0].keys() == reference.weights[0].keys()
    for name, before in reference.weights[0].items():
        # How far weights have moved is the sum of their gradients times the learning rate, rounded as the weights are.
        moved, expected = mine.weights[steps][name] - before, reference.weights[steps][name] - before
        if mine.lost is not None:
            moved = moved - config_of(*names).optimizer.learning_rate * mine.lost[name]
        rounding = 2 * np.finfo(np.float32).eps * np.abs(before).max()
        close = 1e-5 * np.abs(expected).max() + rounding
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=float(close), err_msg=name)


@pytest.mark.parametrize("name", [n for n in FORMS if not FORMS[n].its_own])
def test_every_form_trains_as_one_device_does(name):
    assert refusal(name) is None
    assert_trains_as_one_device(name)


def marked(a: str, b: str):
    often = FORMS[a].often and FORMS[b].often
    return pytest.param(a, b, id=f"{a}-{b}", marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("a", "b"), [marked(a, b) for a, b in pairs()])
def test_every_pair_trains_as_one_device_does_or_is_refused_with_a_reason(a, b):
    if reason := refusal(a, b):
        assert re.search(r"; .*\bset\b", reason), f"{a} and {b}: no way out is given in: {reason}"
    else:
        assert_trains_as_one_device(a, b)


# --- the table in the docs -------------------------------------------------------------------------------------------


def table() -> str:
    """What configs say of each pair."""
    reasons: list[str] = []

    def cell(a: str, b: str) -> str:
        if a != b and alternatives(a, b):
            return "-"
        if (reason := refusal(a, b) if a != b else refusal(a)) is None:
            return "yes"
        reason = reason.rpartition("(top): ")[2]
        reason = re.sub(r"\b(mesh\.\w+|outer)=\w+", r"`\1`", reason)  # whatever the value
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    names = list(FORMS)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, a in enumerate(names):
        cells = [cell(a, b) if j <= i else "" for j, b in enumerate(names)]
        lines.append(f"| {a} | {' | '.join(cells)} |")
    return "\n".join(lines + [""] * bool(reasons) + [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)])


def test_the_docs_have_the_table_of_pairs():
    text = DOCS.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table(), f"run python {Path(__file__).name}"


# --- what forms meet besides the training step -----------------------------------------------------------------------


@functools.cache
def evaluated(*overrides: str, moved: bool) -> dict[str, tuple[float, float]]:
    """Metric sums of one batch, with a bidirectional prefix in each document; whether tokens lie in another order."""
    cfg = run_config(*MODEL, *overrides)
    devices = jax.devices()[: np.prod(cfg.mesh.sizes)]
    setup = set_up(cfg, devices)
    params = start(set_up(run_config(*MODEL, *(o for o in overrides if o.startswith("mesh"))), devices))
    batch = random_batch()
    placed = place_batch(setup, batch | {"prefix": batch["positions"] < 3})
    assert ("index" in placed) == moved
    return jax.device_get(make_eval_step(setup)(params.params, placed))


def assert_same_sums(mine: dict, alone: dict) -> None:
    assert mine.keys() == alone.keys()
    for name, pair in alone.items():
        np.testing.assert_allclose(mine[name], pair, rtol=1e-5, err_msg=name)


def test_evaluation_over_shared_rows_is_that_of_one_device():
    assert_same_sums(evaluated("mesh.context=4", moved=True), evaluated(moved=False))


@pytest.mark.parametrize("context", ["ring", "ulysses"])
def test_masks_that_are_not_causal_cross_shares_too(context):
    """Balanced is a wish then: without causality there is nothing to balance, and rows keep their order."""
    mask = "model.block.attention.mask={kind: some, of: [causal, prefix]}"
    alone = evaluated(mask, moved=False)
    assert_same_sums(evaluated(mask, "mesh.context=4", f"context={context}", moved=False), alone)
    assert alone["loss"] != evaluated(moved=False)["loss"]


@pytest.mark.parametrize("remat", ["full", "save_attention"])
def test_remat_changes_nothing_of_a_ring(remat):
    mine, reference = trained(run_config("mesh.context=4", f"remat={remat}", *MODEL)), trained(run_config(*MODEL))
    np.testing.assert_allclose(mine.losses, reference.losses, rtol=1e-5)


SHARED = ("mesh.fsdp=2", "sharding.activations={batch: data, seq: fsdp, norm_seq: fsdp}")  # rows, by another axis
SLICES = "pipeline.schedule={kind: gpipe, slices: 2}"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model.dropout.attention=0.1", "mesh.context=2"), "with mesh.context=2: no device has a whole row"),
        (("model.dropout.attention=0.1", *SHARED), "with mesh.fsdp=2: no device has a whole row"),
        ((SLICES, "mesh.pipe=2", "accumulate=2", "mesh.context=2"), "mesh axis context cuts rows too"),
        ((SLICES, "mesh.pipe=2", "accumulate=2", *SHARED), "mesh axis fsdp cuts rows too"),
        ((SLICES, "mesh.pipe=2", "accumulate=2", "model.position=rope_2d"), "depend on how long a whole prefix is"),
        (("mesh.pipe=2", "accumulate=2", "model.query_layer={}"), "mesh.pipe=2 with model.query_layer"),
        (("model.block.attention={num_heads: 6, head_dim: 8}", "context=ulysses", "mesh.context=4"),
         "num_heads=6 does not divide over mesh axes context of 4 devices"),
        (("model.block.attention={num_heads: 6, head_dim: 8}", "context=ulysses", "mesh={tensor: 2, context: 2}"),
         "num_heads=6 does not divide over mesh axes tensor x context of 4 devices"),
    ],
)  # fmt: skip
def test_what_rows_that_devices_share_cannot_do_is_refused(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        run_config(*overrides)


def test_heads_are_counted_again_when_the_devices_are():
    cfg = run_config("model.block.attention={num_heads: 6, head_dim: 8}", "context=ulysses", "mesh.context=-1")
    with pytest.raises(ConfigError, match="num_heads=6 does not divide over mesh axes context of 4 devices"):
        set_up(cfg)


SEQUENCE = FORMS["sequence"].overrides[0]


@pytest.mark.parametrize(
    ("overrides", "length", "reason"),
    [
        (("mesh.context=4",), 12, "rows of 12 tokens do not divide into 2 x 4 chunks"),
        (("mesh.tensor=4", SEQUENCE, *MODEL), 18, "stream: norm_seq=18 does not divide over mesh axis tensor of 4"),
        (("mesh.pipe=2", "accumulate=2", SLICES), 15, "rows of 15 tokens do not divide into .*slices=2"),
        (("mesh={pipe: 2, tensor: 2}", "accumulate=2", SLICES, SEQUENCE), 18, "stream: norm_seq=9 does not divide"),
    ],
)
def test_rows_that_do_not_divide_are_refused_before_anything_is_made(overrides, length, reason):
    cfg = run_config(*overrides)
    setup = set_up(cfg, jax.devices()[: abs(np.prod(cfg.mesh.sizes))])
    check_batches(setup, 16)
    with pytest.raises(ConfigError, match=reason):
        check_batches(setup, length)


if __name__ == "__main__":
    head, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
