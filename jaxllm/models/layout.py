"""Where a layer's weights lie: stacked by pattern slot in a run, one leaf per layer everywhere else.

A run stacks the layers of slot s of its pattern of P blocks over G groups, so that one scan computes them:
`blocks.{s}.X[g]` is `layers.{g * P + s}.X`, and the left-over `tail.{t}.X` is `layers.{G * P + t}.X`. Checkpoints and
other formats know the second, *logical* name only; it does not depend on grouping, mesh or host count. A name may be
the end of a `/`-path, as those of optimizer state are: `opt/0/mu/blocks.0.ffn.w_up`. A run whose layers are spread
over pipeline stages stacks the groups in the order of devices: `places` says so to all functions here.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxllm.core.errors import CheckpointError
from jaxllm.models.config import AnyModel, Stack

_STACKED = re.compile(r"(?:^|[/.])((blocks|tail)\.(\d+)\.)")
_LAYER = re.compile(r"(?:^|[/.])(layers\.(\d+)\.)")

Leaf = Any  # a jax.Array, a numpy array or a jax.ShapeDtypeStruct
Places = tuple[int, ...]  # the group of layers at each place of a stack; -1: none, zeros that stay zero


def logical_names(name: str, cfg: AnyModel) -> tuple[str, ...]:
    """The logical leaves that make up `name`: one per group for `blocks.…`, else one."""
    match = _STACKED.search(name)
    if not match:
        return (name,)
    cfg = _side(name, cfg)
    period, stacked, at = len(cfg.blocks), cfg.num_groups * len(cfg.blocks), int(match[3])
    layers = range(at, stacked, period) if match[2] == "blocks" else (stacked + at,)
    assert layers and layers[-1] < cfg.num_layers, f"{name} is no leaf of {cfg.num_layers} layers in groups of {period}"
    return tuple(f"{name[: match.start(1)]}layers.{i}.{name[match.end(1) :]}" for i in layers)


def stacked_name(logical: str, cfg: AnyModel) -> str:
    """The run's leaf that holds the logical leaf: the inverse of `logical_names`."""
    match = _LAYER.search(logical)
    if not match:
        return logical
    cfg = _side(logical, cfg)
    period, stacked, layer = len(cfg.blocks), cfg.num_groups * len(cfg.blocks), int(match[2])
    if layer >= cfg.num_layers:
        raise CheckpointError(f"there is a {logical!r}, but the model has num_layers={cfg.num_layers}")
    place = f"blocks.{layer % period}." if layer < stacked else f"tail.{layer - stacked}."
    return logical[: match.start(1)] + place + logical[match.end(1) :]


def unstack(params: dict[str, Leaf], cfg: AnyModel, places: Places | None = None) -> dict[str, Leaf]:
    """One leaf per layer and part. Shapes may stand for arrays; shardings lose the axis of the layers.

    A leaf of `blocks.…` without a leading axis of groups (Adafactor's place-holders) belongs to each of its layers.
    """
    return {name: part for key, leaf in params.items() for name, part in split(key, leaf, cfg, places).items()}


def stack(logical: dict[str, Leaf], cfg: AnyModel, places: Places | None = None) -> dict[str, Leaf]:
    """The leaves of a run with `cfg`: the inverse of `unstack`, for numpy and JAX arrays and shapes.

    Raises:
      CheckpointError: naming the leaf that is missing, or whose shape differs between layers.
    """
    stacked = {}
    for key in dict.fromkeys(stacked_name(name, cfg) for name in logical):
        names = logical_names(key, cfg)
        if missing := [n for n in names if n not in logical]:
            raise CheckpointError(f"{missing[0]!r} is missing beside {next(n for n in names if n in logical)!r}")
        parts = [logical[n] for n in names]
        if len({p.shape for p in parts}) > 1:
            raise CheckpointError(
                f"layers that repeat must be alike: {', '.join(f'{n} is {p.shape}' for n, p in zip(names, parts))}"
            )
        stacked[key] = _stack(_placed(parts, places)) if is_stacked(key) else parts[0]
    return stacked


