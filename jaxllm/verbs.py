"""The verbs as functions: what `jaxllm VERB CONFIG a.b=value` does, from a script or a notebook.

    from jaxllm.verbs import generate, prepare, train

    prepare("configs/data/quickstart.yaml")
    train("configs/train/quickstart.yaml", "steps=500")
    generate("runs/quickstart", 'prompt=["def "]')

Each takes a YAML file or a config object, and overrides; what is wrong with them is raised before JAX is loaded.
"""

from pathlib import Path
from typing import Any

from jaxllm.core.config import C, Config, load, parse, read_tree
from jaxllm.core.errors import ConfigError


def prepare(config: str | Path | Config, *overrides: str) -> Any:
    """Writes packed token shards and their manifest; `config` is a PrepareConfig."""
    cfg = resolve(schema("prepare"), config, overrides)
    from jaxllm.data.prepare import prepare

    return prepare(cfg)


def train(config: str | Path | Config, *overrides: str) -> Any:
    """Trains a model, or goes on with a run that was stopped; `config` is a RunConfig."""
    cfg = resolve(schema("train"), config, overrides)
    from jaxllm.train.loop import train

    return train(cfg)


def generate(config: str | Path | Config, *overrides: str) -> list:
    """Completions of prompts, printed too; `config` is a GenerateConfig, or the folder of a run or of a checkpoint."""
    wanted = schema("generate")
    if not isinstance(config, Config) and Path(config).is_dir():
        cfg = parse(wanted, {"model": str(config)}, overrides, name=f"generate {config}")
    else:
        cfg = resolve(wanted, config, overrides)
    from jaxllm.generate import run

    return run(cfg)


def schema(verb: str) -> type[Config]:
    """The config that a verb takes."""
    match verb:
        case "prepare":
            from jaxllm.data.config import PrepareConfig as wanted
        case "train":
            from jaxllm.train.config import RunConfig as wanted
        case "generate":
            from jaxllm.inference.config import GenerateConfig as wanted
    return wanted


def resolve(wanted: type[C], config: str | Path | Config, overrides: tuple[str, ...] = ()) -> C:
    """A config object, given one or the YAML file of one."""
    if not isinstance(config, Config):
        return load(wanted, config, overrides)
    if not isinstance(config, wanted):
        raise ConfigError(f"a {wanted.__name__} is needed here, got a {type(config).__name__}")
    return parse(wanted, config.model_dump(mode="json"), overrides) if overrides else config


def verb_of(path: str | Path) -> str:
    """The verb that a config file is for, told by the fields that only it has."""
    tree = read_tree(Path(path))
    return "prepare" if "tasks" in tree else "generate" if "prompt" in tree else "train"
