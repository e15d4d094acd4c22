"""RunConfig: the whole of a training run in one value. No JAX here."""

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxllm.core.config import Config, union
from jaxllm.core.errors import ConfigError
from jaxllm.core.metrics import Metrics
from jaxllm.data.config import DataConfig
from jaxllm.models.config import DecoderModel, Remat
from jaxllm.objectives.config import NextToken, Objective
from jaxllm.parallel.config import (
    Compression,
    Context,
    DiLoCo,
    Int8,
    LocalSGD,
    Mesh,
    Offload,
    Outer,
    Pipeline,
    Ring,
    Sharding,
    Ulysses,
    axis_names,
)

# --- schedules: multiples of the peak learning rate by step -----------------------------------------------------


class _Schedule(Config):
    warmup: int = Field(0, ge=0)  # steps of linear rise from 0 to the peak


class Constant(_Schedule):
    """Stays at the peak."""

    kind: Literal["constant"] = "constant"


class Cosine(_Schedule):
    """Half a cosine from the peak to `floor` at the last step (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(0.1, ge=0, le=1)  # end, as a share of the peak (Chinchilla, arXiv:2203.15556: 0.1)


class Linear(_Schedule):
    """A straight line from the peak to `floor` at the last step."""

    kind: Literal["linear"] = "linear"
    floor: float = Field(0.0, ge=0, le=1)  # end, as a share of the peak


class WSD(_Schedule):
    """Warmup, stable, decay (MiniCPM, Hu et al. 2024, arXiv:2404.06395, section 4)."""

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(0.1, gt=0, le=1)  # share of the steps that decay, at the end
    floor: float = Field(0.0, ge=0, le=1)  # end, as a share of the peak
    shape: Literal["linear", "sqrt", "exponential"] = "linear"  # of the decay; sqrt is 1 - sqrt (arXiv:2405.18392)


class InverseSqrt(_Schedule):
    """peak * sqrt(warmup / step) after the warmup (Vaswani et al. 2017, arXiv:1706.03762, equation 3)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: int = Field(1000, gt=0)  # steps of linear rise from 0 to the peak


Schedule = union(Constant, Cosine, Linear, WSD, InverseSqrt)


# --- optimizers ----------------------------------------------------------------------------------------------------


class _Optimizer(Config):
    learning_rate: float = Field(gt=0)  # peak learning rate
    weight_decay: float = Field(0.0, ge=0)  # decoupled, of matrices only: norms, biases and vectors do not decay


class AdamW(_Optimizer):
    """Loshchilov & Hutter 2017, arXiv:1711.05101."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.1, ge=0)  # decoupled, of matrices only
    b1: float = Field(0.9, ge=0, lt=1)  # decay of the mean of gradients
    b2: float = Field(0.95, ge=0, lt=1)  # decay of the mean of their squares
    epsilon: float = Field(1e-8, gt=0)  # added to the root


class Adafactor(_Optimizer):
    """Factored second moments: memory of rows + columns (Shazeer & Stern 2018, arXiv:1804.04235)."""

    kind: Literal["adafactor"] = "adafactor"
    decay: float = Field(0.8, gt=0, le=1)  # exponent c of 1 - step^-c
    clipping: float | None = Field(1.0, gt=0)  # of the update's root mean square; null: none
    min_dim: int = Field(128, gt=0)  # smaller dimensions are not factored
    scale_by_parameter: bool = False  # multiply the rate by the parameter's root mean square


class Lion(_Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

    kind: Literal["lion"] = "lion"
    weight_decay: float = Field(1.0, ge=0)  # decoupled, of matrices only
    b1: float = Field(0.9, ge=0, lt=1)  # interpolation for the update
    b2: float = Field(0.99, ge=0, lt=1)  # decay of the momentum


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)  # 0: none
    nesterov: bool = False  # look ahead


class Muon(_Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025, 2502.16982)."""

    kind: Literal["muon"] = "muon"
    weight_decay: float = Field(0.1, ge=0)  # decoupled, of matrices only
    momentum: float = Field(0.95, ge=0, lt=1)  # of the matrices
    adam: AdamW = AdamW(learning_rate=3e-4)  # for embeddings, head, norms and biases


