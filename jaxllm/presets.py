"""Published models as configs (`configs/models`), and what the verb `models` says of them.

    from jaxllm.presets import preset

    cfg = preset("llama2_7b")

`configs/models/published.tsv` has a line for each: family, what its source says of its size, weights, chat formats. A
training config takes one by `model: {base: PATH/llama2_7b.yaml}`.
"""

import csv
import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxllm.core.config import SHIPPED, Config, dump, parse, read_tree
from jaxllm.core.errors import UserError
from jaxllm.models import count
from jaxllm.models.config import AnyModel, Model

MODELS, CHAT = SHIPPED / "models", SHIPPED / "chat"


class Published(NamedTuple):
    """What is known of a preset besides its config; a line of `published.tsv`, where `-` stands for nothing."""

    preset: str
    family: str
    parameters: str  # as the source gives them: 6738415616, or 1.3e9 where it rounds
    counted: str  # total, or head_twice: the files hold a tied head a second time
    non_embedding: str  # without tables and head, where the source says that too
    within: str  # how far the count may be off, where that is more than rounding; `note` says why
    context: str
    folders: str  # the kind of Hugging Face folders that are read and written
    weights: str
    chat: str  # formats of its fine-tuned versions: names in configs/chat
    source: str
    note: str

    @property
    def url(self) -> str | None:
        """Where its weights are."""
        place = self.weights.partition(" ")[0]
        if "/" not in place:
            return None
        return f"https://{place}" if place.startswith("github.com/") else f"https://huggingface.co/{place}"


class _Preset(Config):
    """The block that a preset's file fills."""

    model: Model


