"""Chat templates: jinja2 programs that come with a model and write a conversation as the model was trained to read it.

They are code from elsewhere, so they run in jinja2's immutable sandbox, and no text they make may outgrow `LIMIT`.
What they may use besides is what the templates of the field use.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.core.errors import ConfigError, DataError

LIMIT = 1 << 22  # characters of any text that a template makes: books fit, bombs do not

Message = Mapping[str, Any]  # role, content, and whatever else a template reads


class Template:
    """A template, compiled.

    Raises:
      DataError: it is no jinja2.
    """

    def __init__(self, source: str, name: str = "chat template"):
        self.source, self.name = source, name
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise DataError(f"{name}, line {e.lineno}: {e.message}") from None
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
            raise DataError(f"{name}: cannot be compiled ({type(e).__name__}: {e})") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **named: Any) -> str:
        """The conversation as one text, special tokens spelled out.

        Args:
          add_generation_prompt: ends where the model's answer begins.
          named: what else the template may read: `bos_token`, `eos_token`, `tools`.

        Raises:
          ConfigError: the template refuses this conversation, in its own words.
          DataError: it fails, reaches for what lies outside of its sandbox, or makes more text than `LIMIT`.
        """
        given = {"tools": None, "documents": None, "messages": [dict(m) for m in messages], **named}
        try:
            return _concat(self._compiled.generate(add_generation_prompt=add_generation_prompt, **given))
        except _Refused as e:
            raise ConfigError(f"{self.name}: {e}") from None
        except SecurityError as e:
            raise DataError(f"{self.name}: {e}; it is refused") from None
        except (MemoryError, RecursionError) as e:
            raise DataError(f"{self.name}: takes more than a template may ({type(e).__name__})") from None
        except Exception as e:  # noqa: BLE001 (whatever its code raises)
            raise DataError(f"{self.name}: fails ({type(e).__name__}: {e})") from None

    def after_answer(self, **named: Any) -> str:
        """What stands between an answer and the next thing that the user says; '' where that cannot be told."""
        said = [("user", "[first question]"), ("assistant", "[its answer]"), ("user", "[second question]")]
        try:
            text = self.render([{"role": role, "content": content} for role, content in said], **named)
        except (ConfigError, DataError):
            return ""
        after = text.partition(said[1][1])[2]
        return after.partition(said[2][1])[0] if said[2][1] in after else ""


class _Refused(jinja2.TemplateError):
    """`raise_exception` of a template."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | str | None = None, **form: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    width = len(indent) if isinstance(indent, str) else indent or 0
    _fits(_size(x) * (1 + width))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **form)


class _Namespace(jinja2.utils.Namespace):
    """No attribute of it begins with an underscore: those are Python's own."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"sets {name!r} of a namespace, a name that is Python's own")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for masks of training; what is inside is rendered."""

    tags = frozenset(("generation",))

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# --- no text outgrows LIMIT ----------------------------------------------------------------------------------------


def _fits(size: int) -> None:
    if size > LIMIT:
        raise SecurityError(f"makes a text of more than {LIMIT:,} characters")


def _size(x: Any, known: dict[int, int] | None = None, depth: int = 0) -> int:
    """Characters of `x` as text, about; a list counts each time it is met, as in text, though it is read once.

    Raises:
      SecurityError: more than LIMIT.
    """
    known = {} if known is None else known
    if isinstance(x, str):
        size = len(x)
    elif isinstance(x, int):
        size = x.bit_length() // 3 + 1
    elif id(x) in known:
        size = known[id(x)]
    elif isinstance(x, Mapping | list | tuple | set):
        if depth > 100:
            raise SecurityError("nests more than 100 lists")
        size = 2
        for item in (*x.keys(), *x.values()) if isinstance(x, Mapping) else x:
            size += 2 + _size(item, known, depth + 1)
            _fits(size)
        known[id(x)] = size
    else:
        size = 1
    _fits(size)
    return size


def _measured(x: Any) -> Any:
    _size(x)
    return x


def _concat(pieces: Iterable[Any]) -> str:
    kept, size = [], 0
    for piece in pieces:
        size += _size(piece)
        _fits(size)
        kept.append(str(piece))
    return "".join(kept)


def _join(environment: jinja2.Environment, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    """jinja2's `join`, of a text that fits."""
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    return _concat(x for i, value in enumerate(values) for x in ((d, value) if i else (value,)))


_WIDE = (
    "batch",
    "center",
    "expandtabs",
    "indent",
    "ljust",
    "rjust",
    "round",
    "slice",
    "zfill",
)  # by so many characters


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, operator or method of strings that refuses to make a long text."""

    @functools.wraps(function)  # with jinja2's marks of what is passed to it first
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if not isinstance(x, jinja2.Environment)]
        sizes = [_size(x) for x in given]
        texts, numbers = ([x for x in given if isinstance(x, kind)] for kind in (str, int))
        if name in _WIDE:
            lines = 1 + (sum(map(texts[0].count, "\n\t")) if texts else 0)
            _fits(lines * max(numbers, default=0))
        elif name == "format":
            widths = [int(x) for x in re.findall(r"\d+", texts[0])]
            widths += numbers if re.search(r"\*|{[^}]*{", texts[0]) else []
            _fits(max(widths, default=0))
            _fits(sizes[0] + sum(map(texts[0].count, "%{")) * sum(sizes[1:]))
        elif name == "replace" and len(texts) == 3:
            text, old, new = texts
            _fits(len(text) + text.count(old) * max(0, len(new) - len(old)))
        return _measured(function(*args, **kwargs))

    return call


class _Code(CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        """`a ~ b` by the environment's own `concat`."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(("*", "**", "+", "%"))
    concat = staticmethod(_concat)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "*" if isinstance(left, int) and isinstance(right, int):
                _fits(_size(left) + _size(right))
            case "*":
                for sequence, times in ((left, right), (right, left)):
                    if isinstance(times, int):
                        _fits(_size(sequence) * max(times, 0))
            case "**" if isinstance(right, int):
                _fits(_size(left) * right)
            case "+":
                _fits(_size(left) + _size(right))
            case "%" if isinstance(left, str):
                of = right if isinstance(right, tuple) else (right,)
                return _bounded("format", lambda *_: left % right)(left, *of)
        return _measured(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        of = getattr(function, "__self__", None)
        if not isinstance(of, str):
            return super().call(context, function, *args, **kwargs)
        name = function.__name__
        if name == "join":
            return _join(self, *args, d=of, **kwargs)
        bounded = _bounded(name, lambda of, *args, **kwargs: function(*args, **kwargs))
        return super().call(context, bounded, of, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        bounded = _bounded("format", lambda _, *args, **kwargs: wrapped(*args, **kwargs))
        return functools.partial(bounded, value.__self__)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in ("encode", "to_bytes", "translate") and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"reaches for {attribute!r} of a {type(obj).__name__}, which is outside of its sandbox")


@functools.cache
def _environment() -> jinja2.Environment:
    made = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], finalize=_measured
    )
    made.filters |= {"tojson": _to_json}
    made.filters = {name: _bounded(name, function) for name, function in made.filters.items()}
    made.filters["join"] = jinja2.pass_environment(_join)
    del made.filters["wordwrap"], made.globals["lipsum"]
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
    made.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return made
