"""Completions of prompts: one compiled prefill, then one compiled program of steps, for a whole batch.

Prompts are padded on the left to one of a few lengths and caches have one of a few sizes, so that programs are
compiled once and met again. Texts come in and out through a tokenizer given by the caller.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.shapes import Array, Bool, Float, Int, Key
from jaxllm.inference.beam import beam_search
from jaxllm.inference.config import Beam, Greedy, Sample
from jaxllm.inference.output import NEVER, Output, allowed, prefill
from jaxllm.inference.sampling import row_keys, sample
from jaxllm.models.config import AnyModel
from jaxllm.models.decoder import Cache
from jaxllm.models.module import Model, Params, for_decoding, merge, split

STEPS = 16  # tokens a row between two looks at them, when nobody watches

Finish = Literal["eos", "stop", "length"]


class Completion(NamedTuple):
    """What a model said after a prompt."""

    tokens: tuple[int, ...]  # all of them, also the one that ended it
    text: str  # without the end token, cut before the stop text
    logprobs: tuple[float, ...]  # nats, of each token under the model itself: before temperature, filters, penalties
    finish: Finish  # why it ended: the end token, a stop text, or max_new_tokens


@runtime_checkable
class TextStream(Protocol):
    """Text of tokens that come one at a time; the pieces joined are the text of all."""

    def feed(self, i: int) -> str:
        """The text that token `i` makes certain, possibly none."""

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never ended."""


Stream = Callable[[Sequence[int]], TextStream]  # from the tokens that stand before the text


@runtime_checkable
class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def suffix(self) -> tuple[int, ...]: ...

    def token_id(self, token: str) -> int | None: ...


