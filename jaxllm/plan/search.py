"""The best plan for a run on a topology, by the formulas of `analytic`. No JAX here.

The space: meshes x ZeRO stage x sequence parallelism x ring or all-to-all x pipeline schedule x microbatches x what a
stage or the backward pass computes again or fetches from the host x offload, less what does not divide; memory throws
out, time ranks. It is gone through by branch and bound: what keeps everything and fetches nothing is computed for all
plans, on arrays, about a million a second; no policy of keeping is faster, so that the policies of a plan are tried
only where it may still be among the best. Of 7.6 million plans for 7B on 256 chips 39 thousand are left to be tried,
0.6 CPU seconds in all, and what is found is the optimum of the model. The alternatives of the surveys, held against it
in tests/plan/test_search: simulated annealing with FlexFlow's moves (Jia et al. 2018, arXiv:1807.05358: one choice
drawn anew) nearly always finds the same plan after some thousand proposals, and takes longer. `anneal` is for spaces
beyond LIMIT. Alpa's integer program (Zheng et al. 2022, arXiv:2201.12023) pays where each operator chooses for itself;
here one choice goes for all layers, and all stages of a pipeline have equally many.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.config import merge, parse
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.models.config import Keep, Remat
from jaxllm.parallel.config import Mesh, Pipeline, Ring, axis_names
from jaxllm.plan.analytic import (
    ATTENTION,
    POLICIES,
    SCHEDULES,
    Calibration,
    Estimate,
    Job,
    Kept,
    Plans,
    estimate,
    kept,
    memory,
    sizes,
)
from jaxllm.plan.calibration import calibration
from jaxllm.plan.chips import Switch
from jaxllm.plan.network import runs
from jaxllm.plan.topology import Topology
from jaxllm.train.config import RunConfig

LIMIT = 20_000_000  # plans that are estimated one by one
CHUNK = 50_000  # plans that are estimated at a time: their arrays stay in cache
HEADROOM = 0.92  # share of the usable memory that a plan may be predicted to take: the formulas err
EXTRA = 1e-3  # share of the step time that each choice beside the plainest must gain
AXES = ("data", "pipe", "fsdp", "context", "tensor")
CHUNKS = (2, 4)  # stages a device holds in an interleaved pipeline


# --- the run ---------------------------------------------------------------------------------------------------------


def job_of(cfg: RunConfig, length: int | None = None) -> Job:
    """What a step of this run does, whatever the plan.

    Args:
      length: tokens of a row; None: the longest that the model is meant for.
    """
    state = {"adamw": 8.0, "adafactor": 0.1, "lion": 4.0, "muon": 4.0, "sgd": 4.0}[cfg.optimizer.kind]
    half = cfg.precision.kind != "float32"
    return Job(
        sizes(cfg.model, length or cfg.model.context), cfg.batch, optimizer_bytes=state,
        compute_bytes=2.0 if half else 4.0, ramp=cfg.ramp_sizes()[:-1], weights_on_host=cfg.offload.parameters,
    )  # fmt: skip


def plans_of(cfg: RunConfig, on: Topology) -> Plans:
    """The one plan that a config asks for.

    Raises:
      ConfigError: its mesh does not fit the topology, or does not divide the model or its batch.
    """
    mesh = cfg.mesh.resolve(on.devices)
    if problems := _refusals(cfg, mesh, on):
        raise ConfigError("; ".join(problems))
    s, pipe = cfg.sharding, cfg.pipeline if mesh.pipe > 1 else Pipeline(recompute=False)
    shared = [getattr(s, part).embed is not None for part in ("optimizer", "gradients", "parameters")]
    return Plans.one(
        kept(cfg.remat), data=mesh.data * mesh.expert, pipe=mesh.pipe, fsdp=mesh.fsdp, context=mesh.context,
        tensor=mesh.tensor, zero=sum(shared), norm_seq=int("tensor" in axis_names(s.activations.norm_seq)),
        ulysses=int(cfg.context.kind == "ulysses" and mesh.context > 1), schedule=SCHEDULES.index(pipe.schedule.kind),
        chunks=pipe.chunks, accumulate=cfg.accumulate, recompute=int(pipe.recompute), slices=pipe.slices,
        offload=int(cfg.offload.optimizer), across=mesh.across if on.slices > 1 else None, crossing=_crossing(cfg),
    )  # fmt: skip


def _crossing(cfg: RunConfig) -> float:
    """What crosses `data` in a step, relative to gradients in the type of products after every microbatch."""
    size = 4.0 if cfg.precision.kind == "float32" else 2.0
    if cfg.outer is not None:  # float32 weights, now and then
        return 4 / size / cfg.accumulate / cfg.outer.every
    if cfg.compression is not None:  # a byte for each value, once
        return 1 / size / cfg.accumulate
    return 1.0


def _refusals(cfg: RunConfig, mesh: Mesh, on: Topology) -> list[str]:
    """Why training would refuse the mesh, in words."""
    own, s, flow = cfg.model_copy(update={"mesh": mesh}), job_of(cfg).sizes, cfg.sharding.activations
    slices = cfg.pipeline.slices if mesh.pipe > 1 else 1
    shares = math.prod(getattr(mesh, axis) for axis in own.sharing_rows)
    over_batch = math.prod(getattr(mesh, axis) for axis in axis_names(flow.batch))
    rows = next((n for n in cfg.ramp_sizes() if n // cfg.accumulate % over_batch), cfg.batch)
    micro, row = rows // cfg.accumulate, f"model.context={s.length}"
    sides = [
        (f"a batch of {rows} rows in accumulate={cfg.accumulate} parts of {micro}", micro, flow.batch),
        (row, s.length, flow.seq),
        (row if slices == 1 else f"{row} in {slices} slices", s.length // slices, flow.norm_seq),
    ]  # fmt: skip
    for weights in (cfg.sharding.parameters, cfg.sharding.gradients, cfg.sharding.optimizer):
        sides += [
            (f"model.vocab={s.vocab}", s.vocab, weights.vocab), (f"num_heads={s.heads}", s.heads, weights.heads),
            (f"num_kv_heads={s.kv_heads}", s.kv_heads, weights.kv_heads), (f"ffn.mlp={s.mlp}", s.mlp, weights.mlp),
            (f"model.embed={s.embed}", s.embed, weights.embed),
            *((f"ffn.experts={moe.experts}", moe.experts, weights.experts) for moe in cfg.model.mixtures),
        ]  # fmt: skip
    found = []
    if mesh.expert > 1 and cfg.model.mixtures:
        found.append(
            f"mesh.expert={mesh.expert} of a mixture: the formulas know no shares of experts; let the compiler plan "
            "(without --formulas), or share experts out over fsdp with mesh.expert=1"
        )
    for what, size, axes in dict.fromkeys(sides):
        over = [axis for axis in axis_names(axes) if getattr(mesh, axis) > 1]
        devices = math.prod(getattr(mesh, axis) for axis in over)
        if size % devices:
            found.append(
                f"{what} does not divide over mesh axis {' x '.join(over)} of {devices} devices; change one of them"
            )
    causal = all(block.attention.mask.causal for block in cfg.model.blocks)
    if isinstance(cfg.context, Ring) and cfg.context.balanced and causal and shares > 1 and s.length % (2 * shares):
        found.append(
            f"{row} does not divide into 2 x {shares} chunks, two for each share of a balanced ring; "
            f"make it a multiple of {2 * shares}, or set context={{kind: ring, balanced: false}}"
        )
    if s.length % slices:
        found.append(f"{row} does not divide into pipeline.schedule.slices={slices}; change one")
    span = getattr(mesh, mesh.across)
    if on.slices > 1 and on.chip.platform == "tpu" and span % on.slices:
        found.append(
            f"mesh.{mesh.across}={span} does not divide over the {on.slices} slices of {on.name}; make it a multiple "
            f"of {on.slices}, or let mesh.across name an axis that is one"
        )
    return found + own.unsupported()


# --- the space -------------------------------------------------------------------------------------------------------


class Remats(NamedTuple):
    """Values of `remat:` to choose from, and what each keeps."""

    values: tuple[Remat, ...]
    policies: tuple[Kept, ...]


PARTS = (("attention",), ("q",), ("k", "v"), ("residual",), ("gate", "up"))
QKV = ("q", "k", "v")
HOST = (
    ("input",),
    QKV,
    ("input", *QKV),
    ("input", "residual", *QKV),
    (*QKV, "attention"),
    ("input", *QKV, "attention"),
)


def remats() -> Remats:
    """Every set of attention, projections, residual stream and feed-forward inputs; nothing again; and what runs that
    were published have in host memory, with every set of the rest beside it."""
    plain = {frozenset(ATTENTION): "save_attention"}
    values: list[Remat] = [
        "full",
        *(plain.get(frozenset(some), Keep(device=some)) for some in _sets(PARTS) if some),
        "none",
    ]
    for host in HOST:
        left = [part for part in (("attention",), QKV, ("residual",), ("gate", "up")) if not set(part) & set(host)]
        for device in _sets(left):
            values.append("offload" if set(host) == ATTENTION and not device else Keep(device=device, host=host))
    return Remats(tuple(values), tuple(map(kept, values)))


def _sets(parts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every set of the parts, written out."""
    return [sum(some, ()) for k in range(len(parts) + 1) for some in itertools.combinations(parts, k)]


