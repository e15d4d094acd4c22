"""SmolLM2-135M-Instruct from a GGUF file, through the public path, against what transformers computes of it.

`make weights` fetches the model; golden figures stand in smollm2.json. All logits and the text of WikiText are too
large for the repository: their tests need JAXLLM_SHARED.
"""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_weights import MODELS, SMOLLM2, File, is_whole, take

from jaxllm import pretrained
from jaxllm.convert import run as convert
from jaxllm.generate import run as generate
from jaxllm.inference import generate as inference
from jaxllm.inference.config import GenerateConfig, Greedy

GOLDEN = json.loads(Path(__file__).with_name("smollm2.json").read_text(encoding="utf-8"))
PROMPTS = GOLDEN["prompts"]
SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2].parent / "shared"))
REFERENCE = SHARED / "data/weights/smollm2_135m_instruct_q4_1.hf_reference.npz"


@pytest.fixture(scope="module")
def file():
    (expected,) = MODELS[0].files.values()
    if not SMOLLM2.is_file():
        pytest.skip(f"needs the weights of SmolLM2 at {SMOLLM2}: `make weights` fetches them (JAXLLM_WEIGHTS)")
    assert is_whole(SMOLLM2, expected), f"{SMOLLM2} is not what `make weights` fetches; take it away"
    return SMOLLM2


@pytest.fixture(scope="module")
def smollm2(file):
    return pretrained.load(file)


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE.is_file():
        pytest.skip(f"needs the reference outputs {REFERENCE} (JAXLLM_SHARED)")
    return np.load(REFERENCE, allow_pickle=False)


@jax.jit
def logits_TV(model, ids_T):
    T = len(ids_T)
    return model(ids_T[None], jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))[0]


def logits(found, ids):
    return np.asarray(logits_TV(found.model, jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p["text"][:12])
def test_texts_have_the_ids_and_logits_of_transformers(prompt, smollm2):
    assert [*smollm2.start, *smollm2.tokenizer.encode(prompt["text"])] == prompt["ids"]
    assert smollm2.tokenizer.decode(prompt["ids"]) == prompt["text"]
    got = logits(smollm2, prompt["ids"])[:, prompt["columns"]]
    np.testing.assert_allclose(got, prompt["logits"], atol=2e-3, rtol=0)


def test_all_logits_are_those_of_transformers(smollm2, reference):
    for i in range(len(PROMPTS)):
        got = logits(smollm2, reference[f"ids_{i}"][0])
        np.testing.assert_allclose(got, reference[f"logits_{i}"], atol=2e-3, rtol=0)


def test_the_generate_verb_continues_all_prompts_together_as_transformers_does_each(file):
    cfg = GenerateConfig(
        model=str(file), prompt=tuple(p["text"] for p in PROMPTS), max_new_tokens=32, sampling=Greedy(), stream=False
    )
    out = io.StringIO()
    completions = generate(cfg, out)
    assert [list(c.tokens) for c in completions] == [p["greedy"] for p in PROMPTS]
    assert [c.finish for c in completions] == ["eos" if p["greedy"][-1] == 2 else "length" for p in PROMPTS]
    assert out.getvalue().startswith("The capital of France is Paris.")


def test_a_conversation_is_answered_as_by_transformers(smollm2):
    chat = GOLDEN["chat"]
    (completion,) = inference.generate(smollm2.model, [chat["ids"]], max_new_tokens=32, eos_id=smollm2.tokenizer.eos_id)
    assert list(completion.tokens) == chat["greedy"]


@pytest.mark.slow
def test_the_loss_on_wikitext_is_that_of_transformers(smollm2, reference):
    ids = reference["ppl_ids"][0]
    logp = jax.nn.log_softmax(logits(smollm2, ids)[:-1].astype(np.float64))
    nats = -np.take_along_axis(np.asarray(logp), ids[1:, None], axis=1).mean()
    assert nats == pytest.approx(2.5966, abs=1e-4)
    assert nats == pytest.approx(float(reference["ppl_nll"]), abs=2e-5)


@pytest.mark.slow
def test_written_as_a_folder_transformers_loads_it_with_the_same_ids_logits_and_continuations(file, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = convert(file, tmp_path / "run")
    folder = convert(checkpoint, tmp_path / "folder", family="llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    for prompt in PROMPTS:
        ids = torch.tensor([prompt["ids"]])
        assert tokenizer(prompt["text"])["input_ids"] == prompt["ids"]
        with torch.no_grad():
            got = theirs(ids).logits[0, :, prompt["columns"]].numpy()
        np.testing.assert_allclose(got, prompt["logits"], atol=2e-3, rtol=0)
    for prompt in PROMPTS[:2]:  # one ends early
        ids = torch.tensor([prompt["ids"]])
        said = theirs.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=2, pad_token_id=2)
        assert said[0, ids.shape[1] :].tolist() == prompt["greedy"]


def test_a_file_that_is_not_the_one_known_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("model/x", b"1234")
    right = hashlib.sha256(b"1234").hexdigest()
    with zipfile.ZipFile(tmp_path / "a.whl") as archive:
        take(archive, File("model/x", 4, right), tmp_path / "x", "a.whl")
        assert (tmp_path / "x").read_bytes() == b"1234"
        for other in (File("model/x", 3, right), File("model/x", 4, "0" * 64)):
            with pytest.raises(SystemExit, match="a.whl: model/x has 4 bytes .* is another file"):
                take(archive, other, tmp_path / "x", "a.whl")
