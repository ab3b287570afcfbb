"""The mutable part of a run: everything a restart needs beside the weights."""

import dataclasses
from typing import Any

import torch

from llip.training.data import DataPosition
from llip.training.distributed import Processes


@dataclasses.dataclass
class TrainState:
    """Step, samples, optimizer, loss scaler, random states and data position; knows how to save and restore itself."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: DataPosition
    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0  # steps without an update, because float16 gradients overflowed

    def save(self, processes: Processes) -> dict[str, Any] | None:
        """Return plain containers on the main process, None elsewhere. Every process must call it."""
        device = processes.device
        own = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "position": dataclasses.asdict(self.position),
        }
        everyone = processes.gather_to_main(own)
        if everyone is None:
            return None
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": everyone,
        }

    def restore(self, saved: dict[str, Any], processes: Processes) -> str | None:
        """Continue from `saved`.

        Returns:
            None when the data go on exactly where they stopped; otherwise a sentence that says how they go on, because
            the number of processes or workers is another one.
        """
        self.step, self.samples_seen = saved["step"], saved["samples_seen"]
        self.skipped_steps = saved["skipped_steps"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        everyone = saved["processes"]
        if len(everyone) == processes.count:
            own = everyone[processes.rank]
            torch.set_rng_state(own["rng"])
            if own["cuda_rng"] is not None and processes.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"], processes.device)
            if own["position"]["workers"] == self.position.workers:
                self.position = DataPosition(**own["position"])
                return None
        # Another topology deals the shards differently: go on at the same depth of everybody's new share.
        workers = max(1, self.position.workers)
        used = sum(sum(one["position"]["cursors"]) for one in everyone)
        self.position.cursors = [used // (processes.count * workers)] * workers
        self.position.batches = 0
        return (
            f"the data go on about {used:,} samples into the stream, dealt anew to {processes.count} processes x "
            f"{workers} workers (before: {len(everyone)} x {max(1, everyone[0]['position']['workers'])}); some samples "
            "of the current pass may repeat or be left out once"
        )
