"""Several processes that train one run: how they find each other, and how they agree.

Who takes part is told by the config or by what launched the process (`find`); JAX's own runtime does the rest. Values
and errors of the host go through its coordination service as text (`gather`, `together`, `from_first`), so nothing is
compiled for them and they cannot come between the collectives of a step. Every process must call these alike, from its
main thread. A process that dies ends the others: JAX does that, `heartbeat_timeout` seconds after its last heartbeat.
"""

import itertools
import json
import os
import re
import socket
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils

from jaxllm.core import errors
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.train.config import Distributed

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # ours: the plain way, for `auto`


class Place(NamedTuple):
    """What a process must know to join the others."""

    told_by: str
    coordinator: str  # host:port, where process 0 listens
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this host, that are this process's; None: all


class Pod(NamedTuple):
    """A TPU pod, or slices of one; JAX reads place and coordinator from the pod's metadata."""

    told_by: str


# --- who takes part --------------------------------------------------------------------------------------------------


def find(cfg: Distributed, env: Mapping[str, str], platforms: str | None) -> Place | Pod | None:
    """Where this process stands among others, by the config and the variables of its launcher; None: it is alone.

    Args:
      platforms: `jax.config.jax_platforms`; JAX sets it and TPU_SKIP_MDS_QUERY by whether there are TPU chips.
    Raises:
      ConfigError: what was asked for is not there, or only half of it.
    """
    match cfg.kind:
        case "none":
            found = None
        case "address":
            found = Place("distributed", cfg.coordinator, cfg.num_processes, cfg.process_id)
        case "tpu":
            found = Pod("distributed.kind=tpu")
        case "slurm":
            found = _slurm(env)
            if found is None:
                raise ConfigError(
                    "distributed.kind=slurm, but this process is no task of a Slurm step (SLURM_PROCID or "
                    "SLURM_STEP_NODELIST is not set); start it with srun"
                )
        case "openmpi":
            found = _openmpi(env)
            if found is None:
                raise ConfigError("distributed.kind=openmpi, but OMPI_COMM_WORLD_RANK is not set; start it with mpirun")
        case "auto":
            # mpirun may itself have been started by Slurm
            found = _variables(env) or _openmpi(env) or _slurm(env) or _pod(env, platforms)
    return None if isinstance(found, Place) and found.processes == 1 else found


def _variables(env: Mapping[str, str]) -> Place | None:
    there = [name for name in VARIABLES if env.get(name)]
    address_alone = there == [VARIABLES[0]] and (_openmpi(env) or _slurm(env))  # the launcher knows the rest
    if not there or address_alone:
        return None
    if len(there) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in there)
        raise ConfigError(
            f"{', '.join(there)} set, but not {missing}; set all three, or none, or distributed.kind=none"
        )
    count, process = _number(env, "JAX_NUM_PROCESSES"), _number(env, "JAX_PROCESS_ID")
    if not 0 <= process < count:
        raise ConfigError(f"JAX_PROCESS_ID={process} must be from 0 to {count - 1}: JAX_NUM_PROCESSES={count}")
    address = env["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address} must be host:port, the host that of process 0")
    return Place("JAX_COORDINATOR_ADDRESS", address, count, process)


