"""The proof half of a plan: the real training step, compiled for chips that nobody has to own, and what it will do."""

import dataclasses
import hashlib
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.models.config import Attention, DecoderConfig
from jaxllm.models.count import flops_per_token, visible_pairs, vocabulary
from jaxllm.models.masks import Coords
from jaxllm.parallel import pipeline, pipelined
from jaxllm.parallel.flags import compile_with, compiler_options, no_room
from jaxllm.plan.account import Account, Cost, Kernel, Layout, account
from jaxllm.plan.chips import GIB, Chip
from jaxllm.plan.hlo import parse
from jaxllm.plan.topology import Topology, devices
from jaxllm.train.config import RunConfig
from jaxllm.train.offload import VISIT
from jaxllm.train.outer import MEETING
from jaxllm.train.pipelined import stages as stages_of
from jaxllm.train.step import abstract_batch, check_batches, make_train_step, set_up


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the compiler says of one training step. Bytes, FLOPs and cycles are those of one JAX device and one step.

    Nothing in here is predicted or measured, except `cycles`, which are the compiler's estimate.
    """

    on: Topology
    mesh: dict[str, int]  # devices by axis
    across: str | None  # the axis over slices; None: there is one slice, or hosts numbered one after another
    rows: int  # of a batch, over all devices
    length: int  # tokens of a row
    fits: bool
    why: str  # it does not fit; empty where it does
    hbm_bytes: int  # that a program may use
    peak_bytes: int  # at the fullest moment; where it does not fit, what the compiler says it would take
    parameter_bytes: int  # in HBM between steps, by dtype and sharding
    optimizer_bytes: int  # the same
    batch_bytes: int  # the same
    temporary_bytes: int  # in HBM beside them, when most is (TPU) or all together: activations, gradients, weights
    argument_bytes: int  # parameters, optimizer state and batch as the compiler lays them out, padding included
    host_bytes: int  # of state, in pinned memory of the host
    model_flops: float  # that the model asks for, only those pairs of tokens that see each other counted
    model_flops_square: float  # the same with all pairs counted, as PaLM does
    hardware_flops: float  # of matrix products that the program does, kernels included; 0 where the text is not known
    account: Account | None  # of the program's text; None where there is none
    bubble: float  # share of a step in which a device of a pipeline idles, by the cycles of its stages
    lower_s: float  # seconds on the clock from config to lowered program
    compile_s: float  # CPU seconds of the compiler, all threads
    compile_wall_s: float  # seconds on the clock
    rss_bytes: int  # peak memory of this process
    text_sha256: str  # of the program's text, empty where there is none
    options: dict[str, Any]  # that the compiler was given
    notes: tuple[str, ...]  # what could not be told

    @property
    def headroom(self) -> int:
        """Bytes left at the peak; negative where it does not fit."""
        return self.hbm_bytes - self.peak_bytes

    @property
    def tokens(self) -> float:
        """Of a step, a device's share."""
        return self.rows * self.length / self.on.devices

    @property
    def ratio(self) -> float:
        """Hardware FLOPs for each that the model asks for; 0 where the text is not known."""
        return self.hardware_flops / self.model_flops

    def record(self) -> dict[str, Any]:
        """As JSON takes it. Where a chip is several devices, `chip` has what sums over them."""
        a = self.account
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _APART}
        record = named | {
            "compiled": True, "on": self.on.name, "topology": str(self.on), "chips": self.on.chips,
            "devices": self.on.devices,
            "devices_per_chip": self.on.chip.devices, "headroom": self.headroom, "ratio": self.ratio,
            "notes": list(self.notes),
            "collective_bytes": a.collective_bytes if a else None,
            "collective_bytes_by_axes": _by_axes(a) if a else None,
            "overlapped": a.overlapped if a else None,
            "cycles": a.cycles if a else None,
            "traffic_bytes": a.traffic if a else None,
            "host_traffic_bytes": a.host_traffic if a else None,
            "kernels": [_kernel_record(k) for k in a.kernels] if a else None,
            "collectives": [c._asdict() | {"axes": list(c.axes)} for c in a.collectives] if a else None,
        }  # fmt: skip
        if self.on.chip.devices > 1:
            record["chip"] = {k: record[k] * self.on.chip.devices for k in _SUMS}
        return record


