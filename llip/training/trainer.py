"""The training loop. It knows steps, time and files; what is learned is the task's business."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.score_plan import ScorePlan
from llip.training.accumulation import Slice, backward_step
from llip.training.checkpoint import write_checkpoint
from llip.training.data import Batch
from llip.training.distributed import Processes
from llip.training.optimizer import learning_rate
from llip.training.run_log import RunLog, log
from llip.training.state import TrainState
from llip.training.task import ContrastiveTask


class Trainer:
    """Runs steps from `state.step` to the end of the schedule, logging, saving and evaluating on the way."""

    def __init__(
        self,
        config: Config,
        task: ContrastiveTask,
        state: TrainState,
        processes: Processes,
        run_log: RunLog,
        evaluate: Callable[[Llip, int], None] | None = None,
    ) -> None:
        """Wrap the task.

        Args:
            config: the run.
            task: on its device.
            state: where to start; advanced in place.
            processes: this process's place.
            run_log: where records go.
            evaluate: called with the model and the step every `eval_steps`, on every process.
        """
        self.config, self.state, self.processes, self.run_log, self.evaluate = (
            config,
            state,
            processes,
            run_log,
            evaluate,
        )
        self.task = task
        self.wrapped: nn.Module = task
        if processes.count > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(task, device_ids=devices, gradient_as_bucket_view=True)
        dtype = autocast_dtype(config.precision)
        self.autocast: Callable[[], AbstractContextManager] = (
            nullcontext if dtype is None else partial(torch.autocast, processes.device.type, dtype=dtype)
        )
        self.saved_time = time.monotonic()
        self.passes = 0  # over the data, as far as the batches of this process tell
        self.first_step = state.step

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train to the end of the schedule."""
        self.task.train()
        window = _Window()
        if plan := self._score_plan():
            log.info("scores of %d images a process: %s", self.config.batch_size * self.config.accum_freq, plan)
        progress = tqdm(
            total=self.config.total_steps,
            initial=self.state.step,
            desc=self.config.name,
            unit="step",
            disable=not self.processes.is_main,
            dynamic_ncols=True,
        )
        with progress:
            while self.state.step < self.config.total_steps:
                with window.waiting():
                    slices = [self._next_slice(batches) for _ in range(self.config.accum_freq)]
                lr = learning_rate(self.state.step, self.config)
                loss, norm, report = self._step(slices, lr)
                self.state.step += 1
                self.state.samples_seen += self.config.global_batch
                window.steps += 1
                progress.update()
                self._after_step(window, progress, loss, norm, lr, report)

    def _next_slice(self, batches: Iterator[Batch]) -> Slice:
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
        return batch.to(self.processes.device)

    def _step(self, slices: list[Slice], lr: float) -> tuple[Tensor, float, dict[str, Tensor]]:
        """One optimizer step; returns (this process's loss, gradient norm over all parameters, report)."""
        state, scaler = self.state, self.state.scaler
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        with self._explained_shortage():
            loss, report = backward_step(self.wrapped, slices, self.autocast, scaler.scale)
        scaler.unscale_(state.optimizer)
        largest = math.inf if self.config.grad_clip is None else self.config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), largest).item()
        if not math.isfinite(norm):
            self._check_overflow(loss)
        scaler.step(state.optimizer)
        scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        self.task.model.clamp_logit_scale()
        return loss, norm, report

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

    def _check_overflow(self, loss: Tensor) -> None:
        """Count an overflow of float16; anything else that is not finite ends the run, on every process alike.

        Gradients are averaged over processes before their norm is taken, so that all see the same.
        """
        self.state.skipped_steps += 1
        if self.config.precision != "amp_fp16":
            scale = self.task.model.logit_scale.exp().item()
            raise UserError(
                f"the gradient is not finite at step {self.state.step} (loss of this process {loss.item():.4g}, "
                f"logit scale {scale:.4g}, precision {self.config.precision}); try a smaller lr or a longer warmup"
            )

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
                    "data_wait_fraction": window.waited / window.seconds(),
                    "seconds": window.total_seconds(),
                    **self._data_record(window),
                }
            )
            progress.set_postfix_str(f"loss {loss_value:.3f}, {rate:,.0f} samples/s")
            window.restart()
        if step % config.steps_per_epoch == 0 and (counts := self.processes.gather_to_main(self.state.counts.plain())):
            self.run_log.data.log_epoch(counts)
        if self._save_is_due(done):
            self.save()
        if self.evaluate is not None and config.eval_steps and (step % config.eval_steps == 0 or done):
            self.evaluate(self.task.model, step)
            window.restart()

    def _data_record(self, window: "_Window") -> dict[str, Any]:
        """Return what the workers of this process did in the window; the counts are those of all processes."""
        counts = self.processes.gather_to_main(self.state.counts.plain())
        if counts is None:
            return {}
        waited = window.waited / window.seconds()
        record = self.run_log.data.record(counts, waited)
        if window.steps < self.state.step - self.first_step:  # not the first window, in which the workers start
            self.run_log.data.explain(record, waited)
        return record

    def _save_is_due(self, done: bool) -> bool:
        config, step = self.config, self.state.step
        by_epoch = config.save_frequency and step % (config.save_frequency * config.steps_per_epoch) == 0
        by_step = config.save_steps and step % config.save_steps == 0
        by_time = False
        if config.save_minutes:  # the main process's clock decides for all
            by_time = self.processes.from_main(time.monotonic() - self.saved_time >= 60 * config.save_minutes)
        return bool(done or by_epoch or by_step or by_time)

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
        content = self.state.save(self.processes)
        if content is not None:
            model = self.task.model
            content |= {"model": model.config, "state_dict": model.state_dict(), "config": dict(vars(self.config))}
            folder = self.config.folder / "checkpoints"
            seconds = write_checkpoint(folder, self.state.step, content, self.config.keep_checkpoints)
            log.info("checkpoint of step %d written in %.1f s", self.state.step, seconds)
        self.saved_time = time.monotonic()


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
