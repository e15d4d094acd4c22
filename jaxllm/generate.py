"""The `generate` verb: a model continues prompts, in the terminal or in a notebook."""

import functools
import sys
from io import TextIOBase

from jaxllm.data import tokenizers
from jaxllm.inference.config import GenerateConfig
from jaxllm.inference.generate import Completion, complete
from jaxllm.models.module import for_decoding
from jaxllm.pretrained import load


def run(cfg: GenerateConfig, out: TextIOBase | None = None) -> list[Completion]:
    """Writes each prompt with its completion to `out` (None: stdout), a single one as it comes if `cfg.stream`.

    Raises:
      CheckpointError: no usable model there.
      ConfigError: a prompt that does not fit the model.
    """
    out = out or sys.stdout
    found = load(cfg.model, cfg.step, cfg.precision)
    found = found._replace(model=for_decoding(found.model))
    live = cfg.stream and len(cfg.prompt) == 1
    begun = False

    def show(row: int, text: str) -> None:
        nonlocal begun
        print(text if begun else cfg.prompt[row] + text, end="", file=out, flush=True)
        begun = True

    completions = complete(
        found.model, found.tokenizer, cfg.prompt, start=found.start, ends=found.ends, seed=cfg.seed,
        stream=functools.partial(tokenizers.StreamDecoder, found.tokenizer),
        max_new_tokens=cfg.max_new_tokens, sampling=cfg.sampling, stop=cfg.stop, stop_tokens=cfg.stop_tokens,
        show=show if live else None,
    )  # fmt: skip
    for prompt, completion in zip(cfg.prompt, completions, strict=True):
        print("" if begun else prompt + completion.text, file=out, flush=True)
    return completions
