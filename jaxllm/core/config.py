"""Configs are frozen pydantic models; YAML files and `a.b=value` overrides only fill them in.

One rule serves files, the command line, sweeps, notebooks and tests: a tree of plain values is laid over its
`base:`, overrides are set in it, and the schema validates the result once. Nothing else (no environment
variable) can change a run. Any block may name a `base:` of its own: the file that says what the block does not.
"""

import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import re
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import pydantic
import yaml

from jaxllm.core.errors import ConfigError


class Config(pydantic.BaseModel):
    """Base of every config: immutable, hashable (so it may be static under jit), no stray keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)
SHIPPED = Path(__file__).parents[1] / "configs"  # what comes with the package: models/ and chat/


def union(*kinds: type[Config], default: type[Config] | None = None) -> Any:
    """The tagged union of config classes, chosen by `kind:`; a bare string stands for `{kind: string}`.

    Args:
      default: what a block without `kind:` is; None: it must say.
    """
    if len(kinds) == 1:  # a union of one is waiting for its second; the tag is checked by its Literal
        return Annotated[kinds[0], pydantic.BeforeValidator(kind_alone)]
    return Annotated[
        Annotated[Union[kinds], pydantic.Field(discriminator="kind")],  # noqa: UP007 (built at run time)
        pydantic.BeforeValidator(kind_alone if default is None else functools.partial(_kind_or, default)),
    ]


def _kind_or(default: type[Config], value: Any) -> Any:
    block = kind_alone(value)
    return {"kind": default.model_fields["kind"].default, **block} if isinstance(block, dict) else block


def kind_alone(value: Any) -> Any:
    """The block that a bare kind stands for."""
    return {"kind": value} if isinstance(value, str) else value


class _Yaml(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML 1.2 floats: PyYAML alone reads `3e-4` and `1e9` as strings."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Reads `path`, lays it over its `base:` file if it names one, then applies `a.b=value` overrides.

    Raises:
      ConfigError: listing every wrong field at once.
    """
    return parse(schema, read_tree(Path(path)), overrides, name=str(path))


def parse(schema: type[C], tree: dict[str, Any], overrides: Sequence[str] = (), name: str = "config") -> C:
    """`schema` filled from a tree of plain values and `a.b=value` overrides; `name` opens the error message."""
    for text in sorted(overrides, key=lambda t: not t.partition("=")[0].endswith("kind")):  # a kind clears its block
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {text!r} is not `path=value`; write for example model.num_layers=12")
        try:
            tree = _set(tree, key.split("."), yaml.load(value, _Yaml), [schema])
        except yaml.YAMLError as e:
            raise ConfigError(f"override {text!r}: the value is not YAML ({_one_line(e)})") from None
    _check_version(schema, tree, name)
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as e:
        raise ConfigError(f"{name}:\n" + "\n".join(_explain(schema, err) for err in e.errors())) from None


def override(path: str, value: Any) -> str:
    """The override that sets `path` to a plain value, whatever text is in it."""
    text = json.dumps(value, default=str).replace("\x7f", "\\x7f")  # JSON leaves DEL, YAML refuses it
    return f"{path}={_SURROGATES.sub(_code_point, text)}"


# JSON escapes what lies beyond 16 bits in two halves, which YAML refuses
_SURROGATES = re.compile(r"\\u(d[89ab]\w\w)\\u(d[c-f]\w\w)")


def _code_point(halves: re.Match) -> str:
    high, low = (int(half, 16) for half in halves.groups())
    return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08x}"


