"""Several processes: joining, leaving, and FSDP sharding of the backbone."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator


def first_process() -> bool:
    """Return whether this is the first of the run's processes: the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0  # set by torchrun


def processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> Accelerator:
    """Join the run's other processes, if there are any: over NCCL on GPUs, over gloo on CPUs."""
    return Accelerator(cpu=device.type == "cpu")


def leave() -> None:
    """End this process's part in the run's group of processes, when all have come so far."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # whose process ends first would leave the others' threads in its sockets
        torch.distributed.destroy_process_group()
