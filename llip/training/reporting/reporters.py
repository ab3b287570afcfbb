"""Reporters named by `report_to`, beside metrics.jsonl: TensorBoard, Weights & Biases."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llip.configs import Config
from llip.errors import UserError
from llip.system.files import write_text
from llip.training.checkpoints.records import BestEffort

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_ROOM = 1 << 16  # free bytes that the disk needs before curves are written again

WANDB_ID = "wandb_id"
"""File in the run's folder with its id at Weights & Biases, so that a resumed run continues its curves."""


class Reporter(Protocol):
    """Receives scalars. A failing disk or service loses them with a warning; it never ends a run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record the scalars of a step, by `group/name`."""

    def close(self) -> None:
        """Flush what is buffered."""


class TensorBoard:
    """Event files in `<run>/tensorboard`; a resumed run hides events after the step it resumes from."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = SummaryWriter(self._folder, purge_step=step + 1)
        self._guard = BestEffort(str(self._folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._guard.allowed():
            writer = self._open_writer()
            try:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            except OSError:
                self._drop_writer()
                raise

    def _open_writer(self) -> "SummaryWriter":
        """Return the writer, after a failure a new one: the failure has ended the old one's thread."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            room = self._folder / "room.tmp"  # otherwise each try would leave an empty event file
            try:
                room.write_bytes(bytes(_ROOM))
            finally:
                room.unlink(missing_ok=True)
            self._writer = SummaryWriter(self._folder)
        return self._writer

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def close(self) -> None:
        if self._writer is not None:
            with self._guard.allowed():
                self._writer.close()
        self._guard.close()


class WeightsAndBiases:
    """A run at wandb.ai, or in `<run>/wandb` with WANDB_MODE=offline; project and entity by wandb's own variables."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("report_to = wandb needs the package: pip install wandb") from None
        path = folder / WANDB_ID
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                id=path.read_text().strip(), resume="allow", name=config.name, dir=folder, config=dict(vars(config))
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"report_to = wandb: cannot open a run: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._guard, self._error = BestEffort("the run at Weights & Biases"), wandb.Error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back on resume

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._guard.allowed(), self._disk_error():
            self._run.log({"step": step, **values})

    def close(self) -> None:
        with self._guard.allowed(), self._disk_error():
            self._run.finish()

    @contextlib.contextmanager
    def _disk_error(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise OSError(str(error)) from error


REPORTERS: dict[str, Callable[[Path, Config, int], Reporter]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_reporters(config: Config, folder: Path, step: int) -> list[Reporter]:
    """Open the reporters in `report_to`, for a run that continues from `step`.

    Raises:
        UserError: a package is missing, or a service opens no run.
        OSError: the disk cannot take a reporter's files.
    """
    return [REPORTERS[name](folder, config, step) for name in config.report_to]
