"""The decoder and its objective, cut for the stages of a pipeline: gradients and metrics of runs with mesh.pipe > 1.

A `setup` here is a `jaxllm.train.step.Setup`, a `state` its TrainState.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.core.axes import constrain
from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Float, Int, Key, PyTree
from jaxllm.models.decoder import Decoder
from jaxllm.models.stack import row_tokens
from jaxllm.models.layers.attention import KV, Tokens
from jaxllm.models.layers.block import Layer
from jaxllm.models.layout import Places, is_stacked
from jaxllm.models.module import Params, merge
from jaxllm.parallel.pipeline import forward_only, instructions, table
from jaxllm.parallel.pipelined import AXIS, Model, Stages, backpropagate, evaluate
from jaxllm.train.config import RunConfig

Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]


def stack_order(cfg: RunConfig, devices: int) -> Places | None:
    """The layer group at each place of a stack, for so many devices along `pipe`; None: one after another."""
    return None if devices == 1 else stages(cfg, devices).order(devices)


def stages(cfg: RunConfig, devices: int) -> Stages:
    return Stages.of(cfg.pipeline.groups(devices, cfg.model.num_groups))


def gradients(setup, state, batch: Batch, key: Key[Array, ""] | None) -> tuple[Params, Float[Array, ""], Sums]:
    """As `jaxllm.train.step.gradients`: the microbatches of `accumulate` go through the stages."""
    cfg, devices = setup.cfg, setup.mesh.shape[AXIS]
    micro = microbatches(batch, cfg.accumulate)
    size = micro["weights"][0].size  # what is backpropagated is a mean, as in step.gradients
    scale = jnp.float32(1) if state.scale is None else state.scale.scale
    keys = None if key is None else jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(cfg.accumulate))
    program = instructions(table(cfg.pipeline.schedule, devices, cfg.accumulate), cfg.pipeline.recompute)
    specs = {name: where.spec for name, where in setup.gradients.items()}
    specs = {name: PartitionSpec(*spec[1:]) if is_stacked(name) else spec for name, spec in specs.items()}
    work = Work(micro, keys, scale / size)
    done = backpropagate(
        cut(setup, work, cfg.pipeline.slices), stages(cfg, devices), program, setup.mesh,
        *halves(setup.policy.cast(state.params)), work, halves(specs), unroll=not cfg.scan,
    )  # fmt: skip
    grads = {name: (done.shared | done.layers)[name] * size for name in state.params}
    weight, metrics = done.sums
    return jax.lax.with_sharding_constraint(grads, setup.gradients), weight, metrics


def metric_sums(setup, params: Params, batch: Batch) -> Sums:
    """What the objective measures on a batch, in evaluation; the batch goes through the stages in as many parts."""
    cfg, devices = setup.cfg, setup.mesh.shape[AXIS]
    rows, others = batch["weights"].shape[0], setup.mesh.size // devices
    parts = devices if rows % (devices * others) == 0 else 1
    program = instructions(forward_only(devices, parts, cfg.pipeline.chunks))
    work = Work(microbatches(batch, parts), None, jnp.float32(1))
    _, metrics = evaluate(
        cut(setup, work), stages(cfg, devices), program, setup.mesh, *halves(setup.policy.cast(params)), work,
        unroll=not cfg.scan,
    )  # fmt: skip
    return metrics


def microbatches(batch: Batch, count: int) -> Batch:
    """[count, rows, ...]; each has its share of every device's rows."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch)


def slice_size(length: int, slices: int) -> int:
    """Tokens of a slice of a row. Raises ConfigError if rows do not divide into slices."""
    if length % slices:
        raise ConfigError(
            f"rows of {length} tokens do not divide into pipeline.schedule.slices={slices}; take lengths that are "
            "multiples of it, or other slices"
        )
    return length // slices


