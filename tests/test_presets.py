"""Published models as configs: they load, count what their sources say, and are written as the folders they name."""

import itertools
import math
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxllm import presets
from jaxllm.cli import main
from jaxllm.core.config import load, read_tree
from jaxllm.core.errors import UserError
from jaxllm.models.count import non_embedding, parameters, vocabulary
from jaxllm.train.config import RunConfig

ROOT = Path(__file__).parents[1]
ROWS = presets.published()
FILES = sorted(presets.MODELS.glob("*.yaml"))
FAMILIES = {family: list(rows) for family, rows in itertools.groupby(ROWS.values(), key=lambda row: row.family)}
EACH_FAMILY = pytest.mark.parametrize("rows", FAMILIES.values(), ids=FAMILIES)


def rounding(published: str) -> float:
    """How far the count may be from a number as it is written: 0 for 6738415616, half of 0.1e9 for 6.7e9."""
    if published.isdigit():
        return 0.0
    digits, _, exponent = published.partition("e")
    return 0.5 * 10.0 ** (int(exponent) - len(digits.partition(".")[2]))


# --- the table and the files -------------------------------------------------------------------------------------------


def test_every_preset_has_a_line_and_every_line_a_preset():
    lines = (presets.MODELS / "published.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == list(presets.Published._fields)
    assert sorted(line.partition("\t")[0] for line in lines[1:]) == sorted(path.stem for path in FILES)
    assert all(cell and cell == cell.strip() for row in ROWS.values() for cell in row)


def test_a_file_opens_with_the_model_and_who_published_it():
    for path in FILES:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        assert re.match(r"# .+ \(.*20\d\d.*\)", first), f"{path.name}: {first}"
        assert path.name == path.name.lower()


def test_families_stand_together():
    families = [row.family for row in ROWS.values()]
    changes = [a for a, b in zip(families, [*families[1:], None], strict=True) if a != b]
    assert len(changes) == len(set(families))


# --- sizes -------------------------------------------------------------------------------------------------------------


@EACH_FAMILY
def test_parameters_are_those_that_their_source_says(rows):
    for row in rows:
        cfg = presets.preset(row.preset)
        again = {"total": 0, "head_twice": cfg.table_width * vocabulary(cfg)}[row.counted]
        assert not again or cfg.tie
        said = {row.parameters: parameters(cfg) + again, row.non_embedding: non_embedding(cfg)}
        for published, counted in said.items():
            if published != "-":
                allowed = rounding(published) if row.within == "-" else float(row.within)
                assert abs(counted - float(published)) <= allowed, f"{row.preset}: {counted:,}, published {published}"


def test_what_is_further_off_than_rounding_says_why():
    for row in ROWS.values():
        if row.within != "-":
            assert float(row.within) > min(rounding(n) for n in (row.parameters, row.non_embedding) if n != "-")
            assert float(row.within) <= 0.17 * float(row.parameters)
            assert row.note != "-", row.preset


def test_most_sizes_are_held_to_the_last_parameter():
    exact = [row for row in ROWS.values() if row.parameters.isdigit()]
    assert len(exact) > len(ROWS) / 2
    assert [row.preset for row in exact if row.within != "-"] == ["gpt_j_6b"]


def test_the_context_is_the_published_one():
    assert {name: presets.preset(name).context for name in ROWS} == {n: int(row.context) for n, row in ROWS.items()}


def shapes_add_up(name: str) -> None:
    from jaxllm.models.module import abstract

    cfg = presets.preset(name)
    assert sum(math.prod(x.shape) for x in abstract(cfg)[1].values()) == parameters(cfg)


@pytest.mark.parametrize("name", ["gpt1", "opt_350m", "gemma3_1b", "ctrl_1.6b", "palm_540b", "glm_130b", "falcon_40b"])
def test_a_built_model_has_the_counted_parameters(name):
    shapes_add_up(name)


@pytest.mark.slow
@EACH_FAMILY
def test_every_built_model_has_the_counted_parameters(rows):
    for name in {presets.preset(row.preset): row.preset for row in rows}.values():
        shapes_add_up(name)


# --- Hugging Face ------------------------------------------------------------------------------------------------------


@EACH_FAMILY
def test_a_preset_is_written_as_the_folders_that_are_named(rows):
    from jaxllm.interop.folder import BY_KIND

    for row in rows:
        if row.folders != "-":
            BY_KIND[row.folders].theirs(presets.preset(row.preset))  # what comes back is compared there


@pytest.mark.slow
@EACH_FAMILY
def test_transformers_counts_as_many_parameters_in_such_a_folder(rows):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxllm.interop.folder import BY_KIND

    for row in rows:
        cfg = presets.preset(row.preset)
        said = {} if row.folders == "-" else BY_KIND[row.folders].theirs(cfg)
        if said.get("model_type") not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers has no class of its own for {row.family}")
        theirs = transformers.CONFIG_MAPPING[said.pop("model_type")](**said)
        # T5's class ties head and embedding until it has read two that differ.
        apart = theirs.tie_word_embeddings and not said.get("tie_word_embeddings", True)
        with torch.device("meta"):
            model = getattr(transformers, said["architectures"][0])._from_config(theirs)
        weights = [*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")]
        assert sum(p.numel() for p in weights) + apart * cfg.table_width * vocabulary(cfg) == parameters(cfg), (
            row.preset
        )


# --- where presets are used --------------------------------------------------------------------------------------------


def test_training_configs_of_published_models_take_their_presets():
    cfg = load(RunConfig, ROOT / "configs/train/llama2_70b_v6e256.yaml")
    assert cfg.model == presets.preset("llama2_70b")
    padded = load(RunConfig, ROOT / "configs/train/gpt3_175b_v5p1024.yaml").model
    assert padded == presets.preset("gpt3_175b").model_copy(update={"vocab": 50304})


def test_a_preset_given_for_a_run_is_told_what_it_is(capsys):
    path = presets.path("gpt2_xl")
    assert main(["train", str(path)]) == 2
    wanted = f"{path}: this is a model; a training config takes it by `model: {{base: {path}}}`\n"
    assert capsys.readouterr().err == wanted


def test_a_preset_that_is_not_there_is_told_its_neighbours():
    with pytest.raises(UserError, match="no model preset 'llama2-7b'; did you mean llama2_7b,"):
        presets.preset("llama2-7b")
    with pytest.raises(UserError, match="no model preset '../train/quickstart'; `jaxllm models` lists them"):
        presets.preset("../train/quickstart")


def test_a_preset_printed_whole_is_a_file_of_the_same_preset(tmp_path, capsys):
    assert main(["models", "gemma2_2b"]) == 0
    (tmp_path / "printed.yaml").write_text(told := capsys.readouterr().out)
    assert presets._Preset(model=read_tree(tmp_path / "printed.yaml")).model == presets.preset("gemma2_2b")
    assert "google/gemma-2-2b" in told and "Hugging Face folders (gemma2) read and written" in told
    table = dict(re.findall(r"^#   (\S.*?)  +([\d,]+)$", told, re.MULTILINE))
    assert table["embedding"] == "589,824,000" and table["in all"] == "2,614,341,888"
    assert table["layers.0-25 (26 of 77,865,984)"] == f"{26 * 77_865_984:,}"


def test_the_list_has_every_preset_with_size_context_weights_and_source(capsys):
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines() if line.startswith("  ")}
    assert lines.keys() == ROWS.keys()
    assert re.split("  +", lines["bloom_176b"].strip()) == [
        "bloom_176b", "176,247,271,424", "2048", "bigscience/bloom", "arXiv:2211.05100, table 3; model cards"
    ]  # fmt: skip
    assert "\nBLOOM: Hugging Face folders (bloom) read and written\n" in told


@pytest.mark.parametrize("asked", ["LLaMA 3", "llama3", "llama-3"])
def test_a_family_is_listed_alone_however_its_name_is_typed(asked, capsys):
    assert main(["models", asked]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["llama3_8b", "llama3_70b", "llama3.1_8b", "llama3.1_70b", "llama3.1_405b", "llama3.2_1b", "llama3.2_3b"]  # fmt: skip


def test_what_is_neither_is_told_its_neighbours(capsys):
    assert main(["models", "gemma3-4b"]) == 2
    assert capsys.readouterr().err.startswith("no model or family 'gemma3-4b'; did you mean gemma3_4b")
    assert main(["models", "zzz"]) == 2
    assert capsys.readouterr().err == "no model or family 'zzz'; `jaxllm models` lists them\n"


def test_the_document_is_what_the_verb_prints():
    stale = "docs/models.md is stale: jaxllm models --markdown > docs/models.md"
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == presets.markdown() + "\n", stale


@pytest.mark.slow
def test_a_wheel_has_the_presets(tmp_path):
    """Installed elsewhere, the verb answers as in a checkout."""
    source = tmp_path / "source"
    for part in ("jaxllm", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    pip += ["--no-build-isolation", "-w", tmp_path, source]
    built = subprocess.run(pip, capture_output=True, text=True, check=False)
    if "BackendUnavailable" in built.stderr or "No module named pip" in built.stderr:
        pytest.skip("nothing here to build a wheel with")
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {n.removeprefix("jaxllm/configs/") for n in wheel.namelist() if n.startswith("jaxllm/configs/")}
        wheel.extractall(tmp_path / "site")
    assert names == {str(p.relative_to(presets.SHIPPED)) for d in ("models", "chat") for p in (presets.SHIPPED / d).iterdir()}  # fmt: skip
    answer = [sys.executable, "-m", "jaxllm", "models", "llama2_7b"]
    done = subprocess.run(answer, cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert done.stdout == presets.page(ROWS["llama2_7b"]) + "\n"
