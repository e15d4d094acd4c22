import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.inference import generate as module
from jaxllm.inference.config import Greedy, Sample
from jaxllm.inference.generate import bucket, complete, generate, stop_at
from jaxllm.models.config import (
    FFN,
    Attention,
    Block,
    DecoderConfig,
    DeepNorm,
    Dropout,
    EncoderConfig,
    EncoderDecoderConfig,
    LayerNorm,
    Parallel,
    Post,
    Pre,
    RMSNorm,
    Sandwich,
    SubLN,
)  # fmt: skip
from jaxllm.models.masks import All, Causal, Full, Prefix, Some, Window
from jaxllm.models.module import abstract, merge, split
from jaxllm.models.positions import ALiBi, Learned, NoPosition, RoPE, RoPE2D, Sinusoidal

V = 29
SAMPLINGS = [Greedy(), Sample(), Sample(temperature=0.7, top_k=7, top_p=0.9, min_p=0.02, repetition_penalty=1.3)]


def random_model(cfg, seed):
    """The model with random numbers in every weight, norms and biases too; made without compiling anything."""
    graphdef, shapes, _ = abstract(cfg)
    draw = np.random.default_rng(seed).normal
    about = {name: 1.0 if name.endswith("scale") else 0.0 for name in shapes}
    return merge(graphdef, {n: jnp.array(draw(about[n], 0.4, x.shape), jnp.float32) for n, x in shapes.items()})


@functools.cache
def tiny(seed=1, **changes):
    """A model whose next token hangs on all before it; its weights are large, so that its choices are clear."""
    block = Block(attention=Attention(num_heads=4, num_kv_heads=2), ffn=FFN(mlp=24))
    cfg = DecoderConfig(vocab=V, context=64, embed=16, num_layers=2, block=block)
    return random_model(cfg.model_copy(update=changes), seed)


# --- the cache ---------------------------------------------------------------------------------------------------

positions = st.sampled_from(
    [
        NoPosition(),
        Sinusoidal(),
        Learned(),
        RoPE(),
        RoPE(fraction=0.5),
        RoPE(interleaved=True, theta=50.0),
        RoPE2D(),
        ALiBi(),
    ]
)
placements = st.sampled_from([Pre(), Sandwich(), Parallel(), Parallel(norms=2), SubLN()])
post_placements = st.sampled_from([Post(), DeepNorm()])
masks = st.sampled_from(
    [
        Causal(),
        Causal() | Prefix(),
        Causal() & Window(left=3),
        All(of=(Causal() | Prefix(), Window(left=4) | Prefix())),
        Some(of=(All(of=(Causal(), Window(left=2))), All(of=(Causal(), Prefix())))),
    ]
)


@st.composite
def attentions(draw):
    heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    return Attention(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=4, bias=draw(st.booleans()), mask=draw(masks),
        window=draw(st.sampled_from([None, 2, 3, 50])), softcap=draw(st.sampled_from([None, 5.0])),
        qk_norm=draw(st.sampled_from([None, RMSNorm()])), log_scale=draw(st.sampled_from([None, 3])),
    )  # fmt: skip


@st.composite
def decoders(draw):
    """The fields of a config: the placements of a pattern are all post-norm or all pre-norm."""
    placement = draw(st.sampled_from([placements, post_placements]))
    norm = draw(st.sampled_from([RMSNorm(), LayerNorm()]))
    num_slots = draw(st.integers(1, 2))
    pattern = tuple(
        Block(
            norm=norm, placement=draw(placement), attention=draw(attentions()), ffn=FFN(mlp=8, glu=draw(st.booleans()))
        )
        for _ in range(num_slots)
    )
    return dict(
        vocab=V, context=32, embed=12, num_layers=num_slots + draw(st.integers(0, 2)), pattern=pattern,
        tie=draw(st.booleans()), query_layer=draw(st.none() | st.builds(Block, attention=attentions())),
        position=draw(positions), logit_softcap=draw(st.sampled_from([None, 30.0])), dropout=Dropout(residual=0.3),
    )  # fmt: skip


