"""Encoders of transformers with random weights and configs: what they say of tokens and rows, and their files."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm.interop.folder import open_folder
from jaxllm.interop.weights import load
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop import oracle  # noqa: E402
from tests.interop.test_decoders import few  # noqa: E402

V, CONTEXT, LENGTHS = 50, 24, (5, 9, 3)
of, flag = st.sampled_from, st.booleans()

# What each class answers, by our kind of head; `hidden` and `pooled` are of models without a head.
SAID = {
    "prediction_logits": "mlm", "seq_relationship_logits": "nsp", "sop_logits": "sop", "last_hidden_state": "hidden",
    "pooler_output": "pooled",
}  # fmt: skip
CLASSES = {
    "Model": {}, "ForMaskedLM": {"logits": "mlm"}, "ForTokenClassification": {"logits": "tokens"},
    "ForSequenceClassification": {"logits": "classification"}, "ForQuestionAnswering": {"start_logits": "qa"},
}  # fmt: skip


def sizes(draw: Any, **more: Any) -> dict[str, Any]:
    heads = draw(of([1, 2, 4]))
    return {
        "vocab_size": V, "hidden_size": heads * draw(of([4, 8])), "num_hidden_layers": draw(of([1, 2, 3])),
        "num_attention_heads": heads, "intermediate_size": draw(of([20, 33])), "max_position_embeddings": CONTEXT,
        "hidden_act": draw(of(["gelu", "relu", "gelu_new"])), "layer_norm_eps": draw(of([1e-12, 1e-3])),
        "num_labels": draw(of([1, 2, 5])), "attn_implementation": "eager", **more,
    }  # fmt: skip


def segments(draw: Any) -> dict[str, Any]:
    return {"type_vocab_size": draw(of([1, 2]))}


def table(draw: Any, c: dict[str, Any]) -> dict[str, Any]:
    return c | {"embedding_size": draw(of([12, c["hidden_size"]]))}


def bert(draw):
    return transformers.BertConfig(**sizes(draw, **segments(draw)))


def ernie(draw):
    return transformers.ErnieConfig(**sizes(draw, **segments(draw)), use_task_id=draw(flag))


def roberta(draw):
    return transformers.RobertaConfig(**sizes(draw, **segments(draw)))


def xlm_roberta(draw):
    return transformers.XLMRobertaConfig(**sizes(draw, **segments(draw)))


def camembert(draw):
    return transformers.CamembertConfig(**sizes(draw, **segments(draw)))


def mpnet(draw):
    return transformers.MPNetConfig(**sizes(draw, relative_attention_num_buckets=32))


def albert(draw):
    c = table(draw, sizes(draw, **segments(draw))) | {"num_hidden_layers": draw(of([2, 4]))}
    return transformers.AlbertConfig(**c, num_hidden_groups=draw(of([1, 2])))


def electra(draw):
    return transformers.ElectraConfig(**table(draw, sizes(draw, **segments(draw))))


def distilbert(draw):
    c = sizes(draw)
    return transformers.DistilBertConfig(
        vocab_size=V, dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        hidden_dim=c["intermediate_size"], activation=draw(of(["gelu", "relu"])), max_position_embeddings=CONTEXT,
        num_labels=c["num_labels"], attn_implementation="eager",
    )  # fmt: skip


def _deberta(draw: Any) -> dict[str, Any]:
    kinds = draw(of([[], ["c2p"], ["p2c"], ["c2p", "p2c"]]))
    return sizes(draw, **segments(draw)) | {
        "type_vocab_size": draw(of([0, 2])), "relative_attention": draw(flag) and bool(kinds), "pos_att_type": kinds,
        "max_relative_positions": draw(of([-1, 4, 16])), "position_biased_input": draw(flag), "pooler_hidden_act": "gelu",
    }  # fmt: skip


def deberta(draw):
    return transformers.DebertaConfig(**_deberta(draw))


def deberta_v2(draw):
    c = _deberta(draw)
    if c["relative_attention"]:
        c |= {"position_buckets": draw(of([-1, 4, 6])), "max_relative_positions": 16, "share_att_key": draw(flag)}
        c |= {"norm_rel_ebd": draw(of(["none", "layer_norm"]))}
    convolution = {"conv_kernel_size": 3, "conv_act": draw(of(["tanh", "gelu"])), "conv_groups": draw(of([1, 2]))}
    return transformers.DebertaV2Config(**c, **(convolution if draw(flag) else {}))


PREFIX = {
    "deberta": "Deberta", "deberta_v2": "DebertaV2",
    "bert": "Bert", "ernie": "Ernie", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "camembert": "Camembert",
    "mpnet": "MPNet", "albert": "Albert", "electra": "Electra", "distilbert": "DistilBert",
}  # fmt: skip
MORE = {
    "bert": {"ForPreTraining": {}, "ForNextSentencePrediction": {"logits": "nsp"}},
    "ernie": {"ForPreTraining": {}, "ForNextSentencePrediction": {"logits": "nsp"}},
    "albert": {"ForPreTraining": {}}, "electra": {"ForPreTraining": {"logits": "rtd"}},
}  # fmt: skip
DRAWN = {f.__name__: f for f in (
    bert, ernie, roberta, xlm_roberta, camembert, mpnet, albert, electra, distilbert, deberta, deberta_v2,
)}  # fmt: skip


def randomised(config: Any, architecture: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return oracle.randomised(getattr(transformers, architecture)(config), seed)


PAIRS = [(name, architecture) for name in DRAWN for architecture in CLASSES | MORE.get(name, {})]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), PAIRS, ids=[n + a for n, a in PAIRS])
def test_a_random_encoder_says_what_that_of_transformers_does_and_its_files_go_back_as_they_came(
    name, architecture, tmp_path_factory
):
    said = (CLASSES | MORE.get(name, {}))[architecture]

    @settings(few, max_examples=2)
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        folder = tmp_path_factory.mktemp(name)
        config = DRAWN[name](data.draw)
        if architecture in ("ForQuestionAnswering", "ForPreTraining"):
            config.num_labels = 2  # a start and an end; in order or not
        model = randomised(config, PREFIX[name] + architecture, seed)
        model.save_pretrained(folder / "theirs")
        read = open_folder(folder / "theirs")
        graphdef, shapes, _ = abstract(read.cfg)
        assert_same_outputs(model, merge(graphdef, load(read.weights, read.cfg, shapes)), said, seed)
        assert_same_files(model, read, folder)

    check()


def rows(seed: int, with_segments: int, with_tasks: int):
    """Rows padded on the right, of one document each, and the same documents packed in one row."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, V, n) for n in LENGTHS]
    types = [np.sort(rng.integers(0, max(with_segments, 1), n)) for n in LENGTHS]
    tasks = [np.full(n, rng.integers(0, max(with_tasks, 1))) for n in LENGTHS]
    return ids, types, tasks


