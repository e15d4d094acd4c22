"""The training step: state in, state out. Nothing here knows the model or the objective."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxllm.core.axes import placed_by
from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Bool, Float, Int, Key, PyTree
from jaxllm.models.layout import Places
from jaxllm.models.module import Axes, Params, abstract, create, merge
from jaxllm.objectives.next_token import Loss, next_token
from jaxllm.parallel.collectives import share_count
from jaxllm.parallel.config import Context, Ring
from jaxllm.parallel.context import zigzag
from jaxllm.parallel.sharding import (
    Placed,
    batch_shardings,
    fitting,
    make_mesh,
    placed,
    placement,
    sharding,
    shardings,
)
from jaxllm.train import compressed, offload, optimizers, outer, pipelined, replicas
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
    axes: Axes  # logical axes of the weights
    opt_axes: PyTree  # and of the optimizer's state
    places: Places | None  # the layer group at each place of the stacks; None: one after another


def set_up(cfg: RunConfig, devices: list[jax.Device] | None = None) -> Setup:
    """The run's program without its arrays: definition, mesh, optimizer, and where the state will lie.

    Raises:
      ConfigError: mesh, sharding, schedule or model do not fit together or not the devices.
    """
    mesh = make_mesh(cfg.mesh, devices)
    if reasons := cfg.model_copy(update={"mesh": cfg.mesh.resolve(mesh.size)}).unsupported():
        raise ConfigError("; ".join(reasons))
    cfg = cfg.model_copy(update={"context": balanced(cfg, mesh)})
    places = pipelined.stack_order(cfg, mesh.shape["pipe"])
    graphdef, shapes, axes = abstract(cfg.model, scan=cfg.scan, remat=cfg.remat, places=places)
    schedule = learning_rate(cfg.schedule, cfg.optimizer.learning_rate, cfg.steps)
    tx = optimizers.build(cfg.optimizer, schedule, axes)
    opt = jax.eval_shape(tx.init, shapes)
    scale = jax.eval_shape(lambda: init_scale(cfg.precision))
    s, replicated = cfg.sharding, sharding(mesh, cfg.sharding.parameters, ())
    opt_axes = optimizers.state_axes(opt, shapes, axes)
    where = TrainState(
        step=replicated,
        params=shardings(mesh, s.parameters, axes, shapes),
        opt=shardings(mesh, s.optimizer, opt_axes, opt),
        scale=jax.tree.map(lambda _: replicated, scale),
    )
    params_at, opt_at = offload.places(cfg.offload, where.params, where.opt, opt_axes)
    where = where._replace(params=params_at, opt=opt_at)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, opt, scale)
    if cfg.outer is not None:
        state = jax.eval_shape(lambda s: outer.start(cfg.outer, s, axes, opt_axes, mesh.shape["data"]), state)
        where = outer.places(mesh, s, state, axes, opt_axes)
    if cfg.compression is not None:
        residual = jax.eval_shape(lambda p: compressed.start(p, axes, mesh.shape["data"]), shapes)
        state = state._replace(opt=compressed.Fed(opt, residual))
        where = where._replace(opt=compressed.Fed(where.opt, compressed.places(mesh, s.gradients, residual, axes)))
    return Setup(
        cfg, graphdef, mesh, tx, schedule, placed(state, where), shardings(mesh, s.gradients, axes, shapes),
        policy(cfg.precision), functools.partial(next_token, cfg.objective), axes, opt_axes, places,
    )  # fmt: skip


def init_state(setup: Setup, params: Params | None = None) -> TrainState:
    """The state of step 0, every array made directly in its shard: no host or device ever holds the whole model.

    Args:
      params: weights to start from, in place of fresh ones; donated.
    """

    cfg, count = setup.cfg, setup.mesh.shape["data"]

    def make(key, params):
        params = create(cfg.model, key, setup.places) if params is None else params
        state = TrainState(jnp.int32(0), params, setup.tx.init(params), init_scale(cfg.precision))
        if cfg.outer is not None:
            state = outer.start(cfg.outer, state, setup.axes, setup.opt_axes, count)
        if cfg.compression is not None:
            state = state._replace(opt=compressed.Fed(state.opt, compressed.start(params, setup.axes, count)))
        return state

    where = jax.tree.map(lambda x: x.sharding, setup.state)
    return jax.jit(make, out_shardings=where, donate_argnums=1)(jax.random.key(setup.cfg.seed), params)


def make_train_step(setup: Setup) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """jitted (state, batch) -> (state, sums); the old state's buffers are donated.

    A step whose loss or gradients are not finite counts in `sums["nonfinite"]` and, where `skips(cfg)`, leaves
    parameters and optimizer as they were.
    """
    cfg = setup.cfg
    step = functools.partial(train_step, setup)
    if cfg.outer is not None:
        alone = functools.partial(train_step, within_replica(setup))
        rules = cfg.sharding.activations
        step = outer.make_step(cfg.outer, cfg.steps, alone, setup.state, rules, setup.axes, setup.opt_axes)
    where = jax.tree.map(lambda x: x.sharding, setup.state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def train_step(
    setup: Setup, state: TrainState, batch: Batch, replica: Int[Array, ""] | None = None
) -> tuple[TrainState, Sums]:
    """One step; `replica` is its number where several train apart."""
    cfg = setup.cfg
    draws = cfg.model.draws
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if draws else None
    if draws and replica is not None:
        key = jax.random.fold_in(key, replica)
    light = state._replace(params=weights(setup, state.params))
    grads, weight, sums = (gradients if cfg.compression is None else replica_gradients)(setup, light, batch, key)
    # Gradients are of sums over tokens: one division by the weight of the whole batch makes the mean exact
    # whatever the microbatches weigh.
    per = 1 / jnp.where(weight > 0, weight, 1) / (1 if state.scale is None else state.scale.scale)
    finite, opt, residual = jnp.isfinite(sums["loss"][0]), state.opt, None
    if cfg.compression is not None:
        opt, residual = state.opt
        finite &= jnp.isfinite(optax.tree.norm(times(per, grads)))  # now: the residuals need not wait for the sum
        where = {name: x.sharding for name, x in setup.state.opt.residual.items()}, setup.gradients
        wanted = finite if skips(cfg) else True
        grads, residual = compressed.exchange(cfg.compression, where, setup.axes, grads, per, residual, wanted)
        per = jnp.float32(1)
    norm = optax.tree.norm(times(per, grads))
    if cfg.clip is not None:  # Pascanu et al. 2012, arXiv:1211.5063
        per *= jnp.minimum(1, cfg.clip / jnp.maximum(norm, 1e-12))
    finite &= jnp.isfinite(norm)
    params, opt = updated(setup, grads, per, state.params, opt, finite if skips(cfg) else True)
    if cfg.compression is not None:
        opt = compressed.Fed(opt, residual)
    scale = None if state.scale is None else adjust(cfg.precision, state.scale, finite)
    one = jnp.float32(1)
    sums |= {"grad_norm": (jnp.where(finite, norm, 0), finite * one), "nonfinite": (one - finite, one)}
    if scale is not None:
        sums |= {"loss_scale": (scale.scale, one)}
    return TrainState(state.step + 1, params, opt, scale), sums


def updated(
    setup: Setup, grads: Params, per: Float[Array, ""], params: Params, opt: PyTree, wanted: Bool[Array, ""] | bool
) -> tuple[Params, PyTree]:
    """Weights and optimizer state after `per` times the gradients, or as they were if they are not `wanted`."""
    cfg = setup.cfg
    if cfg.offload.optimizer or cfg.offload.parameters:
        build = functools.partial(optimizers.build, cfg.optimizer, setup.schedule)
        opt_at = setup.state.opt.opt if cfg.compression is not None else setup.state.opt
        where = jax.tree.map(lambda x: x.sharding, (setup.state.params, opt_at))
        return offload.update(build, setup.axes, where, grads, per, params, opt, wanted)
    updates, then = setup.tx.update(times(per, grads), opt, params)
    return chosen(wanted, (optax.apply_updates(params, updates), then), (params, opt))


def times(factor: Float[Array, ""], grads: Params) -> Params:
    """In float32."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) * factor, grads)


