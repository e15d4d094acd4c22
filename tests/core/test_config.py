"""The config loader: what it reads, how it says no, and that every schema can be written, read and listed."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from jaxllm import verbs
from jaxllm.core.config import Config, dump, fields, fingerprint, load, override, parse, read_tree, sweep, union
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.data.config import PrepareConfig
from jaxllm.inference.config import Beam, ChatConfig, GenerateConfig
from jaxllm.models.config import DecoderConfig
from jaxllm.train.config import RunConfig

ROOT = Path(__file__).parents[2]
TREE = {"out": "runs/x", "steps": 10, "batch": 4, "data": {"path": "prepared/x"}, "model": {"kind": "decoder"},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3}}  # fmt: skip
OPTIMIZERS = "'adamw', 'adafactor', 'lion', 'sgd', 'muon'"
TEXT = """\
out: runs/x
steps: 10
batch: 4
data: {path: prepared/x}
model: {kind: decoder, num_layers: 2, block: {attention: {num_heads: 4}}}
optimizer: {kind: adamw, learning_rate: 3e-3}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TEXT)
    return "tiny.yaml"


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def refusal(*overrides: str) -> str:
    """What is said of TREE with these overrides, without the opening line."""
    opening, _, rest = complaint(parse, RunConfig, TREE, overrides).partition("\n")
    assert opening == "config:"
    return rest


# --- errors, as printed --------------------------------------------------------------------------------------------


def test_all_errors_are_told_at_once_with_path_and_value(tiny):
    told = complaint(load, RunConfig, tiny, ["steps=-3", "model.num_layers=two"])
    assert told == (
        "tiny.yaml:\n"
        "  steps: Input should be greater than 0 (got -3)\n"
        "  model.num_layers: Input should be a valid integer, unable to parse string as an integer (got 'two')"
    )


def test_a_misspelt_field_is_told_its_neighbour(tiny):
    told = complaint(load, RunConfig, tiny, ["model.block.attention.num_kv_head=2"])
    assert told == "tiny.yaml:\n  model.block.attention.num_kv_head: no such field; did you mean 'num_kv_heads'?"


def test_a_rule_between_fields_names_both_values(tiny):
    told = complaint(load, RunConfig, tiny, ["model.block.attention.num_kv_heads=3"])
    assert told == "tiny.yaml:\n  model.block.attention: num_heads=4 must be a multiple of num_kv_heads=3"


def test_a_field_without_neighbours_gets_the_list_of_those_known():
    assert refusal("data.zzz=1") == "  data.zzz: no such field; known: path, prefetch, verify, weights"


