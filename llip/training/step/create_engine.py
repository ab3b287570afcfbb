"""Which engine a run uses: the config's `distributed_engine` and `torchcompile`, applied to a model."""

import os
import shutil

import torch

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.system.processes import Processes
from llip.training.reporting.run_log import log
from llip.training.step.engine import Engine
from llip.training.step.engine_fsdp import ShardedEngine


def create_engine(config: Config, model: Llip, processes: Processes) -> Engine:
    """Distribute and compile a model as the config says. Create the optimizer afterwards: parameters may be replaced.

    Args:
        config: the run.
        model: with the same weights on every process; changed in place.
        processes: of the run.

    Raises:
        UserError: `torchcompile` without a C++ compiler on a CPU.
    """
    if config.torchcompile:
        _check_compiler(processes.device)
    if config.distributed_engine == "fsdp":
        if processes.world_size > 1:
            return ShardedEngine(config, model, processes)
        log.info("distributed_engine=fsdp: a single process keeps all weights")
    if config.torchcompile:
        model.visual.compile()
        model.text.compile()
    return Engine()


def _check_compiler(device: torch.device) -> None:
    """Raise before the start what torch.compile would raise in the first step."""
    if device.type != "cpu":
        return
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"torchcompile=true on a CPU needs a C++ compiler, and {', '.join(names)} is not on this machine; "
            "install one, name it in the environment variable CXX, or set torchcompile=false"
        )