def published() -> dict[str, Published]:
    """All presets by name, families together, in the order of the file."""
    with (MODELS / "published.tsv").open(encoding="utf-8", newline="") as f:
        rows = [Published(*row) for row in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return {row.preset: row for row in rows[1:]}


def path(name: str) -> Path:
    """The file of a preset.

    Raises:
      UserError: there is none; names the nearest.
    """
    file = MODELS / f"{name}.yaml"
    if "/" in name or not file.is_file():
        near = difflib.get_close_matches(name.lower(), (p.stem for p in MODELS.glob("*.yaml")), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; `jaxllm models` lists them"
        raise UserError(f"no model preset {name!r}{hint}")
    return file


def preset(name: str) -> AnyModel:
    """The config of a published model; raises UserError as `path`."""
    file = path(name)
    return parse(_Preset, {"model": read_tree(file)}, name=str(file)).model


# --- what the verb prints --------------------------------------------------------------------------------------------


def listing(asked: str | None = None) -> str:
    """All families and presets; of a family named, its own; of a preset named, its config and parts.

    Raises:
      UserError: neither a family nor a preset.
    """
    rows = published()
    if asked in rows:
        return page(rows[asked])
    found = [row for row in rows.values() if asked is None or _plain(row.family) == _plain(asked)]
    if not found:
        families = {_plain(row.family): row.family for row in rows.values()}
        near = difflib.get_close_matches(_plain(asked), [*families, *rows], n=3)
        hint = f"did you mean {', '.join(families.get(n, n) for n in near)}?" if near else "`jaxllm models` lists them"
        raise UserError(f"no model or family {asked!r}; {hint}")
    cells = {
        row.preset: (row.preset, f"{count.parameters(preset(row.preset)):,}", row.context, row.weights, row.source)
        for row in found
    }
    widths = [max(len(line[i]) for line in cells.values()) for i in range(4)]
    lines = []
    for family, members in _families(found):
        lines += ["", f"{family}: {_reads(members[0])}{_formats(members)}"]
        for name, parameters, context, weights, source in (cells[m.preset] for m in members):
            lines.append(
                f"  {name:{widths[0]}}  {parameters:>{widths[1]}}  {context:>{widths[2]}}  {weights:{widths[3]}}  {source}"
            )
    if asked is None:
        lines += ["", f"chat formats: {', '.join(formats())}"]
    return "\n".join(lines[1:])


def page(row: Published) -> str:
    """A preset whole: a YAML file that is the same preset, with what is known of it and its parts as comments."""
    cfg, text = preset(row.preset), path(row.preset).read_text(encoding="utf-8")
    about = [
        text.partition("\n")[0], f"# preset {row.preset} of {row.family}; {_reads(row)}",
        f"# weights: {row.weights}; sizes: {row.source}{'' if row.note == '-' else f' ({row.note})'}",
    ]  # fmt: skip
    parts = [(name, f"{n:,}") for name, n in _parts(cfg)] + [("in all", f"{count.parameters(cfg):,}")]
    wide = [max(len(part[i]) for part in parts) for i in range(2)]
    lines = [f"#   {name:{wide[0]}}  {n:>{wide[1]}}" for name, n in parts]
    return "\n".join([*about, dump(cfg).rstrip(), "# parameters", *lines])


ABOUT = """\
# Published models

Written by `jaxllm models --markdown`. Each preset is a file in [configs/models](../configs/models), the `model:` block \
of a training config, which takes it by `model: {base: ../models/llama2_7b.yaml}`. `jaxllm models NAME` prints one \
whole; in Python it is `jaxllm.presets.preset(NAME)`.

Parameters are counted from the preset and held against its source by a test, to the last one where the source or the \
released weights are that exact; _weights_ as a source are the elements of the released tensors. Chat formats are \
templates in [configs/chat](../configs/chat)."""


def markdown() -> str:
    """The file docs/models.md."""
    rows = list(published().values())
    lines = [ABOUT]
    for family, members in _families(rows):
        about = f"{_reads(members[0])}{_formats(members)}."
        lines += ["", f"## {family}", "", about[0].upper() + about[1:]]
        lines += ["", "| preset | parameters | context | weights | source |", "|---|---:|---:|---|---|"]
        for row in members:
            parameters = f"{count.parameters(preset(row.preset)):,}"
            weights = f"[{row.weights}]({row.url})" if row.url else row.weights
            source = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", row.source)
            note = "" if row.note == "-" else f"; {row.note}"
            file = f"[{row.preset}](../configs/models/{row.preset}.yaml)"
            lines.append(f"| {file} | {parameters} | {int(row.context):,} | {weights} | {source}{note} |")
    return "\n".join(lines)


def formats() -> list[str]:
    """Names of the chat templates that are shipped."""
    return sorted(p.stem for p in CHAT.glob("*.jinja"))


def _families(rows: list[Published]) -> Iterator[tuple[str, list[Published]]]:
    for family, members in itertools.groupby(rows, key=lambda row: row.family):
        yield family, list(members)


def _reads(row: Published) -> str:
    if row.folders == "-":
        return "no Hugging Face folders"
    return f"Hugging Face folders ({row.folders}) read and written"


def _formats(members: list[Published]) -> str:
    found = dict.fromkeys(name for row in members for name in row.chat.split() if name != "-")
    return f"; chat: {', '.join(found)}" if found else ""


def _parts(cfg: AnyModel) -> Iterator[tuple[str, int]]:
    """Parts with their sizes, layers in a row of the same size as one line."""
    of_layer = lambda part: (re.sub(r"layers\.\d+$", "layers", part[0]), part[1])
    for (name, n), run in itertools.groupby(count.parts(cfg).items(), key=of_layer):
        names = [part for part, _ in run]
        if not name.endswith("layers"):
            yield name, n
            continue
        first, last = names[0], names[-1].rpartition(".")[2]
        side = getattr(cfg, name.rpartition(".")[0]) if "." in name else cfg
        each = count.block_parts(side, side.layer(int(first.rpartition(".")[2])))
        yield (first if len(names) == 1 else f"{first}-{last} ({len(names)} of {n:,})"), n * len(names)
        for part, size in each.items():
            yield f"  {part}", size * len(names)


def _plain(name: str) -> str:
    """A family's name as it may be typed: `LLaMA 2`, `llama2`, `llama-2`."""
    return re.sub(r"[\s_-]", "", name).lower()