@pytest.mark.parametrize(
    "override, told",
    [
        ("optimizer={kind: adam, learning_rate: 1e-3}", f"  optimizer: no kind 'adam'; known: {OPTIMIZERS}"),
        ("schedule=cosin", "  schedule: no kind 'cosin'; known: 'constant', 'cosine', 'linear', 'wsd', 'inverse_sqrt'"),
        ("optimizer={learning_rate: 1e-3}", f"  optimizer: `kind:` is missing; known: {OPTIMIZERS}"),
        ("optimizer={kind: sgd}", "  optimizer.learning_rate: is required"),
        ("batch=6 ", None),
        ("accumulate=3", "  (top): batch=4 must be a multiple of accumulate=3"),
        ("sharding=zero4", "  sharding: no sharding preset 'zero4'; known: ddp, zero1, zero2, zero3"),
        ("clip=.inf", "  clip: Input should be a finite number (got inf)"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_what_would_be_right(override, told):
    if told is None:
        assert parse(RunConfig, TREE, [override]).batch == 6
    else:
        assert refusal(override) == told


def test_errors_inside_lists_and_kinds_name_the_place_as_the_file_spells_it():
    tree = {
        "out": "x",
        "tasks": [{"name": "a", "source": {"kind": "python", "packag": "json"}}, {"name": "B", "source": "python"}],
    }
    told = complaint(parse, PrepareConfig, tree)
    assert "  tasks.0.source.packag: no such field; did you mean 'package'?" in told
    assert "  tasks.1.name: String should match pattern" in told


@pytest.mark.parametrize("text, told", [
    ("- a\n- b\n", "a config is a mapping of names to values, got list"),
    ("", "a config is a mapping of names to values, got NoneType"),
    ("steps: [1, 2\n", "not valid YAML"),
    ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
])  # fmt: skip
def test_a_file_that_is_no_config_is_named(tiny, text, told):
    Path(tiny).write_text(text)
    assert complaint(load, RunConfig, tiny).startswith("tiny.yaml: " + told)


def test_a_file_that_cannot_be_read_is_named(tiny):
    Path(tiny).write_bytes(b"out: \xff\xfe\n")
    assert complaint(load, RunConfig, tiny).startswith("tiny.yaml: cannot be read as UTF-8 YAML")
    assert complaint(load, RunConfig, "tiny.yml") == "tiny.yml: no such config file; did you mean tiny.yaml?"
    assert complaint(load, RunConfig, "elsewhere/tiny.yaml") == "elsewhere/tiny.yaml: no such config file"


@pytest.mark.parametrize("schema", [RunConfig, PrepareConfig, GenerateConfig, ChatConfig])
def test_a_config_of_a_future_version_asks_for_an_upgrade_and_nothing_else(schema):
    told = complaint(parse, schema, {"version": 99, "a_field_of_the_future": 1})
    assert told == "config: config version 99 is newer than version 1, the newest this jaxllm reads; upgrade jaxllm"


@pytest.mark.parametrize("override, told", [
    ("steps", "override 'steps' is not `path=value`; write for example model.num_layers=12"),
    ("=3", "override '=3' is not `path=value`; write for example model.num_layers=12"),
    ("steps=[1", "override 'steps=[1': the value is not YAML"),
    ("steps.more=1", "override: cannot set 'more' inside 10"),
])  # fmt: skip
def test_an_override_that_cannot_be_applied_is_told(override, told):
    assert complaint(parse, RunConfig, TREE, [override]).startswith(told)


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "{a: b}", "true", "0"])
def test_a_base_that_is_no_file_name_is_refused(tiny, base):
    Path("child.yaml").write_text(f"base: {base}\n")
    assert complaint(load, RunConfig, "child.yaml").startswith("child.yaml: `base:` names one config file, got ")


def test_a_block_may_name_a_base_of_its_own(tiny):
    Path("models").mkdir()
    Path("models/small.yaml").write_text("num_layers: 3\nblock: {attention: {num_heads: 4}, ffn: {mlp: 64}}\n")
    Path("models/wide.yaml").write_text("base: small.yaml\nblock: {ffn: {mlp: 128}}\n")
    Path("child.yaml").write_text("base: tiny.yaml\nmodel: {base: models/wide.yaml, num_layers: 6}\n")
    model = load(RunConfig, "child.yaml").model
    assert (model.num_layers, model.block.attention.num_heads, model.block.ffn.mlp) == (6, 4, 128)
    Path("grandchild.yaml").write_text("base: child.yaml\nmodel: {block: {attention: {num_heads: 8}}}\n")
    above = load(RunConfig, "grandchild.yaml").model.block
    assert (above.attention.num_heads, above.ffn.mlp) == (8, 128)


def test_a_block_with_a_base_takes_the_place_of_the_block_below_it(tiny):
    Path("low.yaml").write_text(TEXT.replace("num_layers: 2", "num_layers: 2, tie: true"))
    Path("model.yaml").write_text("num_layers: 3\n")
    Path("child.yaml").write_text("base: low.yaml\nmodel: {base: model.yaml}\n")
    assert load(RunConfig, "child.yaml").model == DecoderConfig(num_layers=3)


def test_blocks_of_lists_have_bases_and_a_base_that_is_no_text_is_a_field(tiny):
    Path("local.yaml").write_text("attention: {window: 16}\n")
    pattern = "pattern: [{base: local.yaml}, {}], position: {kind: sinusoidal, base: 500}"
    Path("child.yaml").write_text(f"base: tiny.yaml\nmodel: {{{pattern}}}\n")
    model = load(RunConfig, "child.yaml").model
    assert [block.attention.window for block in model.pattern] == [16, None]
    assert model.position.base == 500


def test_bases_of_blocks_that_go_wrong_are_named(tiny):
    Path("a.yaml").write_text("block: {base: b.yaml}\n")
    Path("b.yaml").write_text("ffn: {base: a.yaml}\n")
    assert complaint(read_tree, Path("a.yaml")) == (
        "a.yaml: `base:` goes round in a circle: a.yaml -> b.yaml -> a.yaml"
    )
    Path("child.yaml").write_text("base: tiny.yaml\nmodel: {base: tiny.yml}\n")
    assert complaint(load, RunConfig, "child.yaml") == "tiny.yml: no such config file; did you mean tiny.yaml?"
    Path("child.yaml").write_text("base: tiny.yaml\nmodel: {base: [tiny.yaml]}\n")
    assert complaint(load, RunConfig, "child.yaml").startswith("child.yaml:\n  model.base: no such field; ")


def test_a_sweep_that_is_not_yaml_is_told():
    assert complaint(list, sweep(["seed=[0, 1"])).startswith("sweep axis 'seed=[0, 1': the values are not YAML")


def test_an_index_beyond_a_list_is_told():
    tree = {"out": "x", "tasks": [{"name": "a", "source": "python"}]}
    assert parse(PrepareConfig, tree, ["tasks.0.name=b"]).tasks[0].name == "b"
    for index in ("1", "name"):
        assert (
            complaint(parse, PrepareConfig, tree, [f"tasks.{index}.name=b"])
            == f"override: {index!r} is no index of a list of 1"
        )


# --- files, bases, overrides ---------------------------------------------------------------------------------------


def test_an_ablation_is_its_base_but_for_what_it_says(tiny):
    Path("sub").mkdir()
    Path("sub/mqa.yaml").write_text("base: ../tiny.yaml\nmodel: {block: {attention: {num_kv_heads: 1}}}\n")
    Path("sub/long.yaml").write_text("base: mqa.yaml\nsteps: 99\n")
    base, long = load(RunConfig, tiny), load(RunConfig, "sub/long.yaml")
    assert (long.steps, long.model.block.attention.num_kv_heads, long.model.block.attention.num_heads) == (99, 1, 4)
    assert long.model_copy(update={"steps": base.steps, "model": base.model}) == base


def test_bases_that_go_round_in_a_circle_are_refused(tiny):
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    assert complaint(load, RunConfig, "a.yaml") == "a.yaml: `base:` goes round in a circle: a.yaml -> b.yaml -> a.yaml"


def test_a_missing_base_is_named(tiny):
    Path("child.yaml").write_text("base: tyny.yaml\n")
    assert complaint(load, RunConfig, "child.yaml") == "tyny.yaml: no such config file; did you mean tiny.yaml?"


def test_a_changed_kind_in_a_child_replaces_the_block(tiny):
    Path("lion.yaml").write_text("base: tiny.yaml\noptimizer: {kind: lion, learning_rate: 1e-4}\n")
    lion = load(RunConfig, "lion.yaml").optimizer
    assert (lion.kind, lion.learning_rate, lion.b2) == ("lion", 1e-4, 0.99)


def test_a_changed_kind_in_an_override_clears_the_block_in_whatever_order_it_comes():
    for overrides in (
        ["optimizer.kind=sgd", "optimizer.learning_rate=0.1"],
        ["optimizer.learning_rate=0.1", "optimizer.kind=sgd"],
    ):
        sgd = parse(
            RunConfig, TREE | {"optimizer": {"kind": "adamw", "learning_rate": 1.0, "b2": 0.9}}, overrides
        ).optimizer
        assert (sgd.kind, sgd.learning_rate, sgd.momentum) == ("sgd", 0.1, 0.9)


def test_the_same_kind_again_keeps_the_block():
    assert parse(RunConfig, TREE, ["optimizer.kind=adamw"]) == parse(RunConfig, TREE)


def test_later_overrides_win():
    assert parse(RunConfig, TREE, ["steps=1", "steps=2"]).steps == 2


def test_a_bare_string_is_short_for_its_kind():
    short = parse(RunConfig, TREE, ["precision=bfloat16", "schedule=constant", "model.position=alibi"])
    long = parse(RunConfig, TREE, ["precision.kind=bfloat16", "schedule.kind=constant", "model.position.kind=alibi"])
    assert short == long
    deeper = parse(RunConfig, TREE | {"schedule": "wsd"}, ["schedule.decay=0.5"])
    assert (deeper.schedule.kind, deeper.schedule.decay) == ("wsd", 0.5)


@pytest.mark.parametrize(
    "text, value", [("3e-4", 3e-4), ("1e9", 1e9), ("1E+2", 100.0), ("-2.5e1", -25.0), ("4", 4.0), (".5", 0.5)]
)
def test_numbers_are_read_as_yaml_1_2_reads_them(text, value):
    class Number(Config):
        x: float

    assert parse(Number, {}, [f"x={text}"]).x == value


def test_a_whole_number_in_e_notation_is_a_number_of_steps(tiny):
    Path(tiny).write_text(TEXT.replace("steps: 10", "steps: 1e4"))
    assert load(RunConfig, tiny).steps == 10_000


def test_the_environment_changes_nothing(monkeypatch):
    before = parse(RunConfig, TREE)
    for name in ("SEED", "seed", "STEPS", "JAXLLM_SEED"):
        monkeypatch.setenv(name, "7")
    assert parse(RunConfig, TREE) == before


def test_a_sweep_is_the_product_of_its_axes_in_order():
    points = list(sweep(["optimizer.learning_rate=[1e-4,3e-4]", "optimizer.kind=[adamw,lion]", "seed=[0,1]"]))
    runs = [parse(RunConfig, TREE, point) for point in points]
    assert [(r.optimizer.learning_rate, r.optimizer.kind, r.seed) for r in runs] == [
        (rate, kind, seed) for rate in (1e-4, 3e-4) for kind in ("adamw", "lion") for seed in (0, 1)
    ]
    assert complaint(list, sweep(["seed=1"])) == "sweep axis 'seed=1' is not `path=[value, ...]`"


TEXTS = st.text() | st.text(alphabet="\\\"'ud83e0\n\r\t\0\x7f\x85\u2028\ufeff\ufffe😀%@&*!|>-:#[]{}, ")


@given(TEXTS)
def test_an_override_carries_any_text(text):
    assert parse(GenerateConfig, {"model": "x"}, [override("prompt", [text, "b"])]).prompt == (text, "b")
    (point,) = sweep([override("model", [text])])
    assert parse(GenerateConfig, {"model": "x", "prompt": ["a"]}, point).model == text


GENERATE = {"model": "x", "prompt": ["a"]}


def test_a_field_of_a_block_that_is_left_out_changes_the_default():
    default = parse(GenerateConfig, GENERATE).sampling
    assert parse(GenerateConfig, GENERATE, ["sampling.min_p=0.2"]).sampling == default.model_copy(update={"min_p": 0.2})
    assert parse(GenerateConfig, GENERATE, ["sampling.width=3", "sampling.kind=beam"]).sampling == Beam(width=3)
    task = {"name": "a", "source": "python"}
    assert parse(PrepareConfig, {"out": "x", "tasks": [task]}, ["tokenizer.add=[x]"]).tokenizer.add == ("x",)
    rope = parse(RunConfig, TREE, ["model.position.theta=5e5"]).model.position
    assert (rope.kind, rope.theta) == ("rope", 5e5)


def test_a_field_that_the_default_kind_lacks_is_refused_and_a_block_without_kind_gets_the_list_of_them():
    told = complaint(parse, GenerateConfig, GENERATE, ["sampling.width=3"])
    assert told.startswith("config:\n  sampling.width: no such field; ")
    told = complaint(parse, GenerateConfig, GENERATE | {"sampling": {"min_p": 0.2}})
    assert told == "config:\n  sampling: `kind:` is missing; known: 'greedy', 'sample', 'beam'"
    assert refusal("optimizer={}", "optimizer.b1=0.9").startswith("  optimizer: `kind:` is missing; known: 'adamw'")


# --- values --------------------------------------------------------------------------------------------------------


def test_configs_are_frozen_and_may_be_static_under_jit():
    cfg = parse(RunConfig, TREE)
    assert hash(cfg) == hash(parse(RunConfig, TREE))
    with pytest.raises(ValueError, match="frozen"):
        cfg.steps = 3


def run_overrides() -> st.SearchStrategy[dict]:
    """Overrides that set a few fields of a run, unions of every kind among them."""
    kinds = {
        "optimizer.kind": ["adamw", "adafactor", "lion", "sgd", "muon"],
        "schedule": ["constant", "cosine", "linear", "wsd", "inverse_sqrt"],
        "precision": ["float32", "bfloat16", "float16"],
        "sharding": ["ddp", "zero1", "zero2", "zero3"],
        "model.position": ["none", "sinusoidal", "learned", "rope", "alibi"],
        "model.init": ["fan_in", "normal", "small", "xavier"],
        "model.block.norm": ["rmsnorm", "layernorm"],
        "model.block.placement": ["pre", "post", "sandwich", "parallel", "subln", "deepnorm"],
        "model.block.attention.mask": [
            "causal",
            "full",
            "prefix",
            "{kind: window, left: 3}",
            "{kind: all, of: [causal, document]}",
        ],
        "model.block.attention.num_kv_heads": ["null", "1", "2"],
        "model.pattern": ["[]", "[{attention: {window: 8}}, {}]"],
        "ramp": ["null", "{start: 1, increment: 1, steps: 5}"],
        "metrics.sinks": ["[]", "[tensorboard, {kind: wandb, mode: offline}]"],
        "seed": ["0", "123456789"],
    }
    return st.fixed_dictionaries({}, optional={path: st.sampled_from(values) for path, values in kinds.items()})


@given(run_overrides())
def test_a_dumped_config_loads_to_an_equal_one_of_equal_fingerprint(tmp_path_factory, values):
    cfg = parse(
        RunConfig, TREE, [f"{path}={value}" for path, value in values.items()] + ["optimizer.learning_rate=1e-3"]
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(cfg))
    again = load(RunConfig, file)
    assert again == cfg
    assert fingerprint(again) == fingerprint(cfg)


SOURCES = [{"kind": "text", "files": ["a*.txt"], "document": "line"}, {"kind": "jsonl", "files": ["a.jsonl.gz"]},
           "python", {"kind": "huggingface", "path": "x"}]  # fmt: skip
TOKENIZERS = ["byte", {"kind": "hf", "file": "x"}, {"kind": "sentencepiece", "file": "x"},
              {"kind": "tiktoken", "file": "x", "encoding": "gpt2"},
              *({"kind": k, "vocab": 300, "add": ["<x>"]}
                for k in ("train_bpe", "train_unigram", "train_wordpiece"))]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=str)
