"""Conversations: a chat template writes what was said so far, and the model goes on from there.

    talk = Conversation(model, tokenizer, Template(source), stream=functools.partial(StreamDecoder, tokenizer))
    print(talk.say("Name three rivers.").text)

Each answer is what `generate` gives for the whole conversation: nothing is carried over but the messages.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxllm.core.errors import ConfigError
from jaxllm.inference.config import Beam, Greedy, Sample
from jaxllm.inference.generate import Completion, Stream, generate
from jaxllm.inference.output import Output
from jaxllm.inference.template import Message, Template
from jaxllm.models.decoder import Decoder
from jaxllm.models.module import for_decoding

ANSWER = 512  # tokens an answer may have, where nothing else is asked for


@runtime_checkable
class ChatTokenizer(Protocol):
    """What a conversation needs of a tokenizer."""

    vocab_size: int
    eos_id: int | None
    special: dict[str, int]
    apart: dict[str, int]

    def encode_plain(self, text: str) -> list[int]: ...

    def encode_marked(self, text: str) -> list[int]: ...

    def named(self) -> dict[str, str]: ...


class Answer(NamedTuple):
    """What a model said in its turn."""

    completion: Completion
    prompt: tuple[int, ...]  # ids that it went on from
    forgotten: int  # turns at the beginning that no longer fit the model's context, and were left out

    @property
    def text(self) -> str:
        return self.completion.text


class Conversation:
    """A system message, if any, and turns of user and assistant (`messages`); `say` takes the next turn.

    An answer ends at the tokenizer's end token, at `ends`, and at what the template writes after an answer: its first
    special token, or the text where there is none.

    Where a conversation outgrows the model's context, its oldest turns are left out and the system message is kept;
    `messages` still holds them all.

    Args:
      stream: as of `generate`.
      max_new_tokens: room kept for an answer; None: 512 tokens, or half the context if that is less.
      stop: further texts that end an answer.
      output: what is settled of each answer.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: ChatTokenizer,
        template: Template,
        *,
        stream: Stream,
        system: str | None = None,
        ends: Sequence[int] = (),
        max_new_tokens: int | None = None,
        sampling: Greedy | Sample | Beam = Greedy(),
        stop: Sequence[str] = (),
        seed: int = 0,
        output: Output = Output(),
    ):
        self.model, self.tokenizer, self.template = for_decoding(model), tokenizer, template  # once for all turns
        self.max_new_tokens = max_new_tokens or min(ANSWER, model.cfg.context // 2)
        self.sampling, self.seed, self.output, self._stream = sampling, seed, output, stream
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        end, text = end_of_turn(template, tokenizer)
        self.ends = tuple(dict.fromkeys([*ends, *end]))
        self.stop = (*stop, *text)

    def say(self, text: str, show: Callable[[str], None] | None = None) -> Answer:
        """The model's answer to `text`; both join the conversation.

        Interrupted (KeyboardInterrupt), what has been shown of the answer joins it as if it were all.

        Args:
          show: called with each piece of the answer as it becomes certain.

        Raises:
          ConfigError: the message is too long for the model, or the template refuses it; the conversation stays as
            it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, forgotten = self._fitting(asked)
        said: list[str] = []

        def keep(row: int, piece: str) -> None:
            said.append(piece)
            show(piece)

        try:
            (completion,) = generate(
                self.model, [prompt], max_new_tokens=self.max_new_tokens, sampling=self.sampling,
                eos_id=self.tokenizer.eos_id, end_ids=self.ends, vocab_size=self.tokenizer.vocab_size, seed=self.seed,
                output=self.output, stream=self._stream, stop=self.stop, show=keep if show else None,
            )  # fmt: skip
        except KeyboardInterrupt:
            if said:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": completion.text}]
        return Answer(completion, tuple(prompt), forgotten)

    def _fitting(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt for the next answer, and how many turns at the beginning are left out of it."""
        context, room = self.model.cfg.context, self.model.cfg.context - self.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a conversation in the model's context of "
                f"{context}; ask for fewer"
            )
        for forgotten, kept in enumerate(shortened(messages)):
            prompt = encode(self.template, self.tokenizer, kept)
            if len(prompt) <= room:
                return prompt, forgotten
        raise ConfigError(
            f"the message makes {len(prompt)} tokens, with what the template puts around it, and the answer may have "
            f"{self.max_new_tokens}: together more than the model's context of {context}; shorten it, or lower "
            "max_new_tokens"
        )


def shortened(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation, then without its first turn, without its first two, ...; system message and last turn stay."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"] or [first]
    for start in starts:
        yield [*messages[:first], *messages[start:]]


def end_of_turn(template: Template, tokenizer: ChatTokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids, or else texts, that end an answer as the template writes it."""
    after = template.after_answer(**tokenizer.named())
    found = [(after.find(token), -len(token), i) for token, i in tokenizer.apart.items() if token.strip()]
    found = min((f for f in found if f[0] >= 0), default=None)
    if found:
        return (found[2],), ()
    return (), (after.strip(),) if after.strip() else ()


# --- from messages to ids ------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # never characters of any text (Unicode 23.7)


def encode(
    template: Template, tokenizer: ChatTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation; nothing is put before what the template writes, which has its BOS if it wants one.

    Only what the template itself writes is read as special tokens; in a message, they are text like any other. So are
    other tokens that the template writes, such as <tool_call>, but in answers, where the model may have said them.
    """
    written = {t for t in tokenizer.apart if t in template.source and not t.isspace()}
    either, special = _one_of(written | tokenizer.special.keys()), _one_of(tokenizer.special)
    marked = [_marked(dict(m), special if m["role"] == "assistant" else either) for m in messages]
    text = template.render(marked, add_generation_prompt=add_generation_prompt, **tokenizer.named())
    parts = re.split(f"{_OPEN}({either}){_CLOSE}|[{_OPEN}{_CLOSE}]", text)  # plain, token as text or None, plain, ...
    ids = tokenizer.encode_marked(parts[0])
    for n, part in enumerate(parts[1:], 1):
        if part:
            ids += _inside(part, tokenizer.encode_plain if n % 2 else tokenizer.encode_marked)
    return ids


def _one_of(tokens: Iterable[str]) -> str:
    """A pattern of the longest of these that stands somewhere."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _marked(value, either: str):
    """`value` with special tokens in it put between marks, and marks of others taken away."""
    if isinstance(value, str):
        return re.sub(either, f"{_OPEN}\\g<0>{_CLOSE}", re.sub(f"[{_OPEN}{_CLOSE}]", "", value))
    if isinstance(value, dict):
        return {key: _marked(item, either) for key, item in value.items()}
    return [_marked(item, either) for item in value] if isinstance(value, list | tuple) else value


def _inside(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of text that follows other text: without the space that some tokenizers put before a beginning."""
    newline = encode("\n")
    ids = encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)