Optimizer = union(AdamW, Adafactor, Lion, SGD, Muon)


# --- precision -----------------------------------------------------------------------------------------------------


class Float32(Config):
    """Everything in float32."""

    kind: Literal["float32"] = "float32"


class BFloat16(Config):
    """Computes in bfloat16, keeps float32 master weights and optimizer state (Kalamkar et al. 2019, 1905.12322)."""

    kind: Literal["bfloat16"] = "bfloat16"


class Float16(Config):
    """Computes in float16 with a dynamic loss scale (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

    An overflow skips the step and halves the scale; `growth_interval` good steps double it.
    """

    kind: Literal["float16"] = "float16"
    initial_scale: float = Field(2.0**15, gt=0)  # loss scale at the start
    growth_interval: int = Field(2000, gt=0)  # good steps before the scale doubles
    min_scale: float = Field(1.0, gt=0)  # the scale is not halved below this


Precision = union(Float32, BFloat16, Float16)


# --- several processes ---------------------------------------------------------------------------------------------


class _Processes(Config):
    start_timeout: int = Field(300, gt=0)  # seconds to wait for all processes to come
    heartbeat_timeout: int = Field(100, ge=5)  # seconds without a sign of life after which a process has died: all end


class Auto(_Processes):
    """By what launched the process: JAX_COORDINATOR_ADDRESS and kin, OpenMPI, Slurm, a TPU pod; else it is alone."""

    kind: Literal["auto"] = "auto"


class TPUPod(_Processes):
    """A TPU pod, or several slices: JAX reads the rest from the pod's metadata."""

    kind: Literal["tpu"] = "tpu"


class Slurm(_Processes):
    """Tasks of srun."""

    kind: Literal["slurm"] = "slurm"


class OpenMPI(_Processes):
    """Processes of mpirun."""

    kind: Literal["openmpi"] = "openmpi"


class Address(_Processes):
    """Processes started by hand, each with its own `process_id`."""

    kind: Literal["address"] = "address"
    coordinator: str = Field(pattern=r"^.+:\d{1,5}$")  # host:port, where process 0 listens
    num_processes: int = Field(gt=0)  # all in all
    process_id: int = Field(ge=0)  # of this one, from 0

    @model_validator(mode="after")
    def _is_one_of_them(self):
        if self.process_id >= self.num_processes:
            raise ValueError(f"process_id={self.process_id} must be below num_processes={self.num_processes}")
        return self


class Alone(Config):
    """One process, whatever launched it."""

    kind: Literal["none"] = "none"


Distributed = union(Auto, TPUPod, Slurm, OpenMPI, Address, Alone)


# --- the rest of a run ---------------------------------------------------------------------------------------------


class Ramp(Config):
    """Batch size grows in equal steps of rows (GPT-3, arXiv:2005.14165, appendix B)."""

    start: int = Field(gt=0)  # rows of the first batches
    increment: int = Field(gt=0)  # rows added at a time
    steps: int = Field(gt=0)  # steps until the full batch


class Evaluation(Config):
    """Held-out loss, perplexity, bits per byte and token accuracy."""

    every: int = Field(500, ge=0)  # steps; 0: only at the end
    rows: int | None = Field(None, gt=0)  # held-out rows to use, the first ones; null: all


class Checkpoints(Config):
    """When to save, what to keep."""

    every: int = Field(1000, gt=0)  # steps
    keep: int = Field(3, gt=0)  # newest that are kept
    best: bool = True  # also keep the one with the lowest held-out loss, of those saved at an evaluated step
    asynchronous: bool = True  # write while training goes on


