"""The training loop: batches in, checkpoints and metrics out; killed or moved, it goes on where it was."""

import functools
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
from jaxllm.core.sinks import Sinks, check_extras, open_sinks, truncate_after
from jaxllm.data.loader import Prepared, Rows, batches, open_prepared, validation_rows
from jaxllm.models.count import flops_per_token
from jaxllm.parallel.flags import compile_with, compiler_options
from jaxllm.train import distributed, initial, runtime
from jaxllm.train.checkpoint import Checkpointer, restore, steps
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import evaluate
from jaxllm.train.run_folder import check_alike, open_run
from jaxllm.train.stability import SpikeDetector
from jaxllm.train.step import (
    Setup,
    TrainState,
    abstract_batch,
    check_batches,
    init_state,
    local_rows,
    make_eval_step,
    make_train_step,
    place_batch,
    set_up,
    skips,
)
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
    skipped: int = 0  # steps skipped for not being finite, all in all
    nonfinite_in_a_row: int = 0
    rewinds: int = 0
    detector: dict[str, Any] = field(default_factory=dict)


class Spike(Exception):
    """A loss spike was seen at `step`."""

    def __init__(self, step: int, loss: float):
        self.step, self.loss = step, loss


def train(cfg: RunConfig, find: initial.Find = initial.of_checkpoint) -> Result:
    """Trains, or goes on with the run that `cfg.out` holds, to `cfg.steps`.

    Several processes (`cfg.distributed`) call it alike. What is refused by one is refused by all.

    Args:
      find: the model at the path `cfg.initial`, where others than checkpoints may lie there.

    Raises:
      UserError: config, data, devices or checkpoints do not fit; before anything is written where that can be known.
    """
    runtime.start(cfg.distributed, compile_cache=cfg.compile_cache)
    cfg, setup, rows, start = distributed.together(lambda: ready(cfg, find))
    prepared = rows.prepared
    check_alike(cfg, prepared.hash)
    with open_run(cfg, prepared.hash) as (folder, changed):
        result = Loop(cfg, setup, rows, folder, changed, start).run()
    distributed.gather(None)  # nobody leaves while another still writes: JAX would take him for dead
    return result


def ready(cfg: RunConfig, find: initial.Find) -> tuple[RunConfig, Setup, Rows, initial.Initial | None]:
    """The config fitted to its data, program, rows, and the model to start from, of a run that begins with one.

    Raises UserError for what is wrong with a run not yet opened.
    """
    prepared = open_prepared(cfg.data.path)
    if cfg.data.verify:
        prepared.verify()
    cfg = fit_to_data(cfg, prepared)
    if distributed.first():
        check_extras(cfg.metrics)
    setup = set_up(cfg)
    check_batches(setup, prepared.length)
    rows = Rows(prepared, cfg.seed, cfg.data.weights or None)
    start = None
    if cfg.initial and not steps(Path(cfg.out)):
        start = find(Path(cfg.initial), cfg.model)
        initial.check(cfg, start)
    return cfg, setup, rows, start