# Each example compiles a program: to shrink one that fails would take many minutes.
@pytest.mark.slow
@settings(derandomize=True, max_examples=16, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(
    fields=decoders(),
    lengths=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    prefix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cached_decode_of_a_padded_batch_is_the_full_forward_of_each_row_alone(fields, lengths, prefix, seed):
    new, T = 4, max(lengths) + 1  # at least one token of padding everywhere
    graphdef, params = split(random_model(DecoderConfig(**fields), seed))
    tokens = np.random.default_rng(seed).integers(0, V, (2, max(lengths) + new))
    padded, rest = np.zeros((2, T), np.int32), np.zeros((new, 2), np.int32)
    for b, n in enumerate(lengths):
        padded[b, T - n :], rest[:, b] = tokens[b, :n], tokens[b, n : n + new]
    pad_B = np.array([T - n for n in lengths], np.int32)
    prefix_B = np.array([n - 1 for n in lengths] if prefix else [0, 0], np.int32)

    @jax.jit
    def both(params, tokens, padded, rest, pad_B, prefix_B):
        model = merge(graphdef, params)
        first_BV, cache = model.prefill(padded, pad_B, capacity=T + new, prefix_len_B=prefix_B)
        _, after = jax.lax.scan(lambda cache, t: model.decode(t, cache)[::-1], cache, rest)
        here = jnp.arange(tokens.shape[1])[None] + 0 * tokens  # what follows a row's tokens changes nothing before it
        full = model(tokens, here, jnp.ones_like(here), prefix_BT=here < prefix_B[:, None])
        return jnp.concatenate([first_BV[None], after]), full

    cached, full = both(params, *(jnp.array(x, jnp.int32) for x in (tokens, padded, rest, pad_B, prefix_B)))
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(cached[:, b], full[b, n - 1 : n + new], atol=1e-4)


# --- what is chosen ----------------------------------------------------------------------------------------------


def follow(model, prompt, count, prefix=0):
    """Greedy tokens and their log-probabilities by a full forward for each; the first `prefix` see each other."""
    graphdef, params = split(model)

    @jax.jit
    def logprobs(params, tokens_T):
        here = jnp.arange(len(tokens_T))[None]
        logits_BTV = merge(graphdef, params)(tokens_T[None], here, jnp.ones_like(here), prefix_BT=here < prefix)
        return jax.nn.log_softmax(logits_BTV[0])

    tokens, chosen = list(prompt), []
    for _ in range(count):
        row = logprobs(params, jnp.array(tokens + [0] * (48 - len(tokens))))[len(tokens) - 1]
        tokens.append(int(row.argmax()))
        chosen.append(float(row.max()))
    return tuple(tokens[len(prompt) :]), chosen


PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6], [7] * 19, [2, 6]]  # 20 tokens more are of one bucket whatever they are with


def test_greedy_is_the_argmax_of_repeated_full_forwards():
    for prompt, completion in zip(PROMPTS, generate(tiny(), PROMPTS, max_new_tokens=20), strict=True):
        tokens, logprobs = follow(tiny(), prompt, 20)
        assert completion.tokens == tokens and completion.finish == "length"
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.kind}{s.repetition_penalty}")
def test_a_row_is_completed_alike_alone_in_a_batch_and_anywhere_in_it(sampling):
    ask = functools.partial(generate, tiny(), max_new_tokens=20, sampling=sampling)
    together, backwards = ask(PROMPTS), ask(PROMPTS[2::-1] + PROMPTS[3:])[2::-1]
    alone = [ask([prompt])[0] for prompt in PROMPTS[:3]]
    assert [c.tokens for c in together[:3]] == [c.tokens for c in backwards] == [c.tokens for c in alone]


def test_a_seed_gives_the_same_draws_again_and_another_seed_others():
    ask = functools.partial(generate, tiny(), PROMPTS, max_new_tokens=20, sampling=Sample())
    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask()[1].tokens != ask()[3].tokens  # the same prompt twice: two draws