_APART = ("on", "account", "notes")
_SUMS = (
    "hbm_bytes", "peak_bytes", "parameter_bytes", "optimizer_bytes", "batch_bytes", "temporary_bytes", "host_bytes",
    "model_flops", "model_flops_square", "hardware_flops", "headroom",
)  # fmt: skip


def _by_axes(a: Account) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for (kind, axes), size in a.collective_bytes_by_axes.items():
        nested.setdefault(kind, {})[" x ".join(axes) or "none"] = size
    return nested


def _kernel_record(k: Kernel) -> dict[str, Any]:
    shown = {
        side: [f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in arrays]
        for side, arrays in (("operands", k.operands), ("results", k.results))
    }
    return {"name": k.name, "count": k.count, "cycles": k.cycles, **shown}


class DoesNotCompile(UserError):
    """The compiler gave up on a program, for another reason than want of memory."""


def prove(
    cfg: RunConfig,
    on: Topology,
    *,
    rows_length: int | None = None,
    options: Mapping[str, Any] | None = None,
    begin: Callable[[], object] = lambda: None,
) -> Proof:
    """Compiles the training step of `cfg` for a topology. No array is made, no data are read, no chip is needed.

    Args:
      rows_length: tokens of a row; default: the model's context.
      options: for the compiler, over those of `parallel.flags`.
      begin: called when the compiler is about to start, and the config has shown no fault.

    Raises:
      ConfigError: the config does not go with the topology, or `model.vocab` is not set.
      UserError: the compiler for the topology is not installed.
      DoesNotCompile: it refuses the program.
    """
    vocabulary(cfg.model)
    length = rows_length or cfg.model.context
    chips = devices(on)
    started = time.perf_counter()
    setup = set_up(cfg, chips)
    check_batches(setup, length)
    batch = abstract_batch(setup, cfg.batch, length)
    lowered = make_train_step(setup).lower(setup.state, batch)
    lower_s = time.perf_counter() - started
    options = compiler_options(chips[0]) | dict(options or {})

    begin()
    cpu, clock = time.process_time(), time.perf_counter()
    compiled, used, why, notes = _compile(lowered, options, on, setup.mesh)
    if (cfg.offload.optimizer or cfg.offload.parameters) and setup.state.step.sharding.memory_kind is None:
        # JAX drops memory kinds on devices that have no memories: GPUs that are not there
        notes.append("offload is not in this program: what waits in host memory is counted on the device")
    made = Made(compiled, length, time.process_time() - cpu, time.perf_counter() - clock, used, why, tuple(notes))
    state = {name: _held(tree) for name, tree in (("params", setup.state.params), ("opt", setup.state.opt))}
    held = {
        "parameter_bytes": state["params"][0], "optimizer_bytes": state["opt"][0], "batch_bytes": _held(batch)[0],
        "host_bytes": state["params"][1] + state["opt"][1],
    }  # fmt: skip
    return proof_of(made, cfg, on, setup.mesh, held, lower_s)


class Made(NamedTuple):
    """What a compiler gave, and what it took."""

    compiled: Any  # jax.stages.Compiled; None: there was no room for it
    length: int  # tokens of a row
    cpu_s: float
    wall_s: float
    options: Mapping[str, Any] = MappingProxyType({})
    why: str = ""  # there was no room
    notes: tuple[str, ...] = ()