def chosen(wanted: Bool[Array, ""] | bool, new: PyTree, old: PyTree) -> PyTree:
    return new if wanted is True else jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new, old)


def weights(setup: Setup, params: Params) -> Params:
    """What the model computes with: on the device, and in the type of compute where copies of it are made.

    Of that type are then the gradients, too; who uses them part by part makes each part float32.
    """
    if setup.cfg.offload.parameters:
        where = {name: x.sharding for name, x in setup.state.params.items()}
        return offload.copies(params, setup.policy.cast, where)
    apart = setup.cfg.offload.optimizer or setup.cfg.compression is not None
    return setup.policy.cast(params) if apart else params


def within_replica(setup: Setup) -> Setup:
    """The run of one replica, over the mesh axes beside `data`."""
    rules = setup.cfg.sharding
    rules = rules.model_copy(update={"activations": replicas.within(rules.activations)})
    update = {"sharding": rules, "outer": None, "compression": None}
    return setup._replace(cfg=setup.cfg.model_copy(update=update))


def skips(cfg: RunConfig) -> bool:
    """Whether steps that are not finite are skipped; float16 could not find its scale otherwise."""
    return cfg.stability.skip_nonfinite or cfg.precision.kind == "float16"


def gradients(setup: Setup, state: TrainState, batch: Batch, key: Key[Array, ""] | None) -> tuple[Params, Array, Sums]:
    """Gradients of the summed loss (times the loss scale) and the batch's weight, both in a unit of their own, and the
    metric sums.

    Gradients are float32 where they are sums over microbatches, else of the type of the weights.
    """
    cfg = setup.cfg
    if setup.places is not None:
        with placed_by(place(setup)):
            return pipelined.gradients(setup, state, batch, key)
    scale = 1.0 if state.scale is None else state.scale.scale

    def one(params: Params, batch: Batch, key: Key[Array, ""] | None):
        # Summing 10^5 tokens' gradients would leave float16's range: backpropagate the mean over the places of the
        # microbatch (a constant), and weigh it so.
        places = batch["weights"].size

        def scaled_loss(params):
            loss = setup.objective(merge(setup.graphdef, setup.policy.cast(params)), batch, key)
            return loss.total * (scale / places), loss

        with placed_by(place(setup)):
            grads, loss = jax.grad(scaled_loss, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(grads, setup.gradients), loss.weight / places, dict(loss.metrics)

    if cfg.accumulate == 1:
        return one(state.params, batch, key)

    n = cfg.accumulate
    micro = pipelined.microbatches(batch, n)

    def add(total, indexed):
        i, batch = indexed
        new = one(state.params, batch, None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, new), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(one, state.params, jax.tree.map(lambda x: x[0], micro), key),
    )
    zeros = (jax.lax.with_sharding_constraint(zeros[0], setup.gradients), *zeros[1:])
    return jax.lax.scan(add, zeros, (jnp.arange(n), micro))[0]


