"""The `generate` verb: a checkpoint continues prompts, in the terminal or in a notebook."""

import functools
import sys
from io import TextIOBase
from pathlib import Path

from jaxllm.core.config import read_tree
from jaxllm.core.errors import CheckpointError
from jaxllm.data import tokenizers
from jaxllm.inference.config import GenerateConfig
from jaxllm.inference.generate import Completion, complete
from jaxllm.models.decoder import Decoder
from jaxllm.models.module import abstract, merge
from jaxllm.train.checkpoint import load_params, steps


def run(cfg: GenerateConfig, out: TextIOBase | None = None) -> list[Completion]:
    """Writes each prompt with its completion to `out` (None: stdout), a single one as it comes if `cfg.stream`.

    Raises:
      CheckpointError: no usable checkpoint there.
      ConfigError: a prompt that does not fit the model.
    """
    out = out or sys.stdout
    model, tokenizer = load(Path(cfg.model), cfg.step, cfg.precision)
    live = cfg.stream and len(cfg.prompt) == 1
    begun = False

    def show(row: int, text: str) -> None:
        nonlocal begun
        print(text if begun else cfg.prompt[row] + text, end="", file=out, flush=True)
        begun = True

    completions = complete(
        model, tokenizer, cfg.prompt, stream=functools.partial(tokenizers.StreamDecoder, tokenizer), seed=cfg.seed,
        max_new_tokens=cfg.max_new_tokens, sampling=cfg.sampling, stop=cfg.stop, stop_tokens=cfg.stop_tokens,
        show=show if live else None,
    )  # fmt: skip
    for prompt, completion in zip(cfg.prompt, completions, strict=True):
        print("" if begun else prompt + completion.text, file=out, flush=True)
    return completions


def checkpoint_of(folder: Path, step: int | None) -> Path:
    """The folder of a run's checkpoint of `step`; None: `folder` itself. Raises CheckpointError if there is none."""
    if step is None:
        return folder
    checkpoint = folder / "checkpoints" / f"{step:08d}"
    if not checkpoint.is_dir():
        found = ", ".join(map(str, steps(folder)))
        there = f"there are those of {found}" if found else "it has no checkpoints"
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; {there}")
    return checkpoint


def load(folder: Path, step: int | None = None, precision: str | None = None) -> tuple[Decoder, tokenizers.Tokenizer]:
    """Model and tokenizer of a run (its checkpoint of `step`, or the newest that is whole) or of one checkpoint.

    The weights are in `precision`; None: in what the run computed with, so that log-probabilities are the trainer's.
    """
    weights = load_params(checkpoint_of(folder, step))
    trained = read_tree(weights.folder / "config.yaml")["precision"]["kind"]
    params = {name: weights.params.pop(name).astype(precision or trained) for name in list(weights.params)}
    return merge(abstract(weights.model_cfg)[0], params), tokenizers.load(weights.folder / "tokenizer")