def test_every_source_and_tokenizer_survives_a_dump(tmp_path, source, tokenizer):
    cfg = parse(
        PrepareConfig,
        {"out": "x", "tasks": [{"name": "a", "source": source}], "tokenizer": tokenizer, "mixture": "proportional"},
    )
    (tmp_path / "c.yaml").write_text(dump(cfg))
    assert load(PrepareConfig, tmp_path / "c.yaml") == cfg


@pytest.mark.parametrize("sampling", ["greedy", "{kind: sample, top_k: 3}", "beam"])
def test_a_generate_config_survives_a_dump_odd_prompts_included(tmp_path, sampling):
    prompts = ["def ", "  a: b\n", "null", "é\u2028☃", ""]
    cfg = parse(GenerateConfig, {"model": "runs/x", "prompt": prompts}, [f"sampling={sampling}"])
    (tmp_path / "c.yaml").write_text(dump(cfg), encoding="utf-8")
    assert load(GenerateConfig, tmp_path / "c.yaml") == cfg


def test_a_fingerprint_depends_on_values_and_on_nothing_else():
    class Old(Config):
        a: int = 1
        b: tuple[float, ...] = (0.5,)

    # printf '{"a":1,"b":[0.5]}' | sha256sum
    assert fingerprint(Old()) == "bdad23344c9c37f976fae01e230f88bd1423b0f633b71770085d452c5c243787"
    assert fingerprint(Old(a=1)) == fingerprint(Old()) != fingerprint(Old(a=2))


