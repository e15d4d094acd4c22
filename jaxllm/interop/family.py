"""A family of models of another library: its config as ours and ours as its, and the names of its weights.

A family is a value. `sizes` says which key of `config.json` is which field of ours; what takes more than that is a
`Part`. Ours is made from theirs and theirs from ours by the same tables: a config of ours is one of a family's if
it comes back as it was.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm.core.config import Config, merge
from jaxllm.core.errors import CheckpointError, ConfigError, UserError
from jaxllm.interop.names import Table
from jaxllm.models.config import AnyModel, Attention, Block, DecoderConfig, Dropout, FanIn
from jaxllm.models.positions import NoPosition

Paths = dict[str, Any]  # by dotted path of ours


class Given(Mapping[str, Any]):
    """The keys of a `config.json`, with those it leaves out as the family's class has them."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], name: str = "config.json"):
        self._said, self.name = {**defaults, **given}, name

    def __getitem__(self, key: str) -> Any:
        if key not in self._said:
            raise CheckpointError(f"{self.name}: {key} is missing")
        return self._said[key]

    def __contains__(self, key: object) -> bool:
        return key in self._said

    def get(self, key: str, default: Any = None) -> Any:
        return self._said.get(key, default)

    def __iter__(self):
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    def refuse(self, key: str, right: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {key}={json.dumps(self.get(key))}; {right}")


class Part(NamedTuple):
    """What one key of theirs alone does not say."""

    ours: Callable[[Given], Paths]
    theirs: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """See the head of this file.

    Attributes:
      kind: its name; `model_type` of its configs, unless `model_type` says another.
      architecture: the class of transformers that computes next-token logits.
      names: its table, or the table of a config.
      prefix: of the names of all weights but the head's; files of the bare model lack it.
      sizes: key of theirs -> path or paths of ours.
      fixed: path of ours -> what all models of the family have there.
      only: key of theirs -> the one value that can be read.
      defaults: of their config class.
      drop: tensors that hold no weights, by the end of their names.
      model: the config of ours.
      repeats: tensors that files may have although they are the same as another: name of theirs -> weight of ours.
      when: which configs are its, among those of families with the same `model_type`.
    """

    kind: str
    architecture: str
    prefix: str
    names: Table | Callable[[Any], Table]
    sizes: dict[str, str | tuple[str, ...]]
    fixed: Paths
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    only: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    drop: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # further `model_type`s
    model_type: str | None = None
    model: type[Config] = DecoderConfig
    repeats: dict[str, str] = dataclasses.field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] = lambda config: True

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.model_type or self.kind, *self.also)

    def ours(self, config: Mapping[str, Any], name: str = "config.json") -> AnyModel:
        """The config of ours that computes what a `config.json` describes.

        Raises:
          CheckpointError: naming a key that is missing, wrong, or asks for what is not here.
        """
        given = Given(config, self.defaults, name)
        try:
            return self._ours(given)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:  # a value of another type
            raise CheckpointError(f"{name}: no {self.kind} that can be computed: {_first(e)}") from None

    def _ours(self, given: Given) -> AnyModel:
        for key, value in self.only.items():
            if given.get(key, value) != value:
                raise given.refuse(key, f"{self.kind} is read with {json.dumps(value)} only")
        paths = dict(self.fixed)
        for key, where in self.sizes.items():
            if (
                isinstance(where, str)
                and where.endswith("num_layers")
                and not (type(given[key]) is int and 0 < given[key] <= MOST_LAYERS)
            ):
                raise given.refuse(key, f"a model has 1 to {MOST_LAYERS} layers")
            if where == "vocab" and type(given[key]) is not int:
                raise given.refuse(key, "a whole number is needed")
            for path in (where,) if isinstance(where, str) else where:
                paths[path] = activation(given, key) if path.endswith(".activation") else given[key]
        for part in self.parts:
            paths |= part.ours(given)
        layered = {path: paths.pop(path) for path in [*paths] if path.endswith(LAYERS)}
        tree = _tree(paths)
        for path, layers in layered.items():
            pattern, side = _pattern([_tree(layer) for layer in layers]), path.removesuffix(LAYERS)
            tree = merge(tree, {side[:-1]: pattern} if side else pattern)
        return self.model.model_validate(tree)

    def table(self, cfg: AnyModel) -> Table:
        return self.names(cfg) if callable(self.names) else self.names

    def theirs(self, cfg: AnyModel) -> dict[str, Any]:
        """The `config.json` of a config of ours.

        Raises:
          ConfigError: the family has no such model; names the fields.
        """
        if not isinstance(cfg, self.model):
            raise ConfigError(f"no {self.kind} is like this model: it is of another kind, {cfg.kind}")
        cfg = resolved(cfg)
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        config |= self.only
        for key, where in self.sizes.items():
            path = where if isinstance(where, str) else where[0]
            value = at(cfg, path)
            config[key] = ACTIVATIONS_OF_OURS[value] if path.endswith(".activation") else value
        for part in self.parts:
            config |= part.theirs(cfg)
        try:
            again = self.ours(config)
        except CheckpointError as e:
            raise ConfigError(f"no {self.kind} is like this model: {e}") from None
        if differs := differences(resolved(again), cfg):
            raise ConfigError(
                f"no {self.kind} is like this model: "
                + "; ".join(f"{path} is {mine!r}, there {theirs!r}" for path, theirs, mine in differs[:5])
            )
        return config


