"""The log of a run's steps: records of metrics.jsonl, the progress bar, and warnings about data and mixture tokens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from llip.configs import ATTENTION_POOLINGS, Config
from llip.data.loader import Batch
from llip.open_clip.costs.flops import pair_tokens
from llip.open_clip.factory import ModelSpec
from llip.open_clip.mixture_alarms import find_alarms
from llip.open_clip.mixture_statistics import mixture_measures
from llip.system.processes import Processes
from llip.training.checkpoints.train_state import TrainState
from llip.training.reporting.data_report import WORST
from llip.training.reporting.run_log import RunLog, Terminal, log
from llip.training.reporting.speed import Speed
from llip.training.step.task import ContrastiveTask

_MOST_REPEATED = 0.5  # fraction of caption places without a new caption from which the log warns


class StepResult(NamedTuple):
    """What a step computed; tensors are on the device, reading them waits for it."""

    step: int  # from 1
    lr: float
    loss: Tensor  # [], of this process
    grad_norm: Tensor  # [], over all parameters
    report: dict[str, Tensor]  # the task's


class StepLog:
    """Logs steps: some become a record, and each epoch ends with a report on its data. All processes take part."""

    def __init__(
        self, config: Config, task: ContrastiveTask, state: TrainState, processes: Processes, run_log: RunLog
    ) -> None:
        """Log the steps that advance `state`.

        Args:
            config: the run's config.
            task: its model and last features are measured.
            state: of the run; only read.
            processes: of the run.
            run_log: takes the records.
        """
        self.config, self.task, self.state, self.processes, self.run_log = config, task, state, processes, run_log
        self.speed = Speed(config, processes)
        self.first_step = state.step
        self.data_epoch = 0  # as far as this process's batches show
        self.alarms: set[str] = set()  # kinds that have been logged
        self.bar = tqdm(disable=True)
        self.began = time.perf_counter()
        self.restart_window()

    def restart_window(self) -> None:
        """Begin the time and the steps that the next record is about."""
        self.window_began, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.repeated = 0.0  # captions of images that have fewer than N

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show a progress bar on the main process inside the block, which runs the steps."""
        self.bar = tqdm(
            total=self.config.total_steps,
            initial=self.state.step,
            desc=self.config.name,
            unit="step",
            disable=not self.processes.is_main,
            dynamic_ncols=True,
            file=Terminal(),
        )
        self.began = time.perf_counter()
        self.restart_window()
        with self.bar:
            yield

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        if self.state.step == self.first_step:
            log.info("data: the first batch came after %.1f s", self.waited)

    def batch(self, batch: Batch) -> None:
        """Record a batch of the step that is being computed, before the position moves past it."""
        self.run_log.batch(batch, self.state.position.batches, self.state.step + 1)
        self.repeated += int((~batch.mask.numpy()).sum())
        if batch.data_epoch > self.data_epoch:
            self.data_epoch = batch.data_epoch
            log.info("data: epoch %d of the data begins at step %d", batch.data_epoch + 1, self.state.step)

    def step(self, result: StepResult) -> None:
        """Record a step if it is to be logged, and report on the data at the end of an epoch."""
        config, step = self.config, result.step
        self.steps += 1
        self.bar.update()
        if config.log_steps and (step % config.log_steps == 0 or step == config.total_steps):
            record = self._record(result)
            self.run_log.metrics(record)
            self.bar.set_postfix_str(
                f"loss {record['loss']:.3f}, {record['samples_per_second']:,.0f} samples/s", refresh=False
            )
            self.restart_window()
        if step % config.steps_per_epoch == 0:
            counts = self.processes.gather_object(self.state.counts.plain(WORST))
            if counts is not None:
                self.run_log.data.log_epoch(counts)

    def _record(self, result: StepResult) -> dict[str, Any]:
        """Return the record of a step and of the window that ends with it. Collective."""
        state, report = self.state, result.report
        loss = self.processes.mean(result.loss).item()
        seconds = max(1e-9, time.perf_counter() - self.window_began)
        rate, waited = self.steps * self.config.global_batch / seconds, self.waited / seconds
        return {
            "step": result.step,
            "samples_seen": state.samples_seen,
            "epoch": result.step / self.config.steps_per_epoch,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm.item(),
            "logit_scale": report["logit_scale"].item(),
            "logit_bias": report["logit_bias"].item() if "logit_bias" in report else None,
            "samples_per_second": rate,
            **self.speed.record(rate),
            **self._caption_record(rate),
            "data_wait_fraction": waited,
            "seconds": time.perf_counter() - self.began,
            "skipped_steps": state.skipped_steps,
            **self._mixture_record(),
            **self._data_record(waited),
        }

    def _caption_record(self, rate: float) -> dict[str, float]:
        """Return the captions per second, and the fraction of this process's that fill a place without a new one."""
        config = self.config
        if config.captions_per_image == 1:
            return {}
        captions = self.steps * config.batch_size * config.accum_freq * config.captions_per_image
        repeated = self.repeated / captions
        if repeated > _MOST_REPEATED and config.caption_fill != "mask" and self.processes.is_main:
            self._warn_once(
                f"most captions are repeats: {100 * repeated:.0f} % of captions_per_image={config.captions_per_image} "
                "are captions that their image has already; use a smaller captions_per_image or caption_fill=mask"
            )
        return {
            "captions_per_second": rate * config.captions_per_image,
            "repeated_caption_fraction": repeated,
        }

    def _mixture_record(self) -> dict[str, float]:
        """Return statistics of the mixture tokens on the main process's last batch; warn of each collapse once."""
        seen = self.task.seen
        if not self.processes.is_main or seen is None or self.config.pooling not in ATTENTION_POOLINGS:
            return {}
        tokens = pair_tokens(ModelSpec(**self.task.model.config))
        if tokens == 1:
            return {}
        measures = mixture_measures(self.task.model, seen.h, seen.t)
        if self.state.step >= self.config.warmup:
            has_temperature = hasattr(self.task.model.pooling, "temperature")
            for alarm in find_alarms(measures, tokens, text_conditioned=True, has_temperature=has_temperature):
                self._warn_once(alarm)
        return {f"mixture_{name}": value for name, value in measures.items()}

    def _warn_once(self, alarm: str) -> None:
        """Log an alarm, unless one that begins alike has been logged."""
        kind = alarm.split(":")[0]
        if kind not in self.alarms:
            self.alarms.add(kind)
            log.warning("step %d: %s", self.state.step, alarm)

    def _data_record(self, waited: float) -> dict[str, Any]:
        """Return what this process's workers did in the window, and what all processes used and dropped. Collective."""
        counts = self.processes.gather_object(self.state.counts.plain(0))
        if counts is None:
            return {}
        record = self.run_log.data.record(counts, waited)
        if self.steps < self.state.step - self.first_step:  # not the first window, in which the workers start
            self.run_log.data.explain(record, waited)
        return record