# --- what is there to set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [RunConfig, PrepareConfig, GenerateConfig, ChatConfig])
def test_every_field_of_every_schema_has_a_doc(schema):
    listed = list(fields(schema))
    assert len(listed) > 5
    assert not [f.path for f in listed if not f.doc]


@pytest.mark.parametrize("schema", [RunConfig, PrepareConfig, GenerateConfig, DecoderConfig])
def test_every_listed_path_is_one_the_loader_knows(schema):
    for field in fields(schema):
        path, _, kind = field.path.partition("  (")
        value = {"no": "such value"}
        for name in reversed(path.split(".")):
            value = {name.removesuffix("[]"): [value] if name.endswith("[]") else value}
            if kind:
                value, kind = value | {"kind": kind.rstrip(")")}, ""
        told = complaint(parse, schema, value)
        assert f"  {path.replace('[]', '.0')}: no such field" not in told
        # A block above may be of the kind that it is by default, which has no such field.
        above = [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]
        other_kind = any(f"  {block.replace('[]', '.0')}: no such field; known:" in told for block in above)
        assert path in told.replace(".0", "[]") or "`kind:` is missing" in told or other_kind


@pytest.mark.parametrize("schema", [RunConfig, PrepareConfig, GenerateConfig, ChatConfig])
def test_no_path_is_listed_twice(schema):
    paths = [field.path for field in fields(schema)]
    assert len(set(paths)) == len(paths)


