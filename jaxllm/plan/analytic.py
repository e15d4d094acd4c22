"""Memory and time of a training step as closed formulas, of thousands of plans at once. No JAX here.

A quantity is a numpy array over plans (`Plans`). All of it is predicted: no chip was asked.

Sources. Memory: Rajbhandari et al. 2019 (ZeRO, arXiv:1910.02054, section 3), Korthikanti et al. 2022 (activations of a
layer, sequence parallelism, arXiv:2205.05198, sections 4-5), Narayanan et al. 2021 (pipelines, arXiv:2104.04473,
section 2.2), Qi et al. 2023 (zero bubble, arXiv:2401.10241, table 1). Time of collectives on rings and tori: Austin et
al. 2025, "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapters 3 and 5. What the chips reach of their
data sheets is fitted to published runs (`calibration.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.models.config import DecoderConfig, Keep
from jaxllm.models.count import (
    attention_weights,
    ffn_weights,
    ffn_width,
    flops_per_token,
    parameters,
    parts,
    vocabulary,
)
from jaxllm.plan.network import Numbers, wires
from jaxllm.plan.topology import Topology

# --- the model in numbers --------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """A decoder on rows of `length` tokens; where layers differ, their mean."""

    length: int  # tokens of a row
    layers: int
    groups: int  # runs of layers that a pipeline can cut between
    embed: int
    vocab: int
    heads: int  # what tensor parallelism must divide: the greatest common divisor over layers
    kv_heads: int
    mlp: int
    queries: float  # heads x head_dim
    keys: float  # kv_heads x head_dim
    wide: float  # feed-forward width
    ups: float  # products into that width: 2 with a gate
    layer_parameters: float
    tables: float  # parameters outside of layers: embedding, positions, head, last norm
    pairs: float  # FLOPs of scores and values of a layer, forward, per token
    flops: float  # of the model per token, forward and backward: what MFU counts
    stored: float = 1.0  # feed-forwards a layer stores: experts
    used: float = 1.0  # feed-forwards a token passes through, padding of their capacity included

    @property
    def parameters(self) -> float:
        return self.layers * self.layer_parameters + self.tables


@functools.lru_cache(256)
def sizes(cfg: DecoderConfig, length: int) -> Sizes:
    """What the formulas need to know of a decoder. Of mixtures all experts are used: dispatch is dense."""
    blocks = [cfg.layer(i) for i in range(cfg.num_layers)]

    def mean(values) -> float:
        return math.fsum(values) / len(blocks)

    in_layers = sum(n for name, n in parts(cfg).items() if name.startswith("layers."))
    flops = flops_per_token(cfg, length)
    weights = sum(attention_weights(cfg, b.attention) + ffn_weights(cfg, b) for b in blocks)
    wide = mean(b.ffn.mlp for b in blocks)
    shared = [s.mlp for b in blocks if (s := getattr(b.ffn, "shared", None))]
    return Sizes(
        length=length, layers=cfg.num_layers, groups=cfg.num_groups, embed=cfg.embed, vocab=vocabulary(cfg),
        heads=math.gcd(*(b.attention.num_heads for b in blocks)),
        kv_heads=math.gcd(*(b.attention.kv_heads for b in blocks)), mlp=math.gcd(*(b.ffn.mlp for b in blocks), *shared),
        queries=mean(b.attention.num_heads * cfg.head_dim(b.attention) for b in blocks),
        keys=mean(b.attention.kv_heads * cfg.head_dim(b.attention) for b in blocks),
        wide=wide, ups=mean(1 + b.ffn.glu for b in blocks),
        layer_parameters=in_layers / cfg.num_layers, tables=parameters(cfg) - in_layers,
        pairs=(flops.forward - 2 * weights - 2 * cfg.embed * vocabulary(cfg)) / cfg.num_layers, flops=flops.train,
        stored=mean(getattr(b.ffn, "experts", 1) for b in blocks),
        used=mean(ffn_width(b.ffn, chosen=False) for b in blocks) / wide,
    )  # fmt: skip


class Job(NamedTuple):
    """What a step does whatever the plan, and how numbers are kept."""

    sizes: Sizes
    rows: int  # of a step, over all devices
    weight_bytes: float = 4.0  # of a parameter between steps
    optimizer_bytes: float = 8.0  # of its optimizer state
    compute_bytes: float = 2.0  # of an activation, and of a weight in a product
    speed: float = 1.0  # of products, as a multiple of the chip's 16-bit peak: 2 with 8-bit numbers
    ramp: tuple[int, ...] = ()  # rows of the smaller steps at the start
    weights_on_host: bool = False  # whether they wait in host memory between steps

    @property
    def tokens(self) -> int:
        return self.rows * self.sizes.length

    @property
    def unit(self) -> int:
        """Rows that those of every step are a multiple of: what divides them divides all steps."""
        return math.gcd(self.rows, *self.ramp)


# --- what the backward pass keeps ------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Values of a layer that wait for the backward pass, by the names of `models.remat`, on the device or the host.

    Besides those: `input` of the layer (always kept, unless offloaded), `normed` inputs of products, `hidden` of the
    feed-forward after its activation, `down`, its output.
    """

    device: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()


