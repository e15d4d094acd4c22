"""The verbs as functions: what `jaxllm VERB CONFIG a.b=value` does, from a script or a notebook.

    from jaxllm.verbs import chat, embed, generate, prepare, train

    prepare("configs/data/quickstart.yaml")
    train("configs/train/quickstart.yaml", "steps=500")
    generate("runs/quickstart", 'prompt=["def "]')
    chat("SmolLM2-135M-Instruct", 'turns=["Name three rivers."]')
    vectors = embed("all-MiniLM-L6-v2", "file=texts.txt")

Each takes a YAML file or a config object, and overrides; what is wrong with them is raised before JAX is loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.core.config import C, Config, load, parse, read_tree
from jaxllm.core.errors import ConfigError

if TYPE_CHECKING:  # these import JAX
    import numpy as np

    import jaxllm.data.manifest
    import jaxllm.inference.chat
    import jaxllm.inference.generate
    import jaxllm.train.loop

SIGNS = {  # fields that only this verb has
    "prepare": ("tasks",), "generate": ("prompt",), "train": ("optimizer",), "chat": ("turns", "system", "template"),
    "embed": ("text", "pool", "normalise"),
}  # fmt: skip


def prepare(config: str | Path | Config, *overrides: str) -> "jaxllm.data.manifest.Prepared":
    """The folder of packed token shards and their manifest, once it is written; `config` is a PrepareConfig."""
    cfg = resolve(schema("prepare"), config, overrides)
    from jaxllm.data.prepare import prepare

    return prepare(cfg)


def train(config: str | Path | Config, *overrides: str) -> "jaxllm.train.loop.Result":
    """How training a model ended, begun anew or gone on with where it was stopped; `config` is a RunConfig."""
    cfg = resolve(schema("train"), config, overrides)
    from jaxllm.pretrained import initial
    from jaxllm.train.loop import train

    return train(cfg, initial)


def plan(config: str | Path | Config, *overrides: str, file: Path | None = None, **asked: Any) -> dict[str, Any]:
    """What a training run would take on named chips, printed too; `asked` are fields of `jaxllm.plan.run.Asked`."""
    cfg = resolve(schema("train"), config, overrides)
    from jaxllm.plan.run import Asked, plan

    return plan(cfg, Asked(**asked), file)


def generate(config: str | Path | Config, *overrides: str) -> "list[jaxllm.inference.generate.Completion]":
    """Completions of prompts, printed too; `config` is a GenerateConfig, or a model: a run, a folder, a GGUF file."""
    cfg = _of_model(schema("generate"), config, overrides)
    from jaxllm.generate import run

    return run(cfg)


def chat(config: str | Path | Config, *overrides: str) -> "jaxllm.inference.chat.Conversation":
    """The conversation, once it has ended; `config` is a ChatConfig, or a model: a run, a folder, a GGUF file."""
    cfg = _of_model(schema("chat"), config, overrides)
    from jaxllm.chat import run

    return run(cfg)


def embed(config: str | Path | Config, *overrides: str) -> "np.ndarray":
    """Vectors of texts, float32 [N, D], printed or written too; `config` is an EmbedConfig, or a model, as of `chat`."""
    cfg = _of_model(schema("embed"), config, overrides)
    from jaxllm.embed import run

    return run(cfg)


def convert(source: str | Path, destination: str | Path, **asked: Any) -> Path:
    """Where a model now lies in another form; `asked` are `dtype` and `family`, see `jaxllm.convert.run`."""
    from jaxllm.convert import run

    return run(source, destination, **asked)


def schema(verb: str) -> type[Config]:
    """The config that a verb takes."""
    match verb:
        case "prepare":
            from jaxllm.data.config import PrepareConfig as wanted
        case "train":
            from jaxllm.train.config import RunConfig as wanted
        case "generate":
            from jaxllm.inference.config import GenerateConfig as wanted
        case "chat":
            from jaxllm.inference.config import ChatConfig as wanted
        case "embed":
            from jaxllm.inference.config import EmbedConfig as wanted
    return wanted


def _of_model(wanted: type[C], config: str | Path | Config, overrides: tuple[str, ...]) -> C:
    """`resolve`, where the path of a model stands for a config that names it."""
    if not isinstance(config, Config) and (Path(config).is_dir() or Path(config).suffix == ".gguf"):
        verb = next(verb for verb in SIGNS if schema(verb) is wanted)
        return parse(wanted, {"model": str(config)}, overrides, name=f"{verb} {config}")
    return resolve(wanted, config, overrides)


def resolve(wanted: type[C], config: str | Path | Config, overrides: tuple[str, ...] = ()) -> C:
    """A config object, given one or the YAML file of one.

    Raises:
      ConfigError: listing every wrong field, after the verb that the file is for if it is for another.
    """
    if not isinstance(config, Config):
        try:
            return load(wanted, config, overrides)
        except ConfigError as e:
            if "kind" in read_tree(Path(config)):  # a block, alone in a file
                raise ConfigError(
                    f"{config}: this is a model; a training config takes it by `model: {{base: {config}}}`"
                ) from None
            told_by = signs(config)
            if not told_by or any(schema(verb) is wanted for verb in told_by):
                raise
            raise ConfigError(f"{config}: this is a config for `jaxllm {told_by[0]}`\n{e}") from None
    if not isinstance(config, wanted):
        raise ConfigError(f"a {wanted.__name__} is needed here, got a {type(config).__name__}")
    return parse(wanted, config.model_dump(mode="json"), overrides) if overrides else config


def verb_of(path: str | Path) -> str:
    """The verb that a config file is for, told by the fields that only it has; `train` if there are none."""
    return (*signs(path), "train")[0]


def signs(path: str | Path) -> list[str]:
    """The verbs that have a field of their own in a config file."""
    tree = read_tree(Path(path))
    return [verb for verb, fields in SIGNS.items() if any(field in tree for field in fields)]