def split(key: str, leaf: Leaf, cfg: AnyModel, places: Places | None = None) -> dict[str, Leaf]:
    """The logical leaves of one leaf of a run, by name."""
    names = logical_names(key, cfg)
    if not has_layers(key, leaf.shape, cfg, places):
        return dict.fromkeys(names, leaf)
    parts = _unstack(leaf)
    at = range(len(parts)) if places is None else [places.index(g) for g in range(_side(key, cfg).num_groups)]
    return dict(zip(names, (parts[i] for i in at), strict=True))


def join(parts: list[jax.Array], like: jax.ShapeDtypeStruct, stacked: bool, places: Places | None = None) -> jax.Array:
    """One leaf of a run, in the sharding of `like`, from its logical leaves in order."""
    if not stacked:
        return parts[0].reshape(like.shape)
    return _stacker(like.shape, like.sharding, places)(*parts)


def has_layers(key: str, shape: tuple[int, ...], cfg: AnyModel, places: Places | None = None) -> bool:
    """Whether a leaf of a run has the layers of its slot as its leading axis."""
    return is_stacked(key) and shape[:1] == (_side(key, cfg).num_groups if places is None else len(places),)


def _side(name: str, cfg: AnyModel) -> Stack:
    """The stack that a leaf is of: the one side of an encoder-decoder, or the whole model."""
    if cfg.kind != "encoder_decoder":
        return cfg
    return cfg.encoder if "encoder" in re.split("[./]", name) else cfg.decoder


def is_stacked(key: str) -> bool:
    """Whether a leaf of a run is of the layers of a slot."""
    match = _STACKED.search(key)
    return bool(match) and match[2] == "blocks"


def layer_sharding(sharding: Sharding | None, shape: tuple[int, ...] = ()) -> Sharding | None:
    """The sharding of one layer of a stacked array.

    Given the shape of that array: mesh axes that share out layers share out a dimension of the layer that divides.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    over, *dims = (_axes(d) for d in (sharding.spec or (None,)))
    dims += [()] * (len(shape) - 1 - len(dims))
    for i, size in enumerate(shape[1:]):
        if over and size % math.prod(sharding.mesh.shape[a] for a in (*dims[i], *over)) == 0:
            dims[i] = (*dims[i], *over)
            break
    spec = PartitionSpec(*(d or None for d in dims))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _axes(mesh_axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())


def _unstack(leaf: Leaf) -> list[Leaf]:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = layer_sharding(leaf.sharding, leaf.shape)
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)] * leaf.shape[0]
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return list(_unstacker(leaf.shape[0], layer_sharding(leaf.sharding, leaf.shape))(leaf))
    return list(leaf)


def _placed(parts: list[Leaf], places: Places | None) -> list[Leaf]:
    """The layers of a slot where the stack has them."""
    if places is None:
        return parts
    if isinstance(parts[0], jax.ShapeDtypeStruct):
        return [parts[0]] * len(places)
    zeros_like = np.zeros_like if isinstance(parts[0], np.ndarray) else jnp.zeros_like
    return [zeros_like(parts[0]) if g < 0 else parts[g] for g in places]


def _stack(parts: list[Leaf]) -> Leaf:
    if isinstance(parts[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(parts), *parts[0].shape), parts[0].dtype)
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


@functools.cache  # one compilation per shape and sharding, not one per leaf
def _unstacker(groups: int, sharding: Sharding | None):
    return jax.jit(jnp.unstack, out_shardings=(sharding,) * groups)


@functools.cache
def _stacker(shape: tuple[int, ...], sharding: Sharding | None, places: Places | None):
    return jax.jit(lambda *parts: jnp.stack(_placed(list(parts), places)).reshape(shape), out_shardings=sharding)
