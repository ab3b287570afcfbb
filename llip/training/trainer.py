"""The training loop: one optimizer step after another, with what is due after it. The objective is the task's."""

import enum
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llip.configs import Config
from llip.errors import RunError, UserError
from llip.open_clip.costs.flops import score_plan_of
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.scores.plan import ScorePlan
from llip.system.processes import Processes
from llip.training.batch_source import BatchSource
from llip.training.checkpoints.saver import Saver
from llip.training.checkpoints.train_state import TrainState
from llip.training.debug.nan_dump import BadStep, write_nan_dump
from llip.training.distributed.processes import PATIENCE
from llip.training.distributed.signals import StopRequest
from llip.training.distributed.watchdog import Watchdog
from llip.training.reporting.profiling import StepProfiler
from llip.training.reporting.run_log import RunLog, log
from llip.training.reporting.step_log import StepLog, StepResult
from llip.training.step.accumulation import backward_step, random_state, set_random_state
from llip.training.step.optimizer import learning_rate, set_learning_rate
from llip.training.step.task import ContrastiveTask

Evaluate = Callable[[Llip, int, Callable[[], bool]], bool]
"""Evaluates the model after a step on every process, and returns whether all tasks were evaluated. The function that it
gets returns, between tasks, whether to stop."""


class Outcome(enum.Enum):
    """How training ended; the newest checkpoint is of the last step either way."""

    FINISHED = "finished"  # the schedule is at its end
    STOPPED = "stopped"  # a process was asked to stop


