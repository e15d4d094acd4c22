import json
import math
import os
import pty
import sys
import termios

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.core.metrics import Metrics, TensorBoard, WandB
from jaxllm.core.sinks import open_sinks, progress_line, truncate_after

QUIET = Metrics(console=False)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def log_steps(folder, steps, cfg=QUIET, **metrics):
    with open_sinks(cfg, folder, "run", 100) as sinks:
        for step in steps:
            sinks.log(step, {"loss": 1.0 / step} | metrics)


def test_metrics_and_events_are_one_json_object_a_line_in_order(tmp_path):
    with open_sinks(QUIET, tmp_path / "new" / "run", "run", 100) as sinks:
        sinks.log(1, {"loss": np.float32(2.5), "tokens": np.int64(7), "note": "größer"})
        sinks.event("rewind", "loss spiked", step=1, losses=[1.0, 2.0])
    first, second = lines(tmp_path / "new" / "run")
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "loss": 2.5, "tokens": 7, "note": "größer"}
    assert second == {"event": "rewind", "message": "loss spiked", "step": 1, "losses": [1.0, 2.0]}


def test_each_line_is_on_disk_before_the_next(tmp_path):
    sinks = open_sinks(QUIET, tmp_path, "run", 100)
    for step in range(1, 4):
        sinks.log(step, {"loss": 1.0})
        assert [x["step"] for x in lines(tmp_path)] == list(range(1, step + 1))
    sinks.close()


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf"), "d": 1.5}
    with open_sinks(QUIET, tmp_path, "run", 100) as sinks:
        sinks.log(1, values)
        sinks.event("skip", "not finite", losses=[float("nan")])
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(text[0], parse_constant=refuse)
    assert (read["a"], read["b"], read["c"]) == ("nan", "inf", "-inf")
    np.testing.assert_array_equal([float(read[k]) for k in values], [float(v) for v in values.values()])
    assert json.loads(text[1], parse_constant=refuse)["losses"] == ["nan"]


def test_a_run_killed_at_any_byte_and_resumed_holds_each_step_once(tmp_path):
    log_steps(tmp_path, range(1, 9))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        checkpoint = min(4, complete)
        truncate_after(tmp_path / "metrics.jsonl", checkpoint)
        log_steps(tmp_path, range(checkpoint + 1, 9))
        assert [x["step"] for x in lines(tmp_path)] == list(range(1, 9))
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_line_that_lost_only_its_line_end_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    truncate_after(tmp_path / "metrics.jsonl", 2)
    log_steps(tmp_path, [3])
    assert [x["step"] for x in lines(tmp_path)] == [1, 2, 3]


def test_events_outlive_the_steps_that_are_taken_back(tmp_path):
    with open_sinks(QUIET, tmp_path, "run", 100) as sinks:
        sinks.log(50, {"loss": 9.0})
        sinks.event("rewind", "to step 40", step=50)
    truncate_after(tmp_path / "metrics.jsonl", 40)
    assert [x.get("event") for x in lines(tmp_path)] == ["rewind"]


