import functools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from jaxllm.core import config
from jaxllm.core.axes import placed_by
from jaxllm.core.errors import ConfigError
from jaxllm.models.config import Attention, DecoderConfig
from jaxllm.models.layers.attention import Mixing, Tokens
from jaxllm.models.module import abstract, merge
from jaxllm.models.positions import ALiBi
from jaxllm.objectives.config import NextToken
from jaxllm.objectives.next_token import next_token
from jaxllm.parallel import context
from jaxllm.parallel.config import ACTIVATIONS, Mesh, Ring, Ulysses
from jaxllm.parallel.context import spread, zigzag
from jaxllm.parallel.sharding import make_mesh, placement, sharding

FORMS = {"ring": Ring(balanced=False), "balanced": Ring(), "ulysses": Ulysses()}
MESHES = [{"context": 4}, {"context": 2, "tensor": 2}, {"context": 2, "fsdp": 2}]
B, T, N, H = 2, 48, 4, 8


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    sizes = {"fsdp": 1} | sizes
    return make_mesh(Mesh(**sizes), jax.devices()[: math.prod(sizes.values())])


def random_mixing(r: random.Random, causal: bool, mesh: dict) -> Mixing:
    some = {"kind": "some", "of": ["causal", "prefix"]}
    mask = r.choice(["causal", {"kind": "all", "of": ["causal", {"kind": "window", "left": 9, "right": 3}]}])
    cfg = config.parse(Attention, {
        "num_heads": N, "num_kv_heads": r.choice([2, 4]) if mesh.get("tensor") else r.choice([1, 2, 4]),
        "softcap": r.choice([None, 3.0]), "window": r.choice([None, 7, 20]),
        "mask": mask if causal else r.choice([some, "full", mask]),
    })  # fmt: skip
    return Mixing(cfg, 0.5, alibi=ALiBi() if r.random() < 0.5 else None)


def arrays(num_kv_heads: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Queries, keys, values and the gradient of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, (N, num_kv_heads, num_kv_heads, N)))


def packed_tokens(seed: int = 0) -> Tokens:
    """Rows of a few documents, each with a prefix, and padding at the end."""
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(1, 5, (B, T)), 1)
    document[:, T - rng.integers(1, 9) :] = 0
    position = np.zeros_like(document)
    for t in range(1, T):
        position[:, t] = np.where(document[:, t] == document[:, t - 1], position[:, t - 1] + 1, 0)
    index = np.arange(T)[None]
    return Tokens(*(jnp.asarray(x) for x in (index, position, document, position < 5)))


def attended(attention, mixing: Mixing, order: np.ndarray, tokens: Tokens):
    """(q, k, v, do) -> output and gradients of `attention` on rows in this order, put back into their own."""
    there = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, T))[:, order], tokens)
    back = np.argsort(order)

    def run(q, k, v, do):
        def total(q, k, v):
            o = attention(mixing, q, k, v, there, there)
            return jnp.sum(o * do[:, order]), o

        grads, o = jax.grad(total, (0, 1, 2), has_aux=True)(*(x[:, order] for x in (q, k, v)))
        return jax.tree.map(lambda x: x[:, back], (o, *grads))

    return jax.jit(run)


def whole(mixing, q, k, v, q_tokens, k_tokens):
    return mixing.whole(q, k, v, q_tokens, k_tokens, mixing.slopes())