def test_draws_of_rows_and_positions_do_not_hang_together():
    graphdef, params = split(tiny())
    flat = merge(graphdef, params | {"head": 0 * params["head"]})  # every token is as probable as every other
    prompts = [[a, b] for a in range(8) for b in range(8)]
    tokens = np.array([c.tokens for c in generate(flat, prompts, max_new_tokens=20, sampling=Sample())])
    for along in (tokens, tokens.T):
        pairs = along[1:].size
        assert np.sum(along[1:] == along[:-1]) == pytest.approx(pairs / V, abs=4 * np.sqrt(pairs / V))
    assert np.bincount(tokens.ravel(), minlength=V) == pytest.approx(
        np.full(V, tokens.size / V), abs=4 * np.sqrt(tokens.size / V)
    )


def test_repetition_penalty_counts_prompt_and_completion():
    [completion] = generate(tiny(), [[3, 1, 4]], max_new_tokens=20, sampling=Greedy(repetition_penalty=1e6))
    said = (3, 1, 4, *completion.tokens)
    assert len(set(said)) == len(said)


def test_only_ids_of_the_tokenizer_are_said():
    tokens = [
        c.tokens for s in SAMPLINGS for c in generate(tiny(), PROMPTS, max_new_tokens=20, sampling=s, vocab_size=5)
    ]
    assert max(map(max, tokens)) < 5


def test_a_bidirectional_prefix_is_that_of_the_full_forward():
    block = Block(attention=Attention(num_heads=4, mask=Causal() | Prefix()), ffn=FFN(mlp=24))
    model, prompt = tiny(block=block), [3, 1, 4, 1, 5]
    [seen], [unseen] = (generate(model, [prompt], max_new_tokens=1, prefix_lens=[n]) for n in (4, 0))
    T = jnp.arange(5)[None]
    for completion, n in ((seen, 4), (unseen, 0)):
        logits = model(jnp.array([prompt]), T, jnp.ones((1, 5), jnp.int32), prefix_BT=T < n)[0, -1]
        assert completion.logprobs[0] == pytest.approx(float(jax.nn.log_softmax(logits).max()), abs=1e-4)
    assert seen.logprobs != unseen.logprobs


def test_places_in_two_dimensions_are_those_of_full_forwards_after_prefixes_of_any_length():
    """ChatGLM: places in the prompt, whose prefix it is, and places after it (arXiv:2103.10360, section 2.2)."""
    block = Block(attention=Attention(num_heads=4, mask=Causal() | Prefix()), ffn=FFN(mlp=24))
    model, prefixes = tiny(block=block, position=RoPE2D()), [4, 0, 19, 2]
    completions = generate(model, PROMPTS, max_new_tokens=20, prefix_lens=prefixes)
    for prompt, prefix, completion in zip(PROMPTS, prefixes, completions, strict=True):
        tokens, logprobs = follow(model, prompt, 20, prefix)
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
    assert len({c.tokens for c in completions[1::2]}) == 2  # one prompt after two prefixes


def test_bfloat16_weights_generate():
    graphdef, params = split(tiny())
    model = merge(graphdef, {name: x.astype(jnp.bfloat16) for name, x in params.items()})
    [completion] = generate(model, [[3, 1, 4]], max_new_tokens=3)
    assert completion.logprobs == pytest.approx(follow(tiny(), [3, 1, 4], 3)[1], abs=0.5)


# --- where it ends -----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of 29 pieces, some of which end words, and its stream."""

    vocab_size, bos_id, eos_id = V, 0, 1
    pieces = ["", "", *"abcdefghijklmnopqrstuvwxyz"[:20], "ab", "bc", "cab", " ", ". ", "a ", "zz"]

    def suffix(self):
        return (1,)

    def token_id(self, token):
        return self.pieces.index(token) if token in self.pieces else None

    def encode(self, text):
        return [self.pieces.index(c) for c in text]