def meshes(job: Job, on: Topology) -> Iterator[dict[str, int]]:
    """Sizes of the mesh axes that the model, the rows and the topology divide by."""
    s, n = job.sizes, on.devices
    fast = on.shape[0] if isinstance(on.chip.links, Switch) else n  # tensor parallelism beyond a host is hopeless
    for tensor in _divisors(math.gcd(n, math.gcd(s.heads, s.kv_heads), math.gcd(s.mlp, s.vocab))):
        if tensor > fast:
            continue
        for context in _divisors(n // tensor):
            if s.length % (2 * context):
                continue
            for pipe in _divisors(n // tensor // context):
                # Configs refuse stages where weights wait in host memory.
                if s.groups % pipe or (pipe > 1 and job.weights_on_host):
                    continue
                left = n // tensor // context // pipe
                for fsdp in _divisors(left):
                    data = left // fsdp
                    slow = on.slices > 1 and on.chip.platform == "tpu"
                    if job.unit % left or job.unit // left < pipe:  # rows of a device: at least a microbatch a stage
                        continue
                    if slow and all(size % on.slices for size in (data, pipe, fsdp)):
                        continue
                    yield {"data": data, "pipe": pipe, "fsdp": fsdp, "context": context, "tensor": tensor}


def _dividing(job: Job, on: Topology, among: Sequence[dict[str, int]] | None) -> list[dict[str, int]]:
    """The meshes that divide the run, of those of `among` if it is given."""
    return [mesh for mesh in meshes(job, on) if among is None or mesh in among]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def of_mesh(job: Job, on: Topology, mesh: dict[str, int], choices: Remats) -> Plans:
    """Every plan on a mesh."""
    s, pipe = job.sizes, mesh["pipe"]
    shared, across = mesh["fsdp"] * mesh["context"], mesh["context"] * mesh["tensor"]
    rows = job.unit // (mesh["data"] * mesh["fsdp"])
    schedules = [(SCHEDULES.index("1f1b"), 1)]
    if pipe > 1:
        cuts = [c for c in CHUNKS if s.groups % (pipe * c) == 0]
        schedules = [(0, 1), (1, 1), (3, 1), *((SCHEDULES.index("interleaved"), c) for c in cuts)]
    zero = (3,) if shared == 1 else (0, 1, 2, 3) if s.embed % shared == 0 else (0,)
    along = mesh["tensor"] > 1 and s.length % across == 0
    swaps = mesh["context"] > 1 and s.heads % across == 0
    # Stages have nothing in host memory: configs refuse it.
    policies = [i for i, policy in enumerate(choices.policies) if pipe == 1 or not policy.host]
    schedule, *rest = _product(
        range(len(schedules)), [m for m in _divisors(rows) if pipe == 1 or m >= pipe], zero, (0, 1) if along else (0,),
        (0, 1) if swaps else (0,), (0, 1) if pipe > 1 else (0,), policies, (0, 1) if pipe == 1 else (0,),
    )  # fmt: skip
    kinds, names = (
        np.array(schedules)[schedule],
        ("accumulate", "zero", "norm_seq", "ulysses", "recompute", "remat", "offload"),
    )
    return Plans(
        **{axis: np.full(len(schedule), size) for axis, size in mesh.items()}, schedule=kinds[:, 0], chunks=kinds[:, 1],
        **dict(zip(names, rest)), policies=choices.policies,
    )  # fmt: skip


def _product(*values: Sequence[int]) -> list[np.ndarray]:
    """Columns of the Cartesian product."""
    return [grid.reshape(-1) for grid in np.meshgrid(*(np.array(v) for v in values), indexing="ij")]


def _together(parts: list[Plans]) -> Plans:
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in Plans.CHOICES}
    return dataclasses.replace(parts[0], **columns)


def extras(p: Plans) -> np.ndarray:
    """How many choices of each plan are not the plainest."""
    return (
        (p.pipe > 1) * 2 + (p.context > 1) + (p.tensor > 1) + (p.data > 1) + (p.zero != 3) + p.norm_seq + p.ulysses
        + (p.schedule != 1) + (p.accumulate > 1) + (p.pipe > 1) * (1 - p.recompute) + 2 * p.offload + 2 * _on_host(p)
    )  # fmt: skip


def _on_host(p: Plans) -> np.ndarray:
    """Whether what the backward pass needs waits in host memory."""
    return np.array([bool(policy.host) for policy in p.policies])[p.remat]


# --- the search ------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the search wants to know of a compiled plan; `predict.verdict` makes it of a proof."""

    fits: bool
    peak_bytes: float  # of a device
    expected_ms: float  # predicted of the compiled program
    proof: Any = None
    why: str = ""  # it does not compile


@dataclasses.dataclass(frozen=True)
class Plan:
    """One plan, what is predicted of it, and the config that asks for it."""

    cfg: RunConfig
    overrides: dict[str, Any]  # the blocks of the config that it sets
    plans: Plans  # it alone
    estimate: Estimate  # of it alone
    verdict: Verdict | None = None

    @property
    def expected(self) -> float:
        """Predicted seconds of a step; of the compiled program, where there is one."""
        return self.verdict.expected_ms / 1e3 if self.verdict else float(self.estimate.time.expected[0])

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: int(getattr(self.plans, axis)[0]) for axis in AXES}

    @property
    def peak(self) -> float:
        """Predicted bytes of a device."""
        return float(self.estimate.memory.peak[0])