class Stability(Config):
    """What to do when a step goes wrong (PaLM, arXiv:2204.02311, section 5.1: rewind and skip 200-500 batches)."""

    skip_nonfinite: bool = True  # leave the state as it was when loss or gradients are not finite; counted
    max_skipped: int = Field(20, gt=0)  # non-finite steps in a row that end the run
    spike_zscore: float | None = Field(None, gt=0)  # a loss this many deviations above its mean rewinds; null: never
    spike_window: int = Field(100, gt=1)  # steps that make the mean and deviation
    spike_patience: int = Field(1, gt=0)  # spiked steps in a row that count as a spike
    skip_batches: int = Field(10, ge=0)  # batches skipped beyond the spike when rewinding
    max_rewinds: int = Field(5, gt=0)  # rewinds that end the run


class Profile(Config):
    """A window of steps recorded for TensorBoard or Perfetto."""

    start: int = Field(10, ge=1)  # first step recorded
    steps: int = Field(3, gt=0)  # steps recorded


class RunConfig(Config):
    """`jaxllm train`: one training run."""

    version: int = Field(1, ge=1)  # of this config format
    out: str  # the run folder
    seed: int = Field(0, ge=0)  # of weights, data order and dropout
    steps: int = Field(gt=0)  # optimizer steps
    batch: int = Field(gt=0)  # rows of a step, over all devices
    accumulate: int = Field(1, gt=0)  # microbatches a step is cut into
    ramp: Ramp | None = None  # a batch that grows at the start
    data: DataConfig  # what to train on
    model: DecoderModel  # what to train
    initial: str | None = None  # model to take the weights from: a run, a Hugging Face folder, a GGUF file
    objective: Objective = NextToken()  # what is minimised
    optimizer: Optimizer  # how
    schedule: Schedule = Cosine(warmup=100)  # learning rate over time
    clip: float | None = Field(1.0, gt=0)  # largest norm of the gradient; null: none
    precision: Precision = Float32()  # of compute and weights
    remat: Remat = "none"  # what the backward pass computes again
    scan: bool = True  # scan over layers (compile time does not grow with depth); false: unroll
    mesh: Mesh = Mesh()  # devices by axis
    sharding: Sharding = Sharding()  # what lies on which mesh axis
    context: Context = Ring()  # attention over mesh axis context
    pipeline: Pipeline = Pipeline()  # layers over mesh axis pipe
    offload: Offload = Offload()  # what waits in host memory
    outer: Outer | None = None  # replicas (mesh axis data) that meet now and then only; null: at every step
    compression: Compression | None = None  # of the gradients that are summed over mesh axis data; null: none
    distributed: Distributed = Auto()  # processes that train together
    topology: str | None = None  # chips it is meant for, as `jaxllm plan --on` names them: v5p-256, h100-8x4
    evaluation: Evaluation = Evaluation()  # on held-out rows
    checkpoints: Checkpoints = Checkpoints()  # saving
    stability: Stability = Stability()  # non-finite steps and spikes
    metrics: Metrics = Metrics()  # logging
    profile: Profile | None = None  # profiling window
    compile_cache: bool = True  # keep compiled programs for the next start

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} must be a multiple of accumulate={self.accumulate}")
        if self.ramp:
            for rows in self.ramp_sizes():
                if rows % self.accumulate:
                    raise ValueError(
                        f"ramp gives a batch of {rows} rows, not a multiple of accumulate={self.accumulate}"
                    )
            if self.ramp.start > self.batch:
                raise ValueError(f"ramp.start={self.ramp.start} is above batch={self.batch}")
        return self

    @model_validator(mode="after")
    def _parts_go_together(self):
        if reasons := self.unsupported():
            raise ValueError("; ".join(reasons))
        return self

    def unsupported(self) -> list[str]:
        """Why the parts that the run is put together from cannot work together; empty: they can."""
        found, dropout = self.not_pipelined(self.mesh.pipe), self.model.dropout.attention
        if dropout and self.sharing_rows:
            shared = " ".join(f"mesh.{n}={getattr(self.mesh, n)}" for n in self.sharing_rows)
            found.append(
                f"model.dropout.attention={dropout} with {shared}: no device has a whole row of attention "
                "probabilities to draw from; set model.dropout.attention to 0, or have no two devices share a row"
            )
        if self.model.memory:
            found.append(
                f"model.memory={self.model.memory}: rows of one step do not go on in the next, so nothing would be "
                "remembered; set it to 0, or train by Decoder.segment"
            )
        if isinstance(self.context, Ulysses) and self.sharing_rows:
            found += self._not_exchanged()
        if self.outer is not None and self.compression is not None:
            found.append(
                f"outer={self.outer.kind} with compression: no gradient crosses mesh axis data where replicas train "
                "apart; set one of them to null"
            )
        if self.outer is not None and (self.offload.optimizer or self.offload.parameters):
            found.append(
                f"outer={self.outer.kind} with offload: what waits in host memory is fetched for all replicas at once, "
                "and they train apart; set offload.optimizer and offload.parameters to false"
            )
        for name, part in (("outer", self.outer), ("compression", self.compression)):
            if part is not None:
                found += self.not_replicated(f"{name}={part.kind}", part)
        return found

    @property
    def sharing_rows(self) -> tuple[str, ...]:
        """Mesh axes of several devices, as far as their sizes are known, that share each row out."""
        return tuple(n for n in axis_names(self.sharding.activations.seq) if getattr(self.mesh, n) > 1)

    def _not_exchanged(self) -> list[str]:
        """Why attention cannot exchange shares of rows for shares of heads."""
        flow = self.sharding.activations
        over = [n for n in (*axis_names(flow.heads), *axis_names(flow.seq)) if getattr(self.mesh, n) != 1]
        sizes = [getattr(self.mesh, n) for n in over]
        return [
            f"num_heads={heads} does not divide over mesh axes {' x '.join(over)} of {math.prod(sizes)} devices; make "
            "it a multiple, change the mesh, or set context to ring, which needs no heads"
            for heads in dict.fromkeys(block.attention.num_heads for block in self.model.blocks)
            if -1 not in sizes and heads % math.prod(sizes)
        ]

    def not_replicated(self, asked: str, part: LocalSGD | DiLoCo | Int8) -> list[str]:
        """Why the shares of mesh axis data cannot be replicas that differ, as `part` has them."""
        found, rules = [], self.sharding
        if self.mesh.data == 1 and not isinstance(part, DiLoCo):  # that of one replica is Lookahead, with momentum
            found.append(
                f"{asked} with mesh.data=1: one replica has nobody to exchange with; raise mesh.data or drop it"
            )
        for name in ("parameters", "gradients", "optimizer", "activations"):
            for field, axes in getattr(rules, name):
                may = field == "replicas" or (name, field) == ("activations", "batch")
                if not may and "data" in axis_names(axes):
                    found.append(
                        f"{asked} with sharding.{name}.{field}={axes}: mesh axis data counts replicas, each with "
                        f"{name} of its own; share {field} out over other axes"
                    )
        return found

    def not_pipelined(self, devices: int) -> list[str]:
        """Why the run cannot go through a pipeline of so many devices; one (or -1, for unknown) is no pipeline."""
        if devices < 2:
            return []
        model, mesh, found = self.model, f"mesh.pipe={devices}", []
        if self.accumulate < devices:
            found.append(
                f"{mesh} needs as many microbatches, to keep all stages busy, and accumulate={self.accumulate}; set "
                f"accumulate to {devices} or more (4 x {devices} idles for a fifth of the time)"
            )
        if tail := model.num_layers % len(model.blocks):
            found.append(
                f"{mesh} with {model.num_layers} layers in a pattern of {len(model.blocks)}: {tail} would be left "
                "over; make model.num_layers a multiple of the pattern"
            )
        try:
            self.pipeline.groups(devices, model.num_groups)
        except ConfigError as e:
            found.append(str(e))
        if self.remat == "offload" or getattr(self.remat, "host", ()):
            asked = self.remat if isinstance(self.remat, str) else f"{{host: [{', '.join(self.remat.host)}]}}"
            found.append(
                f"{mesh} with remat={asked}: what a stage keeps waits on its device; set remat to save_attention, or "
                "to a list of names"
            )
        if getattr(model, "query_layer", None):
            found.append(f"{mesh} with model.query_layer: stages end where it begins; set it to null")
        for part in ("outer", "compression"):
            if getattr(self, part) is not None:
                found.append(
                    f"{mesh} with {part}: replicas that differ are mapped over mesh axis data, and what is mapped "
                    f"cannot be cut into stages; set {part} to null"
                )
        routers = getattr(self.objective, "routers", None)
        if model.mixtures and routers and (routers.balance or routers.z_loss):
            found.append(
                f"{mesh} with objective.routers={{balance: {routers.balance}, z_loss: {routers.z_loss}}}: the last stage "
                "computes the loss, and hears nothing of the routers before it; set objective.routers.balance and "
                "objective.routers.z_loss to 0"
            )
        if self.offload.optimizer or self.offload.parameters:
            found.append(
                f"{mesh} with offload: it visits one group of layers after the other, and they are spread over "
                "devices; set offload.optimizer and offload.parameters to false"
            )
        for name in ("parameters", "gradients", "optimizer", "activations"):
            for field, axes in getattr(self.sharding, name):
                if ("pipe" in axis_names(axes)) != (field == "layers") and (name, field) != ("activations", "layers"):
                    found.append(f"{mesh} is for layers and nothing else: sharding.{name}.{field}={axes}")
                flow = getattr(self.sharding.activations, field)
                mine, theirs = ([n for n in axis_names(a) if getattr(self.mesh, n) != 1] for a in (axes, flow))
                if name != "optimizer" and any(a != b for a, b in zip(mine, theirs)):
                    found.append(
                        f"{mesh} with sharding.{name}.{field}={axes}: stages can gather shares but not swap them; set "
                        f"it to the axes of sharding.activations.{field}={flow}, and others after them"
                    )
        return found + (self._not_sliced() if self.pipeline.slices > 1 else [])

    def _not_sliced(self) -> list[str]:
        """Why rows cannot go through a pipeline in slices of tokens."""
        reasons = {
            "a token sees later ones under a mask that is not causal": not all(
                block.attention.mask.causal for block in self.model.blocks
            ),
            "dropout is drawn for whole rows; set model.dropout to 0": any(self.model.dropout.model_dump().values()),
            "jitter is drawn for whole rows; set ffn.jitter to 0": any(moe.jitter for moe in self.model.mixtures),
            "experts take tokens of whole rows up to their capacity; set ffn.capacity to null": any(
                moe.capacity for moe in self.model.mixtures
            ),
            f"mesh axis {' x '.join(self.sharing_rows)} cuts rows too; set it to 1": self.sharing_rows,
            "they keep their inputs alone; set pipeline.recompute to true": not self.pipeline.recompute,
            "its angles depend on how long a whole document is; drop position.scaling": any(
                rope.by_length for rope, _ in self.model.ropes
            ),
            "its angles depend on how long a whole prefix is; drop position=rope_2d": any(
                rope.kind == "rope_2d" for rope, _ in self.model.ropes
            ),
        }
        return [f"pipeline.schedule.slices: {why}, or slices to 1" for why, holds in reasons.items() if holds]

    def ramp_sizes(self) -> tuple[int, ...]:
        """The batch sizes of the ramp, in order, the full batch last."""
        if not self.ramp:
            return (self.batch,)
        return (*range(self.ramp.start, self.batch, self.ramp.increment), self.batch)

    def batch_rows(self, k: int) -> tuple[int, int]:
        """First row and number of rows of batch k: the ramp's sizes share its steps equally."""
        if not self.ramp:
            return k * self.batch, self.batch
        *small, full = self.ramp_sizes()
        first = 0
        for i, rows in enumerate(small):
            lo, hi = self.ramp.steps * i // len(small), self.ramp.steps * (i + 1) // len(small)
            if k < hi:
                return first + (k - lo) * rows, rows
            first += (hi - lo) * rows
        return first + (k - (self.ramp.steps if small else 0)) * full, full
