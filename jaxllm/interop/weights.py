"""Weights of a model by our logical names, out of tensors with the names of its family, and back; one at a time."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxllm.core.errors import CheckpointError
from jaxllm.interop.family import Family
from jaxllm.interop.names import Row, rows_of, shapes_of_theirs
from jaxllm.models import layout
from jaxllm.models.config import AnyModel
from jaxllm.models.module import Params, abstract


class Kept(NamedTuple):
    """What a folder's weights are besides their values, so that they go back as they came."""

    bare: bool = False  # names lack the family's prefix
    tied: tuple[str, ...] = ()  # tensors that repeat others, which the config says they are tied to


@functools.lru_cache(maxsize=8)  # a model is laid out anew each time
def logical_shapes(cfg: AnyModel) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a model's weights, one a layer."""
    return {name: x.shape for name, x in layout.unstack(abstract(cfg)[1], cfg).items()}


def commonest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type of most tensors."""
    return Counter(dtypes).most_common(1)[0][0]


class Weights(Mapping[str, np.ndarray]):
    """The weights of a model by logical name, each read when it is asked for.

    Args:
      tensors: shapes by name (`.shape` of each value), and `read(name)` for the array.

    Raises:
      CheckpointError: tensors that are missing, unexpected or of another shape; all of them are listed.
    """

    def __init__(
        self,
        family: Family,
        cfg: AnyModel,
        tensors: Mapping[str, Any],
        read: Callable[[str], np.ndarray],
        name: str,
    ):
        self.read, self.name = read, name
        self.shapes = logical_shapes(cfg)
        if large := [n for n, shape in self.shapes.items() if math.prod(shape) >= 1 << 63]:
            raise CheckpointError(
                f"{name}: {large[0]} would have shape {self.shapes[large[0]]}, which no file can hold"
            )
        rows = rows_of(family.table(cfg), self.shapes)
        bare = not any(n.startswith(family.prefix) for n in tensors)
        strip = len(family.prefix) if bare else 0
        rows = [
            r._replace(theirs=tuple(n[strip if n.startswith(family.prefix) else 0 :] for n in r.theirs)) for r in rows
        ]
        self.row: dict[str, Row] = {ours: row for row in rows for ours in row.ours}
        used = {n for row in rows for n in row.theirs}
        repeats = {n: o for n, o in _repeats(family, cfg).items() if n in tensors and n not in used}
        self.kept = Kept(bare, tuple(repeats))
        found = [f"{n} is missing" for n in used if n not in tensors]
        found += [
            f"{n} is unexpected"
            for n in tensors
            if n not in used and n not in repeats and not n.endswith(family.drop or ("\0",))
        ]
        for row in rows:
            wanted = shapes_of_theirs(row.form, tuple(self.shapes[n] for n in row.ours))
            found += [
                f"{n} has shape {list(tensors[n].shape)}, config.json asks for {list(shape)}"
                for n, shape in zip(row.theirs, wanted, strict=True)
                if n in tensors and tuple(tensors[n].shape) != shape
            ]
        if found:
            more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
            raise CheckpointError(f"{name}: no {family.kind} as config.json says:\n  " + "\n  ".join(found[:20]) + more)
        for n, ours in repeats.items():
            if not np.array_equal(_bytes(read(n)), _bytes(self[ours])):
                raise CheckpointError(
                    f"{name}: {n} differs from the {ours}, but config.json has tie_word_embeddings=true"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.of(self.row[name])[name]

    def of(self, row: Row) -> dict[str, np.ndarray]:
        """All weights of a row."""
        theirs = [self.read(n) for n in row.theirs]
        return dict(zip(row.ours, row.form.ours(theirs, [self.shapes[n] for n in row.ours]), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load(
    weights: Weights, cfg: AnyModel, like: Mapping[str, jax.ShapeDtypeStruct], places: layout.Places | None = None
) -> Params:
    """The arrays of a run of `cfg`, each put where and in the type that `like` says.

    One layer after the other goes from the file into the shards that stay: memory holds no weight twice.

    Args:
      places: of layers in the stacks of `like`.
    """
    params = {}
    for key, leaf in like.items():
        names = layout.logical_names(key, cfg)
        if not layout.is_stacked(key):
            params[key] = jax.device_put(_own(weights[names[0]], leaf.dtype), leaf.sharding)
            continue
        at = layout.layer_sharding(leaf.sharding, leaf.shape)
        stack = jax.jit(lambda leaf=leaf: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
        for group, name in enumerate(names):
            place = group if places is None else places.index(group)
            stack = _placer(leaf.sharding)(stack, jax.device_put(_own(weights[name], leaf.dtype), at), place)
        params[key] = jax.block_until_ready(stack)
    return params


def _own(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In memory of its own: a device array on CPU may share what it is given, and that may be a mapped file."""
    return np.array(x, dtype, order="C")


@functools.cache
def _placer(sharding: Sharding | None):
    return jax.jit(
        lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0), donate_argnums=0,
        out_shardings=sharding,
    )  # fmt: skip


def tensors_of(
    family: Family, cfg: AnyModel, shapes: Mapping[str, Any], kept: Kept = Kept()
) -> dict[str, tuple[tuple[int, ...], Row, int]]:
    """By name of theirs, in the order of the model: the shape of a tensor, the row that makes it, its place in that.

    Args:
      shapes: logical name -> shape.
    """
    out: dict[str, tuple[tuple[int, ...], Row, int]] = {}
    for row in rows_of(family.table(cfg), logical_shapes(cfg)):  # whatever the order of `shapes`
        made = shapes_of_theirs(row.form, tuple(shapes[o] for o in row.ours))
        for i, (n, shape) in enumerate(zip(row.theirs, made, strict=True)):
            out[n.removeprefix(family.prefix) if kept.bare else n] = shape, row, i
    repeats = _repeats(family, cfg)
    for n in kept.tied:
        out[n] = next(made for made in out.values() if repeats[n] in made[1].ours)
    return out


def _repeats(family: Family, cfg: AnyModel) -> dict[str, str]:
    """What a tensor of theirs is called that is tied to another -> the weight of ours that it is."""
    tied = getattr(cfg, "tie", False)
    heads = [n for row in family.table(cfg) if row.ours == ("head",) for n in row.theirs] if tied else []
    return dict.fromkeys(heads, "embedding") | family.repeats


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)
