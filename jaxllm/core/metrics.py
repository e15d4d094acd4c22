"""Where numbers go: config of the metric sinks. The sinks themselves are in `jaxllm.core.sinks`."""

from typing import Literal

from pydantic import Field

from jaxllm.core.config import Config, union


class TensorBoard(Config):
    """Event files under `tensorboard/` of the run folder (extra: tensorboard)."""

    kind: Literal["tensorboard"] = "tensorboard"


class WandB(Config):
    """Weights & Biases (extra: wandb)."""

    kind: Literal["wandb"] = "wandb"
    project: str = "jaxllm"  # project name
    entity: str | None = None  # team or user; null: the account's default
    mode: Literal["online", "offline"] = "online"  # offline writes for a later upload


Sink = union(TensorBoard, WandB)


class Metrics(Config):
    """What is logged, how often, where. `metrics.jsonl` in the run folder is always written."""

    every: int = Field(10, gt=0)  # steps between log lines
    console: bool = True  # progress line with speed and time left
    sinks: tuple[Sink, ...] = ()  # further places
