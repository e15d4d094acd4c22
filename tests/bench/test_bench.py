"""What a measurement is asked, what it writes, and that what cannot work is said before anything is measured."""

import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from jaxllm import bench, cli
from jaxllm.bench import decode, load, plan, train
from jaxllm.core.errors import UserError


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list:
    """The rounds of each measurement of `constant`, a module of its own."""
    (tmp_path / "constant.py").write_text(
        "from jaxllm.bench import compare\n"
        "rounds_taken = []\n"
        "def measure(rounds):\n"
        "    rounds_taken.append(rounds)\n"
        "    return compare([2.0] * rounds, [4.0] * rounds, work=8.0) | {'versions': {'peer': '7'}}\n"
    )
    monkeypatch.setattr(bench, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jaxllm.bench.constant", raising=False)
    return importlib.import_module("jaxllm.bench.constant").rounds_taken


def test_a_result_has_both_speeds_their_ratio_and_the_versions_of_both_sides(measured, tmp_path, capsys):
    file = tmp_path / "new" / "result.json"
    assert cli.main(["bench", "constant", "--rounds", "3", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["ours"], result["peer"], result["ratio"], measured) == (4.0, 2.0, 2.0, [3])
    assert {"peer", "jax", "python"} <= result["versions"].keys()
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_no_rounds_are_refused(measured, rounds, capsys):
    assert cli.main(["bench", "constant", "--rounds", rounds]) == 2
    assert f"--rounds must be at least 1, got {rounds}" in capsys.readouterr().err and not measured


def test_a_file_that_cannot_be_written_is_told_before_measuring(measured, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "result.json"):
        assert cli.main(["bench", "constant", "--json", str(path)]) == 2
        assert f"--json {path} cannot be written" in capsys.readouterr().err
    assert not measured


def test_a_measurement_that_fails_leaves_no_file(measured, tmp_path, monkeypatch):
    def fails(rounds):
        raise UserError("cannot be measured")

    monkeypatch.setattr(sys.modules["jaxllm.bench.constant"], "measure", fails)
    with pytest.raises(UserError):
        bench.run("constant", file=tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


# --- MaxText ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sides(monkeypatch) -> list[tuple[str, str]]:
    """The (case, side) pairs that are compiled: ours twice as good, and `bad` not at all."""
    seen = []

    def compiled(python: str, side: str, case: str, file: Path) -> dict:
        seen.append((case, side))
        if python == side or python == "neither" or (python, case) == ("some", "bad"):
            raise UserError(f"{side} of {case} did not compile")
        return {figure: 1.0 + (side == "maxtext") for figure in plan.LIMITS}

    monkeypatch.setattr(plan, "CASES", {"bad": None, "good": None})
    monkeypatch.setattr(plan, "_compiled", compiled)
    monkeypatch.setattr(plan.shutil, "which", lambda python: python)
    return seen


def test_a_case_that_does_not_compile_is_written_and_counts_as_failed(sides, tmp_path):
    assert bench.run("plan", peer="maxtext", python="all")["ratio"] == 2 * min(plan.LIMITS.values())
    result = bench.run("plan", file=tmp_path / "result.json", peer="maxtext", python="some")
    assert result["cases"]["bad"] == {"error": "maxtext of bad did not compile"}
    assert result["cases"]["good"]["ours"] and result["worst"]["good"] > 1
    assert result["ratio"] == 0 and "0 for a case that does not compile" in result["unit"]
    assert json.loads((tmp_path / "result.json").read_text())["cases"] == result["cases"]


@pytest.mark.parametrize("python", ["neither", "maxtext"])
def test_if_no_case_compiles_there_is_nothing_to_write(sides, tmp_path, python):
    with pytest.raises(UserError, match="maxtext of bad did not compile"):
        bench.run("plan", file=tmp_path / "result.json", peer="maxtext", python=python)
    assert not (tmp_path / "result.json").exists()
    assert {side for _, side in sides} == {"maxtext"}  # ours, which takes minutes, was not compiled in vain


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--peer", "maxtext", "--peer-python", "/nonexistent"],
            "--peer-python /nonexistent is no program; name a Python",
        ),
        (["--peer", ""], "no peer ''; known: maxtext"),
        (["--peer", "torchtitan"], "no peer 'torchtitan'; known: maxtext"),
    ],
)
def test_a_peer_that_is_not_there_is_one_message(argv, told, capsys):
    assert cli.main(["bench", "plan", *argv]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_the_versions_of_a_training_measurement_name_torch(monkeypatch):
    if not importlib.util.find_spec("torch"):
        pytest.skip("torch, the peer, is not installed: pip install 'jaxllm[oracle]'")
    monkeypatch.setattr(train, "worker", lambda module, side: contextlib.nullcontext(lambda precision: [1.0, 1.0]))
    assert train.measure(1)["versions"] == {"torch": importlib.metadata.version("torch")}


def test_a_model_is_taken_by_the_measurements_that_can_use_one(measured, capsys):
    assert cli.main(["bench", "constant", "--model", "x.gguf"]) == 2
    assert "--model is for `jaxllm bench decode`" in capsys.readouterr().err and not measured


def test_both_readers_of_the_loading_measurement_give_what_was_written(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(load, "SHAPES", {"a": (3, 5), "b": (0,), "c": (64,)})
    result = load.measure(2)
    assert {side: len(times) for side, times in result["seconds"].items()} == {"ours": 2, "mmap": 2, "pread": 2}
    best = min(sum(result["seconds"][side]) for side in load.BACKENDS)
    assert result["ratio"] == pytest.approx(best / sum(result["seconds"]["ours"]))


def test_the_decoding_measurement_divides_each_ratio_by_what_is_wanted_of_it(monkeypatch):
    pytest.importorskip("transformers")
    spent = {"ours": 2.0, "sdpa": 4.0, "eager": 3.0}

    def worker(module, side, folder, **env):
        answer = lambda rows: {"tokens": [[1]] * rows, "seconds": rows * spent[side], "cpu_seconds": 1.0}
        return contextlib.nullcontext(answer)

    monkeypatch.setattr(decode, "worker", worker)
    monkeypatch.setattr(decode, "_folder", lambda model: contextlib.nullcontext(Path("nowhere")))
    result = decode.measure(3)
    assert result["ratio"] == pytest.approx(1.5 / 1.5) and result["batches"]["8"]["ratio"] == pytest.approx(1.5)
    assert result["ours"] == pytest.approx(128 / 2) and result["peer"] == pytest.approx(128 / 3)
    assert result["batches"]["1"]["peer_attention"] == "eager" and result["batches"]["8"]["same_tokens"] == 1
    assert result["config"]["weights"] == "random" and {"torch", "transformers"} <= result["versions"].keys()