def assert_same_attention(form: str, sizes: dict, mixing: Mixing, rules=ACTIVATIONS, seed: int = 0) -> None:
    order = zigzag(T, sizes["context"]) if form == "balanced" else np.arange(T)
    given, tokens = arrays(mixing.cfg.kv_heads, seed), packed_tokens(seed)
    shared = attended(spread(mesh_of(**sizes), rules, FORMS[form]), mixing, order, tokens)(*given)
    alone = attended(whole, mixing, np.arange(T), tokens)(*given)
    for name, x, y in zip(("output", "dq", "dk", "dv"), shared, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", FORMS)
def test_attention_over_shared_rows_is_that_of_one_device_and_so_are_its_gradients(form, seed):
    r = random.Random(seed)
    sizes = MESHES[seed % 3]
    assert_same_attention(form, sizes, random_mixing(r, form == "balanced", sizes), seed=seed)


@pytest.mark.parametrize("form", FORMS)
def test_key_heads_that_do_not_divide_may_be_replicated_while_query_heads_are_shared(form):
    rules = ACTIVATIONS.model_copy(update={"kv_heads": None})
    mixing = Mixing(Attention(num_heads=N, num_kv_heads=1), 0.5, alibi=None)
    assert_same_attention(form, {"context": 2, "tensor": 2}, mixing, rules)


@pytest.mark.parametrize("form", ["ring", "balanced"])
def test_queries_in_parts_attend_as_at_once(form, monkeypatch):
    monkeypatch.setattr(context, "LOGITS", 25)  # shares of 24 tokens: parts of 1 query, or of 2 in a chunk of 12
    assert_same_attention(form, {"context": 2}, Mixing(Attention(num_heads=N, window=20), 0.5, alibi=ALiBi()))


@pytest.mark.parametrize("form", ["ring", "balanced"])
def test_no_device_has_an_array_of_a_row_by_a_row(form):
    square = re.compile(rf"\b{T},{T}\b")
    mixing = Mixing(Attention(num_heads=N), 0.5, alibi=None)
    given = arrays(N)
    run = attended(spread(mesh_of(context=4), ACTIVATIONS, FORMS[form]), mixing, np.arange(T), packed_tokens())
    assert not square.search(run.lower(*given).compile().as_text())
    assert square.search(attended(whole, mixing, np.arange(T), packed_tokens()).lower(*given).as_text("hlo"))


def executed(jaxpr, name: str, cost=lambda eqn: 1) -> int:
    """Sum of `cost` over the equations of a primitive that a program runs, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            total += cost(eqn)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            total += times * executed(inner, name, cost)
    return total


def matmul_flops(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)


@pytest.mark.parametrize("shares", [2, 4])
def test_a_balanced_ring_does_half_the_work(shares):
    """Of 4n pairs of half shares 2n + 1 are looked at; the program is one for all devices, so each does as much."""
    mixing, given = Mixing(Attention(num_heads=N), 0.5, alibi=None), arrays(N)
    flops = {}
    for form in ("ring", "balanced"):
        run = attended(spread(mesh_of(context=shares), ACTIVATIONS, FORMS[form]), mixing, np.arange(T), packed_tokens())
        flops[form] = executed(jax.make_jaxpr(run)(*given).jaxpr, "dot_general", matmul_flops)
    assert flops["balanced"] * 4 * shares == flops["ring"] * (2 * shares + 1)


@pytest.mark.parametrize("shares", [1, 2, 3, 4])
def test_in_zigzag_order_every_share_of_a_causal_row_sees_as_much(shares):
    length = 24
    order = zigzag(length, shares)
    assert sorted(order) == list(range(length))
    seen = (order + 1).reshape(shares, -1).sum(1)
    assert len(set(seen)) == 1
    assert shares == 1 or len(set((np.arange(length) + 1).reshape(shares, -1).sum(1))) > 1


def test_rows_that_zigzag_cannot_cut_are_refused():
    with pytest.raises(ConfigError, match=r"rows of 20 tokens .* multiples of 8, or set context=.*balanced: false"):
        zigzag(20, 4)


@functools.cache
def decoder_gradient(remat):
    """The jaxpr of a gradient of a two-layer decoder whose rows 4 devices share."""
    model = DecoderConfig.model_validate(
        {"vocab": 32, "embed": 16, "num_layers": 2, "block": {"attention": {"num_heads": 4}, "ffn": {"mlp": 16}}}
    )
    graphdef, shapes, _ = abstract(model, remat=remat)
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "documents", "weights"), rows)

    def loss(params, batch):
        with placed_by(placement(mesh_of(context=4), ACTIVATIONS, context=Ring())):
            return next_token(NextToken(), merge(graphdef, params), batch).total

    return jax.make_jaxpr(jax.grad(loss))(shapes, batch).jaxpr


def test_what_remat_keeps_of_attention_spares_the_backward_pass_a_round():
    sends = {remat: executed(decoder_gradient(remat), "ppermute") for remat in ("none", "save_attention", "full")}
    assert sends["none"] == sends["save_attention"] < sends["full"]


def test_blocks_are_sent_on_once_less_than_there_are_devices():
    """In the compiled program: what the last turn would send on is never asked for."""
    mixing, tokens = Mixing(Attention(num_heads=N), 0.5, alibi=None), packed_tokens()
    tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, T)), tokens)
    ring = spread(mesh_of(context=2), ACTIVATIONS, Ring(balanced=False))
    text = jax.jit(lambda q, k, v: ring(mixing, q, k, v, tokens, tokens)).lower(*arrays(N)[:3]).compile().as_text()
    assert len(re.findall(rf"f32\[1,{B},{T // 2},{N},{H}\]\S* collective-permute\(", text)) == 2  # keys and values


@pytest.mark.parametrize("form", FORMS)
def test_stages_of_a_pipeline_may_be_at_different_places_of_the_program(form):
    """Stage 0 works in the first tick, stage 1 in the second, on what stage 0 has made; each over two devices."""
    mesh, mixing = mesh_of(pipe=2, context=2), Mixing(Attention(num_heads=N), 0.5, alibi=None)
    order = zigzag(T, 2) if form == "balanced" else np.arange(T)
    tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, T)), packed_tokens())
    there = jax.tree.map(lambda x: x[:, order], tokens)

    def layer(attention, tokens, x):
        y, pull = jax.vjp(lambda x: attention(mixing, x, x, x, tokens, tokens), x)
        return y + pull(jnp.sin(y))[0]

    def stage(x):
        run = functools.partial(layer, spread(mesh, ACTIVATIONS, FORMS[form]), there)

        def tick(t, x):
            works = jax.lax.axis_index("pipe") == t
            x = jax.lax.fori_loop(0, works.astype(jnp.int32), lambda _, x: run(x), x)
            return jax.lax.ppermute(x, "pipe", [(0, 1), (1, 0)])

        return jax.lax.fori_loop(0, 2, tick, x[0])[None]

    pipeline = jax.shard_map(
        stage, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"), axis_names={"pipe"}, check_vma=False
    )
    x = jnp.stack([arrays(N, seed)[0] for seed in (0, 1)])
    alone = functools.partial(layer, whole, tokens)
    twice, untouched = jax.jit(pipeline)(x[:, :, order])
    np.testing.assert_allclose(twice, alone(alone(x[0]))[:, order], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(untouched, x[1][:, order])


@pytest.mark.tpu_aot
def test_a_tpu_sends_keys_and_values_on_while_it_computes(v5e):
    mesh = make_mesh(Mesh(fsdp=1, context=4), v5e)
    mixing = Mixing(Attention(num_heads=N), 0.1, alibi=None)
    length = 4096

    def shaped(*size, dtype, axes):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding(mesh, ACTIVATIONS, axes))

    qkv = shaped(1, length, N, 128, dtype=jnp.bfloat16, axes=("batch", "seq", "heads", "head_dim"))
    index = shaped(1, length, dtype=jnp.int32, axes=("batch", "seq"))

    def total(q, k, v, index):
        tokens = Tokens(index, index, index // 100, index < 0)
        return jnp.sum(spread(mesh, ACTIVATIONS, Ring())(mixing, q, k, v, tokens, tokens).astype(jnp.float32))

    lines = jax.jit(jax.grad(total, (0, 1, 2))).lower(qkv, qkv, qkv, index).compile().as_text().splitlines()
    began, hidden = {}, []
    for i, line in enumerate(lines):
        if start := re.search(r"%(collective-permute-start[\w.-]*) = \((\w+)\[", line):
            began[start[1]] = i, start[2]
        if done := re.search(r"collective-permute-done\(%([\w.-]+)\)", line):
            first, dtype = began[done[1]]
            hidden.append((dtype, any(" while(" in between for between in lines[first:i])))
    # Keys and values: 2 sent on in the first turn and 2 in the loop, in each of two rounds; the 2 left over are their
    # gradients on the last way home, when there is nothing left to compute.
    assert [dtype for dtype, behind in hidden if dtype == "bf16" and not behind] == ["bf16"] * 2
    assert sum(behind for dtype, behind in hidden if dtype == "bf16") >= 6
    assert all(behind for dtype, behind in hidden if dtype == "s32")
