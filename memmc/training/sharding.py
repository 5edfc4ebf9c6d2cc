"""Tensors that are spread over workers, and back: what FSDP asks of code that reads or writes whole ones.

Source: torch.distributed.fsdp.fully_shard (FSDP2): parameters become DTensors, sharded along their first axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor in one piece; of a spread one every worker must ask at the same time."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every worker has in one piece, spread as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    local = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a model's parameters over the workers of a mesh, block by block, so that each holds a share of them.

    A block's parameters are gathered for as long as it computes.
    """
    from torch.distributed.fsdp import fully_shard

    from memmc.model.attention import EncoderBlock
    from memmc.model.decoder import DecoderBlock

    for module in model.modules():
        if isinstance(module, EncoderBlock | DecoderBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
