"""The training loop. It knows steps, time and files; what is learned is the task's business."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llip.configs import Config
from llip.data.loader import Batch
from llip.errors import RunError, UserError
from llip.open_clip.mixture_alarms import find_alarms
from llip.open_clip.mixture_statistics import mixture_measures
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.scores.plan import ScorePlan
from llip.system.processes import Processes
from llip.training.checkpoints.saver import Saver
from llip.training.checkpoints.train_state import TrainState
from llip.training.debug.nan_dump import BadStep, summary, write_nan_dump
from llip.training.distributed.processes import PATIENCE
from llip.training.distributed.signals import StopRequest
from llip.training.distributed.watchdog import Watchdog
from llip.training.reporting.data_report import WORST
from llip.training.reporting.profiling import StepProfiler
from llip.training.reporting.run_log import RunLog, Terminal, log
from llip.training.reporting.speed import Speed
from llip.training.step.accumulation import Slice, backward_step, random_state
from llip.training.step.optimizer import learning_rate, set_learning_rate
from llip.training.step.task import ContrastiveTask

Evaluate = Callable[[Llip, int, Callable[[], bool]], None]
"""Evaluates a model of a step, on every process; the function tells, between tasks, whether to leave off."""


class Trainer:
    """Runs steps from `state.step` to the end of the schedule, logging, saving and evaluating on the way."""

    def __init__(
        self,
        config: Config,
        task: ContrastiveTask,
        state: TrainState,
        processes: Processes,
        run_log: RunLog,
        saver: Saver,
        watch: Watchdog,
        stop: StopRequest,
        evaluate: Evaluate | None = None,
    ) -> None:
        """Wrap the task.

        Args:
            config: the run.
            task: on its device.
            state: where to start; advanced in place.
            processes: this process's place.
            run_log: where records go.
            saver: writes checkpoints.
            watch: is told what this process does.
            stop: whether this process has been asked to stop.
            evaluate: called every `eval_steps` on every process, with the model (or the average of its weights, where
                one is kept), the step, and what tells whether to leave off.
        """
        self.config, self.state, self.processes, self.run_log = config, state, processes, run_log
        self.saver, self.watch, self.stop, self.evaluate = saver, watch, stop, evaluate
        self.task = task
        self.wrapped: nn.Module = state.engine.wrap(task)
        dtype = autocast_dtype(config.precision)
        self.autocast: Callable[[], AbstractContextManager] = (
            nullcontext if dtype is None else partial(torch.autocast, processes.device.type, dtype=dtype)
        )
        self.passes = 0  # over the data, as far as the batches of this process tell
        self.first_step = state.step
        folder = config.folder if processes.is_main else None
        self.profiler = StepProfiler(config.profile_steps, folder, processes.device)
        self.speed = Speed(config, processes)
        self.alarms: set[str] = set()  # kinds that have been told
        self.stopping = False  # whether any process has been asked to stop, as all know

    def fit(self, loader: Iterable[Batch]) -> bool:
        """Train to the end of the schedule, or until a process is asked to stop.

        Args:
            loader: gives this process's batches, endlessly.

        Returns:
            Whether the schedule is at its end; the newest checkpoint is of the last step either way.

        Raises:
            UserError: the data, the memory or the settings do not allow to go on.
            RunError: numbers are not finite for too long, or the last checkpoint cannot be written.
        """
        if self.state.step >= self.config.total_steps:  # beyond it: a longer run's checkpoint, named by `resume`
            self._evaluate_if_missed()
            return not self.stopping
        self.task.train()
        window, batches = _Window(), iter(loader)
        if plan := self._score_plan():
            log.info("scores of %d images a process: %s", self.config.batch_size * self.config.accum_freq, plan)
        progress = tqdm(
            total=self.config.total_steps,
            initial=self.state.step,
            desc=self.config.name,
            unit="step",
            disable=not self.processes.is_main,
            dynamic_ncols=True,
            file=Terminal(),
        )
        with progress:
            self._evaluate_if_missed()
            while self.state.step < self.config.total_steps and not self.stopping:
                with self.profiler.step(self.state.step + 1):
                    self._train_step(batches, window, progress)
        step = self.state.step
        done = step == self.config.total_steps and not (self.stopping and self._evaluation_is_due(step))
        if not done:
            log.info("asked to stop: saved after step %d of %d", self.state.step, self.config.total_steps)
        return done

    def _train_step(self, batches: Iterator[Batch], window: "_Window", progress: tqdm) -> None:
        self.watch.enter("data", self.state.step + 1)
        with window.waiting():
            parts = [self._next_slice(batches) for _ in range(self.config.accum_freq)]
        if self.state.step == self.first_step:
            log.info("data: the first batch came after %.1f s", window.waited)
        self.watch.enter("forward and backward", self.state.step + 1)
        lr = learning_rate(self.state.step, self.config)
        loss, norm, report = self._step([part for part, _ in parts], lr, [ids for _, ids in parts])
        self.state.step += 1
        self.state.samples_seen += self.config.global_batch
        window.steps += 1
        progress.update()
        self._after_step(window, progress, loss, norm, lr, report)

    def _next_slice(self, batches: Iterator[Batch]) -> tuple[Slice, list[str]]:
        try:
            batch = next(batches)
        except RuntimeError as error:
            if "timed out" in str(error):
                raise UserError(
                    f"data: no batch came at step {self.state.step} within the deadline: {error}"
                ) from error
            if "worker" in str(error) and ("unexpectedly" in str(error) or "killed by signal" in str(error)):
                raise UserError(
                    f"data: a worker died at step {self.state.step}, often because memory ran out; try fewer workers "
                    f"or a smaller shuffle_buffer: {error}"
                ) from error
            raise
        if batch.error:
            raise UserError(batch.error)
        self.run_log.batch(batch, self.state.position.batches, self.state.step + 1)
        if batch.passes > self.passes:
            self.passes = batch.passes
            log.info("data: pass %d begins at step %d", batch.passes + 1, self.state.step)
        self.state.position.advance(batch.cursor)
        return batch.to(self.processes.device), batch.ids

    def _step(self, slices: list[Slice], lr: float, ids: list[list[str]]) -> tuple[Tensor, float, dict[str, Tensor]]:
        """One optimizer step; returns (this process's loss, gradient norm over all parameters, report)."""
        state, scaler = self.state, self.state.scaler
        set_learning_rate(state.optimizer, lr)
        before = random_state(self.processes.device)
        with self._explained_shortage():
            loss, report = backward_step(self.wrapped, slices, self.autocast, scaler.scale)
        scaler.unscale_(state.optimizer)
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        total = state.engine.gradient_norm(parameters)
        norm = total.item()
        bad_loss, bad_norm, stopping = self.processes.all_reduce_max(
            [not math.isfinite(loss.item()), not math.isfinite(norm), bool(self.stop)]
        )
        self.stopping = bool(stopping)
        if bad_loss or bad_norm:
            bad = BadStep(state.step + 1, slices, ids, before, loss.item(), norm)
            self._skip(bad, overflow=self.config.precision == "amp_fp16" and not bad_loss)
        else:
            state.skipped_in_a_row = 0
            if self.config.grad_clip is not None:
                state.engine.clip_gradients(parameters, self.config.grad_clip, total)
            scaler.step(state.optimizer)
            self.task.model.clamp_logit_scale()
            if state.averaged is not None:
                state.averaged.update(self.task.model, state.step + 1)
        scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return loss, norm, report

    def _skip(self, bad: BadStep, overflow: bool) -> None:
        """Count a step whose numbers are not finite; too many in a row end the run, on every process alike.

        Args:
            bad: this process's part of the step.
            overflow: float16 gradients alone overflowed, which a smaller loss scale mends.
        """
        state, config = self.state, self.config
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        what = "float16 gradients overflowed" if overflow else "loss or gradient is not finite"
        if state.skipped_in_a_row < config.max_bad_steps:
            tell = log.info if overflow else log.warning
            if self.processes.is_main:
                tell("step %d is skipped: %s (%d in a row)", bad.step, what, state.skipped_in_a_row)
            return
        scale = state.scaler.get_scale()
        model = state.engine.model_with_gradients(self.task.model)
        folder, report = write_nan_dump(bad, config, model, scale, self.processes)
        message = None
        if report is not None:
            record = (
                f"flight record: {folder}; compute the step again with: python -m llip.training.debug.replay {folder}"
            )
            if "unwritten" in report:
                record = f"the flight record could not be written whole: {report['unwritten']}"
            message = (
                f"{what}, for {state.skipped_in_a_row} steps in a row (max_bad_steps); {summary(report)}; {record}. "
                "A smaller lr or a longer warmup often helps"
            )
        raise RunError(self.processes.broadcast_object(message))

    @contextmanager
    def _explained_shortage(self) -> Iterator[None]:
        """Say what was predicted, and what to change, where a step runs out of memory."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            config, scores = self.config, self._score_plan()
            first_line = str(error).splitlines()[0]
            advice = f", or score_memory below {scores.budget / 2**30:.3g}" if scores else ""
            raise UserError(
                f"out of memory at step {self.state.step} on process {self.processes.rank}: {first_line} "
                f"Scores: {scores or 'one feature per image'}. Try a smaller batch_size with a larger accum_freq "
                f"(now {config.batch_size} and {config.accum_freq}: the global batch can stay the same), "
                f"grad_checkpointing=true{advice}."
            ) from error

    def _score_plan(self) -> ScorePlan | None:
        return self.task.score_plan(self.config.batch_size * self.config.accum_freq)

    def _after_step(
        self, window: "_Window", progress: tqdm, loss: Tensor, norm: float, lr: float, report: dict[str, Tensor]
    ) -> None:
        config, step = self.config, self.state.step
        done = step == config.total_steps
        if config.log_steps and (step % config.log_steps == 0 or done):
            loss_value = self.processes.mean(loss).item()
            rate = window.steps * config.global_batch / window.seconds()
            self.run_log.metrics(
                {
                    "step": step,
                    "samples_seen": self.state.samples_seen,
                    "epoch": step / config.steps_per_epoch,
                    "loss": loss_value,
                    "lr": lr,
                    "grad_norm": norm,
                    "logit_scale": report["logit_scale"].item(),
                    "logit_bias": report["logit_bias"].item() if "logit_bias" in report else None,
                    "samples_per_second": rate,
                    **self.speed.record(rate),
                    "data_wait_fraction": window.waited / window.seconds(),
                    "seconds": window.total_seconds(),
                    "skipped_steps": self.state.skipped_steps,
                    **self._mixture_record(),
                    **self._data_record(window),
                }
            )
            progress.set_postfix_str(f"loss {loss_value:.3f}, {rate:,.0f} samples/s", refresh=False)
            window.restart()
        if step % config.steps_per_epoch == 0:
            counts = self.processes.gather_object(self.state.counts.plain(WORST))
            if counts is not None:
                self.run_log.data.log_epoch(counts)
        evaluating = self._evaluation_is_due(step)
        if self.saver.is_due(done) or self.stopping or evaluating:  # an evaluation may take longer than a job has left
            self.watch.enter("checkpoint", step, PATIENCE)
            self.saver.save(last=done or self.stopping)
        if evaluating and not self.stopping:
            self._evaluate()
            window.restart()

    def _evaluation_is_due(self, step: int) -> bool:
        every, done = self.config.eval_steps, step == self.config.total_steps
        return bool(self.evaluate and every and step and (step % every == 0 or done))

    def _evaluate_if_missed(self) -> None:
        """Evaluate the model that the run goes on from, as far as it was stopped before that was done."""
        if self._evaluation_is_due(self.state.step):
            self._evaluate()

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self.watch.enter("evaluation", self.state.step, PATIENCE)
        averaged = self.state.averaged
        model = self.state.engine.whole_model(self.task.model if averaged is None else averaged.module)
        self.evaluate(model, self.state.step, self._is_stopping)
        self.watch.enter("after the evaluation", self.state.step)

    def _is_stopping(self) -> bool:
        """Agree with all processes whether one has been asked to stop."""
        self.stopping = self.stopping or bool(self.processes.all_reduce_max([float(bool(self.stop))])[0])
        return self.stopping

    def _mixture_record(self) -> dict[str, float]:
        """Return what the mixture tokens do on the last batch of the main process; a collapse is said aloud, once."""
        tokens, seen = self.config.mixture_tokens, self.task.seen
        if not self.processes.is_main or seen is None or tokens == 1 or self.config.pooling != "text":
            return {}
        measures = mixture_measures(self.task.model, seen.h, seen.t)
        if self.state.step >= self.config.warmup:
            for alarm in find_alarms(measures, tokens, listens=True):
                kind = alarm.split(":")[0]
                if kind not in self.alarms:
                    self.alarms.add(kind)
                    log.warning("step %d: %s", self.state.step, alarm)
        return {f"mixture_{name}": value for name, value in measures.items()}

    def _data_record(self, window: "_Window") -> dict[str, Any]:
        """Return what the workers of this process did in the window; the counts are those of all processes."""
        counts = self.processes.gather_object(self.state.counts.plain(0))
        if counts is None:
            return {}
        waited = window.waited / window.seconds()
        record = self.run_log.data.record(counts, waited)
        if window.steps < self.state.step - self.first_step:  # not the first window, in which the workers start
            self.run_log.data.explain(record, waited)
        return record


class _Window:
    """Time between two logged steps: how long it was, and how much of it went into waiting for data."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.start)

    def total_seconds(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
