"""Training in several processes: rank, world size, joining and leaving the process group."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator


def first_process() -> bool:
    """Return whether this is the process of rank 0, which writes all files."""
    return int(os.environ.get("RANK", "0")) == 0  # set by torchrun


def num_processes() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> Accelerator:
    """Join the run's process group, if there are several processes: NCCL on GPUs, gloo on CPUs."""
    return Accelerator(cpu=device.type == "cpu")


def leave() -> None:
    """Wait for all processes of the run, then leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a process that ends early breaks the others' connections
        torch.distributed.destroy_process_group()
