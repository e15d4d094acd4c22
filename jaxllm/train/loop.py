"""The training loop: batches in, checkpoints and metrics out; killed or moved, it goes on where it was."""

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.machine import versions
from jaxllm.core.sinks import Sinks, open_sinks, truncate_after
from jaxllm.data.loader import Prepared, Rows, batches, open_prepared, validation_rows
from jaxllm.models.count import flops_per_token
from jaxllm.models.module import Params
from jaxllm.models.resize import resize_vocabulary
from jaxllm.train.checkpoint import Checkpointer, load_params, restore, stored_model
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import evaluate
from jaxllm.train.run_folder import open_run
from jaxllm.train.stability import SpikeDetector
from jaxllm.train.step import (
    Setup, TrainState, abstract_batch, init_state, make_eval_step, make_train_step, place_batch, set_up,
)  # fmt: skip
from jaxllm.train.throughput import Meter, memory, peak_flops


class Result(NamedTuple):
    """How a call of `train` ended."""

    folder: Path
    step: int  # steps done
    metrics: dict[str, float]  # the last evaluation of this call, empty if there was none
    stopped: str | None  # the signal that ended the run early


@dataclass
class Progress:
    """What the loop knows besides the train state; saved with it, so that a resumed run decides as an unbroken one."""

    batch: int = 0  # next batch of the data; ahead of the step by the batches that rewinds have skipped
    tokens: int = 0  # weighted tokens trained on
    sums: dict[str, list[float]] = field(default_factory=dict)  # metric sums since the last log line
    skipped: int = 0  # non-finite steps, all in all
    skipped_in_a_row: int = 0
    rewinds: int = 0
    best: float | None = None  # lowest held-out loss
    detector: dict[str, Any] = field(default_factory=dict)


class Spike(Exception):
    """A loss spike was seen at `step`."""

    def __init__(self, step: int, loss: float):
        self.step, self.loss = step, loss