def complete(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stream: Stream,
    max_new_tokens: int,
    start: Sequence[int] = (),
    ends: Sequence[int] = (),
    output: Output = Output(),
    sampling: Greedy | Sample | Beam = Greedy(),
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
    show: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """`generate` for texts. What an encoder reads ends as the tokenizer ends texts, too.

    Args:
      start: ids that each begins with, such as BOS.
      ends: ids that end a completion, besides the tokenizer's own and `stop_tokens`.
    """
    named = [tokenizer.token_id(token) for token in stop_tokens]
    if None in named:
        raise ConfigError(f"stop_tokens: the tokenizer has no token {stop_tokens[named.index(None)]!r}")
    suffix = tokenizer.suffix() if model.cfg.kind == "encoder_decoder" else ()
    prompts = [[*start, *tokenizer.encode(text), *suffix] for text in texts]
    return generate(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_id=tokenizer.eos_id,
        end_ids=[*named, *ends], output=output,
        vocab_size=tokenizer.vocab_size, seed=seed, stream=stream, stop=stop, show=show,
    )  # fmt: skip


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Greedy | Sample | Beam = Greedy(),
    eos_id: int | None = None,
    end_ids: Sequence[int] = (),
    output: Output = Output(),
    vocab_size: int | None = None,
    prefix_lens: Sequence[int] | None = None,
    seed: int = 0,
    stream: Stream | None = None,
    stop: Sequence[str] = (),
    show: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """A completion of each prompt (token ids), computed as one batch; each is what it would be alone, but where
    experts have a `capacity`, of which a row's padding is a part.

    Args:
      max_new_tokens: longest completion; prompt and completion together must fit the model's context.
      end_ids: further tokens that end a completion as `eos_id` does.
      vocab_size: only ids below it are chosen: the tokenizer's, where the model's table has rows to spare.
      prefix_lens: length of each prompt's bidirectional prefix, for masks with `prefix`; None: 0.
      output: what is settled of all completions.
      stream: makes the decoder of a completion's tokens, given the tokens that the text goes on from: the prompt's, or
        none where a prompt is read by an encoder; without it completions have no text.
      stop: texts that end a completion; the first to be complete counts, wherever tokens begin and end.
      show: called with (row, piece of text) as text becomes certain, token by token.

    Raises:
      ConfigError: a prompt that is empty, too long or of another vocabulary; a model that sees its future.
      CheckpointError: weights that give NaN.
    """
    assert stream or not (stop or show), "text needs a decoder"
    _check(model.cfg, prompts, max_new_tokens, output)
    ends = frozenset(end_ids) | ({eos_id} if eos_id is not None else set())
    before = prompts if model.cfg.kind == "decoder" else [()] * len(prompts)  # what the text of each goes on from
    rows = [_Row(stream and stream(tokens), ends, stop) for tokens in before]
    graphdef, params = split(for_decoding(model))
    length = bucket(max(map(len, prompts)))
    tokens_BT = np.array([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], np.int32)
    pad_B = np.array([length - len(prompt) for prompt in prompts], np.int32)
    prefix_B = np.array(prefix_lens or [0] * len(prompts), np.int32)
    V = model.cfg.vocab
    may_V = jnp.asarray((np.arange(V) < (vocab_size or V)) & ~np.isin(np.arange(V), output.never))
    start, first, last = (np.int32(NEVER if i is None else i) for i in output[:3])
    if output.start is None and model.cfg.kind == "encoder_decoder":
        start = np.int32(model.cfg.start)
    if max_new_tokens == 1 and output.last is not None:
        first = last
    eos = np.int32(NEVER if eos_id is None else eos_id)
    capacity = bucket(length + max_new_tokens)

    def take(tokens_SB: np.ndarray, logprobs_SB: np.ndarray) -> None:
        if np.isnan(logprobs_SB).any():
            raise CheckpointError(
                "the model's logits are not numbers (NaN): its weights are damaged, or diverged in training"
            )
        for tokens, logprobs in zip(tokens_SB.tolist(), logprobs_SB.tolist(), strict=True):
            for b, row in enumerate(rows):
                piece = row.take(tokens[b], logprobs[b], last=len(row.tokens) + 1 == max_new_tokens)
                if show and piece:
                    show(b, piece)

    if isinstance(sampling, Beam):
        take(*jax.device_get(beam_search(
            graphdef, sampling, bucket(max_new_tokens), capacity, params, tokens_BT, pad_B, prefix_B, may_V, eos,
            np.int32(max_new_tokens), start, first, last,
        )))  # fmt: skip
        return [row.completion() for row in rows]

    keys_B = row_keys(seed, prompts)
    state, logprob_B = _start(
        graphdef, sampling, capacity, params, tokens_BT, pad_B, prefix_B, may_V, keys_B, start, first
    )
    take(*jax.device_get((state.tokens_B[None], logprob_B[None])))
    while not all(done := [row.ended is not None for row in rows]):
        left = max_new_tokens - int(state.count)
        steps = min(1 if show else STEPS, left)
        at_end = last if steps == left else np.int32(NEVER)
        state, *said, ran = _advance(
            graphdef, sampling, params, state, may_V, keys_B, eos, np.array(done), np.int32(steps), at_end
        )
        tokens_SB, logprobs_SB, ran = jax.device_get((*said, ran))
        take(tokens_SB[:ran], logprobs_SB[:ran])
    return [row.completion() for row in rows]


def bucket(n: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least n: few sizes to compile for, at most half too large."""
    power = 1 << max(n - 1, 15).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 and power > 16 else power


class State(NamedTuple):
    """What one step leaves to the next."""

    cache: Cache  # of all tokens but the last
    tokens_B: Int[Array, " B"]  # the last
    seen_BV: Bool[Array, "B V"]  # what stands in the prompt or was chosen
    count: Int[Array, ""]  # tokens chosen so far


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "capacity"))
def _start(
    graphdef: nnx.GraphDef,
    sampling: Greedy | Sample,
    capacity: int,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    pad_B: Int[Array, " B"],
    prefix_B: Int[Array, " B"],
    may_V: Bool[Array, " V"],
    keys_B: Key[Array, " B"],
    start: Int[Array, ""],
    first: Int[Array, ""],
) -> tuple[State, Float[Array, " B"]]:
    """The state after the first token, and that token's log-probability."""
    model = merge(graphdef, params)
    logits_BV, cache = prefill(model, tokens_BT, pad_B, capacity, prefix_B, start)
    B, T = tokens_BT.shape
    seen_BV = jnp.zeros(logits_BV.shape, bool)
    if model.cfg.kind == "decoder":
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(jnp.arange(T) >= pad_B[:, None])
    else:  # what an encoder reads is not yet said
        seen_BV = seen_BV.at[:, start].set(True)
    state = State(cache, tokens_BT[:, -1], seen_BV, jnp.int32(0))
    return _choose(sampling, state, logits_BV, may_V, keys_B, first)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="state")
def _advance(
    graphdef: nnx.GraphDef,
    sampling: Greedy | Sample,
    params: Params,
    state: State,
    may_V: Bool[Array, " V"],
    keys_B: Key[Array, " B"],
    eos: Int[Array, ""],
    done_B: Bool[Array, " B"],
    steps: Int[Array, ""],
    last: Int[Array, ""],
) -> tuple[State, Int[Array, "S B"], Float[Array, "S B"], Int[Array, ""]]:
    """The state `steps` tokens later (fewer if all rows end), these tokens, their log-probabilities, their number.

    Args:
      last: what the last of them is; `NEVER`: what is chosen.
    """
    model = merge(graphdef, params)

    def going(carry):
        n, _, done_B, *_ = carry
        return (n < steps) & ~jnp.all(done_B)

    def step(carry):
        n, state, done_B, tokens_SB, logprobs_SB = carry
        logits_BV, cache = model.decode(state.tokens_B, state.cache)
        forced = jnp.where(n + 1 == steps, last, NEVER)
        state, logprob_B = _choose(sampling, state._replace(cache=cache), logits_BV, may_V, keys_B, forced)
        done_B = done_B | (state.tokens_B == eos)
        return n + 1, state, done_B, tokens_SB.at[n].set(state.tokens_B), logprobs_SB.at[n].set(logprob_B)

    none_SB = jnp.zeros((STEPS, len(done_B)))
    carry = jnp.int32(0), state, done_B, none_SB.astype(jnp.int32), none_SB
    n, state, _, tokens_SB, logprobs_SB = jax.lax.while_loop(going, step, carry)
    return state, tokens_SB, logprobs_SB, n


def _choose(
    sampling, state: State, logits_BV: Array, may_V: Array, keys_B: Array, forced: Array
) -> tuple[State, Float[Array, " B"]]:
    B = len(logits_BV)
    choice_BV = jnp.where(allowed(may_V, forced), logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.count)
    token_B = sample(sampling, choice_BV, state.seen_BV, keys_B)
    logprob_B = jax.nn.log_softmax(logits_BV)[jnp.arange(B), token_B]
    seen_BV = state.seen_BV.at[jnp.arange(B), token_B].set(True)
    return State(state.cache, token_B, seen_BV, state.count + 1), logprob_B


class _Row:
    """A completion in the making."""

    def __init__(self, stream: TextStream | None, ends: frozenset[int], stop: Sequence[str]):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text, self.ended = "", None
        self._stream, self._ends, self._stop = stream, ends, stop
        self._shown = 0

    def take(self, token: int, logprob: float, last: bool) -> str:
        """Adds a token; the text that is certain now and was not before. After the end, nothing happens."""
        if self.ended:
            return ""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.ended = "eos" if token in self._ends else "length" if last else None
        if self._stream is None:
            return ""
        new = "" if self.ended == "eos" else self._stream.feed(token)
        before, self.text = len(self.text), self.text + new + (self._stream.finish() if self.ended else "")
        if (cut := stop_at(self.text, self._stop, before)) is not None:
            self.text, self.ended = self.text[:cut], "stop"
        certain = len(self.text) - (0 if self.ended else held_back(self.text, self._stop))
        piece, self._shown = self.text[self._shown : certain], certain
        return piece

    def completion(self) -> Completion:
        return Completion(tuple(self.tokens), self.text, tuple(self.logprobs), self.ended)


def stop_at(text: str, stop: Sequence[str], before: int = 0) -> int | None:
    """Where the first stop text to be complete begins; None without one. The first `before` characters hold none."""
    found = []
    for s in stop:
        at = text.find(s, max(0, before - len(s) + 1))
        if at >= 0:
            found.append((at + len(s), at))
    return min(found)[1] if found else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def check_vocabulary(cfg: AnyModel, name: str, tokens: Sequence[int]) -> None:
    """Raises ConfigError, of what is called `name`, if a token is none of the model's."""
    if wrong := [t for t in tokens if not 0 <= t < cfg.vocab]:
        raise ConfigError(
            f"{name} has token id {wrong[0]}, the model's vocabulary is 0 to {cfg.vocab - 1}: was it made by the "
            "tokenizer that the model was trained with?"
        )


def _check(cfg: AnyModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, output: Output) -> None:
    if cfg.kind == "encoder":
        raise ConfigError("model.kind=encoder reads but does not write: generation needs a decoder or encoder-decoder")
    if cfg.kind == "encoder_decoder" and cfg.start is None and output.start is None:
        raise ConfigError(
            "model.start is not set, the token that every output begins with: give start_token=TOKEN; mBART's are those "
            "of the language to write in, such as en_XX"
        )
    for name, i in output._asdict().items():
        if isinstance(i, int) and not 0 <= i < cfg.vocab:
            raise ConfigError(f"output.{name}={i} is no token of the model's vocabulary, 0 to {cfg.vocab - 1}")
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        if not n:
            raise ConfigError(f"prompt {i} has no tokens: there must be one to go on from, such as BOS")
        check_vocabulary(cfg, f"prompt {i}", prompt)
        if cfg.kind == "encoder_decoder":
            if n > cfg.encoder.context:
                raise ConfigError(
                    f"prompt {i} has {n} tokens, more than the encoder's context of {cfg.encoder.context}"
                )
            if max_new_tokens >= cfg.context:
                raise ConfigError(
                    f"max_new_tokens={max_new_tokens}: the decoder's context of {cfg.context} begins with one token "
                    f"more; ask for at most {cfg.context - 1}"
                )
        elif n + max_new_tokens > cfg.context:
            room = f"ask for at most {cfg.context - n}" if n < cfg.context else f"shorten it below {cfg.context}"
            raise ConfigError(
                f"prompt {i} has {n} tokens and max_new_tokens={max_new_tokens}: together more than the model's "
                f"context of {cfg.context}; {room}"
            )