def fit_to_data(cfg: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with the vocabulary filled in from the data's tokenizer.

    Raises:
      ConfigError: vocabulary or context are smaller than the data needs.
    """
    vocab = cfg.model.vocab or prepared.vocab
    if vocab < prepared.vocab:
        raise ConfigError(
            f"model.vocab={vocab} is smaller than the {prepared.vocab} ids of the tokenizer of {cfg.data.path}; set it "
            "to at least that, or to null"
        )
    if cfg.model.context < prepared.length:
        raise ConfigError(
            f"model.context={cfg.model.context} is shorter than the rows of {prepared.length} tokens in "
            f"{cfg.data.path}; raise it, or prepare with length={cfg.model.context}"
        )
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab": vocab})})


class Loop:
    """One call of `train`: the open ends of a run in progress."""

    def __init__(
        self, cfg: RunConfig, setup: Setup, rows: Rows, folder: Path, changed: list[str],
        initial_model: initial.Initial | None = None,
    ):  # fmt: skip
        prepared = rows.prepared
        self.cfg, self.setup, self.rows, self.prepared, self.folder = cfg, setup, rows, prepared, folder
        self.initial = initial_model
        self.notes: list[tuple[str, str]] = []  # events from before the sinks are open
        if changed:
            self.notes.append(("changed", f"the config has changed since the last start: {'; '.join(changed)}"))
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
        self.sent = 0  # steps given to the devices by this call, those of rewinds again
        self.saved = -1  # step of the newest checkpoint of this call
        self.tracing = False

    def run(self) -> Result:
        cfg = self.cfg
        with ExitStack() as stack:
            stack.enter_context(self.stopping_on_signals())
            distributed.from_first(lambda: initial.keep_source(self.initial, self.folder))
            files = {"config.yaml": self.folder / "config.yaml", "tokenizer": self.prepared.path / "tokenizer"}
            if (self.folder / initial.SOURCE).is_dir():
                files[initial.SOURCE] = self.folder / initial.SOURCE
            self.checkpoints = stack.enter_context(
                Checkpointer(
                    self.folder / "checkpoints", cfg.checkpoints, cfg.model, extra_files=files,
                    places=self.setup.places,
                )
            )  # fmt: skip
            state, step = self.start()
            self.sinks = stack.enter_context(distributed.together(lambda: self.open_metrics(step)))
            for name, message in self.notes:
                self.sinks.event(name, message, step=step)
            stack.callback(self.stop_trace)
            if cfg.stability.spike_zscore is not None and not distributed.from_first(self.checkpoints.steps):
                self.save(state, step)  # what a spike before the first checkpoint goes back to
            if step >= cfg.steps:
                self.sinks.event("finished", f"nothing left to do: {step} of {cfg.steps} steps are done", step=step)
            while step < cfg.steps and not self.stop:
                try:
                    state, step = self.segment(state, step)
                    continue
                except Spike as e:  # its traceback would keep the state alive while another is read
                    spike, state = e.with_traceback(None), None
                state, step = self.rewind(spike)
        return Result(self.folder, step, self.last_evaluation, self.stop)

    def open_metrics(self, step: int) -> Sinks:
        """Sinks of the first process, metrics.jsonl cut back to `step`; the others have none."""
        if distributed.first():
            truncate_after(self.folder / "metrics.jsonl", step)
        return open_sinks(self.cfg.metrics, self.folder, self.folder.name, self.cfg.steps)

    # --- start, resume, rewind ---

    def start(self) -> tuple[TrainState, int]:
        """The state to go on from: the newest good checkpoint, or a fresh one."""
        if distributed.from_first(self.checkpoints.steps):
            state, step = self.restore()
            self.notes.append(("resume", f"resumed at step {step} from {self.folder / 'checkpoints'}"))
            return state, step
        if self.initial is None:
            return init_state(self.setup), 0
        self.notes.append(("initial", f"weights from {self.cfg.initial}"))
        return init_state(self.setup, initial.weights(self.setup, self.initial)), 0

    def restore(self) -> tuple[TrainState, int]:
        state, meta, step = restore(
            self.folder / "checkpoints", self.setup.state, self.cfg.model,
            warn=lambda message: self.notes.append(("damaged", message)), places=self.setup.places,
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
            raise UserError(
                f"step {spike.step}: loss {spike.loss:.4g} is a spike after {cfg.max_rewinds} rewinds "
                f"(stability.max_rewinds); lower the learning rate or look at the data around batch {ahead.batch}"
            )
        next_batch = ahead.batch + cfg.skip_batches
        state, step = self.restore()
        first, self.progress.batch, self.progress.rewinds = self.progress.batch, next_batch, rewinds
        self.saved = step
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
        mine = functools.cache(functools.partial(local_rows, setup))
        feed = batches(self.rows, self.progress.batch, cfg.batch_rows, mine, cfg.data.prefetch)
        pending: deque[tuple[int, int, Any, float]] = deque()
        with closing(feed):
            while step < cfg.steps and not self.stop:
                waited = feed.waited
                k, batch = next(feed)
                waited = feed.waited - waited
                self.trace(step + 1)
                rows = cfg.batch_rows(k)[1]
                program = self.program(rows)
                state, sums = program(state, place_batch(setup, batch, rows))
                step += 1
                self.sent += 1
                if distributed.told_to_stop(self.sent):
                    self.stop = signal.SIGTERM.name
                pending.append((step, k, sums, waited))
                due = self.due(step)
                # One step of lag keeps the device busy while the host looks at numbers.
                while len(pending) > (0 if due else 1):
                    self.see(*pending.popleft())
                if due:
                    self.report(due, state, step)
        while pending:
            self.see(*pending.popleft())
        if self.stop and self.saved != step:
            self.save(state, step)
        return state, step

    def program(self, rows: int) -> Any:
        """The step compiled for a batch of so many rows: once a size."""
        if rows not in self.programs:
            began = time.monotonic()
            step = make_train_step(self.setup).lower(self.setup.state, abstract_batch(self.setup, rows, self.length))
            self.programs[rows], _, _ = compile_with(step, compiler_options(jax.local_devices()[0]))
            self.meter.restart()
            self.sinks.event(
                "compile", f"training step for {rows} rows compiled in {time.monotonic() - began:.1f} s", rows=rows
            )
        return self.programs[rows]

    def due(self, step: int) -> set[str]:
        """What is to be done after this step; a run that is told to stop only saves."""
        cfg, last = self.cfg, step == self.cfg.steps
        often = cfg.evaluation.every and step % cfg.evaluation.every == 0
        due = {
            "log": last or step % cfg.metrics.every == 0,
            "evaluate": len(self.held_out) > 0 and (last or often) and not self.stop,
            "save": last or step % cfg.checkpoints.every == 0,
        }
        return {name for name, now in due.items() if now}

    def see(self, step: int, k: int, sums: Any, waited: float) -> None:
        """Takes in the numbers of a step; raises on a spike or when too many steps in a row are not finite."""
        p, stability = self.progress, self.cfg.stability
        sums = {name: [float(s), float(w)] for name, (s, w) in jax.device_get(sums).items()}
        loss = sums["loss"][0] / max(sums["loss"][1], 1.0)
        self.speed = self.meter.tick(self.cfg.batch_rows(k)[1] * self.length, waited)
        p.batch = k + 1
        lost, replicas = map(int, sums["nonfinite"])
        if lost and self.cfg.precision.kind != "float16":  # there an overflow is how the scale is found
            whose = f" in {lost} of {replicas} replicas" if replicas > 1 else ""
            done = "the step is skipped" if skips(self.cfg) else "it is applied all the same (skip_nonfinite: false)"
            self.sinks.event(
                "nonfinite", f"step {step}: loss or gradients are not finite{whose}; {done}", step=step, batch=k
            )
        if lost == replicas:
            p.skipped += skips(self.cfg)
            p.nonfinite_in_a_row += 1
            if p.nonfinite_in_a_row > stability.max_skipped:
                raise UserError(
                    f"step {step}: {p.nonfinite_in_a_row} steps in a row were not finite (stability.max_skipped); "
                    f"lower the learning rate, or look at the data from batch {k + 1 - p.nonfinite_in_a_row}"
                )
            sums = {name: sums[name] for name in ("nonfinite", "loss_scale") if name in sums}
        else:
            p.nonfinite_in_a_row = 0
            p.tokens += int(sums["loss"][1])
        for name, (s, w) in sums.items():
            total = p.sums.setdefault(name, [0.0, 0.0])
            total[0] += s
            total[1] += w
        if self.detector.see(loss):
            raise Spike(step, loss)

    def report(self, due: set[str], state: TrainState, step: int) -> None:
        """Logs, evaluates and saves what is due; all numbers up to `step` have been seen."""
        p = self.progress
        if "log" in due:
            line = {name: s / w for name, (s, w) in p.sums.items() if w and name != "nonfinite"}
            line |= {
                "learning_rate": float(self.setup.schedule(step - 1 - p.skipped)),
                "tokens": p.tokens,
                "skipped": p.skipped,
            }
            self.sinks.log(step, line | self.speed | memory())
            p.sums = {}
        if "evaluate" in due:
            self.evaluate(state, step)
        # A rewind must not go back to a spike that is not yet one by its length; the end is saved all the same.
        if "save" in due and (step == self.cfg.steps or not self.detector.state()["spiked"]):
            self.save(state, step, self.last_evaluation.get("validation_loss") if "evaluate" in due else None)
        self.meter.restart()

    def save(self, state: TrainState, step: int, loss: float | None = None) -> None:
        self.progress.detector = self.detector.state()
        meta = {
            "progress": asdict(self.progress), "manifest": self.prepared.hash, "versions": versions(),
            "tokenizer": {"path": "tokenizer", "fingerprint": self.prepared.manifest["tokenizer"]["fingerprint"]},
        }  # fmt: skip
        self.checkpoints.save(step, state, meta, loss)
        self.saved = step

    def evaluate(self, state: TrainState, step: int) -> None:
        found = evaluate(self.setup, self.eval_step, state.params, self.held_out, lambda: self.stop is not None)
        if found is not None:
            self.last_evaluation = found
            self.sinks.log(step, found)

    # --- profile and signals ---

    def trace(self, step: int) -> None:
        """Starts and ends the profile of the steps that the config names; `step` is the one about to run."""
        window = self.cfg.profile
        inside = distributed.first() and window is not None and window.start <= step < window.start + window.steps
        if inside and not self.tracing:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True
        if not inside:
            self.stop_trace()

    def stop_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM ends the run after the step in progress, with a checkpoint; several processes after the same step."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            # of several processes `told_to_stop` says it, by JAX's own handler
            yield
            return

        def note(number, frame):
            self.stop = signal.Signals(number).name

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