def _openmpi(env: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    rank, size, local, beside = (
        _number(env, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    # Open MPI 4 names the host of mpirun, which is rank 0's as a rule; Open MPI 5 names none.
    launcher = env.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", launcher)
    if given := env.get("JAX_COORDINATOR_ADDRESS"):
        address = given
    elif beside == size:
        address = f"127.0.0.1:{_port(env.get('PMIX_NAMESPACE') or launcher)}"
    elif host:
        address = f"{host[1] or host[2] + ']'}:{_port(launcher)}"
    else:
        raise ConfigError(
            "this mpirun does not say which host rank 0 is on; name it and a free port: "
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ..."
        )
    return Place("OMPI_COMM_WORLD_RANK", address, size, rank, _devices(local, beside, env))


def _slurm(env: Mapping[str, str]) -> Place | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(env.get(name) for name in needed):
        return None  # in a batch script outside of srun, say
    tasks, nodes = _number(env, "SLURM_NTASKS"), int(env.get("SLURM_STEP_NUM_NODES", 0))
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        address = (
            f"{first_host(env['SLURM_STEP_NODELIST'])}:{_port(env['SLURM_JOB_ID'] + env.get('SLURM_STEP_ID', ''))}"
        )
    devices = _devices(_number(env, "SLURM_LOCALID"), 1 if nodes == tasks else 2, env)
    return Place("SLURM_PROCID", address, tasks, _number(env, "SLURM_PROCID"), devices)


def first_host(nodes: str) -> str:
    """`node[007-012,20],gpu1` -> `node007`: the first of Slurm's list."""
    head = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    if not head:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set JAX_COORDINATOR_ADDRESS=HOST:PORT")
    return "".join(part or "" for part in head.groups())


def _pod(env: Mapping[str, str], platforms: str | None) -> Pod | None:
    """A TPU pod of several hosts. The metadata server is asked only where there are TPU chips and no variable tells."""
    if "tpu" not in (platforms or "").split(","):
        return None
    if env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Pod("MEGASCALE_COORDINATOR_ADDRESS")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := env.get(name):
            return Pod(name) if _are_hosts(hosts) else None  # libtpu may have left a sentence there
    if env.get("TPU_SKIP_MDS_QUERY"):
        return None
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            workers = answer.read().decode()
    except (OSError, ValueError):  # no such host, no such attribute: a TPU of one host
        return None
    return Pod(f"the metadata server {server}") if _are_hosts(workers) else None


def _are_hosts(text: str) -> bool:
    return re.fullmatch(r"[^\s,]+(,[^\s,]+)+", text.strip()) is not None


def _devices(local: int, beside: int, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """One accelerator for each of several processes of a host, unless the launcher has shared them out already."""
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES") or env.get("HIP_VISIBLE_DEVICES")
    shared_out = bool(visible) and "," not in visible
    return None if beside == 1 or shared_out or env.get("JAX_LOCAL_DEVICE_IDS") else (local,)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} must be a whole number")
    return int(text)


def _port(job: str) -> int:
    """A port above those that systems give out by themselves, the same in all processes of a job."""
    return 61440 + zlib.crc32(job.encode()) % 4096


# --- joining ---------------------------------------------------------------------------------------------------------


def join(cfg: Distributed) -> None:
    """Makes this process one of those that train together, if `find` says that there are any; before JAX has devices.

    Raises:
      ConfigError: the settings are wrong, or not all processes came within `start_timeout` seconds.
    """
    if jax.distributed.is_initialized() or (place := find(cfg, os.environ, jax.config.jax_platforms)) is None:
        return
    settings: dict[str, Any] = {
        "heartbeat_timeout_seconds": cfg.heartbeat_timeout,
        "shutdown_timeout_seconds": cfg.heartbeat_timeout,
    }
    if isinstance(place, Place):
        if place.process == 0:
            _check_port(place)
        settings |= {
            "coordinator_address": place.coordinator,
            "num_processes": place.processes,
            "process_id": place.process,
            "local_device_ids": place.devices,
            "cluster_detection_method": "deactivate",
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # When nobody comes, JAX aborts the process without a word of ours: it may wait for longer than we do.
    waiting = _Thread(lambda: jax.distributed.initialize(initialization_timeout=7 * 86400, **settings))
    waiting.start()
    waiting.join(cfg.start_timeout)
    if waiting.is_alive():
        raise ConfigError(_nobody_came(place, cfg.start_timeout))
    if isinstance(waiting.error, RuntimeError | ValueError) and isinstance(place, Pod):
        raise ConfigError(
            f"{place.told_by} asks for a TPU pod, but JAX cannot join one ({waiting.error}); "
            "set distributed.kind=none to train on this host alone"
        )
    if waiting.error:
        raise waiting.error


class _Thread(threading.Thread):
    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self.work, self.error = work, None

    def run(self) -> None:
        try:
            self.work()
        except Exception as e:  # noqa: BLE001 (told to the thread that waits)
            self.error = e


def _check_port(place: Place) -> None:
    """Raises ConfigError if process 0 cannot listen: JAX would crash."""
    port = int(place.coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except (OSError, OverflowError) as e:
            why = e.strerror if isinstance(e, OSError) else "there is no such port"
            raise ConfigError(
                f"coordinator {place.coordinator} ({place.told_by}): process 0 cannot listen on port {port}: {why}; "
                "name a free one"
            ) from None


def _nobody_came(place: Place | Pod, seconds: int) -> str:
    if isinstance(place, Pod):
        return (
            f"the processes of the TPU pod ({place.told_by}) did not all join within {seconds} s "
            "(distributed.start_timeout); start the same command on every host, or set distributed.kind=none"
        )
    start = f"start all {place.processes} with the same settings ({place.told_by})"
    if place.process == 0:
        return (
            f"process 0 of {place.processes} has waited {seconds} s (distributed.start_timeout) at "
            f"{place.coordinator} for the others; {start}"
        )
    return (
        f"process {place.process} of {place.processes} could not join within {seconds} s (distributed.start_timeout): "
        f"{_knock(place.coordinator)}; {start}"
    )


def _knock(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as e:
        return f"the coordinator {address} does not answer ({e.strerror or e})"
    return f"the coordinator {address} answers, but not every process has come"


# --- agreeing --------------------------------------------------------------------------------------------------------

_LONG = 7 * 86400 * 1000  # ms; a dead process ends the wait, a slow one is waited for
_calls = itertools.count()


def first() -> bool:
    """Whether this is the process that writes the run folder and speaks."""
    return jax.process_index() == 0


def gather(value: Any) -> list:
    """The values (JSON) of all processes, in their order; returns when every one has called."""
    if jax.process_count() == 1:
        return [value]
    client, n, me = _client(), next(_calls), jax.process_index()
    client.key_value_set(f"jaxllm/{n}/{me}", json.dumps(value))
    client.wait_at_barrier(f"jaxllm/{n}", _LONG)
    said = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(f"jaxllm/{n}/")}
    if n:  # all have read what was said the time before
        client.key_value_delete(f"jaxllm/{n - 1}/{me}")
    return [said[process] for process in sorted(said)]


def together(fn: Callable[[], T]) -> T:
    """`fn()` on every process; if it fails on one, all raise that error."""
    if jax.process_count() == 1:
        return fn()
    value = error = None
    try:
        value = fn()
    except Exception as e:  # noqa: BLE001 (raised below, on all)
        error = e
    said = gather(error and [type(error).__name__, str(error)])
    failed = next((process for process, text in enumerate(said) if text), None)
    if failed is None:
        return value
    if failed == jax.process_index():
        raise error
    kind, text = said[failed]
    known = getattr(errors, kind, None)
    raise known(text) if known else UserError(f"process {failed} failed: {kind}: {text}")


def from_first(fn: Callable[[], T]) -> T:
    """What `fn()` gives on process 0, to all (JSON); its error is raised on all."""
    if jax.process_count() == 1:
        return fn()
    return gather(together(lambda: fn() if first() else None))[0]


def check_shared(path: Path, seconds: float = 30.0) -> None:
    """Raises ConfigError on all if a file of process 0 is not seen by all, in the time a network file system takes."""

    def see() -> None:
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end:
                raise ConfigError(
                    f"process {jax.process_index()} on {socket.gethostname()} does not see {path}, which process 0 has "
                    "written; `out` must be on a file system that all hosts share"
                )
            time.sleep(0.2)

    together(see)


def told_to_stop(call: int) -> bool:
    """Whether all processes stop here: one got SIGTERM a moment ago, and this is the call they have agreed on.

    Every process calls it at every step, with a number that only grows. Costs no communication until a signal comes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(call)


def _client() -> Any:
    from jax._src import distributed  # JAX shows its coordination service in no other place; orbax uses it so too

    assert distributed.global_state.client is not None, "JAX has several processes, but jax.distributed was not started"
    return distributed.global_state.client
