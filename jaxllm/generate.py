"""The `generate` verb: a model continues prompts, in the terminal or in a notebook."""

import functools
import sys
from io import TextIOBase

from jaxllm.core.errors import ConfigError
from jaxllm.data import tokenizers
from jaxllm.inference.config import GenerateConfig
from jaxllm.inference.generate import Completion, complete
from jaxllm.models.module import for_decoding
from jaxllm.pretrained import load


def run(cfg: GenerateConfig, out: TextIOBase | None = None) -> list[Completion]:
    """Writes each prompt with its completion to `out` (None: stdout), a single one as it comes if `cfg.stream`.

    Of an encoder-decoder, which does not go on with its prompts, completions alone are written.

    Raises:
      CheckpointError: no usable model there.
      ConfigError: a prompt that does not fit the model, or a token that its tokenizer does not have.
    """
    out = out or sys.stdout
    found = load(cfg.model, cfg.step, cfg.precision)
    found = found._replace(model=for_decoding(found.model))
    live = cfg.stream and len(cfg.prompt) == 1
    before = cfg.prompt if found.model.cfg.kind == "decoder" else [""] * len(cfg.prompt)
    begun = False

    def show(row: int, text: str) -> None:
        nonlocal begun
        print(text if begun else before[row] + text, end="", file=out, flush=True)
        begun = True

    if cfg.start_token is not None and found.model.cfg.kind == "decoder":
        raise ConfigError(
            f"start_token={cfg.start_token!r}: a decoder goes on with its prompt; first_token is said first"
        )
    asked = {"start": cfg.start_token, "first": cfg.first_token}
    known = {role: found.tokenizer.token_id(token) for role, token in asked.items() if token is not None}
    if unknown := [role for role, i in known.items() if i is None]:
        raise ConfigError(f"{unknown[0]}_token={asked[unknown[0]]!r}: the tokenizer has no such token")
    output = found.output._replace(**known)
    completions = complete(
        found.model, found.tokenizer, cfg.prompt, start=found.start, ends=found.ends, output=output, seed=cfg.seed,
        stream=functools.partial(tokenizers.StreamDecoder, found.tokenizer),
        max_new_tokens=cfg.max_new_tokens, sampling=cfg.sampling, stop=cfg.stop, stop_tokens=cfg.stop_tokens,
        show=show if live else None,
    )  # fmt: skip
    for text, completion in zip(before, completions, strict=True):
        print("" if begun else text + completion.text, file=out, flush=True)
    return completions
