"""Agreement between the workers of a run through torch.distributed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from memmc.model.mae import MemMCMAE
from memmc.training.sharding import shard

Strategy = Literal["ddp", "fsdp"]


class Sync(Protocol):
    """What a loop needs from its fellow workers; every rank must call each method at the same steps."""

    def broadcast_float(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        ...

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over the ranks."""
        ...

    def texts(self, text: str) -> list[str]:
        """Return every rank's text, in order of ranks."""
        ...

    def wrap(self, model: MemMCMAE, average: MemMCMAE) -> nn.Module:
        """Return the module to call in the forward pass, its gradients averaged over the ranks.

        Args:
            model: to train; its parameters may be replaced.
            average: of the same shape, spread over the ranks as the model is.
        """
        ...

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Within the block gradients stay on their rank."""
        ...


class Alone:
    """The only worker."""

    def broadcast_float(self, value: float) -> float:
        """Return the value."""
        return value

    def sum(self, values: list[float]) -> list[float]:
        """Return the values."""
        return values

    def texts(self, text: str) -> list[str]:
        """Return the text."""
        return [text]

    def wrap(self, model: MemMCMAE, average: MemMCMAE) -> nn.Module:
        """Return the model."""
        return model

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()


class Group:
    """The workers of an initialised process group.

    Args:
        device: of this worker.
        strategy: `ddp` keeps the whole model on each worker, `fsdp` a share of it.
    """

    def __init__(self, device: torch.device, strategy: Strategy = "ddp") -> None:
        self._device, self._strategy = device, strategy

    def broadcast_float(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.broadcast(tensor, src=0)
        return float(tensor.item())

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def texts(self, text: str) -> list[str]:
        """Return every rank's text; no pickle travels, as bytes of one padded tensor."""
        mine = text.encode()
        (longest,) = (int(value) for value in self._max([float(len(mine))]))
        padded = torch.zeros(longest + 1, dtype=torch.uint8)
        padded[: len(mine)] = torch.tensor(list(mine), dtype=torch.uint8)
        padded = padded.to(self._device)
        gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, padded)
        return [bytes(item.cpu().tolist()).rstrip(b"\0").decode() for item in gathered]

    def wrap(self, model: MemMCMAE, average: MemMCMAE) -> nn.Module:
        """Return the model under DDP, or the model itself with its parameters and the average's sharded."""
        if self._strategy == "fsdp":
            # Without a mesh torch would take the device that it was built for, with or without one at hand.
            mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
            shard(model, mesh)
            shard(average, mesh)
            return model
        devices = [self._device.index] if self._device.type == "cuda" else None
        # The only buffers are positions, which never change: no step need wait for them.
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Within the block gradients stay on their rank; a sharded model reduces each time, to hold its share alone."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _max(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]
