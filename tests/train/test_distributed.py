"""Two real processes of two fake CPU devices each; what they do must equal one process of four."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from test_loop import LENGTH, lines, losses, run_tree, wait_for_lines, write_corpus

from jaxllm.core import config
from jaxllm.core.errors import ConfigError
from jaxllm.data.config import PrepareConfig
from jaxllm.train import distributed
from jaxllm.train.checkpoint import load_params
from jaxllm.train.config import RunConfig
from jaxllm.train.distributed import Place, Pod, find, first_host
from jaxllm.train.loop import train

STEPS, KILLED_AFTER = 8, 5  # with a checkpoint at 3

# One process of a pair: trains each config of a list in turn and says in a line of JSON how that ended. A configuration
# may be of only one of the two. KILL_AFTER: the step after which this process kills itself.
DRIVER = """
import json, os, signal, sys
from jaxllm.core import config
from jaxllm.core.errors import UserError
from jaxllm.data.loader import Rows
from jaxllm.train.config import RunConfig
from jaxllm.train.loop import Loop, train

read, get, see = [], Rows.__getitem__, Loop.see

def noting(rows, r):
    read.append(r)
    return get(rows, r)

def seeing(loop, step, *rest):
    see(loop, step, *rest)
    if str(step) == os.environ.get("KILL_AFTER"):
        os.kill(os.getpid(), signal.SIGKILL)

Rows.__getitem__, Loop.see = noting, seeing
for tree in json.load(open(sys.argv[1])):
    read.clear()
    try:
        result = train(config.parse(RunConfig, tree))
        said = {"step": result.step, "stopped": result.stopped, "metrics": result.metrics}
    except UserError as e:
        said = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(said | {"read": sorted(set(read))}), flush=True)