MOST_LAYERS = 10_000  # what is said layer by layer takes no memory that a wrong number asks for
LAYERS = "*layers"  # among the paths of a Part, of a side too: a list of Paths, what each layer has for itself


def resolved(cfg: AnyModel) -> AnyModel:
    """The same model with all that follows from other fields written down, and nothing that only training looks at."""
    if cfg.kind == "encoder_decoder":
        return cfg.model_copy(update={"encoder": resolved(cfg.encoder), "decoder": resolved(cfg.decoder)})
    per_layer = cfg.position.kind in ("rope", "rope_2d", "alibi", "none")

    def full(a: Attention, position: Any) -> Attention:
        return a.model_copy(update={
            "num_kv_heads": a.kv_heads, "head_dim": cfg.head_dim(a), "scale": a.scale or cfg.head_dim(a) ** -0.5,
            "position": position,
        })  # fmt: skip

    def block(block: Block) -> Block:
        a = block.attention
        position = cfg.position_of(a) if per_layer else None
        ffn = block.ffn.model_copy(update={"jitter": 0.0}) if block.ffn.kind == "moe" else block.ffn
        own, cross = full(a, position), block.cross and full(block.cross, None)
        return block.model_copy(update={"ffn": ffn, "attention": own, "cross": cross})

    blocks = [block(cfg.layer(i)) for i in range(cfg.num_layers)]
    period = _period(blocks)
    layered = {"block": blocks[0], "pattern": tuple(blocks[:period]) if period > 1 else ()}
    if getattr(cfg, "query_layer", None):
        layered["query_layer"] = block(cfg.query_layer)
    table = cfg.table if cfg.kind == "encoder" or cfg.table != cfg.embed else None
    position = NoPosition() if per_layer else cfg.position
    return cfg.model_copy(
        update=layered | {"dropout": Dropout(), "init": FanIn(), "table": table, "position": position}
    )


def differences(a: AnyModel, b: AnyModel) -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two configs differ, with both values."""

    def walk(path: str, x: Any, y: Any) -> list[tuple[str, Any, Any]]:
        if isinstance(x, dict) and isinstance(y, dict):
            keys = {**x, **y}
            return [d for k in keys for d in walk(f"{path}.{k}" if path else k, x.get(k), y.get(k))]
        close = isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 1e-6 * abs(y)
        return [] if x == y or close else [(path, x, y)]

    return walk("", a.model_dump(mode="json"), b.model_dump(mode="json"))


def at(cfg: Any, path: str) -> Any:
    """The value at a dotted path; where a part on the way is another kind without it, None."""
    return functools.reduce(lambda c, name: getattr(c, name, None), path.split("."), cfg)


# Names that transformers has for activations (its ACT2FN), and the ones we write.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu",
    "sigmoid": "sigmoid", "tanh": "tanh", "mish": "mish", "linear": "identity",
}  # fmt: skip
ACTIVATIONS_OF_OURS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "gelu_sigmoid": "quick_gelu", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh", "mish": "mish", "identity": "linear",
}  # fmt: skip


def activation(given: Given, key: str) -> str:
    """What a key of theirs names, as we name it."""
    if given[key] not in ACTIVATIONS:
        raise given.refuse(key, f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given[key]]


def _tree(paths: Paths) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in paths.items():
        *above, name = path.split(".")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[name] = (
            merge(inner[name], value) if isinstance(inner.get(name), dict) and isinstance(value, dict) else value
        )
    return tree


def _pattern(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The block, or the repeating group, of layers that differ so."""
    period = _period(layers)
    return {"block": layers[0]} if period == 1 else {"pattern": layers[:period]}


def _period(layers: list[Any]) -> int:
    """The least number of layers that repeats."""
    return next(p for p in range(1, len(layers) + 1) if all(x == layers[i % p] for i, x in enumerate(layers)))


def _first(e: Exception) -> str:
    """What pydantic found first."""
    errors = getattr(e, "errors", list)()
    if not errors:
        return str(e)
    where = ".".join(map(str, errors[0]["loc"]))
    return f"{where}: {errors[0]['msg']}" if where else errors[0]["msg"].removeprefix("Value error, ")