def train(cfg: RunConfig) -> Result:
    """Trains, or goes on with the run that `cfg.out` holds, to `cfg.steps`.

    Raises:
      UserError: config, data, devices or checkpoints do not fit; before anything is written where that can be known.
    """
    if cfg.compile_cache:
        keep_compiled_programs()
    prepared = open_prepared(cfg.data.path)
    if cfg.data.verify:
        prepared.verify()
    cfg = fit_to_data(cfg, prepared)
    setup = set_up(cfg)
    for rows in cfg.ramp_sizes():  # every batch size must divide over the mesh, now rather than at step 10,000
        abstract_batch(setup, rows // cfg.accumulate, prepared.length)
    rows = Rows(prepared, cfg.seed, cfg.data.weights or None)
    fresh = not list(Path(cfg.out).glob("checkpoints/*"))
    initial = initial_weights(cfg, setup) if cfg.initial and fresh else None
    with open_run(cfg, prepared.hash) as folder:
        return Loop(cfg, setup, rows, folder, initial).run()


def fit_to_data(cfg: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with the vocabulary filled in from the data's tokenizer.

    Raises:
      ConfigError: vocabulary or context are smaller than the data needs.
    """
    vocab = cfg.model.vocab or prepared.vocab
    if vocab < prepared.vocab:
        raise ConfigError(f"model.vocab={vocab} is smaller than the {prepared.vocab} ids of the tokenizer of {cfg.data.path}; set it to at least that, or to null")
    if cfg.model.context < prepared.length:
        raise ConfigError(f"model.context={cfg.model.context} is shorter than the rows of {prepared.length} tokens in {cfg.data.path}; raise it, or prepare with length={cfg.model.context}")
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab": vocab})})


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in its configured place or under the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "jaxllm" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def initial_weights(cfg: RunConfig, setup: Setup) -> Params:
    """The weights that `cfg.initial` names, in their shards, with rows for the vocabulary of this run."""
    folder, wanted = Path(cfg.initial), cfg.model
    stored = stored_model(folder)
    may_differ = {name: getattr(wanted, name) for name in ("vocab", "context", "dropout", "init")}
    if stored.model_copy(update=may_differ) != wanted:
        raise ConfigError(f"initial={folder} holds another model than `model:` asks for; make `model:` agree with its config.yaml")
    if stored.vocab == wanted.vocab:
        return load_params(folder, wanted, like=setup.state.params).params
    params, _ = resize_vocabulary(load_params(folder).params, stored, wanted.vocab)
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, setup.state.params))


class Loop:
    """One call of `train`: the open ends of a run in progress."""

    def __init__(self, cfg: RunConfig, setup: Setup, rows: Rows, folder: Path, initial: Params | None):
        prepared = rows.prepared
        self.cfg, self.setup, self.rows, self.prepared, self.folder = cfg, setup, rows, prepared, folder
        self.initial = initial
        self.progress = Progress()
        self.detector = SpikeDetector(cfg.stability)
        self.length = prepared.length
        self.held_out = validation_rows(prepared, cfg.evaluation.rows)
        self.programs: dict[int, Any] = {}
        self.eval_step = make_eval_step(setup)
        self.last_evaluation: dict[str, float] = {}
        devices = setup.mesh.devices.flat
        peak = peak_flops(devices[0].device_kind, setup.policy.compute)
        self.meter = Meter(len(devices), flops_per_token(cfg.model, self.length).train, peak)
        self.speed: dict[str, float] = {}
        self.stop: str | None = None

    def run(self) -> Result:
        cfg = self.cfg
        with ExitStack() as stack:
            self.checkpoints = stack.enter_context(
                Checkpointer(self.folder / "checkpoints", cfg.checkpoints, cfg.model, extra_files={
                    "config.yaml": self.folder / "config.yaml", "tokenizer": self.prepared.path / "tokenizer",
                })
            )  # fmt: skip
            state, step = self.start()
            truncate_after(self.folder / "metrics.jsonl", step)
            self.sinks: Sinks = stack.enter_context(open_sinks(cfg.metrics, self.folder, self.folder.name, cfg.steps))
            for name, message in self.notes:
                self.sinks.event(name, message, step=step)
            stack.enter_context(self.stopping_on_signals())
            if cfg.stability.spike_zscore is not None and not self.checkpoints.steps():
                self.save(state, step)  # what a spike before the first checkpoint goes back to
            while step < cfg.steps and not self.stop:
                try:
                    state, step = self.segment(state, step)
                except Spike as spike:
                    state, step = self.rewind(spike)
        return Result(self.folder, step, self.last_evaluation, self.stop)

    # --- start, resume, rewind ---

    def start(self) -> tuple[TrainState, int]:
        """The state to go on from: the newest good checkpoint, or a fresh one."""
        self.notes: list[tuple[str, str]] = []
        if self.checkpoints.steps():
            state, step = self.restore()
            self.notes.append(("resume", f"resumed at step {step} from {self.folder / 'checkpoints'}"))
            return state, step
        if self.initial is not None:
            self.notes.append(("initial", f"weights from {self.cfg.initial}"))
        initial, self.initial = self.initial, None  # the state owns them from here on
        return init_state(self.setup, initial), 0

    def restore(self) -> tuple[TrainState, int]:
        state, meta, step = restore(
            self.folder / "checkpoints", self.setup.state, self.cfg.model,
            warn=lambda message: self.notes.append(("damaged", message)),
        )  # fmt: skip
        self.progress = Progress(**meta["progress"])
        self.detector.restore(self.progress.detector)
        return state, step

    def rewind(self, spike: Spike) -> tuple[TrainState, int]:
        """The last checkpoint, with the data moved past the batches that led to the spike."""
        cfg, ahead = self.cfg.stability, self.progress
        self.checkpoints.wait()
        rewinds = ahead.rewinds + 1
        if rewinds > cfg.max_rewinds:
            raise UserError(f"step {spike.step}: loss {spike.loss:.4g} is a spike after {cfg.max_rewinds} rewinds (stability.max_rewinds); lower the learning rate or look at the data around batch {ahead.batch}")
        next_batch = ahead.batch + cfg.skip_batches
        self.notes = []
        state, step = self.restore()
        first, self.progress.batch, self.progress.rewinds = self.progress.batch, next_batch, rewinds
        self.sinks.rewind(step)
        self.sinks.event(
            "rewind", f"loss {spike.loss:.4g} at step {spike.step} is a spike: back to step {step}, batches {first} to "
            f"{next_batch - 1} are skipped", step=step, spike=spike.step, skipped=[first, next_batch],
        )  # fmt: skip
        return state, step

    # --- training ---

    def segment(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Trains until the end, a signal or a spike (raised)."""
        cfg, setup = self.cfg, self.setup
        hosts = jax.process_index(), jax.process_count()
        feed = batches(self.rows, self.progress.batch, cfg.batch_rows, *hosts, cfg.data.prefetch)
        pending: deque[tuple[int, int, Any, float]] = deque()
        stopping = False
        with closing(feed):
            while step < cfg.steps and not stopping:
                waited = feed.waited
                k, batch = next(feed)
                waited = feed.waited - waited
                self.profile(step)
                program = self.program(cfg.batch_rows(k)[1])
                state, sums = program(state, place_batch(setup, batch))
                step += 1
                pending.append((step, k, sums, waited))
                stopping = self.stop is not None
                due = self.due(step, stopping)
                # One step of lag keeps the device busy while the host looks at numbers.
                while len(pending) > (0 if due else 1):
                    self.see(*pending.popleft())
                if due:
                    self.report(due, state, step)
        return state, step

    def program(self, rows: int) -> Any:
        """The step compiled for a batch of so many rows: once a size."""
        if rows not in self.programs:
            began = time.monotonic()
            step = make_train_step(self.setup).lower(self.setup.state, abstract_batch(self.setup, rows, self.length))
            self.programs[rows] = step.compile()
            self.meter.restart()
            self.sinks.event("compile", f"training step for {rows} rows compiled in {time.monotonic() - began:.1f} s", rows=rows)
        return self.programs[rows]

    def due(self, step: int, stopping: bool) -> set[str]:
        """What is to be done after this step."""
        cfg, last = self.cfg, step == self.cfg.steps
        often = cfg.evaluation.every and step % cfg.evaluation.every == 0
        due = {
            "log": last or step % cfg.metrics.every == 0,
            "evaluate": len(self.held_out) > 0 and (last or often),
            "save": last or step % cfg.checkpoints.every == 0 or stopping,
        }
        return {name for name, now in due.items() if now}

    def see(self, step: int, k: int, sums: Any, waited: float) -> None:
        """Takes in the numbers of a step; raises on a spike or when too many steps in a row are not finite."""
        p, stability = self.progress, self.cfg.stability
        sums = {name: [float(s), float(w)] for name, (s, w) in jax.device_get(sums).items()}
        loss = sums["loss"][0] / max(sums["loss"][1], 1.0)
        self.speed = self.meter.tick(self.cfg.batch_rows(k)[1] * self.length, waited)
        p.batch = k + 1
        if sums["skipped"][0]:
            p.skipped += 1
            p.skipped_in_a_row += 1
            if self.cfg.precision.kind != "float16":  # there an overflow is how the scale is found
                self.sinks.event("skipped", f"step {step}: loss or gradients are not finite; the step is skipped", step=step, batch=k)
            if p.skipped_in_a_row > stability.max_skipped:
                raise UserError(f"step {step}: {p.skipped_in_a_row} steps in a row were not finite (stability.max_skipped); lower the learning rate, or look at the data from batch {k + 1 - p.skipped_in_a_row}")
            sums = {"skipped": sums["skipped"]} | ({"loss_scale": sums["loss_scale"]} if "loss_scale" in sums else {})
        else:
            p.skipped_in_a_row = 0
            p.tokens += int(sums["loss"][1])
        for name, (s, w) in sums.items():
            total = p.sums.setdefault(name, [0.0, 0.0])
            total[0] += s
            total[1] += w
        if "loss" in sums and self.detector.see(loss):
            raise Spike(step, loss)

    def report(self, due: set[str], state: TrainState, step: int) -> None:
        """Logs, evaluates and saves what is due; all numbers up to `step` have been seen."""
        p = self.progress
        if "log" in due:
            line = {name: s / w for name, (s, w) in p.sums.items() if w and name != "skipped"}
            line |= {"learning_rate": float(self.setup.schedule(step - 1 - p.skipped)), "tokens": p.tokens, "skipped": p.skipped}
            self.sinks.log(step, line | self.speed | memory())
            p.sums = {}
        if "evaluate" in due:
            self.evaluate(state, step)
        if "save" in due and not self.detector.state()["spiked"]:  # a rewind must not go back to the spike itself
            self.save(state, step, self.last_evaluation.get("validation_loss") if "evaluate" in due else None)
        self.meter.restart()

    def save(self, state: TrainState, step: int, loss: float | None = None) -> None:
        self.progress.detector = self.detector.state()
        meta = {
            "progress": asdict(self.progress), "manifest": self.prepared.hash, "versions": versions(),
            "tokenizer": {"path": "tokenizer", "fingerprint": self.prepared.manifest["tokenizer"]["fingerprint"]},
        }  # fmt: skip
        self.checkpoints.save(step, state, meta, loss)

    def evaluate(self, state: TrainState, step: int) -> None:
        self.last_evaluation = evaluate(self.setup, self.eval_step, state.params, self.held_out)
        loss = self.last_evaluation["validation_loss"]
        if math.isfinite(loss):
            self.progress.best = loss if self.progress.best is None else min(self.progress.best, loss)
        self.sinks.log(step, self.last_evaluation)

    # --- profile and signals ---

    def profile(self, step: int) -> None:
        window = self.cfg.profile
        if window and step == window.start:
            jax.profiler.start_trace(str(self.folder / "profile"))
        if window and step == window.start + window.steps:
            jax.profiler.stop_trace()

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM ends the run after the step in progress, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            self.stop = signal.Signals(number).name

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