"""


class Ended(NamedTuple):
    code: int
    said: list[dict[str, Any]]  # for each config
    output: str


class Pair:
    """Two processes under way, one list of configs for each."""

    def __init__(self, folder: Path, trees: tuple[list[dict], list[dict]], kill_after: int | None = None):
        folder.mkdir()
        port = free_port()
        self.processes, self.outputs = [], []
        for process, own in enumerate(trees):
            jobs, output = folder / f"{process}.json", folder / f"{process}.txt"
            jobs.write_text(json.dumps(own))
            env = os.environ | {
                "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder.parent / "cache"),
                # process 1 finds nothing in the cache of compiled programs: let it compile fast
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(process),
            }  # fmt: skip
            if process == 1 and kill_after:
                env["KILL_AFTER"] = str(kill_after)
            with output.open("w") as out:
                command = [sys.executable, "-c", DRIVER, str(jobs)]
                self.processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
            self.outputs.append(output)

    def end(self) -> tuple[Ended, Ended]:
        try:
            for process in self.processes:
                process.wait(timeout=240)
        finally:
            for process in self.processes:
                process.kill()
        texts = [output.read_text(errors="replace") for output in self.outputs]
        said = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in texts]
        return tuple(map(Ended, (process.returncode for process in self.processes), said, texts))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from jaxllm.data.prepare import prepare

    root = tmp_path_factory.mktemp("pairs")
    write_corpus(root / "text", 60)
    tree = {
        "out": str(root / "prepared"), "length": LENGTH, "validation": 0.1,
        "tasks": [{"name": "text", "source": {"kind": "text", "files": [f"{root}/text/*.txt"]}}],
    }  # fmt: skip
    prepare(config.parse(PrepareConfig, tree))
    return root


def tree(folder: Path, name: str, **changes: Any) -> dict:
    """A run of `STEPS` steps in `folder`; the vocabulary divides over four devices."""
    plain = run_tree(folder / "prepared", folder / name)
    plain["data"] = {"path": plain["data"]["path"]}
    plain["model"]["vocab"] = 260
    every = {"steps": STEPS, "checkpoints": {"every": 3}, "distributed": {"kind": "auto", "heartbeat_timeout": 5}}
    return plain | every | changes


@pytest.fixture(scope="module")
def unbroken(folder) -> tuple[Ended, Ended]:
    """Configs of one pair: an unbroken run, one on another mesh, three that are refused."""
    nowhere = {"path": str(folder / "nowhere")}
    both = [tree(folder, "unbroken"), tree(folder, "tensor", steps=3, mesh={"fsdp": 1, "tensor": 4})]
    (folder / "full").mkdir()
    (folder / "full" / "something").touch()
    pair = Pair(
        folder / "unbroken-pair",
        (
            [*both, tree(folder, "refused"), tree(folder, "refused", seed=1), tree(folder, "full")],
            [*both, tree(folder, "refused", data=nowhere), tree(folder, "refused", seed=2), tree(folder, "full")],
        ),
    )
    ended = pair.end()
    assert [e.code for e in ended] == [0, 0], ended[0].output + ended[1].output
    return ended


@pytest.fixture(scope="module")
def killed(folder, unbroken) -> tuple[Ended, Ended]:
    """A pair whose second process is killed after step `KILLED_AFTER`."""
    # synchronous: the checkpoint of step 3 is whole by then
    run = tree(folder, "killed", checkpoints={"every": 3, "asynchronous": False})
    return Pair(folder / "killed-pair", ([run], [run]), kill_after=KILLED_AFTER).end()


@pytest.fixture(scope="module")
def moved(folder, killed) -> Path:
    """What the killed pair left, elsewhere."""
    return shutil.copytree(folder / "killed", folder / "moved")


# --- training ---


@pytest.mark.slow
def test_two_processes_train_evaluate_and_log_as_one_does(folder, unbroken):
    train(config.parse(RunConfig, tree(folder, "alone")))
    alone, pair = lines(folder / "alone"), lines(folder / "unbroken")
    assert len(losses(folder / "unbroken")) == STEPS
    for name in ("loss", "grad_norm", "tokens", "validation_loss", "validation_bits_per_byte", "validation_accuracy"):
        ours, theirs = ([line[name] for line in run if name in line] for run in (pair, alone))
        assert ours and ours == pytest.approx(theirs, rel=1e-6)
    assert unbroken[0].said[0]["metrics"] == unbroken[1].said[0]["metrics"]


@pytest.mark.slow
def test_a_mesh_whose_inner_axis_crosses_processes_gives_the_same_losses(folder, unbroken):
    crossing, within = losses(folder / "tensor"), losses(folder / "unbroken")
    assert list(crossing) == [1, 2, 3]
    assert list(crossing.values()) == pytest.approx([within[step] for step in crossing], rel=1e-5)


@pytest.mark.slow
def test_a_process_reads_the_rows_its_devices_hold_and_no_others(unbroken):
    halves, shared = ([{r % 8 for r in ended.said[i]["read"]} for ended in unbroken] for i in (0, 1))
    assert halves == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert set(unbroken[0].said[0]["read"] + unbroken[1].said[0]["read"]) >= set(range(8 * STEPS))
    assert shared == [set(range(8))] * 2  # over `tensor` every device needs every row


@pytest.mark.slow
def test_each_process_writes_the_shards_of_its_devices_and_no_others(folder, unbroken):
    saved = folder / "unbroken" / "checkpoints" / f"{STEPS:08d}"
    files = [saved.glob(f"arrays/params/ocdbt.process_{process}/d/*") for process in range(2)]
    written = [b"".join(file.read_bytes() for file in mine) for mine in files]
    weights = jax.device_get(load_params(saved).params)
    by_width = [weights["head"], *weights["blocks.0.ffn.w_up"]]  # their first axis is `embed`
    cut = [np.split(weights["embedding"], 4, 1), *(np.split(x, 4) for x in by_width)]
    for shards in cut:
        for device, shard in enumerate(shards):
            assert [shard.tobytes() in mine for mine in written] == [device < 2, device >= 2]


# --- what goes wrong ---


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_both(unbroken):
    one, other = (ended.said[2]["error"] for ended in unbroken)
    assert one == other
    assert one.startswith("DataError") and "nowhere" in one


@pytest.mark.slow
def test_processes_with_different_configs_are_refused_field_by_field(unbroken):
    for ended in unbroken:
        assert "process 1 is not what process 0 is" in ended.said[3]["error"]
        assert "seed: 1 there, 2 here" in ended.said[3]["error"]


@pytest.mark.slow
def test_a_folder_that_process_0_refuses_is_refused_by_both(folder, unbroken):
    for ended in unbroken:
        assert ended.said[4]["error"].startswith("ConfigError") and "is not empty" in ended.said[4]["error"]
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_when_a_process_dies_the_other_ends_with_an_error(folder, killed):
    assert [bool(ended.code) for ended in killed] == [True, True]
    assert killed[1].code == -signal.SIGKILL
    assert not killed[0].said  # it did not return
    assert "died" in killed[0].output or "crashed" in killed[0].output
    assert max(losses(folder / "killed")) < STEPS


@pytest.mark.slow
def test_a_killed_pair_goes_on_to_the_bit_until_sigterm_to_one_stops_both(folder, unbroken, killed, moved):
    run = tree(folder, "killed", steps=5000)
    pair = Pair(folder / "restarted-pair", ([run], [run]))
    wait_for_lines(pair.processes[0], folder / "killed", 2 * STEPS)
    pair.processes[1].send_signal(signal.SIGTERM)
    ended = pair.end()
    assert [e.code for e in ended] == [0, 0], ended[0].output + ended[1].output
    assert resumed(folder / "killed") == ["resumed at step 3"]
    again, once = losses(folder / "killed"), losses(folder / "unbroken")
    assert {step: again[step] for step in once} == once
    assert [(e.said[0]["step"], e.said[0]["stopped"]) for e in ended] == [(max(again), "SIGTERM")] * 2
    assert max(again) == max(int(p.name) for p in (folder / "killed" / "checkpoints").iterdir()) < 5000


@pytest.mark.slow
def test_what_a_killed_pair_has_saved_goes_on_in_one_process(folder, unbroken, moved):
    train(config.parse(RunConfig, tree(folder, "moved")))  # the four devices of this process
    assert resumed(moved) == ["resumed at step 3"]
    assert list(losses(moved).values()) == pytest.approx(list(losses(folder / "unbroken").values()), rel=1e-6)


def resumed(run: Path) -> list[str]:
    return [line["message"].partition(" from")[0] for line in lines(run) if line.get("event") == "resume"]


# --- who takes part ---

AUTO = config.parse(RunConfig, {**run_tree(Path("p"), Path("o"))}).distributed
MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2412")}
MPI4 = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
OURS = {"JAX_COORDINATOR_ADDRESS": "a.b:12", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


def place(env: dict[str, str], platforms: str | None = None, kind: str = "auto") -> Place | Pod | None:
    return find(AUTO if kind == "auto" else with_distributed(kind), env, platforms)


def with_distributed(value: Any):
    return config.parse(RunConfig, run_tree(Path("p"), Path("o")) | {"distributed": value}).distributed


def test_without_a_launcher_a_process_is_alone():
    assert place({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}) is None  # inside sbatch, outside srun
    assert place({}, "cpu") is None
    assert place(OURS | SLURM | MPI, kind="none") is None


def test_our_variables_come_before_those_of_a_launcher():
    assert place(OURS | SLURM) == Place("JAX_COORDINATOR_ADDRESS", "a.b:12", 3, 2)
    assert place(OURS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_a_slurm_task_knows_its_place_and_its_gpu():
    found = place(SLURM)
    host, port = found.coordinator.split(":")
    assert (host, found.processes, found.process, found.devices) == ("gpu003", 8, 5, (1,))
    assert 61440 <= int(port) < 65536
    assert place(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).coordinator == found.coordinator
    assert place(SLURM | {"SLURM_JOB_ID": "78"}).coordinator != found.coordinator


def test_one_slurm_task_a_node_has_all_its_gpus_and_so_has_one_that_slurm_gave_its_own():
    assert place(SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}).devices is None
    assert place(SLURM | {"CUDA_VISIBLE_DEVICES": "1"}).devices is None
    assert place(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == (1,)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n7", "n7"), ("n7,n9", "n7"), ("node[001-015],x2", "node001"), ("a[3,7-9]-ib", "a3-ib"), ("a-1.b[2]", "a-1.b2")],
)
def test_the_first_host_of_a_slurm_list_is_the_coordinator(nodes, host):
    assert first_host(nodes) == host


def test_open_mpi_tells_rank_and_host():
    assert place(MPI | MPI4) == Place("OMPI_COMM_WORLD_RANK", place(MPI | MPI4).coordinator, 4, 2, (1,))
    assert place(MPI | MPI4).coordinator.startswith("10.96.0.1:")
    assert place(MPI | {"JAX_COORDINATOR_ADDRESS": "h:1"}).coordinator == "h:1"
    one_host = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-h-1@1"}
    assert place(one_host).coordinator.startswith("127.0.0.1:")


def test_a_pod_is_told_from_a_tpu_of_one_host():
    assert place({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu") == Pod("TPU_WORKER_HOSTNAMES")
    assert place({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu") is None
    assert place({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu") is None
    assert place({"TPU_WORKER_HOSTNAMES": "WARNING: could not tell, please set it"}, "tpu,cpu") is None
    assert place({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "tpu,cpu") == Pod("MEGASCALE_COORDINATOR_ADDRESS")
    assert place({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu") is None


@pytest.mark.parametrize(
    ("endpoints", "pod"), [("a:0:10.0.0.1,b:1:10.0.0.2", True), ("10.0.0.1", False), (None, False)]
)
def test_the_metadata_server_tells_how_many_hosts_a_tpu_has(endpoints, pod):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = endpoints and self.headers["Metadata-Flavor"] == "Google" and "worker-network" in self.path
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((endpoints or "").encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = place({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, "tpu,cpu")
        server.shutdown()
    assert isinstance(found, Pod) == pod


def test_a_metadata_server_that_is_not_there_leaves_a_tpu_alone():
    assert place({"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}, "tpu,cpu") is None


WRONG = {
    "JAX_COORDINATOR_ADDRESS set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID": (
        {"JAX_COORDINATOR_ADDRESS": "a.b:12"}, "auto",
    ),
    "JAX_PROCESS_ID=3 must be from 0 to 2": (OURS | {"JAX_PROCESS_ID": "3"}, "auto"),
    "JAX_PROCESS_ID='two' must be a whole number": (OURS | {"JAX_PROCESS_ID": "two"}, "auto"),
    "JAX_COORDINATOR_ADDRESS=a.b must be host:port": (OURS | {"JAX_COORDINATOR_ADDRESS": "a.b"}, "auto"),
    "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT": (MPI, "auto"),
    "start it with srun": ({}, "slurm"),
    "start it with mpirun": ({}, "openmpi"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_half_of_what_is_needed_is_refused_with_what_is_missing(message):
    env, kind = WRONG[message]
    with pytest.raises(ConfigError) as e:
        place(env, kind=kind)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "distributed.coordinator"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id=2 must be below num_processes=2"),
        ({"coordinator": "host:1", "num_processes": 2}, "distributed.process_id: is required"),
    ],
)
def test_a_wrong_address_is_refused_by_the_config(address, message):
    with pytest.raises(ConfigError, match=message):
        with_distributed({"kind": "address"} | address)


def test_process_0_says_that_its_port_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        cfg = with_distributed({"kind": "address", "coordinator": here, "num_processes": 2, "process_id": 0})
        with pytest.raises(ConfigError, match="process 0 cannot listen on port"):
            distributed.join(cfg)
    assert not jax.distributed.is_initialized()


def test_a_coordinator_that_does_not_answer_is_named_after_the_stated_time(tmp_path):
    address = {"kind": "address", "coordinator": f"127.0.0.1:{free_port()}", "num_processes": 2, "process_id": 1}
    run = run_tree(tmp_path / "prepared", tmp_path / "run") | {"distributed": address | {"start_timeout": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    command = [sys.executable, "-m", "jaxllm", "train", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, check=False, env=os.environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert (
        f"within 1 s (distributed.start_timeout): the coordinator {address['coordinator']} does not answer"
        in ended.stderr
    )


def test_one_process_agrees_with_itself():
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.together(lambda: 2) == distributed.from_first(lambda: 2) == 2
    assert distributed.first() and not distributed.told_to_stop(1)
