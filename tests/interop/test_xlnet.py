"""XLNet of transformers with random weights and configs: with orders of factorisation, paddings, segments; its files."""

import itertools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm.core.errors import CheckpointError
from jaxllm.interop.folder import BY_KIND, open_folder
from jaxllm.interop.weights import load
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import stack
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop.test_decoders import few  # noqa: E402
from tests.interop.test_encoders import assert_same_files, randomised  # noqa: E402

V, T, LENGTHS = 50, 9, (9, 5, 3)
CLASSES = {
    "Model": "hidden", "LMHeadModel": "lm", "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens", "ForQuestionAnsweringSimple": "qa",
}  # fmt: skip


def config(draw: Any, attention: str, qa: bool) -> Any:
    heads = draw(st.sampled_from([1, 2, 4]))
    return transformers.XLNetConfig(
        vocab_size=V, d_model=heads * draw(st.sampled_from([4, 8])), n_layer=draw(st.sampled_from([1, 2, 3])),
        n_head=heads, d_inner=draw(st.sampled_from([20, 33])), layer_norm_eps=draw(st.sampled_from([1e-12, 1e-3])),
        ff_activation=draw(st.sampled_from(["gelu", "relu", "gelu_new"])), attn_type=attention,
        num_labels=2 if qa else draw(st.sampled_from([1, 2, 5])),
    )  # fmt: skip


def rows(seed: int) -> dict[str, np.ndarray]:
    """Rows padded on the left, the kinds of segment, and for each an order whose last two tokens are predicted."""
    rng = np.random.default_rng(seed)
    at = np.arange(T)[None] - (T - np.array(LENGTHS)[:, None])
    order = np.where(at >= 0, np.argsort(np.argsort(rng.random(at.shape), axis=1), axis=1), -1)
    return {
        "tokens": rng.integers(3, V, at.shape), "at": np.maximum(at, 0), "real": (at >= 0).astype(np.int64),
        "segments": np.sort(rng.integers(0, 3, at.shape), axis=1),
        "visible": order[:, None, :] < order[:, :, None], "targets": np.argsort(order, axis=1)[:, -2:],
    }  # fmt: skip


def theirs(model: Any, r: dict[str, np.ndarray], **more: np.ndarray) -> np.ndarray:
    """Row by row: with `uni` it takes the padding of one row only."""
    said = more | {"input_ids": r["tokens"], "attention_mask": r["real"].astype(np.float32)}
    with torch.no_grad():
        each = [model(**{k: torch.tensor(x[i : i + 1]) for k, x in said.items()}) for i in range(len(LENGTHS))]
    named = ("start_logits", "end_logits") if "start_logits" in each[0] else (next(iter(each[0])),)
    parts = [np.concatenate([out[n].numpy() for out in each]) for n in named]
    return np.stack(parts, -1) if len(parts) > 1 else parts[0]