class Agreement(NamedTuple):
    """What holds for a step on all processes because it holds on one of them."""

    bad_loss: bool  # not finite
    bad_norm: bool
    no_data: bool  # on a process, which took part with blank batches: the step is void
    stop: bool  # requested
    save: bool  # due by the main process's clock


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
        on_step: Callable[[StepResult], None] | None = None,
    ) -> None:
        """Train `task`, which is on its device, from `state` on, which is advanced in place.

        Args:
            config, task, state, processes: of the run.
            run_log, saver: take the records and write the checkpoints.
            watch: publishes the phase of this process.
            stop: whether this process has been asked to stop.
            evaluate: called every `eval_steps` on every process, with the model (or the average of its weights, where
                one is kept), the step, and a function that returns whether to stop.
            on_step: called on every process at the end of each step, after its record, checkpoint and evaluation.
        """
        self.config, self.state, self.processes = config, state, processes
        self.saver, self.watch, self.stop, self.evaluate, self.on_step = saver, watch, stop, evaluate, on_step
        self.task = task
        self.wrapped = state.engine.wrap(task)
        dtype = autocast_dtype(config.precision)
        self.autocast: Callable[[], AbstractContextManager] = (
            nullcontext if dtype is None else partial(torch.autocast, processes.device.type, dtype=dtype)
        )
        folder = config.folder if processes.is_main else None
        self.profiler = StepProfiler(config.profile_steps, folder, processes.device)
        self.log = StepLog(config, task, state, processes, run_log)

    def fit(self, loader: DataLoader) -> Outcome:
        """Train on this process's batches to the end of the schedule, or until a process is asked to stop.

        Raises:
            UserError: the data, the memory or the settings do not permit to continue.
            RunError: numbers are not finite for too long, a data worker died, or the last checkpoint cannot be written.
        """
        config, state = self.config, self.state
        outcome = self._evaluate_before_training()
        if outcome is None:
            self.task.train()
            if plan := self._score_plan():
                log.info("scores of %d images per process: %s", config.batch_size * config.accum_freq, plan)
            source = BatchSource(loader, config.accum_freq, self.processes.device, self.stop)
            with source, self.log.progress_bar():
                while outcome is None:
                    with self.profiler.step(state.step + 1):
                        outcome = self._step(source)
        if outcome is Outcome.STOPPED:
            log.info("stopped as requested after step %d of %d", state.step, config.total_steps)
        return outcome

    def _step(self, source: BatchSource) -> Outcome | None:
        """Take one optimizer step, with what is due after it; return the outcome if it is the last one."""
        config, state, model, step = self.config, self.state, self.task.model, self.state.step + 1
        self.watch.enter("data", step)
        with self.log.data_wait():
            data = source.take()
        if data.missing and self.processes.world_size == 1:
            return self._end_without_data(data.failure)

        self.watch.enter("forward and backward", step, self._patience())
        lr, before = learning_rate(state.step, config), random_state(self.processes.device)
        set_learning_rate(state.optimizer, lr)
        with self._explained_shortage():
            loss, report = backward_step(self.wrapped, data.micro_batches, self.autocast, state.scaler.scale)
        state.scaler.unscale_(state.optimizer)
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        norm = state.engine.gradient_norm(parameters)
        agreed = self._agree(loss, norm, data.missing)
        if agreed.no_data:
            state.optimizer.zero_grad(set_to_none=True)
            set_random_state(before, self.processes.device)
            return self._end_without_data(data.failure)
        for batch in data.batches:
            self.log.batch(batch)
            state.position.advance(batch.cursor)
        if agreed.bad_loss or agreed.bad_norm:
            ids = [batch.ids for batch in data.batches]
            self._skip(BadStep(step, data.micro_batches, ids, before, loss.item(), norm.item()), agreed.bad_loss)
        else:
            state.skipped_in_a_row = 0
            if config.grad_clip is not None:
                state.engine.clip_gradients(parameters, config.grad_clip, norm)
            state.scaler.step(state.optimizer)
            model.clamp_logit_scale()
            if state.averaged is not None:
                state.averaged.update(model, step)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step, state.samples_seen = step, state.samples_seen + config.global_batch

        result = StepResult(step, lr, loss, norm, report)
        self.log.step(result)
        outcome = self._save_and_evaluate(agreed)
        if self.on_step is not None:
            self.on_step(result)
        return outcome

    def _patience(self) -> float:
        """Return the deadlines that a step may take: the first one of a process compiles."""
        return PATIENCE if self.config.torchcompile and self.state.step == self.log.first_step else 1.0

    def _agree(self, loss: Tensor, norm: Tensor, no_data: bool) -> Agreement:
        """Return what all processes know of the step: one all-reduce, and the host's only wait for the device."""
        save = self.processes.is_main and self.saver.is_due_by_time()
        flags = torch.tensor([no_data, bool(self.stop), save], dtype=torch.float32)
        flags = flags.to(loss.device, non_blocking=True)  # a blocking copy would wait for the device, too
        bad = torch.stack([loss.isfinite(), norm.isfinite()]).logical_not()
        return Agreement(*map(bool, self.processes.all_reduce_max(torch.cat([bad.float(), flags]))))

    def _end_without_data(self, failure: UserError | None) -> Outcome:
        """Save what is trained and end the run where a process has no data for the next step. Collective.

        Args:
            failure: of this process's data, None where a stop was requested or the data of another process failed.

        Raises:
            UserError: the failure of a process's data.
        """
        failures = [error for error in self.processes.all_gather_object(failure) if error is not None]
        if self.state.step > self.saver.saved_step:
            self.watch.enter("checkpoint", self.state.step, PATIENCE)
            self.saver.save(last=not failures)
        if not failures:
            return Outcome.STOPPED
        message, newest = str(failures[0]), self.saver.saved_step
        if self.state.step:
            saved = f"the newest checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
            message += f" (after step {self.state.step}; {saved})"
        kind = RunError if isinstance(failures[0], RunError) else UserError
        raise kind(message, on_all_ranks=True)

    def _skip(self, bad: BadStep, bad_loss: bool) -> None:
        """Count a step whose numbers are not finite; too many in a row end the run, on every process.

        Args:
            bad: this process's part of the step.
            bad_loss: whether the loss of a process is not finite; otherwise only gradients are not.
        """
        state, config = self.state, self.config
        overflow = config.precision == "amp_fp16" and not bad_loss  # which a smaller loss scale fixes
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        what = "float16 gradients overflowed" if overflow else "loss or gradient is not finite"
        if state.skipped_in_a_row < config.max_bad_steps:
            if self.processes.is_main:
                level = logging.INFO if overflow else logging.WARNING
                log.log(level, "step %d is skipped: %s (%d in a row)", bad.step, what, state.skipped_in_a_row)
            return
        model = state.engine.model_with_gradients(self.task.model)
        dump = write_nan_dump(bad, config, model, state.scaler.get_scale(), self.processes)
        raise RunError(
            f"{what}, for {state.skipped_in_a_row} steps in a row (max_bad_steps); a smaller lr or a longer warmup "
            f"often helps; {dump}",
            on_all_ranks=True,
        )

    @contextmanager
    def _explained_shortage(self) -> Iterator[None]:
        """Raise a UserError with the predicted memory and the settings to change where a step runs out of memory."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no error class
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            config, scores = self.config, self._score_plan()
            first_line = str(error).splitlines()[0]
            advice = f", or score_memory below {scores.budget / 2**30:.3g}" if scores else ""
            raise UserError(
                f"out of memory at step {self.state.step} on process {self.processes.rank}: {first_line} "
                f"Scores: {scores or 'one feature per image'}. Try a smaller batch_size with a larger accum_freq "
                f"(now {config.batch_size} and {config.accum_freq}: the global batch can stay the same), "
                f"grad_checkpointing=true{advice}"
            ) from error

    def _score_plan(self) -> ScorePlan | None:
        device = self.processes.device
        return score_plan_of(self.config, on_cpu=device.type == "cpu", device=device)

    def _save_and_evaluate(self, agreed: Agreement) -> Outcome | None:
        """Save and evaluate if that is due; return the outcome if training ends with the step."""
        step, done, evaluating = self.state.step, self.state.step == self.config.total_steps, self._evaluation_is_due()
        if self.saver.is_due() or agreed.save or agreed.stop or evaluating or done:  # an evaluation may outlast the job
            self.watch.enter("checkpoint", step, PATIENCE)
            self.saver.save(last=done or agreed.stop)
        if evaluating:
            if agreed.stop or not self._evaluate():
                return Outcome.STOPPED
            self.log.restart_window()
        if done:
            return Outcome.FINISHED
        return Outcome.STOPPED if agreed.stop else None

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.eval_steps, self.state.step
        return bool(self.evaluate and every and step and (step % every == 0 or step == self.config.total_steps))

    def _evaluate_before_training(self) -> Outcome | None:
        """Complete the evaluation of the restored step; return the outcome if there is nothing to train."""
        if self._evaluation_is_due() and not self._evaluate():
            return Outcome.STOPPED
        # a step beyond the schedule is of a longer run's checkpoint, named by `resume`
        return Outcome.FINISHED if self.state.step >= self.config.total_steps else None

    def _evaluate(self) -> bool:
        """Evaluate the current model; return whether that was completed."""
        assert self.evaluate is not None
        self.watch.enter("evaluation", self.state.step, PATIENCE)
        averaged = self.state.averaged
        model = self.state.engine.full_model(self.task.model if averaged is None else averaged.module)
        completed = self.evaluate(model, self.state.step, self._is_stopping)
        self.watch.enter("after the evaluation", self.state.step)
        return completed

    def _is_stopping(self) -> bool:
        """Return whether any process has been asked to stop. Collective."""
        return bool(self.processes.all_reduce_max([float(bool(self.stop))])[0])