def halves(params: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """What the stages have each for themselves, and what all of them have."""
    stacked = {name: x for name, x in params.items() if is_stacked(name)}
    return stacked, {name: x for name, x in params.items() if name not in stacked}


# --- the model, cut --------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A batch in microbatches."""

    rows: Batch
    keys: Key[Array, " m"] | None  # of dropout
    per: Float[Array, ""]  # what the loss is multiplied by


class Unit(NamedTuple):
    """A microbatch, or a slice of its tokens."""

    rows: Batch
    whole: Tokens  # where all tokens of its rows stand
    start: Int[Array, ""]  # of the slice
    key: Key[Array, ""] | None
    per: Float[Array, ""]


class Told(NamedTuple):
    """What every group of layers is told of a unit."""

    context: Layer
    whole: Tokens
    start: Int[Array, ""]
    key: Key[Array, ""] | None


class Head:
    """The decoder to an objective that calls it: what comes before its last norm is done."""

    def __init__(self, decoder: Decoder, x_BTD: Float[Array, "B T D"]):
        self.decoder, self.x_BTD = decoder, x_BTD

    def __call__(self, *_, **__) -> Float[Array, "B T V"]:
        return self.decoder.logits(self.hidden())

    def hidden(self, *_, **__) -> Float[Array, "B T D"]:
        return self.decoder.final(self.x_BTD)

    def __getattr__(self, name: str):
        return getattr(self.decoder, name)


def cut(setup, work: Work, slices: int = 1) -> Model:
    """The decoder for stages, in units of slices of a microbatch."""
    cfg, placeholders = setup.cfg.model, setup.state.params
    rows, length = work.rows["tokens"].shape[1:]
    size = slice_size(length, slices)

    def decoder(params: Params) -> Decoder:
        return merge(setup.graphdef, placeholders | params)

    def unit(work: Work, i: Int[Array, ""]) -> Unit:
        m, start = i // slices, i % slices * size
        rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, 0, keepdims=False), work.rows)
        whole = tokens_of(rows)
        if slices > 1:
            rows |= {"index": whole.index}
            rows = {k: jax.lax.dynamic_slice_in_dim(x, start, size, 1) for k, x in rows.items() if x.ndim == 2}
        return Unit(rows, whole, start, None if work.keys is None else work.keys[m], work.per)

    def first(shared: Params, unit: Unit) -> Float[Array, "B T D"]:
        return decoder(shared).embed(unit.rows["tokens"], unit.rows["positions"], unit.key)

    def context(unit: Unit) -> Told:
        return Told(decoder({}).context(tokens_of(unit.rows)), unit.whole, unit.start, unit.key)

    def group(params: Params, x_and_past, told: Told, number: Int[Array, ""]):
        model, (x_BTD, past) = decoder(params), x_and_past

        def see(s: int, new: KV) -> tuple[KV, Tokens]:
            return put_at(told.start, past[s], new), told.whole

        first = len(cfg.blocks) * number
        x_BTD, new = model.group(
            model.blocks, x_BTD, told.context, first, told.key, see if past else None, keep=bool(past)
        )
        return x_BTD, new if past else ()

    def last(shared: Params, x_BTD: Float[Array, "B T D"], unit: Unit) -> tuple[Float[Array, ""], PyTree]:
        loss = setup.objective(Head(decoder(shared), x_BTD), unit.rows, unit.key)
        return loss.total * unit.per, (loss.weight, dict(loss.metrics))

    def put_at(start: Int[Array, ""], past: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(lambda p, n: jax.lax.dynamic_update_slice_in_dim(p, n, start, 1), past, new)

    heads = [(b.attention.kv_heads, cfg.head_dim(b.attention)) for b in cfg.blocks] if slices > 1 else []
    past = [jax.ShapeDtypeStruct((rows, length, *kh), setup.policy.compute) for kh in heads]
    return Model(
        unit, first, context, group, last,
        settle=lambda x_BTD: constrain(x_BTD, "batch", "norm_seq", "embed"),
        past=tuple(KV(x, x) for x in past), slices=slices,
        put=lambda past, new, i: put_at(i * size, past, new),
        take=lambda past, i: jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, i * size, size, 1), past),
    )  # fmt: skip


def tokens_of(rows: Batch) -> Tokens:
    return row_tokens(rows["positions"], rows["documents"], rows.get("prefix"), rows.get("index"))