def proof_of(
    made: Made, cfg: RunConfig, on: Topology, mesh: jax.sharding.Mesh, held: dict[str, int] | None = None,
    lower_s: float = 0.0,
) -> Proof:  # fmt: skip
    """What a compiled training step says of itself: ours, or a peer's of the same model and batch.

    Args:
      held: bytes of the state, as fields of Proof; None: not told apart.
    """
    hbm, why, notes, length = on.chip.device_hbm, made.why, list(made.notes), made.length
    held = held or dict.fromkeys(("parameter_bytes", "optimizer_bytes", "batch_bytes", "host_bytes"), 0)
    found, bubble = None, 0.0
    text = ""
    if made.compiled is None:
        kept = held["parameter_bytes"] + held["optimizer_bytes"] + held["batch_bytes"]
        asked = _asked(why)
        memory = {"peak_bytes": asked, "temporary_bytes": max(0, asked - kept), "argument_bytes": kept}
    else:
        memory = _memory(made.compiled, on.chip.platform)
        if memory["peak_bytes"] > hbm:
            why = f"takes {memory['peak_bytes'] / GIB:.2f} of {hbm / GIB:.2f} GiB"
        text, said = _text(made.compiled)
        notes += said
    if text:
        found, bubble, said = _account(text, mesh, cfg, on.chip, length)
        notes += said
    tokens = cfg.batch * length / on.devices
    return Proof(
        on=on, mesh=dict(mesh.shape), across=cfg.mesh.across if on.slices > 1 else None, rows=cfg.batch, length=length,
        fits=not why, why=why, hbm_bytes=hbm,
        **memory, **held,
        model_flops=tokens * flops_per_token(cfg.model, length).train,
        model_flops_square=tokens * flops_per_token(cfg.model, length, causal=False).train,
        hardware_flops=found.flops + found.kernel_flops if found else 0.0,
        account=found, bubble=bubble, lower_s=lower_s, compile_s=made.cpu_s, compile_wall_s=made.wall_s,
        rss_bytes=_peak_rss(), text_sha256=hashlib.sha256(text.encode()).hexdigest() if text else "",
        options=dict(made.options), notes=tuple(notes),
    )  # fmt: skip


# --- the compiler ----------------------------------------------------------------------------------------------------


def _compile(
    lowered: Any, options: dict[str, Any], on: Topology, mesh: jax.sharding.Mesh
) -> tuple[Any, dict[str, Any], str, list[str]]:
    """The compiled program, or None and why memory has no room for it; the options used; notes.

    Raises:
      DoesNotCompile: for any other reason, a scratchpad that is too small among them.
    """
    try:
        compiled, used, said = compile_with(lowered, options)
    except jax.errors.JaxRuntimeError as e:
        if no_room(e):
            return None, options, _shortened(str(e)), []
        shown = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "of one device"
        raise DoesNotCompile(
            f"the compiler for {on.name} refuses this step on mesh {shown}: {_shortened(str(e))}; try another mesh, "
            "remat or accumulate"
        ) from e
    return compiled, used, "", [f"compiled {_with(used)}; with more: {_shortened(said)}"] if said else []


def _with(options: dict[str, Any]) -> str:
    return f"with {', '.join(options)}" if options else "without options"


def _shortened(said: str) -> str:
    """The first lines of what a compiler complains about, on one line."""
    words = " ".join(said.split()).removeprefix("RESOURCE_EXHAUSTED: ")
    return words if len(words) <= 300 else words[:300] + " ..."


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _asked(why: str) -> int:
    """Bytes that a program would take, out of the compiler's complaint that there is no room for it."""
    for pattern in (r"Used ([\d.]+)([KMGT]?) of", r"\(([\d.]+)([KMGT]?)B?\) exceeds", r"([\d.]+)([KMGT])"):
        if found := re.search(pattern, why):
            return int(float(found[1]) * _UNITS[found[2]])
    return 0