ATTENTION = frozenset({"q", "k", "v", "attention"})
POLICIES = {
    "none": Kept(ATTENTION | {"residual", "gate", "up", "normed", "hidden"}),
    "dots": Kept(frozenset({"q", "k", "v", "residual", "gate", "up", "down"})),
    "save_attention": Kept(ATTENTION),
    "offload": Kept(host=ATTENTION),
    "full": Kept(),
}


def kept(remat: str | Keep) -> Kept:
    """What a run's `remat` keeps."""
    return POLICIES[remat] if isinstance(remat, str) else Kept(frozenset(remat.device), frozenset(remat.host))


class _Remat(NamedTuple):
    """Costs of a policy per token and layer; `stream` has the width of the residual stream, `wide` is cut by tensor."""

    stream: float  # elements kept on the device
    wide: float
    host_stream: float  # elements kept on the host
    host_wide: float
    qkv: float  # products that are computed again, as shares of the forward pass
    pairs: float
    out: float
    up: float
    again: float  # passes over the rest: norms, activations


@functools.lru_cache(4096)
def _remat(policy: Kept, s: Sizes) -> _Remat:
    stream = {"input": s.embed, "residual": s.embed, "down": s.embed, "normed": 2 * s.embed}
    wide = {
        "q": s.queries, "k": s.keys, "v": s.keys, "attention": s.queries, "up": s.wide * s.used,
        "gate": s.wide * s.used * (s.ups - 1), "hidden": s.wide * s.used,
    }  # fmt: skip
    everywhere = policy.device | policy.host
    on_device = policy.device | ({"input"} - policy.host)

    def of(table: dict[str, float | int], names: frozenset[str]) -> float | int:
        return sum(table[n] for n in names if n in table)

    qkv = s.queries * ("q" not in everywhere) + s.keys * ("k" not in everywhere) + s.keys * ("v" not in everywhere)
    return _Remat(
        stream=of(stream, on_device), wide=of(wide, on_device), host_stream=of(stream, policy.host),
        host_wide=of(wide, policy.host), qkv=qkv / (s.queries + 2 * s.keys), pairs="attention" not in everywhere,
        out="residual" not in everywhere,
        up=(("up" not in everywhere) + (s.ups - 1) * ("gate" not in everywhere)) / s.ups,
        again="normed" not in everywhere,
    )  # fmt: skip


# --- plans -----------------------------------------------------------------------------------------------------------

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")


