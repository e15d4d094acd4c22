"""The command line as processes and as a function: exit status, messages, and which config reaches a verb."""

import importlib.util
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from jaxllm import cli, doctor, verbs
from jaxllm.core.config import dump, load, parse
from jaxllm.core.errors import ConfigError
from jaxllm.inference.config import Beam, ChatConfig, GenerateConfig, Greedy, Sample
from jaxllm.train.config import RunConfig

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/train/quickstart.yaml"


def jaxllm(*argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "jaxllm", *argv], capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def asked(monkeypatch) -> list:
    """What a verb would have been called with, as (config, overrides)."""
    calls = []
    for verb in ("prepare", "train", "generate", "chat"):
        monkeypatch.setattr(verbs, verb, lambda config, *overrides: calls.append((config, overrides)))
    return calls


def test_a_config_error_is_a_message_on_stderr_and_status_2_without_a_traceback(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("steps: -3\n")
    done = jaxllm("train", str(wrong), "batch=two")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{wrong}:\n") and "Traceback" not in done.stderr
    assert "steps: Input should be greater than 0 (got -3)" in done.stderr and "batch: Input should be" in done.stderr


def test_help_names_every_verb_and_asks_for_no_config():
    done = jaxllm("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_listing_of_fields_is_aligned_and_survives_a_closed_pipe():
    lines = jaxllm("train", "--fields").stdout.splitlines()
    columns = [lines[0].index(word) for word in ("type", "default", "meaning")]
    assert len(lines) > 100
    assert all(line[c - 1] == " " and line[c] != " " for line in lines for c in columns)
    head = f"{sys.executable} -m jaxllm train --fields | head -n 1"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(head, shell=True, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("field ") and done.stderr == ""


@pytest.mark.parametrize("argv, told", [
    (["trian", "x.yaml"], "no verb 'trian'; did you mean 'train'?"),
    (["zzz"], "no verb 'zzz'; known: prepare, plan, train"),
    (["train"], "no config given; for example: jaxllm train configs/train/quickstart.yaml"),
    (["train", "nope.yaml"], "nope.yaml: no such config file"),
    (["generate", "nope.yaml"], "nope.yaml: no such config file"),
    (["report", "nope"], "nope: holds no metrics.jsonl"),
    (["plan"], "no config given; for example: jaxllm plan configs/train/125m_v5e8.yaml"),
    (["plan", "nope.yaml"], "nope.yaml: no such config file"),
    (["plan", str(QUICKSTART)], "model.vocab is not set: a plan knows no data"),
])  # fmt: skip
def test_what_is_missing_is_said_with_status_2(argv, told, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(told)


def test_the_help_of_every_verb_shows_an_example(capsys):
    for verb, (_, _, example) in cli.VERBS.items():
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        assert end.value.code == 0
        assert verb in capsys.readouterr().out and example.startswith(f"jaxllm {verb}")


def test_an_interrupt_is_status_130_and_any_other_error_keeps_its_traceback(monkeypatch):
    def raises(error):
        def verb(*args):
            raise error

        return verb

    monkeypatch.setattr(verbs, "train", raises(KeyboardInterrupt()))
    assert cli.main(["train", "x.yaml"]) == 130
    monkeypatch.setattr(verbs, "train", raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "x.yaml"])


def test_overrides_may_stand_on_either_side_of_flags(asked):
    assert cli.main(["generate", "c.yaml", "seed=1", "--prompt", "a", "stop=[b]", "--prompt", "c"]) == 0
    assert asked == [("c.yaml", ('prompt=["a", "c"]', "seed=1", "stop=[b]"))]


def test_flags_of_plan_are_what_is_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(verbs, "plan", lambda config, *overrides, **asked: calls.append((config, overrides, asked)))
    given = ["--top", "2", "--tokens", "1e9", "--price", "0", "--pue", "1.2", "--grid", "0", "--watts", "5"]
    assert (
        cli.main(["plan", "c.yaml", "--on", "", "batch=8", "--search", "--formulas", "--json", "x.json", *given]) == 0
    )
    asked = {"on": "", "search": True, "top": 2, "proof": False, "file": Path("x.json")}
    numbers = {"tokens": 1e9, "price": 0.0, "pue": 1.2, "grid": 0.0, "watts": 5.0}
    assert calls == [("c.yaml", ("batch=8",), asked | numbers)]


@pytest.mark.parametrize("flags, sampling", [
    ([], Beam(width=2)),
    (["--temperature", "0.5"], Sample(temperature=0.5)),
    (["--top-k", "3", "--top-p", "0.5"], Sample(top_k=3, top_p=0.5)),
    (["--temperature", "0"], Greedy()),
    (["--temperature", "0.5", "sampling.min_p=0.1"], Sample(temperature=0.5, min_p=0.1)),
    (["sampling=greedy"], Greedy()),
])  # fmt: skip
def test_flags_of_generate_are_short_for_overrides(asked, tmp_path, flags, sampling):
    file = tmp_path / "g.yaml"
    file.write_text("model: runs/x\nprompt: [a]\nsampling: {kind: beam, width: 2}\n")
    cli.main(["generate", str(file), *flags, "--prompt", 'é\n: "x"', "--seed", "3", "--max-new-tokens", "5"])
    ((config, overrides),) = asked
    cfg = load(GenerateConfig, config, overrides)
    assert cfg == GenerateConfig(model="runs/x", prompt=('é\n: "x"',), sampling=sampling, seed=3, max_new_tokens=5)


def test_flags_of_chat_are_short_for_overrides(asked):
    given = ["--prompt", "-a", "--system=--be brief", "--template", "chatml", "--temperature", "0", "--seed", "3"]
    cli.main(["chat", "m.gguf", *given, "--prompt", "b", "--max-new-tokens", "5", "step=2"])
    ((config, overrides),) = asked
    wanted = {"turns": ("-a", "b"), "system": "--be brief", "template": "chatml", "sampling": Greedy()}
    assert config == "m.gguf"
    assert parse(ChatConfig, {"model": "x"}, overrides) == ChatConfig(
        model="x", step=2, seed=3, max_new_tokens=5, **wanted
    )
    assert cli.main(["chat", "m.gguf"]) == 0 and asked[1:] == [("m.gguf", ())]


ODD = ["", "-x", "--", "--prompt", "--seed 3", "a=b", "- a", "[b", "😀", "\x7f\x85\u2028\ufeff"]


@given(st.text() | st.sampled_from(ODD))
@pytest.mark.parametrize("written", [lambda text: ["--prompt", text], lambda text: [f"--prompt={text}"]])
def test_any_text_may_be_a_prompt(written, text):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs, "generate", lambda config, *overrides: calls.append(overrides))
        assert cli.main(["generate", *written(text), "c.yaml", "seed=2"]) == 0
    (overrides,) = calls
    assert parse(GenerateConfig, {"model": "x"}, overrides) == GenerateConfig(model="x", prompt=(text,), seed=2)


def test_top_k_of_a_greedy_choice_is_refused(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--temperature", "0", "--top-k", "2"]) == 2
    assert "sampling.top_k: no such field" in capsys.readouterr().err


def test_a_folder_in_place_of_a_config_still_needs_a_prompt(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"generate {tmp_path}:\n  prompt: is required\n"


def test_a_notebook_may_hand_over_a_config_object():
    cfg = load(RunConfig, QUICKSTART)
    assert verbs.resolve(RunConfig, cfg) is cfg
    assert verbs.resolve(RunConfig, cfg, ("steps=7",)) == cfg.model_copy(update={"steps": 7})
    with pytest.raises(ConfigError, match="a GenerateConfig is needed here, got a RunConfig"):
        verbs.resolve(GenerateConfig, cfg)


def test_a_config_tells_which_verb_it_is_for(tmp_path):
    generate = tmp_path / "g.yaml"
    generate.write_text(dump(GenerateConfig(model="x", prompt=("a",))))
    assert [verbs.verb_of(p) for p in (ROOT / "configs/data/quickstart.yaml", QUICKSTART, generate)] == [
        "prepare",
        "train",
        "generate",
    ]
    (tmp_path / "c.yaml").write_text("model: x\ntemplate: chatml\n")
    assert verbs.verb_of(tmp_path / "c.yaml") == "chat"


def test_a_config_of_another_verb_is_told_before_its_errors(capsys):
    data = ROOT / "configs/data/quickstart.yaml"
    assert cli.main(["train", str(data)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [f"{data}: this is a config for `jaxllm prepare`", f"{data}:"]
    assert cli.main(["train", str(QUICKSTART), "stepz=1"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"{QUICKSTART}:"


def test_a_report_draws_both_curves_and_skips_a_half_written_line(tmp_path, capsys):
    log = """{"step": 1, "loss": 5.0}
{"event": "compile", "message": "x"}
{"step": 2, "loss": "nan"}
{"step": 2, "validation_loss": 4.5}
{"st"""
    (tmp_path / "metrics.jsonl").write_text(log)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "loss.png"
    png = (tmp_path / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (1050, 600)
    assert len(np.unique(np.frombuffer(pixels(png), np.uint8))) > 10  # something is drawn


def pixels(png: bytes) -> bytes:
    at, data = 8, b""
    while at < len(png):
        size = int.from_bytes(png[at : at + 4])
        data += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    return zlib.decompress(data)


def test_doctor_tells_missing_from_old_from_good():
    assert doctor.unmet(Requirement("numpy>=1")) is None
    assert doctor.unmet(Requirement("no-such-package>=1")) == (
        "no-such-package",
        "is not installed",
        f"{sys.executable} -m pip install 'no-such-package>=1'",
    )
    name, found, remedy = doctor.unmet(Requirement("numpy>=99"))
    assert (name, remedy) == ("numpy", doctor.pip("numpy>=99")) and found.endswith("needed is >=99")


def test_doctor_finds_that_a_config_does_not_fit_what_is_here(tmp_path):
    def states(*overrides):
        return [(f.state, f.subject) for f in doctor.fit(str(QUICKSTART), overrides)]

    assert states("stepz=3") == [("missing", "config")]
    assert states(f"data.path={tmp_path}") == [("good", "config"), ("missing", "fit")]


def test_doctor_names_each_sink_whose_package_is_not_here(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = [f for f in doctor.fit(str(QUICKSTART), ["metrics.sinks=[tensorboard, wandb]"]) if "sink" in f.subject]
    assert [(f.state, f.subject) for f in found] == [("missing", "sink tensorboard"), ("missing", "sink wandb")]
    assert "tensorboardX is not installed" in found[0].found
    assert [f.remedy for f in found] == [doctor.pip("jaxllm[tensorboard]"), doctor.pip("jaxllm[wandb]")]


def test_doctor_finds_that_a_model_to_generate_from_is_not_there(tmp_path):
    config = tmp_path / "g.yaml"
    config.write_text(dump(GenerateConfig(model=str(tmp_path / "run"), prompt=("a",))))
    assert [(f.state, f.subject) for f in doctor.fit(str(config))] == [("good", "config"), ("missing", "model")]
    assert f"{tmp_path / 'run'}: no checkpoint here" in [*doctor.fit(str(config))][1].found


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_doctor_says_that_a_platform_asked_for_is_not_here(platform):
    if importlib.util.find_spec("jax_plugins"):
        pytest.skip("JAX has plugins here, so a platform may start")
    script = "from jaxllm import doctor\nfor f in doctor.machine(): print(f.state, f.subject, f.found, '->', f.remedy)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith(f"missing devices JAX_PLATFORMS={platform} cannot start; ")
    assert "-> unset JAX_PLATFORMS" in done.stdout and ("jaxllm[cuda]" in done.stdout) == (platform == "cuda")


def test_doctor_ends_with_status_1_if_something_needed_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "findings", lambda state, _: iter([doctor.Finding(state, "jax", "is not here", "pip install jax")])
    )
    assert [doctor.examine(state) for state in ("missing", "note", "good")] == [1, 0, 0]
    assert capsys.readouterr().out.count("-> pip install jax") == 3


def test_doctor_says_what_this_machine_has(capsys):
    if doctor.installed("jaxllm") is None:
        pytest.skip("jaxllm is not installed here: pip install -e .")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "4 x cpu (cpu), 1 process" in out and "extra tensorboard" in out
