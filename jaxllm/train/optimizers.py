"""Optimizers over the flat parameter dict, and what their state is made of.

What an optimizer does to a parameter follows from its logical axes alone. Leading "layers" and "experts" (stacked
parameters) are a batch: each is updated as if it stood alone. "head_dim" belongs to the heads before it. What is then left
are the sides of a weight: two for a matrix, (embed) x (heads, head_dim) for a query projection; one for a norm scale
or a bias, (heads, head_dim) for the query's.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxllm.core.shapes import Array, Float, Int, PyTree
from jaxllm.models.module import Axes
from jaxllm.train.config import SGD, Adafactor, AdamW, Lion, Muon, Optimizer

BATCH_AXES = ("layers", "experts")  # stacked copies, where they lead
TABLE_AXES = ("vocab", "position")  # rows picked one at a time, or logits: no linear map between hidden states


def _sides(axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], ...]:
    """Dimensions of each side of a weight, in order; batch dimensions are in none."""
    sides: list[tuple[int, ...]] = []
    for i, axis in enumerate(axes):
        if axis == "head_dim" and sides:
            sides[-1] += (i,)
        elif axis not in BATCH_AXES or sides:
            sides.append((i,))
    return tuple(sides)


def decay_mask(axes: Axes) -> dict[str, bool]:
    """Whether each parameter's weights decay: those with two sides do; norms, biases and other vectors do not.

    Embedding, output head and learned position tables are matrices and decay, as in nanoGPT and Megatron-LM; some
    recipes leave the embedding out (OLMo 2, arXiv:2501.00656).
    """
    return {name: len(_sides(a)) >= 2 for name, a in axes.items()}


def is_matrix(name: str, axes: Axes) -> bool:
    """Whether `name` is a (stack of) hidden matrices, which Muon orthogonalises: not embedding, head or positions."""
    return len(_sides(axes[name])) == 2 and not set(axes[name]) & set(TABLE_AXES)


def build(cfg: Optimizer, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    """The optimizer over params with these axes: weights move by -rate (direction + decay * weight).

    `schedule` gives the rate by number of updates made. Decay is decoupled from the gradient in all of them
    (Loshchilov & Hutter 2017, arXiv:1711.05101) and masked by `decay_mask`. State and updates are float32 whatever
    the types of weights and gradients. Clipping is the caller's. `update` needs params.
    """
    decay = dict.fromkeys(axes, cfg.weight_decay)
    rate = dict.fromkeys(axes, 1.0)
    if isinstance(cfg, Muon):
        for name in axes:
            if not is_matrix(name, axes):  # the same schedule from Adam's own peak
                decay[name], rate[name] = cfg.adam.weight_decay, cfg.adam.learning_rate / cfg.learning_rate
    masked = {name: decay[name] if decays else 0.0 for name, decays in decay_mask(axes).items()}
    return _in_float32(optax.chain(_direction(cfg, axes), _descend(schedule, rate, masked)))


def _direction(cfg: Optimizer, axes: Axes) -> optax.GradientTransformation:
    """Gradients -> where to go before rate and decay, as a multiple of the rate."""
    match cfg:
        case AdamW():
            return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.epsilon)
        case Adafactor():
            return _adafactor(cfg, axes)
        case Lion():
            return optax.scale_by_lion(cfg.b1, cfg.b2)
        case SGD():
            return optax.trace(cfg.momentum, cfg.nesterov) if cfg.momentum else optax.identity()
        case Muon():
            kinds = {name: "muon" if is_matrix(name, axes) else "adam" for name in axes}
            return optax.partition({"muon": _muon(cfg, axes), "adam": _direction(cfg.adam, axes)}, kinds)
    raise AssertionError(cfg)


def _descend(schedule: optax.Schedule, rate: dict[str, float], decay: dict[str, float]) -> optax.GradientTransformation:
    """Directions -> updates, with each parameter's multiple of the schedule and its decay."""

    def update(directions, state, params):
        now = schedule(state.count)
        updates = {
            name: -now * rate[name] * (d + decay[name] * params[name] if decay[name] else d)
            for name, d in directions.items()
        }
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.int32(0)), update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(grads, state, params):
        return tx.update(optax.tree.cast(grads, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(lambda params: tx.init(optax.tree.cast(params, jnp.float32)), update)


# --- Muon --------------------------------------------------------------------------------------------------------


def _muon(cfg: Muon, axes: Axes) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), matrix by matrix.

    Times 0.2 sqrt(max(rows, columns)): then updates have the root mean square of AdamW's, so its learning rates and
    weight decays carry over (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    """
    # optax.partition hides the other parameters behind MaskedNode, here as there
    sides = {
        name: MuonDimensionNumbers(*_sides(a)) if is_matrix(name, axes) else optax.MaskedNode()
        for name, a in axes.items()
    }

    def match_rms(update, side: MuonDimensionNumbers):
        rows, columns = (math.prod(update.shape[i] for i in dims) for dims in side)
        return 0.2 * math.sqrt(max(rows, columns)) * update

    return optax.chain(
        scale_by_muon(beta=cfg.momentum, weight_dimension_numbers=sides),
        optax.stateless(lambda updates, _: jax.tree.map(match_rms, updates, sides)),
    )


# --- Adafactor ---------------------------------------------------------------------------------------------------


class AdafactorState(NamedTuple):
    """Running means of squared gradients; a parameter is in `row` and `column`, or in `full`."""

    count: Int[Array, ""]
    row: dict[str, Float[Array, "..."]]  # mean over a matrix's second side: batch and first side are left
    column: dict[str, Float[Array, "..."]]  # mean over its first side: batch and second side are left
    full: dict[str, Float[Array, "..."]]


def _adafactor(cfg: Adafactor, axes: Axes) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5 without momentum; the schedule is the caller's.

    Not optax's: that one factors over the two largest dimensions whatever they mean, so a stack of layers may lose
    its layers, and clips and scales by the root mean square of the whole stack.
    """

    def factored(name, x):
        sides = _sides(axes[name])
        return len(sides) == 2 and min(math.prod(x.shape[i] for i in side) for side in sides) >= cfg.min_dim

    def init(params):
        row, column, full = {}, {}, {}
        for name, p in params.items():
            if factored(name, p):
                first, second = _sides(axes[name])
                row[name], column[name] = jnp.zeros_like(p.mean(second)), jnp.zeros_like(p.mean(first))
            else:
                full[name] = jnp.zeros_like(p)
        return AdafactorState(jnp.int32(0), row, column, full)

    def update(grads, state, params):
        step = state.count + 1
        beta = 1 - step.astype(jnp.float32) ** -cfg.decay  # 0 at the first step: nothing to correct for a start at 0
        row, column, full, updates = {}, {}, {}, {}
        for name, g in grads.items():
            square = g**2 + 1e-30  # the paper's epsilon 1
            if name in state.full:
                full[name] = beta * state.full[name] + (1 - beta) * square
                u = g * jax.lax.rsqrt(full[name])
            else:
                first, second = _sides(axes[name])
                row[name] = beta * state.row[name] + (1 - beta) * square.mean(second)
                column[name] = beta * state.column[name] + (1 - beta) * square.mean(first)
                r, c = jnp.expand_dims(row[name], second), jnp.expand_dims(column[name], first)
                # v = r c / mean(r); the product of two tiny means would vanish, that of the roots does not
                u = g * jax.lax.rsqrt(r / r.mean(first, keepdims=True)) * jax.lax.rsqrt(c)
            one_layer = tuple(i for side in _sides(axes[name]) for i in side)
            if cfg.clipping is not None:
                u /= jnp.maximum(1, _rms(u, one_layer) / cfg.clipping)
            if cfg.scale_by_parameter:
                u *= jnp.maximum(1e-3, _rms(params[name], one_layer))  # the paper's epsilon 2
            updates[name] = u
        return updates, AdafactorState(step, row, column, full)

    return optax.GradientTransformation(init, update)


def _rms(x: Float[Array, "..."], dims: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.mean(x**2, dims, keepdims=True))


# --- sharding ----------------------------------------------------------------------------------------------------


def state_axes(opt_state: PyTree, params: dict, axes: Axes) -> PyTree:
    """Logical axes of every leaf of an optimizer state (arrays or their shapes), in the state's structure.

    What is kept per parameter has the parameter's axes; Adafactor's means over one side have those that are left;
    counters and constants have none: (None,) * ndim. Map over it together with the state, state first: the tuples
    are leaves of the state's tree, not trees of their own.
    """

    def one(path, leaf):
        keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        name = next((k for k in keys if k in axes), None)
        if name is None:
            return (None,) * leaf.ndim
        gone = ()
        if "row" in keys or "column" in keys:
            first, second = _sides(axes[name])
            gone = second if "row" in keys else first
        left = [i for i in range(len(axes[name])) if i not in gone]
        assert leaf.shape == tuple(params[name].shape[i] for i in left), (path, leaf.shape, params[name].shape)
        return tuple(axes[name][i] for i in left)

    return jax.tree_util.tree_map_with_path(one, opt_state)
