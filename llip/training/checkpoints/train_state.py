"""Mutable state of a run: all that a checkpoint holds beside the weights."""

import dataclasses
from typing import Any

import torch
from timm.utils import ModelEmaV3

from llip.data.position import DataPosition, Layout, continue_data
from llip.errors import UserError
from llip.system.processes import Processes
from llip.training.reporting.data_report import WORST, DataCounts
from llip.training.step.engine import Engine


@dataclasses.dataclass
class TrainState:
    """Step, samples, optimizer, loss scaler, random states and data position; saves and restores itself."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: DataPosition
    counts: DataCounts
    averaged: ModelEmaV3 | None = None  # an exponential moving average of the model
    engine: Engine = dataclasses.field(default_factory=Engine)  # how the weights are distributed over processes
    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0  # without an update, because loss or gradient was not finite
    skipped_in_a_row: int = 0  # up to the current step

    def save(self, processes: Processes) -> dict[str, Any] | None:
        """Return plain containers on the main process, None elsewhere. Collective."""
        device = processes.device
        local = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "position": self.position.plain(),
            "counts": self.counts.plain(WORST),
        }
        optimizer = self.engine.optimizer_state(self.optimizer)
        by_rank = processes.gather_object(local)
        if by_rank is None:
            return None
        averaged = {} if self.averaged is None else {"ema_state_dict": self.averaged.module.state_dict()}
        return averaged | {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "processes": by_rank,
        }

    def restore(self, saved: dict[str, Any], processes: Processes, layout: Layout) -> str | None:
        """Continue from `saved`, with the data of `layout`.

        Returns:
            None if the data continue exactly where they stopped; else how they continue with another number of
            processes or workers, or with other shards.

        Raises:
            UserError: written by another version of llip.
        """
        by_rank = saved["processes"]
        try:
            positions = [DataPosition.from_plain(each["position"]) for each in by_rank]
        except (KeyError, TypeError) as error:
            raise UserError(
                "the checkpoint stores its data position in the format of another version of llip, which cannot be "
                "resumed; start from its weights instead: name=NEW pretrained=PATH/TO/step_<N>.pt"
            ) from error
        self.step, self.samples_seen = saved["step"], saved["samples_seen"]
        self.skipped_steps, self.skipped_in_a_row = saved["skipped_steps"], saved.get("skipped_in_a_row", 0)
        self.engine.load_optimizer_state(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if len(by_rank) == processes.world_size:
            local = by_rank[processes.rank]
            torch.set_rng_state(local["rng"])
            if local["cuda_rng"] is not None and processes.device.type == "cuda":
                torch.cuda.set_rng_state(local["cuda_rng"], processes.device)
        if processes.is_main:  # only the sum over processes is used
            self.counts.restore(each["counts"] for each in by_rank)
        self.position, note = continue_data(positions, self.position, layout, processes.rank, processes.world_size)
        return note
