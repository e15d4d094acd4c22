"""What a measurement is asked, what it writes, and that what cannot work is said before anything is measured."""

import contextlib
import importlib.metadata
import importlib.util
import json
import sys

import pytest

from jaxllm import bench, cli
from jaxllm.bench import train


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


def test_the_versions_of_a_training_measurement_name_torch(monkeypatch):
    if not importlib.util.find_spec("torch"):
        pytest.skip("torch, the peer, is not installed: pip install 'jaxllm[oracle]'")
    monkeypatch.setattr(train, "_worker", lambda side: contextlib.nullcontext(lambda precision: [1.0, 1.0]))
    assert train.measure(1)["versions"] == {"torch": importlib.metadata.version("torch")}