def read_tree(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a YAML file, it and each of its blocks laid over the `base:` that they name.

    A `base:` is a path relative to the file that says it.
    """
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: `base:` goes round in a circle: {' -> '.join(p.name for p in (*_seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as UTF-8 YAML ({_one_line(e)})") from None
    try:
        tree = yaml.load(text, _Yaml)
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(e)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of names to values, got {type(tree).__name__}")
    if not isinstance(tree.get("base"), str | None):
        raise ConfigError(f"{path}: `base:` names one config file, got {tree['base']!r}")
    if tree.get("base", "") is None:
        del tree["base"]
    return _on_bases(tree, path, (*_seen, path.resolve()))


class _Whole(dict):
    """A block that named its own `base:`. It takes the place of a block below it: nothing there shows through."""


def _on_bases(value: Any, path: Path, seen: tuple[Path, ...]) -> Any:
    """A value of the file at `path`, each block in it on its base. A `base` that is no text is a field like others."""
    if isinstance(value, list):
        return [_on_bases(v, path, seen) for v in value]
    if not isinstance(value, dict):
        return value
    tree = {key: _on_bases(v, path, seen) for key, v in value.items()}
    if not isinstance(tree.get("base"), str):
        return tree
    base = tree.pop("base")
    return _Whole(merge(read_tree(path.parent / base, seen), tree))


def dump(cfg: Config) -> str:
    """The whole config as YAML that `load` reads back to an equal value."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, width=110)


def fingerprint(cfg: Config) -> str:
    """SHA-256 (hex) of the config's canonical JSON: equal configs, equal fingerprints."""
    text = json.dumps(cfg.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sweep(axes: Sequence[str]) -> Iterator[list[str]]:
    """`["optimizer.learning_rate=[1e-4,3e-4]", "seed=[0,1]"]` -> four override lists, in order."""
    keys, values = [], []
    for axis in axes:
        key, sep, value = axis.partition("=")
        try:
            points = yaml.load(value, _Yaml) if sep else None
        except yaml.YAMLError as e:
            raise ConfigError(f"sweep axis {axis!r}: the values are not YAML ({_one_line(e)})") from None
        if not isinstance(points, list):
            raise ConfigError(f"sweep axis {axis!r} is not `path=[value, ...]`")
        keys.append(key), values.append(points)
    for point in itertools.product(*values):
        yield [override(k, v) for k, v in zip(keys, point, strict=True)]


class FieldDoc(NamedTuple):
    """One settable path of a config schema."""

    path: str
    type: str
    default: str
    doc: str


def fields(schema: type[Config], prefix: str = "", _above: tuple[type, ...] = ()) -> Iterator[FieldDoc]:
    """Every settable path below `schema`, what may hold itself unfolded once. The doc is the comment on its line."""
    docs = _comments(schema)
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        nested = _configs(field.annotation)
        default = "required" if field.is_required() else _short(field.get_default(call_default_factory=True))
        if not nested:
            yield FieldDoc(path, _type_name(field.annotation), default, docs.get(name, ""))
            continue
        kinds = [_kind(t) for t in nested if _kind(t)]
        shown = [*_plain_types(field.annotation), *(kinds or [nested[0].__name__])]
        yield FieldDoc(path, " | ".join(shown), default, docs.get(name, ""))
        if not {schema, *_above}.isdisjoint(nested):  # a mask of masks: what is in a mask is listed above already
            continue
        for t in nested:
            inner = f"{path}[]." if _is_tuple(field.annotation) else f"{path}."
            for f in fields(t, inner, (*_above, schema)):
                if f.path != f"{inner}kind":
                    yield f._replace(
                        path=f.path + (f"  ({_kind(t)})" if len(kinds) > 1 and "  (" not in f.path else "")
                    )


def _set(tree: Any, keys: list[str], value: Any, schemas: list[type[Config]]) -> Any:
    """A copy of `tree`, filling one of `schemas`, with the value at `keys`.

    A new `kind` clears the block it names; an absent block starts as the field's default.
    """
    key, rest = keys[0], keys[1:]
    if isinstance(tree, list):
        if not key.isdigit() or int(key) >= len(tree):
            raise ConfigError(f"override: {key!r} is no index of a list of {len(tree)}")
        copy = list(tree)
        copy[int(key)] = _set(copy[int(key)], rest, value, schemas) if rest else value
        return copy
    if isinstance(tree, str):  # `optimizer: muon` is short for `optimizer: {kind: muon}`
        tree = {"kind": tree}
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"override: cannot set {key!r} inside {tree!r}")
    tree = tree or {}
    if rest:
        possible = [t for t in schemas if _kind(t) == tree.get("kind")] or schemas
        here = [t.model_fields[key] for t in possible if key in t.model_fields]
        block = tree.get(key)
        if block is None:
            defaults = [field.get_default(call_default_factory=True) for field in here]
            block = next((d.model_dump(mode="json") for d in defaults if _kind(type(d))), None)
        return tree | {key: _set(block, rest, value, [t for field in here for t in _configs(field.annotation)])}
    if key == "kind" and tree.get("kind") not in (None, value):
        return {"kind": value}
    return tree | {key: value}


def merge(low: dict, high: dict) -> dict:
    """`high` over `low`. A changed `kind` replaces the whole block: its old fields mean nothing now."""
    if "kind" in high and high["kind"] != low.get("kind", high["kind"]):
        return high
    merged = dict(low)
    for key, value in high.items():
        below = kind_alone(low.get(key))  # `schedule: cosine` is short for `schedule: {kind: cosine}`
        over = isinstance(value, dict) and not isinstance(value, _Whole) and isinstance(below, dict)
        merged[key] = merge(below, value) if over else value
    return merged


def _check_version(schema: type[Config], tree: dict, name: str) -> None:
    known = schema.model_fields["version"].default if "version" in schema.model_fields else None
    asked = tree.get("version", known)
    if isinstance(asked, int) and known is not None and asked > known:
        raise ConfigError(
            f"{name}: config version {asked} is newer than version {known}, the newest this jaxllm reads;"
            " upgrade jaxllm"
        )


def _explain(schema: type[Config], err: dict) -> str:
    path, siblings, here = _locate(schema, err["loc"])
    shown = ".".join(path) or "(top)"
    if err["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(siblings))}"
        return f"  {shown}: no such field{hint}"
    if err["type"] == "union_tag_invalid":
        return f"  {shown}: no kind {err['ctx']['tag']!r}; known: {err['ctx']['expected_tags']}"
    if err["type"] == "union_tag_not_found":
        return f"  {shown}: `kind:` is missing; known: {', '.join(repr(_kind(t)) for t in here)}"
    if err["type"] == "missing":
        return f"  {shown}: is required"
    message = err["msg"].replace("Value error, ", "")
    if err["type"] != "value_error":
        message += f" (got {err['input']!r})"
    return f"  {shown}: {message}"


def _locate(schema: Any, loc: tuple) -> tuple[list[str], set[str], list[type[Config]]]:
    """The path as the file spells it (union tags taken out), the fields known beside its end, the configs there."""
    path, here = [], [schema]
    for part in loc:
        tagged = [t for t in here if _kind(t) == part] if len(here) > 1 else []
        if tagged or str(part).startswith("<"):  # of a union told apart by more than `kind`
            here = tagged or here
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        siblings = set().union(*(getattr(t, "model_fields", {}) for t in here)) if here else set()
        fields_ = [t.model_fields[part] for t in here if part in getattr(t, "model_fields", {})]
        here = [t for f in fields_ for t in _configs(f.annotation)]
    return path, siblings if path else set(), here


def _kind(schema: Any) -> str | None:
    field = getattr(schema, "model_fields", {}).get("kind")
    return field.default if field is not None else None


def _configs(annotation: Any) -> list[type[Config]]:
    return [t for t in _leaf_types(annotation) if isinstance(t, type) and issubclass(t, Config)]


def _plain_types(annotation: Any) -> list[str]:
    """What may stand in place of the configs of a union."""
    if typing.get_origin(annotation) is Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [name for member in typing.get_args(annotation) for name in _plain_types(member)]
    return [] if annotation is type(None) or _configs(annotation) else [_type_name(annotation)]


def _leaf_types(annotation: Any) -> list[Any]:
    """The member types of unions, Annotated and tuples, flattened."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType, tuple, Annotated):
        args = typing.get_args(annotation)[:1] if origin is Annotated else typing.get_args(annotation)
        return [leaf for a in args for leaf in _leaf_types(a)]
    return [annotation]


def _is_tuple(annotation: Any) -> bool:
    return any(typing.get_origin(a) is tuple for a in (annotation, *typing.get_args(annotation)))


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(a) for a in typing.get_args(annotation))
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is tuple:
        return f"[{', '.join(_type_name(a) for a in typing.get_args(annotation) if a is not Ellipsis)}]"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _short(value: Any) -> str:
    if isinstance(value, Config):
        return _kind(type(value)) or "{...}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _comments(schema: type[Config]) -> dict[str, str]:
    """Field name -> the comment on its line, read from the source (only `--fields` pays for it)."""
    docs = {}
    for cls in reversed(schema.__mro__):
        if not (issubclass(cls, Config) and cls is not Config):
            continue
        name = None
        depth = 0
        for tok in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
            if tok.type == tokenize.NAME and tok.string in cls.model_fields and tok.start[1] == 4 and depth == 0:
                name = tok.string
            elif tok.type == tokenize.COMMENT and name and tok.line.strip() != tok.string:
                docs[name] = tok.string.lstrip("# ")
            elif tok.type == tokenize.OP:
                depth += (tok.string in "([{") - (tok.string in ")]}")
            elif tok.type == tokenize.NEWLINE and depth == 0:
                name = None
    return docs


def _nearby(path: Path) -> str:
    near = difflib.get_close_matches(
        path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    )
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