class Spelled:
    def __init__(self, context):
        self.context = context

    def feed(self, i):
        return Words.pieces[i]

    def finish(self):
        return ""


def spell(tokens):
    return "".join(Words.pieces[i] for i in tokens)


def test_the_end_token_ends_a_row_and_the_others_go_on():
    free = generate(tiny(), PROMPTS, max_new_tokens=20, sampling=Sample(), seed=3)
    eos = free[0].tokens[9]
    ended = generate(tiny(), PROMPTS, max_new_tokens=20, sampling=Sample(), seed=3, eos_id=eos)
    for was, now in zip(free, ended, strict=True):
        n = was.tokens.index(eos) + 1 if eos in was.tokens else 20
        assert now.tokens == was.tokens[:n] and now.logprobs == pytest.approx(was.logprobs[:n], abs=1e-5)
        assert now.finish == ("eos" if eos in was.tokens else "length")


def test_a_stop_text_that_spans_tokens_cuts_the_text_before_it():
    ask = functools.partial(generate, tiny(), [[3, 1, 4]], max_new_tokens=20, sampling=Sample(), stream=Spelled)
    [free] = ask()
    assert free.text == spell(free.tokens) and free.finish == "length"
    stop = free.text[8:13]
    [cut] = ask(stop=("never said", stop))
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish == "stop"
    n = len(cut.tokens)  # with the token that completes the stop text, none after
    assert cut.tokens == free.tokens[:n] and stop in spell(free.tokens[:n]) and stop not in spell(free.tokens[: n - 1])


@pytest.mark.parametrize("stop", [(), ("q", "ab", "ca"), ("never said",)], ids=str)
def test_streamed_pieces_join_to_the_text(stop):
    ask = functools.partial(
        generate, tiny(), PROMPTS, max_new_tokens=20, sampling=Sample(), stream=Spelled, stop=stop, eos_id=1
    )
    shown = [[] for _ in PROMPTS]
    streamed = ask(show=lambda row, piece: shown[row].append(piece))
    assert ["".join(pieces) for pieces in shown] == [c.text for c in streamed]
    assert [c._replace(logprobs=()) for c in streamed] == [c._replace(logprobs=()) for c in ask()]
    assert all(pieces.count("") == 0 for pieces in shown) and max(map(len, shown)) > 3


@settings(derandomize=True, max_examples=200)
@given(
    text=st.text("abc", max_size=30), cuts=st.sets(st.integers(0, 30)),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)  # fmt: skip
def test_where_text_is_cut_does_not_depend_on_the_pieces_it_comes_in(text, cuts, stop):
    ends = sorted(c for c in cuts if c < len(text)) + [len(text)]
    found, before = None, 0
    for end in ends:
        found = stop_at(text[:end], stop, before) if found is None else found
        before = end
    first = min(((text.find(s) + len(s), text.find(s)) for s in stop if s in text), default=None)
    assert found == (first and first[1])


def test_a_text_begins_with_the_ids_it_is_told_to_and_ends_with_others():
    [completion] = complete(tiny(), Words(), ["cab"], stream=Spelled, max_new_tokens=5, start=[0])
    assert completion.tokens == generate(tiny(), [[0, 4, 2, 3]], max_new_tokens=5, eos_id=1)[0].tokens
    [longer] = complete(tiny(), Words(), [""], stream=Spelled, max_new_tokens=3, start=[1])
    assert longer.tokens == follow(tiny(), [1], 3)[0]
    [cut] = complete(tiny(), Words(), [""], stream=Spelled, max_new_tokens=3, start=[1], ends=[longer.tokens[0]])
    assert cut.tokens == longer.tokens[:1] and cut.finish == "eos"


# --- programs ----------------------------------------------------------------------------------------------------