@dataclasses.dataclass(frozen=True)
class Plans:
    """Choices of many plans, one array a choice, all of one length (or one element that stands for all)."""

    data: Numbers
    pipe: Numbers
    fsdp: Numbers
    context: Numbers
    tensor: Numbers
    zero: Numbers  # ZeRO stage, 0 to 3
    norm_seq: Numbers  # whether norms and sums are cut along the row over tensor (Megatron sequence parallelism)
    ulysses: Numbers  # whether attention crosses `context` by all-to-all; else by a ring
    schedule: Numbers  # index into SCHEDULES
    chunks: Numbers  # stages a device holds
    accumulate: Numbers  # microbatches
    recompute: Numbers  # whether a stage of a pipeline goes forward again before it goes backward; 0 without stages
    remat: Numbers  # index into `policies`
    offload: Numbers  # whether optimizer state waits in host memory
    policies: Sequence[Kept] = tuple(POLICIES.values())
    # What a config may ask for, and no search chooses: alike in all plans.
    slices: int = 1  # of tokens, that a microbatch is cut into on its way through a pipeline
    across: str | None = None  # mesh axis over the slices of a topology; None: data, pipe or fsdp, the first that can
    crossing: float = 1.0  # what crosses `data` in a step, of what gradients at every microbatch would be

    CHOICES = (
        "data", "pipe", "fsdp", "context", "tensor", "zero", "norm_seq", "ulysses", "schedule", "chunks", "accumulate",
        "recompute", "remat", "offload",
    )  # fmt: skip

    def __len__(self) -> int:
        return max(len(getattr(self, name)) for name in self.CHOICES)

    def take(self, index: Numbers) -> "Plans":
        """The plans that a mask or an array of indices names."""
        full = {name: np.broadcast_to(getattr(self, name), len(self))[index] for name in self.CHOICES}
        return dataclasses.replace(self, **full)

    @classmethod
    def one(cls, policy: Kept = POLICIES["full"], **choices: Any) -> "Plans":
        """A single plan: what is not said is one device, ZeRO 3, 1F1B."""
        low = dict.fromkeys(("data", "pipe", "fsdp", "context", "tensor", "chunks", "accumulate"), 1)
        low |= {"zero": 3, "schedule": SCHEDULES.index("1f1b")} | choices
        columns = {name: np.array([low.get(name, 0)]) for name in cls.CHOICES}
        return cls(**columns, policies=(policy,), **{n: v for n, v in choices.items() if n not in cls.CHOICES})


# --- estimates -------------------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """Shares: what a chip reaches of its data sheet, and how much of the transfers hides behind compute."""

    products: float  # of the peak, in large matrix products
    attention: float  # of the peak, in flash attention, counting the pairs that the mask lets see
    hidden: float  # of transfers of weights, gradients and offloaded values
    hidden_blocking: float  # of transfers that the next product waits for: tensor, context, pipe
    error: float = 0.0  # of predicted step times, left out of the fit, in the median
    blocks: float = 0.5  # of attention's pace where XLA computes it block by block: in a ring


class Terms(NamedTuple):
    """Seconds of a step by what takes them, one number a plan, with nothing hidden behind anything else."""

    products: Numbers  # matrix products of forward and backward pass
    recompute: Numbers  # products that are computed again
    attention: Numbers  # scores and values, by a flash kernel
    elementwise: Numbers  # norms, activations, the loss: what memory bandwidth limits
    optimizer: Numbers  # reading and writing state
    bubble: Numbers  # a pipeline's idle stages
    tensor: Numbers  # transfers by mesh axis
    context: Numbers
    pipe: Numbers
    gather: Numbers  # of weights, over fsdp x context
    scatter: Numbers  # of gradients, over fsdp x context
    data: Numbers  # of gradients, over data
    host: Numbers  # to and from host memory

    COMPUTE = ("products", "recompute", "attention", "elementwise", "optimizer", "bubble")
    BLOCKING = ("tensor", "context", "pipe")
    STREAMED = ("gather", "scatter", "data")

    def over(self, names: Sequence[str]) -> Numbers:
        return sum(getattr(self, name) for name in names)


class StepTime(NamedTuple):
    """Predicted seconds of a step, one number a plan."""

    low: Numbers  # every transfer that can hide behind compute does
    high: Numbers  # none does
    expected: Numbers  # the calibrated share does


