"""Segments of a text with the memory of earlier ones: the paper's equations, the whole text at once, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.module import abstract, create, merge

V, D, N, H, F = 23, 12, 3, 4, 20
TEXT, SEGMENT = 12, 4


def decoder(block: dict | None = None, attention: dict | None = None, **top) -> DecoderConfig:
    layer = {
        "norm": "layernorm",
        "ffn": {"mlp": F},
        **(block or {}),
        "attention": {"num_heads": N, **(attention or {})},
    }
    return DecoderConfig.model_validate({
        "vocab": V, "context": TEXT, "embed": D, "num_layers": 2, "memory": 8, "block": layer, **top,
    })  # fmt: skip


XL = {"position": "none", "relative": {"kind": "xl", "shared_biases": True}}
PAPER = decoder(
    {"placement": "post", "ffn": {"mlp": F, "activation": "relu", "glu": False, "bias": True}},
    **XL, final_norm=False, tie=True, head_bias=True, memory=5,
)  # fmt: skip
# Every way to tell order that outlasts a segment, every placement of norms, groups and a tail.
DECODERS = {
    "transformer_xl": PAPER.model_copy(update={"memory": 8}),
    "pre": decoder(**XL),
    "sandwich_rope": decoder({"placement": "sandwich"}, {"num_kv_heads": 1, "qk_norm": "rmsnorm"}, position="rope"),
    "parallel_alibi": decoder({"placement": "parallel"}, position="alibi"),
    "two_norms_none": decoder({"placement": {"kind": "parallel", "norms": 2}}, position="none"),
    "res_post_t5": decoder({"placement": "res_post"}, position="none", relative={"kind": "t5", "buckets": 8}),
    "normed_kerple": decoder({"placement": "normed_residual"}, position="none", relative="kerple"),
    "subln_shaw": decoder({"placement": "subln"}, position="none", relative={"kind": "shaw", "clip": 3}),
    "deepnorm_sinusoidal": decoder({"placement": "deepnorm"}, position="sinusoidal"),
    "fire_moe": decoder({"ffn": {"kind": "moe", "mlp": 10, "experts": 3}}, relative={"kind": "fire", "threshold": 3.0}),
    "pattern": decoder(pattern=[{"attention": {"window": 3}}, {"placement": "parallel"}], num_layers=5),
}


@functools.cache
def running(cfg: DecoderConfig):
    """Random weights, and compiled functions of them: a whole text, one segment."""
    params = create(cfg, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    noisy = {n: x + 0.3 * jax.random.normal(k, x.shape) for (n, x), k in zip(params.items(), keys, strict=True)}
    graphdef = abstract(cfg)[0]
    whole = jax.jit(lambda p, *row: merge(graphdef, p)(*row))
    segment = jax.jit(lambda p, past, *row: merge(graphdef, p).segment(*row, past))
    return noisy, merge(graphdef, noisy), whole, segment


def rows(lengths: tuple[int, ...] = (TEXT,), batch: int = 2, seed: int = 0):
    """Token ids, and documents of these lengths in a row."""
    ids = np.random.default_rng(seed).integers(0, V, (batch, sum(lengths)))
    at = np.concatenate([np.arange(n) for n in lengths])
    documents = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return tuple(jnp.asarray(np.broadcast_to(x, ids.shape).astype(np.int32)) for x in (ids, at, documents))


def by_segments(cfg: DecoderConfig, row, size: int = SEGMENT, memory: int | None = None) -> np.ndarray:
    params, model, _, segment = running(cfg)
    past, out = model.begin(row[0].shape[0], memory), []
    for i in range(0, row[0].shape[1], size):
        logits, past = segment(params, past, *(x[:, i : i + size] for x in row))
        out.append(np.asarray(logits))
    return np.concatenate(out, 1)


# --- the paper's equations -----------------------------------------------------------------------------------------


def norm(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.scale"] + w[f"{name}.bias"]


def equations(w: dict[str, np.ndarray], segments: list[np.ndarray], memory: int) -> list[np.ndarray]:
    """Logits of each segment, pair by pair of tokens (Dai et al. 2019, arXiv:1901.02860, the end of section 3.3)."""

    def sinusoid(distance: int) -> np.ndarray:
        angle = distance / 10_000 ** (np.arange(0, D, 2) / D)
        return np.concatenate([np.sin(angle), np.cos(angle)])

    u, v = w["relative.u"], w["relative.v"]
    memories, out = [np.zeros((0, D))] * PAPER.num_layers, []
    for ids in segments:
        h = w["embedding"][ids]
        for n in range(PAPER.num_layers):
            p = {name: w[f"blocks.0.{name}"][n] for name in (
                "attention.w_q", "attention.w_k", "attention.w_v", "attention.w_o", "attention.relative.w_r",
                "ffn.w_up", "ffn.b_up", "ffn.w_down", "ffn.b_down", "norm_attention.scale", "norm_attention.bias",
                "norm_ffn.scale", "norm_ffn.bias",
            )}  # fmt: skip
            both = np.concatenate([memories[n], h])
            memories[n] = both[-memory:]
            q = np.einsum("td,dnh->tnh", h, p["attention.w_q"])
            k, values = (np.einsum("sd,dnh->snh", both, p[f"attention.w_{name}"]) for name in "kv")
            a = np.zeros((len(h), N, H))
            for head in range(N):
                for i in range(len(h)):
                    place = len(both) - len(h) + i
                    logits = []
                    for j in range(place + 1):
                        r = sinusoid(place - j) @ p["attention.relative.w_r"][:, head]
                        logits.append(q[i, head] @ k[j, head] + q[i, head] @ r + u[head] @ k[j, head] + v[head] @ r)
                    e = np.exp((np.array(logits) - max(logits)) / np.sqrt(H))
                    a[i, head] = (e / e.sum()) @ values[: place + 1, head]
            o = norm(p, "norm_attention", h + np.einsum("tnh,nhd->td", a, p["attention.w_o"]))
            up = np.maximum(o @ p["ffn.w_up"] + p["ffn.b_up"], 0)
            h = norm(p, "norm_ffn", o + up @ p["ffn.w_down"] + p["ffn.b_down"])
        out.append(h @ w["embedding"].T + w["head_bias"])
    return out


@pytest.mark.parametrize("memory", [1, 5, 40])
def test_segments_with_memory_are_what_the_equations_of_transformer_xl_say(memory):
    """The memory is shorter than a segment, longer, longer than all of the text."""
    row = rows(batch=1)
    weights = {n: np.asarray(x, np.float64) for n, x in running(PAPER)[0].items()}
    ids = np.asarray(row[0][0])
    wanted = equations(weights, [ids[i : i + SEGMENT] for i in range(0, TEXT, SEGMENT)], memory)
    np.testing.assert_allclose(by_segments(PAPER, row, memory=memory)[0], np.concatenate(wanted), atol=1e-4)


# --- the whole text at once ----------------------------------------------------------------------------------------


FAST = ("transformer_xl", "sandwich_rope", "pattern")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS])
def test_with_all_of_the_text_remembered_segments_are_the_whole_of_it(name):
    """Two texts side by side; and a row of documents that begin and end within segments."""
    cfg = DECODERS[name]
    params, _, whole, _ = running(cfg)
    for row in (rows(), rows((3, 7, 2), seed=1)):
        np.testing.assert_allclose(by_segments(cfg, row), whole(params, *row), atol=3e-5)


def test_with_a_window_a_memory_of_its_length_is_enough_for_any_text():
    """Layers see no further back, however long the text has become; so does generation with a cache."""
    cfg = decoder(None, {"window": SEGMENT}, **XL, memory=SEGMENT - 1)
    params, model, whole, _ = running(cfg)
    row = rows((4 * TEXT,))
    everything = whole(params, *row)
    np.testing.assert_allclose(by_segments(cfg, row), everything, atol=3e-5)
    short = by_segments(cfg, row, memory=SEGMENT - 2)
    assert np.abs(short - everything).max() > 1e-2
    logits, cache = model.prefill(row[0][:, :20], jnp.zeros(2, jnp.int32), capacity=24)
    for i in range(20, 24):
        np.testing.assert_allclose(logits, everything[:, i - 1], atol=3e-5)
        logits, cache = model.decode(row[0][:, i], cache)


def test_generation_is_segments_of_one_token():
    cfg = DECODERS["transformer_xl"]
    _, model, _, _ = running(cfg)
    row = rows()
    one_by_one = by_segments(cfg, row, size=1, memory=TEXT)
    logits, cache = model.prefill(row[0][:, :6], jnp.zeros(2, jnp.int32), capacity=TEXT)
    for i in range(6, TEXT):
        np.testing.assert_allclose(logits, one_by_one[:, i - 1], atol=3e-5)
        logits, cache = model.decode(row[0][:, i], cache)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_goes_into_memory_but_its_projections_get_theirs(remat):
    cfg = DECODERS["pre"]
    params = running(cfg)[0]
    graphdef = abstract(cfg, remat=remat)[0]
    row = rows(batch=1)
    first, second = (tuple(x[:, i : i + SEGMENT] for x in row) for i in (0, SEGMENT))

    def loss(params, scale, remembered):
        """Of the second segment; `scale` multiplies what the layers are given in the first."""
        model = merge(graphdef, params | {"embedding": params["embedding"] * scale})
        _, past = model.segment(*first, model.begin(1))
        model = merge(graphdef, params)
        past = past if remembered is None else past._replace(blocks=(remembered,))
        logits, _ = model.segment(*second, past)
        return jnp.square(logits).mean(), past.blocks[0]

    of = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, memory), (grads, into_first) = of(params, jnp.float32(1.0), None)
    assert into_first == 0 and np.abs(memory).max() > 0
    # The same as with a memory that came from nowhere; and of that the loss depends on weights as the gradient says.
    _, (same, _) = of(params, jnp.float32(1.0), memory)
    for name, g in grads.items():
        np.testing.assert_allclose(g, same[name], atol=1e-6, err_msg=name)
    for name in ("blocks.0.attention.w_k", "blocks.0.attention.w_v", "blocks.0.norm_attention.scale"):
        step = 3e-3 * jax.random.normal(jax.random.key(3), params[name].shape)
        up, down = (of(params | {name: params[name] + s * step}, jnp.float32(1.0), memory)[0][0] for s in (1, -1))
        np.testing.assert_allclose(jnp.vdot(grads[name], step), (up - down) / 2, rtol=2e-2, err_msg=name)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_see_earlier_segments_is_refused_with_its_reason():
    cross = {"cross": {"num_heads": N}}
    dynamic = {"kind": "rope", "scaling": {"kind": "dynamic_ntk", "factor": 2.0, "original": 8}}
    two = {"mask": {"kind": "some", "of": ["causal", "prefix"]}}
    for parts, why in (
        ({"position": "learned"}, "memory=8: position=learned has no vectors for tokens beyond the context"),
        ({"position": "rope_2d"}, "memory=8: position=rope_2d counts from the end of a prefix"),
        ({"position": dynamic}, "memory=8: position.scaling turns all keys by the length of a document"),
        ({"random_positions": 99}, "memory=8: random_positions are drawn for a row"),
        ({"attention": two}, "memory=8: a layer sees tokens that follow"),
        ({"block": cross}, "memory=8: cross attends to the input of one row"),
        ({"query_layer": {"norm": "layernorm", "attention": {"num_heads": N}}}, "memory=8: query_layer has embeddings"),
    ):
        with pytest.raises(ValidationError, match=why):
            decoder(**parts)
    learned = decoder(position="learned", memory=0).build()
    with pytest.raises(ConfigError, match="memory=4: position=learned"):
        learned.begin(1, 4)
    with pytest.raises(ConfigError, match="memory=0: there is nothing to remember"):
        decoder(**XL, memory=0).build().begin(1)


def test_a_training_run_does_not_pretend_to_remember():
    from jaxllm.core.config import SHIPPED, load
    from jaxllm.train.config import RunConfig

    with pytest.raises(ConfigError, match="model.memory=8: rows of one step do not go on in the next"):
        load(RunConfig, SHIPPED / "train/quickstart.yaml", ["model.memory=8"])