def test_prompts_of_one_bucket_share_their_programs():
    model, ask = tiny(), functools.partial(generate, max_new_tokens=9, sampling=Sample(temperature=0.9))
    ask(model, [[1, 2, 3]])
    compiled = [module._start._cache_size(), module._advance._cache_size()]
    ask(model, [list(range(16))])
    ask(tiny(seed=2), [[5]], eos_id=2, seed=4, vocab_size=20)  # other weights, the same config
    assert compiled == [module._start._cache_size(), module._advance._cache_size()]


def test_buckets_are_few_and_not_much_too_large():
    sizes = {n: bucket(n) for n in range(1, 4097)}
    assert all(n <= size <= max(16, 1.5 * n) for n, size in sizes.items()) and len(set(sizes.values())) == 17


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, new, message", [
    ([], 1, "prompt 1 has no tokens"),
    ([1] * 50, 15, "prompt 1 has 50 tokens and max_new_tokens=15: .* context of 64; ask for at most 14"),
    ([1] * 64, 1, "prompt 1 has 64 tokens .* shorten it below 64"),
    ([1, V], 1, f"token id {V}, the model's vocabulary is 0 to {V - 1}"),
    ([-1], 1, "token id -1"),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(prompt, new, message):
    with pytest.raises(ConfigError, match=message):
        generate(tiny(), [[1], prompt], max_new_tokens=new)


def test_prompt_and_completion_may_fill_the_context():
    prompt = list(range(20))
    assert (
        generate(tiny(position=Learned()), [prompt], max_new_tokens=44)[0].tokens[:5]
        == follow(tiny(position=Learned()), prompt, 5)[0]
    )


def test_a_model_that_sees_its_future_does_not_generate():
    with pytest.raises(ConfigError, match="attention.mask=full"):
        generate(
            tiny(block=Block(attention=Attention(num_heads=4, mask=Full()), ffn=FFN(mlp=8))), [[1]], max_new_tokens=1
        )


def test_damaged_weights_are_named():
    graphdef, params = split(tiny())
    with pytest.raises(CheckpointError, match="NaN"):
        generate(merge(graphdef, params | {"head": params["head"] * np.nan}), [[1]], max_new_tokens=1)


SIDE = {
    "vocab": 40,
    "context": 24,
    "embed": 16,
    "num_layers": 2,
    "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 9}},
}
CROSS = SIDE["block"] | {"cross": {"num_heads": 2}}


def reader_and_writer(**more):
    return EncoderDecoderConfig.model_validate(
        {"encoder": SIDE, "decoder": SIDE | {"block": CROSS}, "start": 0, **more}
    ).build()


@pytest.mark.slow
def test_an_encoder_decoder_writes_what_its_full_forward_pass_would_whatever_stands_beside_it_in_the_batch():
    model = reader_and_writer()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    said = [list(c.tokens) for c in generate(model, prompts, max_new_tokens=6)]
    for prompt, got in zip(prompts, said, strict=True):
        read, written = jnp.asarray([prompt]), [0]
        for _ in range(6):
            row = jnp.asarray([written])
            logits = model(
                row, jnp.arange(len(written))[None], jnp.ones_like(row), read_BS=read,
                read_positions_BS=jnp.arange(len(prompt))[None], read_documents_BS=jnp.ones_like(read),
            )  # fmt: skip
            written.append(int(logits[0, -1].argmax()))
        assert got == written[1:]


@pytest.mark.parametrize(
    ("start", "length", "new", "wrong"),
    [
        (None, 3, 4, "model.start is not set"),
        (0, 25, 4, "prompt 0 has 25 tokens, more than the encoder's context of 24"),
        (0, 3, 24, "ask for at most 23"),
    ],
)
def test_what_an_encoder_decoder_cannot_read_or_write_is_said(start, length, new, wrong):
    with pytest.raises(ConfigError, match=wrong):
        generate(reader_and_writer(start=start), [[1] * length], max_new_tokens=new)


def test_an_encoder_does_not_write():
    with pytest.raises(ConfigError, match="model.kind=encoder reads but does not write"):
        generate(EncoderConfig.model_validate(SIDE).build(), [[1, 2]], max_new_tokens=3)