def step_time(terms: Terms, calibration: Calibration) -> StepTime:
    compute, blocking = terms.over(Terms.COMPUTE), terms.over(Terms.BLOCKING)
    streamed, host = terms.over(Terms.STREAMED), terms.host
    low = np.maximum(np.maximum(compute, blocking + streamed), host)
    high = compute + blocking + streamed + host
    busy = compute + (1 - calibration.hidden_blocking) * blocking
    longest = np.maximum(np.maximum(busy, streamed), host)
    expected = longest + (1 - calibration.hidden) * (busy + streamed + host - longest)
    return StepTime(low, high, np.clip(expected, low, high))


class Memory(NamedTuple):
    """Bytes of a device by what takes them, one number a plan. The workspaces do not live at the same time."""

    parameters: Numbers  # between steps
    optimizer: Numbers
    cast: Numbers  # parameters in the type of products
    activations: Numbers  # what waits for the backward pass
    gradients: Numbers
    layer: Numbers  # workspace of a layer in the backward pass, with its gathered weights
    head: Numbers  # workspace of logits and loss

    @property
    def peak(self) -> Numbers:
        backward = self.gradients + self.layer
        return self.parameters + self.optimizer + self.cast + self.activations + np.maximum(backward, self.head)


class Estimate(NamedTuple):
    """What is predicted of plans."""

    memory: Memory
    terms: Terms
    time: StepTime


def estimate(job: Job, on: Topology, plans: Plans, calibration: Calibration) -> Estimate:
    """Memory and time of every plan, one device's."""
    plans = plans.take(np.arange(len(plans)))
    terms = paced(work(job, on, plans), calibration)
    return Estimate(memory(job, plans), terms, step_time(terms, calibration))


def tokens(job: Job, p: Plans) -> Numbers:
    """Tokens of a microbatch on a device."""
    return job.tokens / (p.data * p.fsdp * p.context * p.accumulate)


def in_flight(p: Plans) -> Numbers:
    """Microbatches whose activations the first stage holds at once (arXiv:2104.04473, section 2.2)."""
    deep = np.select([p.schedule == 0, p.schedule == 2], [p.accumulate, p.pipe + (p.pipe - 1) / p.chunks], p.pipe)
    return np.minimum(np.where(p.pipe == 1, 1, deep), p.accumulate)


def _parameters(s: Sizes, p: Plans) -> Numbers:
    """Parameters of a device before ZeRO: stages have their layers, and all of them the tables."""
    return s.layers * s.layer_parameters / (p.tensor * p.pipe) + s.tables / p.tensor


def _policies(job: Job, p: Plans) -> _Remat:
    """The costs of every plan's policy, as arrays."""
    return _Remat(*np.array([_remat(policy, job.sizes) for policy in p.policies], float)[p.remat].T)


def memory(job: Job, p: Plans) -> Memory:
    """Where the bytes go. Factors of workspaces are those of compiled steps: see tests/plan/test_analytic.py."""
    s, b = job.sizes, job.compute_bytes
    held, shared, again = _parameters(s, p), p.fsdp * p.context, _policies(job, p)
    micro, cut = tokens(job, p), np.where(p.norm_seq, p.tensor, 1)
    gathered = s.layer_parameters / p.tensor * ((p.zero == 3) & (shared > 1))
    kept = again.stream / cut + again.wide / p.tensor

    def from_stage(stage: int) -> Numbers:
        """Parameters of a device where `stage` of ZeRO shares them out."""
        return held / np.where(p.zero >= stage, shared, 1)

    inside = 3 * s.embed / cut + 2 * s.embed
    inside = inside + (1.5 * (s.queries + 2 * s.keys) + (s.ups + 1) * s.wide * s.used) / p.tensor
    # Recomputed, a stage keeps its inputs, and what its layers keep while one unit goes backward; else the last stage
    # keeps its outputs, and all devices have the room for them.
    here, again_forward = s.layers / p.pipe, p.recompute > 0
    layers = np.where(again_forward, here / p.chunks, here * in_flight(p))
    inputs = np.where(p.pipe > 1, s.embed / cut * p.chunks * in_flight(p), 0)
    # Both sides of every product of a layer wait for the gradients of its weights, of as many units as stages.
    late = 4 * s.embed / cut + (2 * s.queries + 2 * s.keys + (s.ups + 1) * s.wide * s.used) / p.tensor
    late = late * here * np.where((p.schedule == 3) & (p.pipe > 1), p.pipe, 0)
    return Memory(
        parameters=from_stage(3) * job.weight_bytes * (not job.weights_on_host),
        optimizer=from_stage(1) * job.optimizer_bytes * (1 - p.offload),
        cast=from_stage(3) * (b if b != job.weight_bytes or job.weights_on_host else 0),
        activations=(kept * layers + inputs + late) * b * micro / p.slices,
        gradients=from_stage(2) * np.where(p.accumulate > 1, 4 + b, b),
        layer=inside * b * micro / p.slices + 1.5 * gathered * b,
        head=micro / p.slices * s.vocab / p.tensor * (4 + b),  # logits, and their gradient in the type of products
    )


