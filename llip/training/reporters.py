"""Where curves go beside metrics.jsonl: TensorBoard, Weights & Biases. One class each, by its name in `report_to`."""

import uuid
from pathlib import Path
from typing import Protocol

from llip.configs import Config
from llip.errors import UserError

WANDB_ID = "wandb_id"
"""File of the run's folder that holds its id at Weights & Biases, so that a restart goes on with the same curves."""


class Reporter(Protocol):
    """Takes scalars."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step, by `group/name`."""

    def close(self) -> None:
        """Flush what is buffered."""


class TensorBoard:
    """Event files in `<run>/tensorboard`; a restart hides what lies after the step that it goes on from."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or in `<run>/wandb` with WANDB_MODE=offline; project and entity by wandb's own variables."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("report_to = wandb needs the package: pip install wandb") from None
        path = folder / WANDB_ID
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                id=path.read_text().strip(), resume="allow", name=config.name, dir=folder, config=dict(vars(config))
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"report_to = wandb: no run could be opened ({error}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back after a restart

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


REPORTERS: dict[str, type[Reporter]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_reporters(config: Config, folder: Path, step: int) -> list[Reporter]:
    """Open what `report_to` names, for a run that goes on from `step`.

    Raises:
        UserError: a package is missing, or a service does not open a run.
    """
    return [REPORTERS[name](folder, config, step) for name in config.report_to]
