"""Mesh and sharding as values. Models name logical axes only; `Rules` maps them to mesh axes. No JAX here."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from jaxllm.core.config import Config, union
from jaxllm.core.errors import ConfigError

MESH_AXES = ("data", "pipe", "fsdp", "expert", "context", "tensor")  # from the slowest network to the fastest

MeshAxes = str | tuple[str, ...] | None


def axis_names(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one dimension, slowest first."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


class Mesh(Config):
    """How many devices each mesh axis spans. At most one axis is -1: what is left of the devices."""

    data: int = Field(1, ge=-1)  # replicas of the parameters, each with its share of the batch
    pipe: int = Field(1, ge=-1)  # stages: shares of the layers, one after another (`pipeline`)
    fsdp: int = Field(-1, ge=-1)  # shares of the batch that also share the parameters out
    expert: int = Field(1, ge=-1)  # shares of the batch that also share the experts out
    context: int = Field(1, ge=-1)  # shares of the positions of a row (`context`)
    tensor: int = Field(1, ge=-1)  # shares of heads, feed-forward width and vocabulary
    across: Literal["data", "pipe", "fsdp"] = "data"  # the axis that spans slices (or hosts) joined by a slow network

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
        shown = " x ".join(f"{a}={n}" for a, n in zip(MESH_AXES, self.sizes) if n != 1) or "of one device"
        if -1 not in self.sizes and fixed != devices:
            raise ConfigError(
                f"mesh {shown} needs {fixed} devices, there are {devices}; set one axis to -1 to take what is left"
            )
        if devices % fixed:
            raise ConfigError(
                f"mesh {shown}: {devices} devices do not divide by {fixed}; choose sizes whose "
                f"product divides {devices}"
            )
        return self.model_copy(update={a: n if n > 0 else devices // fixed for a, n in zip(MESH_AXES, self.sizes)})


class Rules(Config):
    """Mesh axes of each logical axis; `None` replicates it.

    An axis that is not a field here cannot be used by a layer: `spec` raises.
    """

    batch: MeshAxes = None  # rows of the batch
    seq: MeshAxes = None  # positions in a row
    norm_seq: MeshAxes = None  # positions in a row, in the residual stream: where norms and sums are, between matmuls
    embed: MeshAxes = None  # width of the residual stream
    heads: MeshAxes = None  # query heads
    kv_heads: MeshAxes = None  # key and value heads
    head_dim: MeshAxes = None  # size of a head
    mlp: MeshAxes = None  # feed-forward width
    vocab: MeshAxes = None  # vocabulary
    table: MeshAxes = None  # width of embeddings that are projected to that of the residual stream
    position: MeshAxes = None  # rows of a learned position table
    small: MeshAxes = None  # what is not worth sharing out: labels, segments, rows of tables of distances
    layers: MeshAxes = None  # stacked layers
    experts: MeshAxes = None  # experts of a mixture
    replicas: MeshAxes = "data"  # copies of the weights or gradients that differ (`outer`, `compression`)

    @field_validator("*", mode="before")
    @classmethod
    def _known_mesh_axes(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        if wrong := [n for n in names if n not in MESH_AXES]:
            raise ValueError(f"no mesh axis {wrong[0]!r}; known: {', '.join(MESH_AXES)}")
        return value

    @field_validator("seq")
    @classmethod
    def _shares_in_order(cls, axes: MeshAxes) -> MeshAxes:
        """Devices that share a row send its tokens on in the order in which JAX numbers them."""
        if list(axis_names(axes)) != (right := sorted(axis_names(axes), key=MESH_AXES.index)):
            raise ValueError(f"positions are shared out over mesh axes in their order: {right}, got {list(axes)}")
        return axes

    def mesh_axes(self, axes: tuple[str | None, ...]) -> tuple[MeshAxes, ...]:
        """Mesh axes of an array with these logical axes; refuses unknown names and collisions."""
        for a in axes:
            if a is not None and a not in type(self).model_fields:
                raise ConfigError(f"unknown logical axis {a!r} in {axes}; known: {', '.join(type(self).model_fields)}")
        chosen = tuple(getattr(self, a) if a else None for a in axes)
        used = [n for c in chosen for n in axis_names(c)]
        if dup := sorted({n for n in used if used.count(n) > 1}):
            raise ConfigError(f"axes {axes} would shard two dimensions over mesh axis {dup[0]!r}: {chosen}")
        return chosen


TENSOR = Rules(heads="tensor", kv_heads="tensor", mlp="tensor", vocab="tensor", layers="pipe", experts="expert")
FSDP = TENSOR.model_copy(update={"embed": ("fsdp", "context")})
ACTIVATIONS = TENSOR.model_copy(
    update={"batch": ("data", "fsdp", "expert"), "seq": "context", "norm_seq": "context", "experts": None}
)


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
        if "kind" in tree:  # rules laid over a preset that is named alone: `merge` takes its name for a kind
            tree = {"preset": tree["kind"]} | {k: v for k, v in tree.items() if k != "kind"}
        name = tree.get("preset", "zero3")
        if name not in cls.PRESETS:
            raise ValueError(f"no sharding preset {name!r}; known: {', '.join(cls.PRESETS)}")
        base = dict(zip(("parameters", "gradients", "optimizer"), cls.PRESETS[name])) | {"activations": ACTIVATIONS}
        asked = {k: v for k, v in tree.items() if k != "preset"}
        return asked | {
            k: rules.model_dump() | asked.get(k, {}) for k, rules in base.items() if isinstance(asked.get(k, {}), dict)
        }


# --- how attention crosses the shares of a row -----------------------------------------------------------------------


class Ring(Config):
    """Keys and values go round the shares of a row while each computes on those it has (Liu et al. 2023, 2310.01889).

    Row lengths must be multiples of twice the shares when `balanced`, of the shares otherwise. Balanced, share i holds
    chunks i and 2n-1-i of 2n (Llama 3, arXiv:2407.21783, 3.3.2).
    """

    kind: Literal["ring"] = "ring"
    balanced: bool = True  # causal work is even; dropout is drawn by place in that order: another draw than elsewhere


class Ulysses(Config):
    """All-to-all: whole rows of a share of the heads during attention (Jacobs et al. 2023, arXiv:2309.14509).

    Heads must divide by context x tensor; key-value heads that do not are sent more than once.
    """

    kind: Literal["ulysses"] = "ulysses"


Context = union(Ring, Ulysses)


# --- how layers are spread over stages -------------------------------------------------------------------------------


class GPipe(Config):
    """All forward passes, then all backward passes (Huang et al. 2018, arXiv:1811.06965); bubble (p-1)/(m+p-1).

    `slices` cuts each microbatch's rows into runs of tokens too (TeraPipe, Li et al. 2021, arXiv:2102.07988).
    """

    kind: Literal["gpipe"] = "gpipe"
    slices: int = Field(1, gt=0)  # token slices a row is cut into; the bubble is (p-1)/(m slices + p-1)


class OneForwardOneBackward(Config):
    """PipeDream-flush (Narayanan et al. 2020, arXiv:2006.09503): GPipe's bubble, at most p microbatches in flight."""

    kind: Literal["1f1b"] = "1f1b"


