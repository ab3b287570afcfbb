"""Where curves go beside metrics.jsonl: TensorBoard, Weights & Biases. One class each, by its name in `report_to`."""

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

_ROOM = 1 << 16  # bytes that must fit on the disk before curves are written again

WANDB_ID = "wandb_id"
"""File of the run's folder that holds its id at Weights & Biases, so that a restart goes on with the same curves."""


class Reporter(Protocol):
    """Takes scalars. What a disk or a service does not take is lost, with a warning; it never ends a run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step, by `group/name`."""

    def close(self) -> None:
        """Flush what is buffered."""


class TensorBoard:
    """Event files in `<run>/tensorboard`; a restart hides what lies after the step that it goes on from."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = SummaryWriter(self._folder, purge_step=step + 1)
        self._gaps = BestEffort(str(self._folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._gaps.allowed():
            writer = self._open_writer()
            try:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            except OSError:
                self._give_up()
                raise

    def _open_writer(self) -> "SummaryWriter":
        """Return the writer, a new one after a failure: its thread writes no more once a write has failed."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            room = self._folder / "room.tmp"  # each try would leave an empty event file otherwise
            try:
                room.write_bytes(bytes(_ROOM))
            finally:
                room.unlink(missing_ok=True)
            self._writer = SummaryWriter(self._folder)
        return self._writer

    def _give_up(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def close(self) -> None:
        if self._writer is not None:
            with self._gaps.allowed():
                self._writer.close()
        self._gaps.close()


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
                f"report_to = wandb: no run could be opened ({error}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self._gaps, self._error = BestEffort("the run at Weights & Biases"), wandb.Error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back after a restart

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._gaps.allowed(), self._disk_error():
            self._run.log({"step": step, **values})

    def close(self) -> None:
        with self._gaps.allowed(), self._disk_error():
            self._run.finish()

    @contextlib.contextmanager
    def _disk_error(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise OSError(str(error)) from error


REPORTERS: dict[str, Callable[[Path, Config, int], Reporter]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_reporters(config: Config, folder: Path, step: int) -> list[Reporter]:
    """Open what `report_to` names, for a run that goes on from `step`.

    Raises:
        UserError: a package is missing, or a service does not open a run.
        OSError: the disk does not take a reporter's files.
    """
    return [REPORTERS[name](folder, config, step) for name in config.report_to]