def _memory(compiled: Any, platform: str) -> dict[str, int]:
    m = compiled.memory_analysis()
    argument, temporary = m.argument_size_in_bytes, m.temp_size_in_bytes
    # Everything at once, less what outputs take over from donated arguments.
    peak = argument + m.output_size_in_bytes + temporary - m.alias_size_in_bytes
    # libtpu knows better: it lays out in time, and adds a host's arguments up with its own.
    if platform == "tpu" and getattr(m, "peak_memory_in_bytes", 0):
        peak = m.peak_memory_in_bytes - m.host_argument_size_in_bytes
        temporary = peak - argument
    return {"peak_bytes": int(peak), "temporary_bytes": int(temporary), "argument_bytes": int(argument)}


def _text(compiled: Any) -> tuple[str, list[str]]:
    """The program's text; empty, and a note, where the compiler cannot write it (programs for tpu7x, at times)."""
    try:
        return compiled.as_text(), []
    except jax.errors.JaxRuntimeError as e:  # memory and verdict stand
        return "", [f"text not available: {_shortened(str(e))}"]


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB


def _held(tree: Any) -> tuple[int, int]:
    """Bytes of a device's share of placed shapes: in its own memory, in its host's."""
    here = host = 0
    for x in jax.tree.leaves(tree):
        size = math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(_plain(x.dtype)).itemsize
        if x.sharding.memory_kind == "pinned_host":
            host += size
        else:
            here += size
    return here, host


def _plain(dtype: Any) -> Any:
    return np.uint32 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype


# --- the text --------------------------------------------------------------------------------------------------------


def _account(
    text: str, mesh: jax.sharding.Mesh, cfg: RunConfig, chip: Chip, length: int
) -> tuple[Account, float, list[str]]:
    """What the program does, the pipeline's bubble, notes."""
    program, pipe = parse(text), mesh.shape.get("pipe", 1)
    runs: dict[str, float | tuple[float, ...]] = {VISIT: 1.0}  # in the steps that count, all is finite
    if pipe > 1:
        schedule = pipeline.table(cfg.pipeline.schedule, pipe, cfg.accumulate)
        stages = stages_of(cfg, pipe)
        runs |= pipelined.runs(pipeline.instructions(schedule, cfg.pipeline.recompute), stages)
    if cfg.outer is not None:
        runs[MEETING] = (1 - 1 / cfg.outer.every, 1 / cfg.outer.every)
    found = account(
        program, Layout.of(mesh, program.partitions, cfg.mesh.across), chip, runs=runs,
        kernel_cost=lambda k: kernel_cost(k, cfg.model, length, chip),
    )  # fmt: skip
    unknown = sorted({k.name for k in found.kernels if not kernel_cost(k, cfg.model, length, chip).flops})
    notes = [f"{note} ({n} x)" for note, n in found.notes.items()]
    notes += [f"products of kernel {name} are not known, and not counted" for name in unknown]
    return found, _bubble(schedule, stages, found.scopes) if pipe > 1 else 0.0, notes


def _bubble(schedule: pipeline.Table, stages: pipelined.Stages, scopes: Mapping[str, float]) -> float:
    """Share of a step that a device idles, if what a stage does in a tick takes the cycles that the compiler thinks."""
    last = len(stages.counts) - 1

    def times(scope: str, stage: int) -> float:
        facts = {pipelined.FIRST: stage == 0, pipelined.LAST: stage == last, pipelined.NOT_LAST: stage != last}
        return float(facts[scope] if scope in facts else stages.counts[stage])

    def cycles(path: str, stage: int) -> float:
        below = [p for p in scopes if p.startswith(f"{path}.") and "." not in p[len(path) + 1 :]]
        return scopes.get(path, 0.0) + sum(times(p[len(path) + 1 :], stage) * cycles(p, stage) for p in below)

    of = {(op, s): cycles(scope, s) for op, scope in pipelined.TICKS.items() for s in range(last + 1)}
    cells = zip(schedule.op.flat, schedule.stage.flat)
    spent = np.array([of.get((int(op), int(stage)), 0.0) for op, stage in cells]).reshape(schedule.op.shape)
    return pipeline.idle(schedule, spent) if spent.any() else 0.0