class Interleaved(Config):
    """1F1B with `chunks` stages a device (Narayanan et al. 2021, arXiv:2104.04473): the bubble divided by `chunks`."""

    kind: Literal["interleaved"] = "interleaved"
    chunks: int = Field(2, gt=1)  # runs of layers each device holds


class ZeroBubble(Config):
    """ZB-H1 (Qi et al. 2023, arXiv:2401.10241): weight gradients wait and fill what was 1F1B's bubble."""

    kind: Literal["zb_h1"] = "zb_h1"


Schedule = union(GPipe, OneForwardOneBackward, Interleaved, ZeroBubble)


class Pipeline(Config):
    """Layers over the mesh axis `pipe`; the microbatches are those of `accumulate`. Embedding first, head last."""

    schedule: Schedule = OneForwardOneBackward()  # who computes when
    stages: tuple[int, ...] | None = None  # layer groups of each stage in order of use; null: as even as can be
    recompute: bool = True  # until its backward pass a stage keeps its input alone; false: what `remat` keeps, too

    @property
    def chunks(self) -> int:
        """Stages a device holds."""
        return getattr(self.schedule, "chunks", 1)

    @property
    def slices(self) -> int:
        """Runs of tokens that a row goes through in."""
        return getattr(self.schedule, "slices", 1)

    def groups(self, devices: int, groups: int) -> tuple[int, ...]:
        """Layer groups of each of the `devices * chunks` stages; later ones take what does not divide last.

        Raises:
          ConfigError: `stages` does not fit, or there are fewer groups than stages.
        """
        n = devices * self.chunks
        if self.stages is None:
            if groups < n:
                raise ConfigError(f"pipeline: {n} stages need as many layer groups, the model has {groups}")
            return tuple(groups // n + (i < groups % n) for i in range(n))
        if len(self.stages) != n or sum(self.stages) != groups or min(self.stages) < 1:
            raise ConfigError(
                f"pipeline.stages={list(self.stages)} must be {n} numbers above 0 that add up to the {groups} layer "
                "groups"
            )
        return self.stages


# --- where state waits -----------------------------------------------------------------------------------------------


class Offload(Config):
    """What lies in pinned host memory between uses (ZeRO-Offload, Ren et al. 2021, arXiv:2101.06840)."""

    optimizer: bool = False  # optimizer state
    parameters: bool = False  # float32 master weights


# --- less communication ----------------------------------------------------------------------------------------------


class LocalSGD(Config):
    """Replicas train alone and are averaged every `every` steps (Stich 2018, arXiv:1805.09767)."""

    kind: Literal["local_sgd"] = "local_sgd"
    every: int = Field(16, gt=0)  # steps between averages


class DiLoCo(Config):
    """Like local SGD, with Nesterov momentum on the averaged change (Douillard et al. 2023, arXiv:2311.08105)."""

    kind: Literal["diloco"] = "diloco"
    every: int = Field(500, gt=0)  # steps between outer updates
    learning_rate: float = Field(0.7, gt=0)  # of the outer update
    momentum: float = Field(0.9, ge=0, lt=1)  # of the outer update


Outer = union(LocalSGD, DiLoCo)


class Int8(Config):
    """Gradients are summed over `data` as 8-bit integers; what rounding loses is added to the next step's.

    One float32 scale a block (1-bit Adam's error feedback, Tang et al. 2021, arXiv:2102.02888, in 8 bits).
    """

    kind: Literal["int8"] = "int8"
    block: int = Field(256, gt=0)  # values that share a scale


Compression = union(Int8)