class Found(NamedTuple):
    """What a search saw."""

    on: Topology
    job: Job
    ranked: tuple[Plan, ...]  # the best of each mesh, the best first
    meshes: tuple[dict[str, int], ...]  # of the best plans by formula, the best first
    seen: int  # plans of the whole space
    estimated: int  # of them, those whose time and memory had to be predicted one by one
    exact: bool  # whether none of the others can be among the ranked
    dropped: tuple[Plan, ...] = ()  # compiled, and found not to fit

    @property
    def best(self) -> Plan:
        return self.ranked[0]


def search(
    cfg: RunConfig,
    on: Topology,
    *,
    length: int | None = None,
    reached: Calibration | None = None,
    verify: Callable[[RunConfig], Verdict] | None = None,
    k: int = 3,
    keep: int = 20,
    among: Sequence[dict[str, int]] | None = None,
) -> Found:
    """The fastest plans of those that fit, one a mesh; model, batch and row length stay as they are.

    Args:
      reached: what the chips reach; None: as published runs say.
      verify: compiles a plan, or raises a UserError. The best `k` are verified; those that do not fit make place for a
        plan of the same mesh that takes less, and the rest is ranked by the compiled prediction.
      keep: plans to return.
      among: meshes to stay with; None: all that divide.

    Raises:
      UserError: no mesh divides the model and its batch, or nothing fits; says what would.
    """
    job, choices, reached = job_of(cfg, length), remats(), reached or calibration(on)
    for part in ("outer", "compression"):
        if getattr(cfg, part) is not None:
            raise UserError(
                f"{part}={getattr(cfg, part).kind}: how many replicas there are is part of the algorithm, and a search "
                f"would choose it; plan the config as it is, or set {part} to null"
            )
    space = _space(job, on, choices, reached, among)
    if space is None:
        raise UserError(_no_mesh(job, on))
    if not len(space.order):
        raise UserError(_nothing_fits(job, on, space.smallest))
    best, estimated, exact = _best_of_meshes(space, job, on, choices, reached, keep)
    if not exact:
        _keep_best(best, job, on, _fitting(job, on, anneal(job, on, choices, reached, among)), reached)
    if not best:
        raise UserError(
            f"no plan for {on.name} that annealing tried fits, and {space.seen:,} are too many to try all; take more "
            "chips or a smaller batch"
        )
    ranked: list[Plan] = []
    refused: set[tuple] = set()
    for _, plans in sorted(best.values(), key=lambda v: v[0]):
        ranked += filter(None, [_accepted(cfg, job, on, plans, choices, reached, refused)])
        if len(ranked) == keep:
            break
    if not ranked:
        raise UserError(f"every plan that fits {on.name} asks for parts that do not go together in this run")
    found = Found(on, job, tuple(ranked), tuple(plan.mesh for plan in ranked), space.seen, estimated, exact)
    return verified(found, cfg, choices, reached, verify, k) if verify else found