def kernel_cost(k: Kernel, model: DecoderConfig, length: int, chip: Chip) -> Cost:
    """Products of an attention kernel, from its shapes and the blocks it does not skip; at least the cycles of these
    at the chip's peak. Of other kernels: nothing but the cycles that were simulated."""
    products, asked = attention_flops(k, model, length)
    return Cost(products, k.cycles or products / chip.device_flops * chip.clock, asked)


def attention_flops(k: Kernel, model: DecoderConfig, length: int) -> tuple[float, float]:
    """FLOPs of one call of a flash attention kernel, and those that flash attention asks for: of pairs that see each
    other alone, five products backward however the kernels share them; 0 for a kernel of another name.

    Forward: scores and weighted values, two products of queries and keys. Backward, the scores and the gradient of
    the weights are made again: three products for the queries' gradient alone, four for keys' and values', five for
    all of them at once (Dao 2023, arXiv:2307.08691, section 3.1.2).
    """
    if not re.search(r"splash|flash|fmha|attention", k.name):
        return 0.0, 0.0
    large = [a for a in k.operands if len(a.dims) >= 3 and a.dtype in ("bf16", "f16", "f32")]
    if len(large) < 2:
        return 0.0, 0.0
    q, key = large[0].dims, large[1].dims
    if k.name.startswith(("hopper", "tpu", "triton")):  # queries (backward, what comes back after them), keys, values
        ours = [a.dims for a in large if len(a.dims) == 4]
        if k.name.startswith("tpu"):
            ours = [dims for dims in ours if dims[2] > 1]  # without what is of rows
        else:  # tokens before heads
            ours = [(B, N, T, H) for B, T, N, H in ours]
        q, key = ours[-3 if "_fwd" in k.name else -4], ours[-2]
    pairs = math.prod(q[:-1]) * key[-2]
    if "dkv" in k.name:
        fused = k.name.startswith("tpu_attention_bwd") or re.search(r"use_fused_bwd_kernel\W+true", k.metadata)
        part, products = "_dkv", 5 if fused else 4
        asked = 5 if products == 5 else 3
    elif "dq" in k.name:
        part, products, asked = "_dq", 3, 2
    else:
        part, products = "", 5 if re.search(r"bwd|backward", k.name) else 2
        asked = products
    blocks = [re.search(rf"\bblock_{side}{part}\W+(\d+)", k.name + k.metadata) for side in ("q", "kv")]
    bq, bk = (int(b[1]) if b else 1 for b in blocks)
    layers = [model.layer(i).attention for i in range(model.num_layers)]
    seen = share = sum(visible_pairs(a, length) for a in layers) / len(layers) / length**2
    if (q[-2], key[-2]) == (length, length):  # else a share of the row: over all of them, as many as of the whole
        share = sum(visible_blocks(a, length, bq, bk) for a in layers) / len(layers)
    return 2.0 * products * pairs * q[-1] * share, 2.0 * asked * pairs * q[-1] * seen


def visible_blocks(a: Attention, length: int, bq: int, bk: int) -> float:
    """Share of the blocks of `bq` queries and `bk` keys in which any query sees any key."""
    ahead = np.arange(1 - length, length)  # key minus query
    seen = a.mask.visible(Coords(np.zeros_like(ahead), 1, False), Coords(ahead, 1, False)) | (ahead == 0)
    if a.window:
        seen = seen & (-ahead < a.window)
    before = np.concatenate([[0], np.cumsum(seen)])
    first_q, first_k = np.arange(0, length, bq)[:, None], np.arange(0, length, bk)[None, :]
    low = first_k - np.minimum(first_q + bq, length) + 1
    high = np.minimum(first_k + bk, length) - 1 - first_q
    return float((before[high + length] - before[low + length - 1] > 0).mean())