def test_damaged_lines_are_dropped_and_a_missing_file_stays_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step": 1}\n{"ste\n\xff\xfe\n7\n\n{"step": 2}\n{"step": 4}\n{"step": 5, "lo')
    truncate_after(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_processes_other_than_the_first_write_nothing(tmp_path, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log_steps(tmp_path / "run", [1, 2], cfg=Metrics(sinks=(TensorBoard(),)))
    assert not (tmp_path / "run").exists()


# --- console ---------------------------------------------------------------------------------------------------------


def test_the_progress_line_says_what_is_known():
    metrics = {"loss": 3.21449, "learning_rate": 3e-4, "tokens_per_second": 12_345.0, "mfu": 0.4123, "grad_norm": 1.0}
    assert (
        progress_line(120, 1000, metrics, 65.2)
        == "step 120/1000  loss 3.214  lr 3.0e-04  12.3k tokens/s  MFU 41.2%  1:05 left"
    )
    assert progress_line(1, 9, {"loss": math.nan}, None) == "step 1/9  loss nan"
    assert progress_line(9, 9, {"validation/loss": 2.5}, 3661.0) == "step 9/9  validation/loss 2.5  1:01:01 left"


def test_without_a_terminal_each_log_is_a_line(tmp_path, capsys):
    log_steps(tmp_path, [50, 60], cfg=Metrics(), step_time=2.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 50/100  loss 0.020  1:40 left",
        "step 60/100  loss 0.017  1:20 left",
    ]


def test_time_left_is_reckoned_from_the_pace_of_the_logs_where_no_step_time_is_given(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 30.0])
    monkeypatch.setattr("jaxllm.core.sinks.time.monotonic", lambda: next(clock))
    log_steps(tmp_path, [10, 20], cfg=Metrics())
    assert [line.split("  ")[2:] for line in capsys.readouterr().err.splitlines()] == [[], ["4:00 left"]]


def test_on_a_terminal_one_line_lives_and_an_event_gets_a_line_of_its_own(tmp_path, monkeypatch):
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 40))
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with open_sinks(Metrics(), tmp_path, "run", 100) as sinks:
            sinks.log(10, {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 5e6, "step_time": 1.0})
            sinks.log(20, {"loss": 0.5})
            sinks.event("checkpoint", "saved")
            sinks.log(30, {"loss": 0.25, "step_time": 1.0})
        seen = b""
        while not seen.endswith(b"left\r\n") or seen.count(b"\n") < 2:  # a terminal hands over what it has, in pieces
            seen += os.read(parent, 10_000)
    os.close(parent)
    first, second, third = seen.decode().split("\r\n")
    drawn = first.split("\r")
    assert [text.split("  ")[0].split(":")[0] for text in drawn] == ["step 10/100", "step 20/100", "checkpoint"]
    assert all(len(text) < 40 for text in drawn)
    assert len(drawn[1]) == len(drawn[0]) == 39  # the shorter line wipes out the longer
    assert drawn[2].rstrip() == "checkpoint: saved"
    assert second.startswith("step 30/100") and third == ""


# --- extras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink, package", [(TensorBoard(), "tensorboardX"), (WandB(), "wandb")])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, sink, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed; pip install 'jaxllm\[{sink.kind}\]'"):
        open_sinks(Metrics(console=False, sinks=(sink,)), tmp_path, "run", 100)


def test_tensorboard_files_hold_the_scalars_and_no_tensorflow_is_loaded(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    before = "tensorflow" in sys.modules
    with open_sinks(Metrics(console=False, sinks=(TensorBoard(),)), tmp_path, "run", 100) as sinks:
        sinks.log(3, {"loss": np.float32(1.25), "note": "text", "bad": float("nan")})
        sinks.log(4, {"loss": 1.0})
        sinks.event("rewind", "to step 2", step=4)
    assert ("tensorflow" in sys.modules) == before
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (tmp_path / "tensorboard").iterdir()
    data, at, scalars, tags = file.read_bytes(), 0, [], set()
    while at < len(data):  # records: length uint64, its crc32, the bytes, their crc32
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag == "loss"]
        tags |= {v.tag.split("/")[0] for v in event.summary.value}
        at += size + 16
    assert scalars == [(3, "loss", 1.25), (4, "loss", 1.0)]
    assert tags == {"loss", "bad", "rewind"}


def test_an_offline_wandb_run_keeps_its_id_when_it_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = Metrics(console=False, sinks=(WandB(mode="offline"),))
    log_steps(tmp_path, [1, 2], cfg)
    run_id = (tmp_path / "wandb_id.txt").read_text()
    log_steps(tmp_path, [2, 3], cfg)
    assert (tmp_path / "wandb_id.txt").read_text() == run_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