class Work(NamedTuple):
    """Terms of a step before the chip's efficiency, one number a plan."""

    terms: Terms  # seconds; products, recompute, attention and bubble at the chip's peak
    products_floor: Numbers  # seconds that the memory traffic of products takes
    recompute_floor: Numbers
    ring: Numbers  # whether attention is computed in blocks
    idle: Numbers  # stage times of a microbatch that a pipeline idles
    share: Numbers  # of a step's compute that a stage does in a microbatch


def paced(work: Work, calibration: Calibration) -> Terms:
    """The terms at the pace that a chip reaches."""
    t = work.terms
    products = np.maximum(t.products / calibration.products, work.products_floor)
    recompute = np.maximum(t.recompute / calibration.products, work.recompute_floor)
    attention = t.attention / calibration.attention / np.where(work.ring, calibration.blocks, 1)
    stage = (products + recompute + attention + t.elementwise) * work.share
    return t._replace(products=products, recompute=recompute, attention=attention, bubble=work.idle * stage)


TILES = {"v6e": 256, "tpu7x": 256}  # side of the matrix unit, which widths are padded to; the others': 128


def work(job: Job, on: Topology, p: Plans) -> Work:
    """What each plan makes a device do."""
    s, b, chip, t = job.sizes, job.compute_bytes, on.chip, p.tensor
    peak, bandwidth, tile = chip.device_flops, chip.device_bandwidth, TILES.get(chip.name, 128)
    net = wires(on, {axis: getattr(p, axis) for axis in ("tensor", "context", "fsdp", "pipe", "data")}, p.across)
    micro, m, again, cut = tokens(job, p), p.accumulate, _policies(job, p), np.where(p.norm_seq, t, 1)
    here, twice = s.layers / p.pipe, p.recompute * (1 - 1 / (p.pipe * p.chunks))  # the last stage goes forward once
    forward = 1 + twice  # passes

    def padded(width: Numbers) -> Numbers:
        return np.ceil(width / tile) * tile

    # Matrix products [tokens, k] x [k, n] of a layer: (k, n, how many, share that is computed again).
    q, kv, wide, d = s.queries / t, s.keys / t, s.wide / t, np.full(len(p), float(s.embed))
    layer = (
        (d, q, 1, again.qkv + twice), (d, kv, 2, again.qkv + twice), (q, d, 1, again.out + twice),
        (d, wide, s.ups * s.used, again.up + twice), (wide, d, s.used, twice),
    )  # fmt: skip
    head = (d, s.vocab / t)

    def seconds(k: Numbers, n: Numbers) -> Numbers:
        return 2 * micro * padded(k) * padded(n) / (peak * job.speed)

    def traffic(k: Numbers, n: Numbers) -> Numbers:
        return b * (micro * (k + n) + k * n) / bandwidth

    def total(of, passes) -> Numbers:
        """Of all products of a step; `passes` tells how often from the share that is computed again."""
        in_layers = sum(times * passes(share) * of(k, n) for k, n, times, share in layer)
        return m * (here * in_layers + passes(0) * of(*head))

    # The flash backward pass computes scores again: 5 products for the forward pass's 2 (arXiv:2307.08691, 3.1).
    attention = m * here * s.pairs / t * (forward + 2.5 + again.pairs) * micro / peak
    # Elements that norms, rotation and activation read and write; per logit, the loss and its gradient move 16 bytes.
    moved = 4 * s.embed / cut + 2 * (q + kv) + (s.ups + 1) * wide * s.used
    elementwise = (
        here * moved * b * (2 + forward + again.again) * micro + 16 * s.vocab / t * micro + 8 * s.vocab * s.embed / t
    )

    held, shared = _parameters(s, p), p.fsdp * p.context
    own = held / np.where(p.zero >= 1, shared, 1)  # parameters whose optimizer state a device has
    kept_gradients = held / np.where(p.zero >= 2, shared, 1)
    state = own * (2 * job.weight_bytes + 4 + b + 2 * job.optimizer_bytes * (1 - p.offload))
    state = state + 12 * kept_gradients * m * (m > 1)  # sums over microbatches

    # A stage gathers its weights for the forward and the backward pass of each microbatch; under ZeRO 1 and 2 the
    # updated weights are gathered once. Gradients are scattered (or, unshared, all-reduced) for each microbatch.
    weights = b * held
    gather = np.where(
        p.zero == 3, m * (1 + forward) * net.shared.gather(weights, 4 * here),
        (p.zero > 0) * net.shared.gather(job.weight_bytes * held, 1),
    )  # fmt: skip
    scatter = m * np.where(p.zero >= 2, 1, 2) * net.shared.gather(weights, 4 * here)
    data = m * 2 * net.data.gather(b * kept_gradients, 4 * here) * p.crossing
    stream = micro * s.embed * b
    # All-reduces of a layer, or a gather and a scatter for each: two forward, two backward, one computed again unless
    # the stream is kept; cut along the row, inputs of products are gathered once more (arXiv:2205.05198, 4.2.2).
    crossings = here * (2 + 2 * forward + again.out + p.norm_seq) + 2
    tensor = m * 2 * net.tensor.gather(stream) * crossings
    ring = (p.context - 1) * net.context.shift(2 * micro * kv * b) * (2 + forward + again.pairs)
    sent = kv * np.maximum(1, p.context * t / s.kv_heads)  # key-value heads too few for the shares go more than once
    swapped = net.context.swap(micro * 2 * (q + sent) * b) * (1 + forward + again.pairs)
    context = m * here * np.where(p.ulysses, swapped, ring)
    # Stages shift on every tick, forward and backward.
    pipe = (p.pipe > 1) * 2 * p.chunks * (m + p.pipe - 1) * net.pipe.shift(stream / cut)
    host = m * here * 2 * (again.host_stream / cut + again.host_wide / t) * micro * b
    host = host + 2 * own * (job.optimizer_bytes * p.offload + job.weight_bytes * job.weights_on_host)

    # ZB-H1 idles for F + B - W of F + B + W (arXiv:2401.10241, table 1), where B may hold another F.
    idle = np.select([p.schedule == 2, p.schedule == 3], [1 / p.chunks, forward / (2 + forward)], 1 / p.slices)
    return Work(
        Terms(
            products=total(seconds, lambda share: 3), recompute=total(seconds, lambda share: share),
            attention=attention, elementwise=m * elementwise / bandwidth, optimizer=state / bandwidth,
            bubble=np.zeros(len(p)), tensor=tensor, context=context, pipe=pipe, gather=gather, scatter=scatter,
            data=data, host=host / (chip.pcie / chip.devices),
        ),
        products_floor=total(traffic, lambda share: 3), recompute_floor=total(traffic, lambda share: share),
        ring=(p.context > 1) & (p.ulysses == 0), idle=(p.pipe - 1) * idle, share=1 / m,
    )  # fmt: skip
