"""Mesh and sharding as values. Models name logical axes only; `Rules` maps them to mesh axes. No JAX here."""

from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from jaxllm.core.config import Config
from jaxllm.core.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

MeshAxes = str | tuple[str, ...] | None


class Mesh(Config):
    """How many devices each mesh axis spans. At most one axis is -1: what is left of the devices."""

    data: int = Field(1, ge=-1)  # replicas of the parameters, each with its share of the batch
    fsdp: int = Field(-1, ge=-1)  # shares of the batch that also share the parameters out
    tensor: int = Field(1, ge=-1)  # shares of heads, feed-forward width and vocabulary

    @model_validator(mode="after")
    def _one_free_axis(self):
        if 0 in self.sizes or self.sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes are positive, and at most one is -1, got {dict(zip(MESH_AXES, self.sizes))}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, a) for a in MESH_AXES)

    def resolve(self, devices: int) -> "Mesh":
        """The mesh with -1 filled in for `devices`. Raises ConfigError where it does not fit."""
        fixed = 1
        for n in self.sizes:
            fixed *= n if n > 0 else 1
        shown = " x ".join(f"{a}={n}" for a, n in zip(MESH_AXES, self.sizes))
        if -1 not in self.sizes and fixed != devices:
            raise ConfigError(
                f"mesh {shown} needs {fixed} devices, there are {devices}; set one axis to -1 to take what is left"
            )
        if devices % fixed:
            raise ConfigError(
                f"mesh {shown}: {devices} devices do not divide by {fixed}; choose sizes whose "
                f"product divides {devices}"
            )
        return Mesh(**{a: n if n > 0 else devices // fixed for a, n in zip(MESH_AXES, self.sizes)})


class Rules(Config):
    """Mesh axes of each logical axis; `None` replicates it.

    An axis that is not a field here cannot be used by a layer: `spec` raises.
    """

    batch: MeshAxes = None  # rows of the batch
    seq: MeshAxes = None  # positions in a row
    embed: MeshAxes = None  # width of the residual stream
    heads: MeshAxes = None  # query heads
    kv_heads: MeshAxes = None  # key and value heads
    head_dim: MeshAxes = None  # size of a head
    mlp: MeshAxes = None  # feed-forward width
    vocab: MeshAxes = None  # vocabulary
    position: MeshAxes = None  # rows of a learned position table
    layers: MeshAxes = None  # stacked layers

    @field_validator("*", mode="before")
    @classmethod
    def _known_mesh_axes(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        if wrong := [n for n in names if n not in MESH_AXES]:
            raise ValueError(f"no mesh axis {wrong[0]!r}; known: {', '.join(MESH_AXES)}")
        return value

    def mesh_axes(self, axes: tuple[str | None, ...]) -> tuple[MeshAxes, ...]:
        """Mesh axes of an array with these logical axes; refuses unknown names and collisions."""
        for a in axes:
            if a is not None and a not in type(self).model_fields:
                raise ConfigError(f"unknown logical axis {a!r} in {axes}; known: {', '.join(type(self).model_fields)}")
        chosen = tuple(getattr(self, a) if a else None for a in axes)
        used = [n for c in chosen if c for n in ((c,) if isinstance(c, str) else c)]
        if dup := sorted({n for n in used if used.count(n) > 1}):
            raise ConfigError(f"axes {axes} would shard two dimensions over mesh axis {dup[0]!r}: {chosen}")
        return chosen


TENSOR = Rules(heads="tensor", kv_heads="tensor", mlp="tensor", vocab="tensor")
FSDP = TENSOR.model_copy(update={"embed": "fsdp"})
ACTIVATIONS = TENSOR.model_copy(update={"batch": ("data", "fsdp")})


class Sharding(Config):
    """What is shared out, as four sets of rules, each laid over those of a `preset`. A bare string names one:

    ddp: everything replicated over data and fsdp. zero1, zero2, zero3 (Rajbhandari et al. 2019, arXiv:1910.02054):
    optimizer state, then gradients, then parameters are shared out over fsdp too. Tensor parallelism (Shoeybi et al.
    2019, arXiv:1909.08053) is in all of them, over mesh axis `tensor`.
    """

    parameters: Rules = FSDP  # weights between steps
    gradients: Rules = FSDP  # gradients after they are summed
    optimizer: Rules = FSDP  # optimizer state
    activations: Rules = ACTIVATIONS  # what flows between layers

    PRESETS: ClassVar[dict[str, tuple[Rules, Rules, Rules]]] = {
        "ddp": (TENSOR, TENSOR, TENSOR),
        "zero1": (TENSOR, TENSOR, FSDP),
        "zero2": (TENSOR, FSDP, FSDP),
        "zero3": (FSDP, FSDP, FSDP),
    }

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, tree: Any) -> Any:
        tree = {"preset": tree} if isinstance(tree, str) else tree
        if not isinstance(tree, dict):
            return tree
        name = tree.get("preset", "zero3")
        if name not in cls.PRESETS:
            raise ValueError(f"no sharding preset {name!r}; known: {', '.join(cls.PRESETS)}")
        base = dict(zip(("parameters", "gradients", "optimizer"), cls.PRESETS[name])) | {"activations": ACTIVATIONS}
        asked = {k: v for k, v in tree.items() if k != "preset"}
        return asked | {
            k: rules.model_dump() | asked.get(k, {}) for k, rules in base.items() if isinstance(asked.get(k, {}), dict)
        }
