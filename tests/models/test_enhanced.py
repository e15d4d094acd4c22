"""DeBERTa's enhanced mask decoder, against the layers of transformers put together as the paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxllm.core.errors import ConfigError
from jaxllm.interop.folder import open_folder
from jaxllm.models.config import EncoderConfig
from jaxllm.models.count import parameters
from jaxllm.models.layout import stack, unstack
from jaxllm.models.module import abstract, create, merge

V, T = 50, 9
SMALL = {
    "vocab": V, "context": 16, "embed": 12, "num_layers": 3, "position": "none",
    "relative": {"kind": "disentangled", "span": 4}, "final_norm": False,
    "block": {"norm": "layernorm", "placement": "post", "attention": {"num_heads": 3}, "ffn": {"mlp": 20}},
    "heads": [{"kind": "mlm", "enhanced": 2}, "tokens"],
}  # fmt: skip


def rows(first: int = 0):
    """Two rows, one with padding; their tokens stand at `first` and after."""
    ids = np.random.default_rng(0).integers(3, V, (2, T))
    at = np.broadcast_to(np.arange(first, first + T), ids.shape)
    real = np.arange(T)[None] < np.array([[T], [T - 3]])
    return tuple(jnp.asarray(x.astype(np.int32)) for x in (ids, at, real))


VARIANTS = {
    "as_in_v1": {"share_att_key": False},
    "as_in_v2": {"share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_layer_is_asked_by_place_as_the_paper_says(name, tmp_path):
    """He et al. 2020, arXiv:2006.03654, section 3.2 and figure 2: n = 2 layers that share their weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.interop.test_encoders import randomised

    said = transformers.DebertaV2Config(
        vocab_size=V, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"],
        type_vocab_size=0, hidden_act="gelu", **VARIANTS[name],
    )  # fmt: skip
    model = randomised(said, "DebertaV2ForMaskedLM", 0)
    model.save_pretrained(tmp_path)
    read = open_folder(tmp_path)

    mlm = read.cfg.head("mlm").model_dump() | {"enhanced": 2}
    cfg = EncoderConfig.model_validate(read.cfg.model_dump() | {"heads": [mlm]})
    places = np.random.default_rng(1).normal(size=(cfg.context, cfg.embed)).astype(np.float32)
    logical = {n: jnp.asarray(read.weights[n]) for n in read.weights} | {"mlm.positions": jnp.asarray(places)}
    ours = jax.jit(merge(abstract(cfg)[0], stack(logical, cfg)).__call__)(*rows())["mlm"]

    ids, real = (torch.tensor(np.asarray(x)).long() for x in (rows()[0], rows()[2]))
    encoder = model.deberta.encoder
    with torch.no_grad():
        before = model.deberta(ids, real, output_hidden_states=True).hidden_states[-2]
        asked = before + torch.tensor(places)[None, :T]
        told = {"rel_embeddings": encoder.get_rel_embedding(), "relative_pos": encoder.get_rel_pos(before)}
        for _ in range(2):
            asked = encoder.layer[-1](before, encoder.get_attention_mask(real), query_states=asked, **told)[0]
        wanted = model.cls(asked)
    np.testing.assert_allclose(np.asarray(ours)[real > 0], wanted.numpy()[real > 0], atol=1e-4, rtol=0)


def test_only_the_mlm_head_is_told_absolute_places():
    cfg = EncoderConfig.model_validate(SMALL)
    params = create(cfg, jax.random.key(0))
    assert sum(x.size for x in params.values()) == parameters(cfg)
    said = jax.jit(lambda cfg, params, *row: merge(abstract(cfg)[0], params)(*row), static_argnums=0)
    here, there = said(cfg, params, *rows()), said(cfg, params, *rows(first=5))
    np.testing.assert_allclose(here["tokens"], there["tokens"], atol=1e-5)
    assert np.abs(here["mlm"] - there["mlm"]).max() > 1e-2
    plain = EncoderConfig.model_validate(SMALL | {"heads": ["tokens"]})
    same = {n: x for n, x in unstack(params, cfg).items() if not n.startswith("mlm.")}
    alone = said(plain, stack(same, plain), *rows())
    np.testing.assert_allclose(alone["tokens"], here["tokens"], atol=1e-5)


def test_what_does_not_go_with_it_is_refused():
    for more, why in (
        ({"repeat": 2}, "mlm.enhanced=2 computes one dense last layer again"),
        ({"num_layers": 1}, "mlm.enhanced=2 needs layers before the last"),
    ):
        with pytest.raises(ValidationError, match=why):
            EncoderConfig.model_validate(SMALL | more)
    model = EncoderConfig.model_validate(SMALL).build()
    with pytest.raises(ConfigError, match="give both results of `states`"):
        model.judge(model.hidden(*rows()))
    long = jnp.ones((1, 17), jnp.int32)
    with pytest.raises(ConfigError, match="rows of 17 tokens for a model of 16 learned positions"):
        model(long, long, long)