class Round(Config):
    """A round table."""

    kind: Literal["round"] = "round"
    radius: float = Field(1.0, gt=0)  # metres


class Square(Config):
    """A square table."""

    kind: Literal["square"] = "square"
    side: float | None = None  # metres


class Door(Config):
    """A door."""

    locked: bool = True  # at night


class Room(Config):
    """A room."""

    name: str  # on the door
    tables: tuple[union(Round, Square), ...] = ()  # what stands in it
    doors: tuple[Door, ...] = (Door(),)  # ways in


class House(Config):
    """A house."""

    rooms: tuple[Room, ...] = ()  # all of them


def test_the_listing_shows_type_default_and_doc():
    assert [tuple(f) for f in fields(House)] == [
        ("rooms", "Room", "[]", "all of them"),
        ("rooms[].name", "str", "required", "on the door"),
        ("rooms[].tables", "round | square", "[]", "what stands in it"),
        ("rooms[].tables[].radius  (round)", "float", "1.0", "metres"),
        ("rooms[].tables[].side  (square)", "float | null", "null", "metres"),
        ("rooms[].doors", "Door", "[{...}]", "ways in"),
        ("rooms[].doors[].locked", "bool", "true", "at night"),
    ]


CONFIGS = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "models"]  # those are blocks


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads_and_says_what_it_is_for(path):
    assert path.read_text().startswith("# ")
    load(verbs.schema(verbs.verb_of(path)), path)


def test_a_config_error_is_a_user_error():
    assert issubclass(ConfigError, UserError)
    assert read_tree(CONFIGS[0])