def ours(model: Any, r: dict[str, np.ndarray], kind: str, **more: np.ndarray) -> np.ndarray:
    def run(model, row, more):
        hidden = model.hidden(*row, **more)
        return hidden if kind == "hidden" else model.judge(hidden)[kind]

    row = [jnp.asarray(r[n].astype(np.int32)) for n in ("tokens", "at", "real")]
    return np.asarray(jax.jit(run)(model, row, {k: jnp.asarray(x) for k, x in more.items()}))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_random_xlnet_says_what_that_of_transformers_does_and_its_files_go_back_as_they_came(name, tmp_path_factory):
    kind, attention = CLASSES[name], itertools.cycle(["bi", "uni"])

    @settings(few, max_examples=3)
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        folder = tmp_path_factory.mktemp("xlnet")
        model = randomised(config(data.draw, next(attention), kind == "qa"), f"XLNet{name}", seed)
        model.save_pretrained(folder / "theirs")
        read = open_folder(folder / "theirs")
        graphdef, shapes, _ = abstract(read.cfg)
        made = merge(graphdef, load(read.weights, read.cfg, shapes))
        assert {head.kind for head in read.cfg.heads} == {kind} - {"hidden"}
        r, told, said = rows(seed), {}, {}  # told one thing after the other
        # With both a causal mask and an order, a target may see nothing: theirs then takes the mean of all there is.
        targets = {"targets"} if model.config.attn_type == "bi" else set()
        for more in ({}, {"segments"}, {"visible"}, targets):
            if "segments" in more:
                told["segments_BT"], said["token_type_ids"] = r["segments"].astype(np.int32), r["segments"]
            if "visible" in more:
                told["visible_BTT"], said["perm_mask"] = r["visible"], 1.0 - r["visible"].astype(np.float32)
            if "targets" in more:
                told["targets_BP"] = r["targets"].astype(np.int32)
                said["target_mapping"] = np.eye(T, dtype=np.float32)[r["targets"]]
            got, wanted = ours(made, r, kind, **told), theirs(model, r, **said)
            real = np.ones(got.shape[:2], bool) if "targets" in more else r["real"] > 0
            both = (got, wanted) if kind == "classification" else (got[real], wanted[real])
            np.testing.assert_allclose(*both, atol=1e-4, rtol=0, err_msg=str(more))
            if more == {"segments"} and kind != "classification":  # the same rows, packed in one
                flat = {n: x[real][None] for n, x in r.items() if x.shape == real.shape}
                flat["real"] = np.repeat(range(1, len(LENGTHS) + 1), LENGTHS)[None]
                got = ours(made, flat, kind, segments_BT=flat["segments"].astype(np.int32))
                np.testing.assert_allclose(got[0], wanted[real], atol=1e-4, rtol=0, err_msg="packed")
        assert_same_files(model, read, folder)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("memory", [3, 20])
def test_segments_of_a_decoder_are_those_of_a_causal_xlnet_with_its_mems(memory, tmp_path):
    """XLNet that sees one way and is given back its hidden states is a Transformer-XL of transformers."""
    said = transformers.XLNetConfig(
        vocab_size=V, d_model=16, n_layer=3, n_head=2, d_inner=20, attn_type="uni", mem_len=memory
    )
    model = randomised(said, "XLNetLMHeadModel", 0)
    model.save_pretrained(tmp_path)
    read = open_folder(tmp_path)
    cfg = DecoderConfig.model_validate({
        "vocab": V, "embed": 16, "num_layers": 3, "block": read.cfg.block.model_dump(), "position": "none",
        "relative": "xl", "final_norm": False, "tie": True, "head_bias": True, "memory": memory,
    })  # fmt: skip
    left = lambda n: n == "query" or n.endswith((".s", ".of_segments"))
    weights = {n: jnp.asarray(read.weights[n]) for n in read.weights if not left(n)}
    weights["head_bias"] = weights.pop("lm.b")
    decoder = merge(abstract(cfg)[0], stack(weights, cfg))
    ids = np.random.default_rng(1).integers(0, V, (2, 15)).astype(np.int32)
    mems, past, segment = None, decoder.begin(2), jax.jit(decoder.segment)
    for i in range(0, 15, 5):
        at = jnp.broadcast_to(jnp.arange(i, i + 5), (2, 5))
        got, past = segment(jnp.asarray(ids[:, i : i + 5]), at, jnp.ones_like(at), past)
        with torch.no_grad():
            out = model(input_ids=torch.tensor(ids[:, i : i + 5]).long(), mems=mems, use_mems=True)
        mems = out.mems
        np.testing.assert_allclose(got, out.logits.numpy(), atol=1e-4, rtol=0)


def test_what_no_xlnet_here_computes_is_refused_naming_the_key():
    small = {"model_type": "xlnet", "d_model": 8, "n_head": 2, "n_layer": 1, "d_inner": 8, "vocab_size": 9}
    read = BY_KIND["xlnet"].ours
    assert read(small).relative.segments
    for key, value, why in (
        ("d_head", 8, "d_head=8; must be d_model / n_head=4"), ("attn_type", "both", "known: bi, uni"),
        ("clamp_len", 5, "clamp_len=5; xlnet is read with -1 only"),
        ("summary_type", "mean", 'summary_type="mean"; xlnet is read with "last" only'),
        ("architectures", ["XLNetForQuestionAnswering"], "XLNetForQuestionAnsweringSimple"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=why):
            read(small | {key: value})