def packed(parts: list[np.ndarray]) -> jnp.ndarray:
    return jnp.asarray(np.concatenate([*parts, [0, 0]])[None].astype(np.int32))


def padded(parts: list[np.ndarray]) -> jnp.ndarray:
    wide = max(map(len, parts))
    return jnp.asarray(np.stack([np.pad(p, (0, wide - len(p))) for p in parts]).astype(np.int32))


def assert_same_outputs(model: Any, ours: Any, said: dict[str, str], seed: int) -> None:
    """One by one in transformers; here padded, and, for what is said of tokens, packed too."""
    cfg = ours.cfg
    ids, types, tasks = rows(seed, cfg.segments, cfg.tasks)
    said = SAID | said
    theirs: list[dict[str, np.ndarray]] = []
    for x, s, t in zip(ids, types, tasks, strict=True):
        more = {"token_type_ids": torch.tensor(s)[None]} if cfg.segments else {}
        more |= {"task_type_ids": torch.tensor(t)[None]} if cfg.tasks else {}
        with torch.no_grad():
            out = model(input_ids=torch.tensor(x)[None], **more)
        got = {said[k]: v[0].numpy() for k, v in out.items() if k in said and v is not None}
        if "start_logits" in out:
            got["qa"] = np.stack([out.start_logits[0].numpy(), out.end_logits[0].numpy()], -1)
        theirs.append(got)
    assert theirs[0].keys() - {"hidden", "pooled"} == {head.kind for head in cfg.heads}
    positions = [np.arange(n) for n in LENGTHS]
    for lay, document in (
        (padded, [np.ones(n) for n in LENGTHS]),
        (packed, [np.full(n, i + 1) for i, n in enumerate(LENGTHS)]),
    ):
        args = (lay(ids), lay(positions), lay(document))
        keys = {"segments_BT": lay(types), "tasks_BT": lay(tasks)}
        answers = jax.jit(lambda m, args, keys: {"hidden": (x := m.hidden(*args, **keys)), **m.judge(x)})(
            ours, args, keys
        )
        for i, wanted in enumerate(theirs):
            for kind, value in wanted.items():
                if kind in ("classification", "nsp", "sop", "pooled"):
                    if lay is padded and kind in answers:
                        np.testing.assert_allclose(answers[kind][i], value, atol=1e-4, rtol=0)
                    continue
                start = 0 if lay is padded else sum(LENGTHS[:i])
                got = answers[kind][i if lay is padded else 0][start : start + LENGTHS[i]]
                np.testing.assert_allclose(got, value, atol=1e-4, rtol=0, err_msg=kind)


def assert_same_files(model: Any, read: Any, folder: Any) -> None:
    """As `oracle.assert_same_tensors`; and what transformers reads says the same."""
    again = oracle.assert_same_tensors(model, read, folder)
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        for a, b in zip(again(input_ids=ids).values(), model(input_ids=ids).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
