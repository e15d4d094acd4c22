"""The `chat` verb: a conversation with a model, in the terminal or from a script."""

import functools
import sys
from io import TextIOBase
from pathlib import Path

from jaxllm.core.errors import ConfigError
from jaxllm.data import tokenizers
from jaxllm.inference.chat import Answer, Conversation
from jaxllm.inference.config import ChatConfig
from jaxllm.inference.template import Template
from jaxllm.models.module import for_decoding
from jaxllm.presets import CHAT
from jaxllm.pretrained import Pretrained, load
from jaxllm.train.runtime import keep_compiled_programs


def run(cfg: ChatConfig, out: TextIOBase | None = None) -> Conversation:
    """Takes the turns of `cfg`, or asks for them on the terminal until its end; answers go to `out` (None: stdout).

    Raises:
      CheckpointError: no usable model there.
      ConfigError: no template for it, or a turn that does not fit the model.
      DataError: a template that cannot be used.
    """
    out = out or sys.stdout
    if cfg.compile_cache:
        keep_compiled_programs()
    found = load(cfg.model, cfg.step, cfg.precision)
    found = found._replace(model=for_decoding(found.model))  # the model as it was read is not kept beside it
    talk = Conversation(
        found.model, found.tokenizer, template_of(cfg, found), system=cfg.system, ends=found.ends,
        stream=functools.partial(tokenizers.StreamDecoder, found.tokenizer), max_new_tokens=cfg.max_new_tokens,
        sampling=cfg.sampling, stop=cfg.stop, seed=cfg.seed, output=found.output,
    )  # fmt: skip
    if cfg.turns:
        for text in cfg.turns:
            _answer(talk, text, out)
    else:
        _converse(talk, out)
    return talk


def template_of(cfg: ChatConfig, found: Pretrained) -> Template:
    """The template that is asked for: a file, one in configs/chat, one of the model's; or the model's own."""
    wanted, own = cfg.template, found.chat_templates
    if wanted is None and found.chat_template is not None:
        return Template(found.chat_template, f"the chat template of {cfg.model}")
    if wanted is not None:
        if wanted in own:
            return Template(own[wanted], f"the chat template {wanted!r} of {cfg.model}")
        for path in (Path(wanted), CHAT / f"{wanted}.jinja"):
            if path.is_file():
                return Template(path.read_text(encoding="utf-8"), str(path))
    known = ", ".join([*own, *sorted(p.stem for p in CHAT.glob("*.jinja"))]) or "none"
    said = f"template={wanted!r} is neither a file nor a name" if wanted else f"{cfg.model} has no chat template"
    raise ConfigError(f"{said}; name a .jinja file or one of these: {known}")


def _answer(talk: Conversation, text: str, out: TextIOBase) -> Answer:
    answer = talk.say(text, lambda piece: print(piece, end="", file=out, flush=True))
    print(file=out, flush=True)
    if answer.forgotten:
        print(
            f"({answer.forgotten} of {len(talk.messages) // 2} turns no longer fit the model's context of "
            f"{talk.model.cfg.context} tokens and were left out)",
            file=sys.stderr,
        )
    return answer


def _converse(talk: Conversation, out: TextIOBase) -> None:
    """Turns from the terminal: Ctrl-C stops an answer, or clears what is being typed; Ctrl-D ends."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  input() edits lines with it

        print("Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> " if asks else "")
            if text.strip():
                _answer(talk, text, out)
        except KeyboardInterrupt:
            print(file=out, flush=True)
        except EOFError:
            if asks:
                print(file=out)
            return
        except ConfigError as e:  # of this turn: the conversation stays as it was
            print(e, file=sys.stderr)
