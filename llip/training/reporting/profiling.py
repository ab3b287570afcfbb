"""Profile a window of steps with PyTorch's profiler: `profile_steps=20-25` writes a trace and a summary."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llip.config_checks import parse_window
from llip.training.reporting.run_log import log

_ROWS = 25


class StepProfiler:
    """Profiles the main process from the beginning of one step to the end of another."""

    def __init__(self, window: str | None, folder: Path | None, device: torch.device) -> None:
        """Profile `window`, in the form of `parse_window`, into `<folder>/profile`; do nothing where one is None."""
        self.first, self.last = parse_window(window) if window and folder else (0, -1)
        self.folder, self.device = folder, device
        self._profile: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run one step inside."""
        if number == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()
        yield
        if self._profile is not None and number == self.last:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._profile.stop()
            self._write(self._profile)
            self._profile = None

    def _write(self, finished: profile) -> None:
        assert self.folder is not None
        folder = self.folder / "profile"
        folder.mkdir(exist_ok=True)
        name = f"steps_{self.first}-{self.last}"
        finished.export_chrome_trace(str(folder / f"{name}.json.gz"))
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
        (folder / f"{name}.txt").write_text(table)
        log.info("profile: summary %s, trace %s (open it at perfetto.dev)", folder / f"{name}.txt", f"{name}.json.gz")