class _Space(NamedTuple):
    """The whole space without the choice of `remat`, and what every policy costs at least."""

    rows: Plans  # that keep everything, and so compute nothing again
    bounds: np.ndarray  # score of each: below that of the same plan under any policy
    order: np.ndarray  # those that fit under the policy that keeps nothing, by their bounds
    seen: int  # plans, policies counted
    smallest: float  # bytes of the plan that takes least


def _space(
    job: Job, on: Topology, choices: Remats, reached: Calibration, among: Sequence[dict[str, int]] | None
) -> _Space | None:
    kept_all = Remats(("none",), (POLICIES["none"],))
    parts = [of_mesh(job, on, mesh, kept_all) for mesh in _dividing(job, on, among)]
    if not parts:
        return None
    rows = _together(parts)
    nothing = dataclasses.replace(rows, policies=(Kept(host=frozenset({"input"})),))
    peak, full = memory(job, nothing).peak, memory(job, dataclasses.replace(rows, policies=(POLICIES["full"],))).peak
    least = np.where(rows.pipe > 1, full, peak)
    pieces = np.array_split(np.arange(len(rows)), max(1, len(rows) // CHUNK))
    bounds = np.concatenate([scores(job, on, rows.take(piece), reached) for piece in pieces])
    fits = np.flatnonzero(least <= HEADROOM * on.chip.device_hbm)
    host = sum(bool(policy.host) for policy in choices.policies)
    seen = int((len(choices.policies) - host * (rows.pipe > 1)).sum())
    return _Space(rows, bounds, fits[np.argsort(bounds[fits], kind="stable")], seen, float(least.min()))


def _best_of_meshes(
    space: _Space, job: Job, on: Topology, choices: Remats, reached: Calibration, keep: int
) -> tuple[dict, int, bool]:
    """Branch and bound: the best plan on each of the `keep` best meshes (mesh -> (score, plan)), how many plans were
    estimated for it, and whether LIMIT let it come to its end."""
    best: dict[tuple, tuple[float, Plans]] = {}
    sizes_ = np.stack([getattr(space.rows, axis) for axis in AXES], 1)
    _, mesh = runs(sizes_)
    reach = np.full(mesh.max() + 1, math.inf)  # of each mesh, its best score so far
    estimated, step = 0, max(1, CHUNK // len(choices.policies))
    for start in range(0, len(space.order), step):
        some = space.order[start : start + step]
        worst = sorted(score for score, _ in best.values())[keep - 1] if len(best) >= keep else math.inf
        if space.bounds[some[0]] > worst:
            break
        some = np.sort(some[space.bounds[some] < np.minimum(reach[mesh[some]], worst)])
        if not len(some):
            continue
        plans = _under_all(space.rows.take(some), choices)
        estimated += len(plans)
        if estimated > LIMIT:
            return best, estimated, False
        _keep_best(best, job, on, _fitting(job, on, plans), reached)
        for i in some:
            reach[mesh[i]] = best.get(tuple(sizes_[i].tolist()), (math.inf,))[0]
    return best, estimated, True


def _under_all(rows: Plans, choices: Remats) -> Plans:
    """Each of the plans under each policy that it can have."""
    n = len(choices.policies)
    plans = rows.take(np.repeat(np.arange(len(rows)), n))
    plans = dataclasses.replace(plans, remat=np.tile(np.arange(n), len(rows)), policies=choices.policies)
    return plans.take((plans.pipe == 1) | ~_on_host(plans))


def _fitting(job: Job, on: Topology, plans: Plans) -> Plans:
    """Those predicted to fit."""
    return plans.take(memory(job, plans).peak <= HEADROOM * on.chip.device_hbm)


def _keep_best(best: dict, job: Job, on: Topology, plans: Plans, reached: Calibration) -> None:
    """Puts the best of `plans` on each mesh into `best`: mesh -> (score, the plan)."""
    if not len(plans):
        return
    score = scores(job, on, plans, reached)
    sizes_ = np.stack([getattr(plans, axis) for axis in AXES], 1)
    starts, _ = runs(sizes_)
    for start, end in zip(starts, [*starts[1:], len(plans)]):
        mesh, i = tuple(sizes_[start].tolist()), start + int(score[start:end].argmin())
        if mesh not in best or score[i] < best[mesh][0]:
            best[mesh] = (float(score[i]), plans.take(np.array([i])))


def scores(job: Job, on: Topology, plans: Plans, reached: Calibration) -> np.ndarray:
    """What is minimised: expected seconds of a step, and a little for each choice beside the plainest."""
    return estimate(job, on, plans, reached).time.expected * (1 + EXTRA * extras(plans))


def anneal(
    job: Job, on: Topology, choices: Remats, reached: Calibration, among: Sequence[dict[str, int]] | None = None,
    steps: int = 300, chains: int = 32, seed: int = 0,
) -> Plans:  # fmt: skip
    """One plan, by simulated annealing: a choice drawn anew, taken if better or, while it is hot, if little worse.

    The moves are FlexFlow's (arXiv:1807.05358, section 6.2). Chains walk side by side, since estimates come in arrays.
    Plans that do not fit cost what they lack; where none was met that does, the one returned does not either.
    """
    rng, all_meshes = np.random.default_rng(seed), _dividing(job, on, among)
    limit = HEADROOM * on.chip.device_hbm
    own = [name for name in Plans.CHOICES if name not in AXES]
    known = functools.cache(lambda number: of_mesh(job, on, all_meshes[number], choices))

    def cost(plans: Plans) -> np.ndarray:
        lacks = np.maximum(memory(job, plans).peak / limit, 1)
        return np.log(scores(job, on, plans, reached)) + 10 * np.log(lacks)

    def near(number: int, like: Plans, but: str | None) -> Plans:
        """A plan on a mesh that agrees with `like` in most choices, `but` one; which one is drawn."""
        options = known(number)
        differs = sum((getattr(options, name) != getattr(like, name)[0]).astype(int) for name in own if name != but)
        return options.take(rng.choice(np.flatnonzero(differs == differs.min()), 1))

    at = [int(rng.integers(len(all_meshes))) for _ in range(chains)]
    plans = [known(m).take(rng.integers(len(known(m)), size=1)) for m in at]
    now = cost(_together(plans))
    best, least = plans[int(now.argmin())], now.min()
    for step in range(steps):
        heat = 0.1 * (1 - step / steps) ** 2 + 1e-6
        change = [rng.choice([None, *own]) for _ in range(chains)]
        there = [m if name else int(rng.integers(len(all_meshes))) for m, name in zip(at, change)]
        trial = [near(m, plan, name) for m, plan, name in zip(there, plans, change)]
        new = cost(_together(trial))
        for i in np.flatnonzero((new < now) | (rng.random(chains) < np.exp(np.minimum(0, (now - new) / heat)))):
            at[i], plans[i], now[i] = there[i], trial[i], new[i]
        if now.min() < least:
            best, least = plans[int(now.argmin())], now.min()
    return best


# --- plans as configs ------------------------------------------------------------------------------------------------


def overrides_of(plans: Plans, on: Topology, choices: Remats) -> dict[str, Any]:
    """The blocks of a RunConfig that ask for a plan."""
    one = {name: int(getattr(plans, name)[0]) for name in Plans.CHOICES}
    mesh: dict[str, Any] = {
        axis: one[axis] for axis in ("data", "pipe", "fsdp", "expert", "context", "tensor") if axis in one
    }
    if on.slices > 1:
        mesh["across"] = _across(one, on)
    sharding: dict[str, Any] = {"preset": ("ddp", "zero1", "zero2", "zero3")[one["zero"]]}
    sharding["activations"] = {"norm_seq": ["context", "tensor"] if one["norm_seq"] else "context"}
    schedule: dict[str, Any] = {"kind": SCHEDULES[one["schedule"]]}
    # What a kind has is said: it would else stay as a config of the same kind has it.
    schedule |= {"gpipe": {"slices": plans.slices}, "interleaved": {"chunks": one["chunks"]}}.get(schedule["kind"], {})
    remat = choices.values[one["remat"]]
    blocks = {
        "topology": on.name, "mesh": {"expert": 1} | mesh, "sharding": sharding, "accumulate": one["accumulate"],
        "remat": remat if isinstance(remat, str) else remat.model_dump(mode="json"),
        "offload": {"optimizer": bool(one["offload"])},
    }  # fmt: skip
    if one["context"] > 1:
        blocks["context"] = {"kind": "ulysses" if one["ulysses"] else "ring"}
    if one["pipe"] > 1:
        blocks["pipeline"] = {"schedule": schedule, "stages": None, "recompute": bool(one["recompute"])}
    return blocks


def _across(one: dict[str, int], on: Topology) -> str:
    """The axis over slices that the formulas have in mind; over hosts of GPUs, the one that lies over them anyway."""
    axes = [a for a in ("data", "pipe", "fsdp") if one[a] % on.slices == 0]
    if on.chip.platform != "tpu":
        axes = [a for a in axes if a == next((b for b in ("data", "pipe", "fsdp") if one[b] > 1), None)]
    return axes[0] if axes else "data"


def configured(
    cfg: RunConfig, job: Job, on: Topology, plans: Plans, choices: Remats, reached: Calibration
) -> Plan | None:
    """The plan with its config; None where the config refuses that combination of parts."""
    blocks = overrides_of(plans, on, choices)
    tree = cfg.model_dump(mode="json")
    tree.pop("sharding")  # presets fill in what is not said
    try:
        own = parse(RunConfig, merge(tree, blocks), name="plan")
    except ConfigError:
        return None
    return Plan(own, blocks, plans, estimate(job, on, plans, reached))


def _accepted(
    cfg: RunConfig, job: Job, on: Topology, plans: Plans, choices: Remats, reached: Calibration, refused: set[tuple]
) -> Plan | None:
    """The plan, or the best on its mesh that the config takes."""
    if plan := _fastest(cfg, job, on, plans, choices, reached, refused):
        return plan
    options = _fitting(job, on, of_mesh(job, on, {axis: int(getattr(plans, axis)[0]) for axis in AXES}, choices))
    return _fastest(cfg, job, on, options, choices, reached, refused)


def _fastest(
    cfg: RunConfig, job: Job, on: Topology, plans: Plans, choices: Remats, reached: Calibration, refused: set[tuple]
) -> Plan | None:
    """The best of the plans whose combination of parts the config takes; adds to those it refuses."""
    parts = _parts(plans)
    for i in np.argsort(scores(job, on, plans, reached), kind="stable") if len(plans) else ():
        if parts[i] not in refused:
            if plan := configured(cfg, job, on, plans.take(np.array([i])), choices, reached):
                return plan
            refused.add(parts[i])
    return None


def _parts(p: Plans) -> list[tuple]:
    """Of each plan, what combinations are refused for; not for `accumulate`, which divides all batches."""
    on = [getattr(p, axis) > 1 for axis in AXES]
    chosen = (*on, p.zero, p.norm_seq, p.ulysses, p.schedule, p.recompute, p.offload, _on_host(p))
    return list(zip(*(x.tolist() for x in chosen)))


# --- compiled plans --------------------------------------------------------------------------------------------------


def verified(
    found: Found, cfg: RunConfig, choices: Remats, reached: Calibration, verify: Callable[[RunConfig], Verdict], k: int
) -> Found:
    """The best `k` compiled, without those that do not fit, ranked by what is predicted of the compiled programs."""
    good: list[Plan] = []
    dropped: list[Plan] = []
    for plan in found.ranked:
        for _ in range(TRIES):
            try:
                verdict = verify(plan.cfg)
            except UserError as e:
                dropped.append(dataclasses.replace(plan, verdict=Verdict(False, math.nan, math.nan, why=str(e))))
                break
            plan = dataclasses.replace(plan, verdict=verdict)
            if verdict.fits:
                good.append(plan)
                break
            dropped.append(plan)
            smaller = _smaller(found, cfg, plan, verdict.peak_bytes / plan.peak, choices, reached)
            if smaller is None:
                break
            plan = smaller
        if len(good) == k:
            break
    if not good:
        compiled = [plan for plan in dropped if not plan.verdict.why]
        if not compiled:
            raise UserError(f"no plan compiles for {found.on.name}: {dropped[0].verdict.why}")
        least = min(compiled, key=lambda plan: plan.verdict.peak_bytes)
        raise UserError(
            f"no plan of {len(compiled)} that were compiled fits {found.on.name}: the smallest takes "
            f"{least.verdict.peak_bytes / 2**30:.1f} GiB of {found.on.chip.device_hbm / 2**30:.1f}; take more "
            "chips or a smaller batch"
        )
    good.sort(key=lambda plan: plan.expected)
    return found._replace(ranked=tuple(good), dropped=tuple(dropped))


TRIES = 3  # plans of a mesh that are compiled until one fits


def _smaller(
    found: Found, cfg: RunConfig, plan: Plan, factor: float, choices: Remats, reached: Calibration
) -> Plan | None:
    """The fastest plan of the same mesh that fits if the formulas are as far off for it; None: there is none."""
    plans = of_mesh(found.job, found.on, plan.mesh, choices)
    peak = memory(found.job, plans).peak
    plans = plans.take((peak * factor <= found.on.chip.device_hbm) & (peak < 0.98 * plan.peak))
    return _fastest(cfg, found.job, found.on, plans, choices, reached, set())


# --- when there is none ----------------------------------------------------------------------------------------------


def _no_mesh(job: Job, on: Topology) -> str:
    s = job.sizes
    rows = f"{job.rows} rows, with those of the ramp multiples of {job.unit}," if job.ramp else f"{job.rows} rows"
    return (
        f"no mesh of {on.devices} devices divides this run: {rows} of {s.length} tokens, {s.groups} layer "
        f"groups, {s.heads} heads and {s.kv_heads} key-value heads; a batch of {on.devices} rows, or a multiple, does"
    )


def _nothing_fits(job: Job, on: Topology, smallest: float) -> str:
    usable = on.chip.device_hbm
    more = math.ceil(on.chips * smallest / (HEADROOM * usable))
    return (
        f"nothing fits {on.name}: the smallest plan is predicted to take {smallest / 2**30:.1f} GiB of a device's "
        f"{usable / 2**30:.1f} (of which {HEADROOM:.0%} are planned with); take about {more} chips, or a smaller batch"
    )