def replica_gradients(
    setup: Setup, state: TrainState, batch: Batch, key: Key[Array, ""] | None
) -> tuple[Params, Array, Sums]:
    """As `gradients`, not yet summed over mesh axis data: each gradient has an axis of replicas."""
    alone = within_replica(setup)
    one = lambda params, batch, key: gradients(alone, state._replace(params=params), batch, key)
    where = {name: x.sharding for name, x in setup.state.params.items()}
    run = compressed.by_replica(one, where, setup.cfg.sharding.activations, setup.axes)
    return run(state.params, batch, key)


def place(setup: Setup) -> Placed:
    """What the run makes of its models' logical axes."""
    rules = setup.cfg.sharding
    return placement(setup.mesh, rules.activations, rules.gradients, setup.cfg.context)


def make_eval_step(setup: Setup) -> Callable[[Params, Batch], Sums]:
    """jitted (params, batch) -> metric sums, with `bits_per_byte` = (nats / ln 2, bytes of text)."""

    def eval_step(params: Params, batch: Batch) -> Sums:
        with placed_by(place(setup)):
            if setup.places is not None:
                metrics = pipelined.metric_sums(setup, weights(setup, params), batch)
            else:
                metrics = setup.objective(
                    merge(setup.graphdef, setup.policy.cast(weights(setup, params))), batch, None
                ).metrics
        nats, _ = metrics["xent"]
        return metrics | {"bits_per_byte": (nats / jnp.log(2.0), jnp.sum(batch["bytes"]).astype(jnp.float32))}

    return jax.jit(eval_step)


