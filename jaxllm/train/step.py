"""The training step: state in, state out. Nothing here knows the model or the objective."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxllm.core.axes import placed_by
from jaxllm.core.shapes import Array, Int, Key, PyTree
from jaxllm.models.module import Params, abstract, create, merge
from jaxllm.objectives.next_token import Loss, next_token
from jaxllm.parallel.sharding import batch_shardings, make_mesh, placed, placement, sharding, shardings
from jaxllm.train import optimizers
from jaxllm.train.config import RunConfig
from jaxllm.train.precision import LossScale, Policy, adjust, init_scale, policy
from jaxllm.train.schedules import learning_rate

Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]  # name -> (sum, weight): averaged once, when logged
Objective = Callable[[nnx.Module, Batch, Key[Array, ""] | None], Loss]


class TrainState(NamedTuple):
    step: Int[Array, ""]  # steps done, skipped ones included
    params: Params  # float32 master weights by name
    opt: PyTree  # optax state
    scale: LossScale | None  # of float16 training


class Setup(NamedTuple):
    """Everything about a run that is known before any array is made."""

    cfg: RunConfig
    graphdef: nnx.GraphDef
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState  # shapes, dtypes and shardings of the train state
    gradients: dict[str, jax.sharding.NamedSharding]
    policy: Policy
    objective: Objective


def set_up(cfg: RunConfig, devices: list[jax.Device] | None = None) -> Setup:
    """The run's program without its arrays: definition, mesh, optimizer, and where the state will lie.

    Raises:
      ConfigError: mesh, sharding, schedule or model do not fit together or not the devices.
    """
    mesh = make_mesh(cfg.mesh, devices)
    graphdef, shapes, axes = abstract(cfg.model, scan=cfg.scan, remat=cfg.remat)
    schedule = learning_rate(cfg.schedule, cfg.optimizer.learning_rate, cfg.steps)
    tx = optimizers.build(cfg.optimizer, schedule, axes)
    opt = jax.eval_shape(tx.init, shapes)
    scale = jax.eval_shape(lambda: init_scale(cfg.precision))
    s, replicated = cfg.sharding, sharding(mesh, cfg.sharding.parameters, ())
    where = TrainState(
        step=replicated,
        params=shardings(mesh, s.parameters, axes, shapes),
        opt=shardings(mesh, s.optimizer, optimizers.state_axes(opt, shapes, axes), opt),
        scale=jax.tree.map(lambda _: replicated, scale),
    )
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, opt, scale)
    return Setup(
        cfg, graphdef, mesh, tx, schedule, placed(state, where), shardings(mesh, s.gradients, axes, shapes),
        policy(cfg.precision), functools.partial(next_token, cfg.objective),
    )  # fmt: skip


def init_state(setup: Setup, params: Params | None = None) -> TrainState:
    """The state of step 0, every array made directly in its shard: no host or device ever holds the whole model.

    Args:
      params: weights to start from, in place of fresh ones; donated.
    """

    def make(key, params):
        params = create(setup.cfg.model, key) if params is None else params
        return TrainState(jnp.int32(0), params, setup.tx.init(params), init_scale(setup.cfg.precision))

    where = jax.tree.map(lambda x: x.sharding, setup.state)
    return jax.jit(make, out_shardings=where, donate_argnums=1)(jax.random.key(setup.cfg.seed), params)


def make_train_step(setup: Setup) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """jitted (state, batch) -> (state, sums); the old state's buffers are donated.

    A step whose loss or gradients are not finite counts in `sums["nonfinite"]` and, where `skips(cfg)`, leaves
    parameters and optimizer as they were.
    """
    cfg = setup.cfg
    dropout = any(cfg.model.dropout.model_dump().values())
    where = jax.tree.map(lambda x: x.sharding, setup.state)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if dropout else None
        with placed_by(placement(setup.mesh, cfg.sharding.activations, cfg.sharding.gradients, cfg.context)):
            grads, weight, sums = gradients(setup, state, batch, key)
        # Gradients are of sums over tokens: one division by the weight of the whole batch makes the mean exact
        # whatever the microbatches weigh.
        per = 1 / jnp.maximum(weight, 1) / (1 if state.scale is None else state.scale.scale)
        grads = jax.tree.map(lambda g: g * per, grads)
        norm = optax.tree.norm(grads)
        if cfg.clip is not None:  # Pascanu et al. 2012, arXiv:1211.5063
            shrink = jnp.minimum(1, cfg.clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        updates, opt = setup.tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"][0])
        if skips(cfg):
            params, opt = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt), (state.params, state.opt)
            )
        scale = None if state.scale is None else adjust(cfg.precision, state.scale, finite)
        one = jnp.float32(1)
        sums |= {"grad_norm": (jnp.where(finite, norm, 0), finite * one), "nonfinite": (one - finite, one)}
        if scale is not None:
            sums |= {"loss_scale": (scale.scale, one)}
        return TrainState(state.step + 1, params, opt, scale), sums

    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))


def skips(cfg: RunConfig) -> bool:
    """Whether steps that are not finite are skipped; float16 could not find its scale otherwise."""
    return cfg.stability.skip_nonfinite or cfg.precision.kind == "float16"


def gradients(setup: Setup, state: TrainState, batch: Batch, key: Key[Array, ""] | None) -> tuple[Params, Array, Sums]:
    """Gradients of the summed loss (times the loss scale), the batch's weight, and the metric sums.

    The batch is cut into `accumulate` microbatches, each of which has its share of every device's rows.
    """
    cfg = setup.cfg
    scale = 1.0 if state.scale is None else state.scale.scale

    def one(params: Params, batch: Batch, key: Key[Array, ""] | None):
        # Summing 10^5 tokens' gradients would leave float16's range: backpropagate the mean over the places of the
        # microbatch (a constant), and undo it in float32.
        places = batch["weights"].size

        def scaled_loss(params):
            loss = setup.objective(merge(setup.graphdef, setup.policy.cast(params)), batch, key)
            return loss.total * (scale / places), loss

        grads, loss = jax.grad(scaled_loss, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * places, grads)
        return jax.lax.with_sharding_constraint(grads, setup.gradients), loss

    if cfg.accumulate == 1:
        grads, loss = one(state.params, batch, key)
        return grads, loss.weight, dict(loss.metrics)

    n = cfg.accumulate
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), batch)

    def add(total, indexed):
        i, batch = indexed
        new = one(state.params, batch, None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, new), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(one, state.params, jax.tree.map(lambda x: x[0], micro), key),
    )
    zeros = (jax.lax.with_sharding_constraint(zeros[0], setup.gradients), zeros[1])
    (grads, loss), _ = jax.lax.scan(add, zeros, (jnp.arange(n), micro))
    return grads, loss.weight, dict(loss.metrics)


def make_eval_step(setup: Setup) -> Callable[[Params, Batch], Sums]:
    """jitted (params, batch) -> metric sums, with `bits_per_byte` = (nats / ln 2, bytes of text)."""

    def eval_step(params: Params, batch: Batch) -> Sums:
        with placed_by(placement(setup.mesh, setup.cfg.sharding.activations, setup.cfg.sharding.gradients, setup.cfg.context)):
            loss = setup.objective(merge(setup.graphdef, setup.policy.cast(params)), batch, None)
        nats, _ = loss.metrics["xent"]
        return loss.metrics | {"bits_per_byte": (nats / jnp.log(2.0), jnp.sum(batch["bytes"]).astype(jnp.float32))}

    return jax.jit(eval_step)


def place_batch(setup: Setup, batch: dict[str, Any]) -> Batch:
    """A host's rows of a batch as global arrays on the mesh."""
    hosts = jax.process_count()
    shapes = {k: jax.ShapeDtypeStruct((x.shape[0] * hosts, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    where = batch_shardings(setup.mesh, setup.cfg.sharding.activations, shapes)
    return {k: jax.make_array_from_process_local_data(where[k], x, shapes[k].shape) for k, x in batch.items()}


def abstract_batch(setup: Setup, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch of `rows` rows."""
    shapes = {
        k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in ("tokens", "targets", "positions", "documents")
    }
    shapes |= {
        "weights": jax.ShapeDtypeStruct((rows, length), jnp.float32),
        "bytes": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    return placed(shapes, batch_shardings(setup.mesh, setup.cfg.sharding.activations, shapes))


def check_batches(setup: Setup, length: int) -> None:
    """Raises ConfigError if a batch of the run does not divide over the mesh: now rather than at step 10,000."""
    for rows in setup.cfg.ramp_sizes():
        abstract_batch(setup, rows // setup.cfg.accumulate, length)
