"""The mutable part of a run: everything a restart needs beside the weights."""

import dataclasses
from typing import Any

import torch
from timm.utils import ModelEmaV3

from llip.data.position import DataPosition, Layout, continue_data
from llip.errors import UserError
from llip.system.processes import Processes
from llip.training.reporting.data_report import DataCounts
from llip.training.step.engine import Engine


@dataclasses.dataclass
class TrainState:
    """Step, samples, optimizer, loss scaler, random states and data position; knows how to save and restore itself."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: DataPosition
    counts: DataCounts
    averaged: ModelEmaV3 | None = None  # an exponential moving average of the model
    engine: Engine = dataclasses.field(default_factory=Engine)  # how the weights lie on the processes
    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0  # steps without an update, because loss or gradient was not finite
    skipped_in_a_row: int = 0  # of them, up to the present step

    def save(self, processes: Processes) -> dict[str, Any] | None:
        """Return plain containers on the main process, None elsewhere. Every process must call it."""
        device = processes.device
        own = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "position": self.position.plain(),
            "counts": self.counts.plain(),
        }
        optimizer = self.engine.optimizer_state(self.optimizer)
        everyone = processes.gather_object(own)
        if everyone is None:
            return None
        averaged = {} if self.averaged is None else {"ema_state_dict": self.averaged.module.state_dict()}
        return averaged | {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "processes": everyone,
        }

    def restore(self, saved: dict[str, Any], processes: Processes, layout: Layout) -> str | None:
        """Continue from `saved`, with the data of `layout`.

        Returns:
            None when the data go on exactly where they stopped; otherwise a sentence that says how they go on, because
            the number of processes or workers is another one, or the shards are others.

        Raises:
            UserError: another version of llip has written it.
        """
        everyone = saved["processes"]
        try:
            positions = [DataPosition.from_plain(one["position"]) for one in everyone]
        except (KeyError, TypeError) as error:
            raise UserError(
                "the checkpoint tells where its data stood in the form of another version of llip, which cannot be "
                "continued; start from its weights instead: name=NEW pretrained=PATH/TO/step_<N>.pt"
            ) from error
        self.step, self.samples_seen = saved["step"], saved["samples_seen"]
        self.skipped_steps, self.skipped_in_a_row = saved["skipped_steps"], saved.get("skipped_in_a_row", 0)
        self.engine.load_optimizer_state(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if len(everyone) == processes.world_size:
            own = everyone[processes.rank]
            torch.set_rng_state(own["rng"])
            if own["cuda_rng"] is not None and processes.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"], processes.device)
        if processes.is_main:  # only the sum over the processes is ever shown
            self.counts.restore(one["counts"] for one in everyone)
        self.position, note = continue_data(positions, self.position, layout, processes.rank, processes.world_size)
        return note