def balanced(cfg: RunConfig, mesh: jax.sharding.Mesh) -> Context:
    """`cfg.context`, balanced only where there is something to balance: rows are shared out, every layer is causal.

    Nor where experts take tokens as they come, up to their capacity: rows must lie in order.
    """
    if not isinstance(cfg.context, Ring) or not cfg.context.balanced:
        return cfg.context
    causal = all(block.attention.mask.causal for block in cfg.model.blocks)
    causal = causal and not any(moe.capacity for moe in cfg.model.mixtures)
    return Ring(balanced=causal and share_count(mesh, cfg.sharding.activations.seq) > 1)


def order(setup: Setup, length: int) -> Int[np.ndarray, " T"] | None:
    """Order in which devices hold the tokens of a row; None: as they come."""
    context = setup.cfg.context
    if not isinstance(context, Ring) or not context.balanced:
        return None
    return zigzag(length, share_count(setup.mesh, setup.cfg.sharding.activations.seq))


def local_rows(setup: Setup, rows: int) -> list[int]:
    """The rows, of a batch of so many, that lie on devices of this process; others may hold them too."""
    one = {"row": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    where = batch_shardings(setup.mesh, setup.cfg.sharding.activations, one)["row"]
    held = where.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in held for row in range(*part.indices(rows))})


def place_batch(setup: Setup, batch: dict[str, Any], rows: int | None = None) -> Batch:
    """A batch as global arrays on the mesh, tokens in the order that `order` says.

    Where that is not their own, `index` has the place of each in its row.

    Args:
      batch: the `local_rows` of a batch of `rows`; None: all its rows.
    """
    here, length = batch["tokens"].shape
    moved = order(setup, length)
    if moved is not None:
        batch = {k: x[:, moved] if x.ndim == 2 else x for k, x in batch.items()}
        batch |= {"index": np.broadcast_to(moved, (here, length))}
    rows = here if rows is None else rows
    place = {row: i for i, row in enumerate(range(rows) if here == rows else local_rows(setup, rows))}
    shapes = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    where = batch_shardings(setup.mesh, setup.cfg.sharding.activations, shapes)

    def share(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        return x[(slice(place[start], place[start] + stop - start), *index[1:])]

    return {
        k: jax.make_array_from_callback(shapes[k].shape, where[k], functools.partial(share, x))
        for k, x in batch.items()
    }


def abstract_batch(setup: Setup, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch of `rows` rows."""
    whole = ["tokens", "targets", "positions", "documents"] + ["index"] * (order(setup, length) is not None)
    shapes = {k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in whole}
    shapes |= {
        "weights": jax.ShapeDtypeStruct((rows, length), jnp.float32),
        "bytes": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    return placed(shapes, batch_shardings(setup.mesh, setup.cfg.sharding.activations, shapes))


def check_batches(setup: Setup, length: int) -> None:
    """Raises ConfigError if a batch of the run does not divide over the mesh: now rather than at step 10,000."""
    cfg = setup.cfg
    at_once = length if setup.places is None else pipelined.slice_size(length, cfg.pipeline.slices)
    for rows in cfg.ramp_sizes():
        micro = rows // cfg.accumulate
        abstract_batch(setup, micro, length)
        rules, stream = cfg.sharding.activations, ("batch", "norm_seq")
        fitting(setup.mesh, rules, stream, (micro, at_once), "residual stream")
