"""When a run saves, what a checkpoint holds, and what happens if it cannot be written."""

import time
from typing import Any

from torch import Tensor

from llip.configs import Config
from llip.errors import RunError, UserError
from llip.open_clip.model import Llip
from llip.system.processes import Processes
from llip.training.checkpoints.checkpoint import write_checkpoint
from llip.training.checkpoints.train_state import TrainState
from llip.training.reporting.run_log import log


class Saver:
    """Writes the run's checkpoints; collective, the main process writes."""

    def __init__(
        self, config: Config, model: Llip, state: TrainState, processes: Processes, provenance: dict[str, Any]
    ) -> None:
        """Save `model` and `state` by the schedule of `config`, with the run's provenance in every checkpoint."""
        self.config, self.model, self.state = config, model, state
        self.processes, self.provenance = processes, provenance
        self.saved_at = time.monotonic()
        self.saved_step = state.step

    def is_due(self) -> bool:
        """Return whether the schedule wants a checkpoint of this step; the same on all processes."""
        config, step = self.config, self.state.step
        by_epoch = config.save_frequency and step % (config.save_frequency * config.steps_per_epoch) == 0
        by_step = config.save_steps and step % config.save_steps == 0
        forever = config.keep_every and step % (config.keep_every * config.steps_per_epoch) == 0
        return bool(by_epoch or by_step or forever)

    def is_due_by_time(self) -> bool:
        """Return whether `save_minutes` have passed since the last checkpoint, by this process's clock."""
        minutes = self.config.save_minutes
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of the current step. A failure is a warning, unless it is the `last` one. Collective.

        Raises:
            RunError: the last checkpoint cannot be written.
        """
        weights = self.state.engine.model_state(self.model)
        content = self.state.save(self.processes)
        problem = None if content is None else self._write(content, weights)
        problem = self.processes.broadcast_object(problem)
        self.saved_at = time.monotonic()
        if problem is None:
            self.saved_step = self.state.step
            return
        remains = f"the newest one is of step {self.saved_step}" if self.saved_step else "there is none yet"
        if last:
            raise RunError(
                f"{problem}; {remains}. Make room or fix the folder, then run the same command again", on_all_ranks=True
            )
        if self.processes.is_main:
            log.warning("%s; %s. Training continues and tries again at the next one", problem, remains)

    def _write(self, content: dict[str, Any], weights: dict[str, Tensor]) -> str | None:
        config = self.config
        content |= {
            "model": self.model.config,
            "state_dict": weights,
            "config": dict(vars(config)),
            "provenance": self.provenance,
        }
        forever = config.keep_every * config.steps_per_epoch
        folder = config.folder / "checkpoints"
        try:
            seconds = write_checkpoint(folder, self.state.step, content, config.keep_checkpoints, forever)
        except UserError as error:
            return str(error)
        log.info("checkpoint of step %d written in %.1f s", self.state.step, seconds)
        return None
