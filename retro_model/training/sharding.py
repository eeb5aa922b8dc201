"""DDP and FSDP. Neither changes what the network computes, except for rounding.

Weights keep their names, so a checkpoint loads with any number of processes, sharded or not.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from retro_model.core.errors import ConfigError
from retro_model.core.rows import NO_ROW
from retro_model.network.attention import CrossAttention, NeighborAttention
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import RETRO
from retro_model.training.distributed import World
from retro_model.training.sequences import Batch


def shard(model: LanguageModel, world: World) -> None:
    """Shard weights, gradients and optimizer state over the processes (FSDP, `fully_shard`).

    Each process holds its shard, and a sublayer's weights are gathered while it runs. All processes must run the
    same sublayers in the same order: see `ensure_neighbor`.
    """
    if not isinstance(model, RETRO):
        raise ConfigError("train.shard: found true, expected false: the weights of a base cannot be sharded")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    encoder = [] if model.encoder is None else list(model.encoder.blocks)
    for block in [*model.decoder, *encoder]:
        fully_shard(block.attention, mesh=mesh)
        fully_shard(block.feed_forward, mesh=mesh)
        if block.cross_attention is not None:
            _shard_keys_and_values(block.cross_attention.inner, mesh)
            fully_shard(block.cross_attention, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "token_losses")


def _shard_keys_and_values(attention: CrossAttention, mesh: Any) -> None:
    """Shard what makes the keys and values of cross-attention, which are made outside `forward`."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(attention.key_value, mesh=mesh)
    if isinstance(attention, NeighborAttention):
        if attention.copy_rows is not None:
            fully_shard(attention.copy_rows, mesh=mesh)
        if attention.sink is not None:  # a weight of the attention itself
            fully_shard(attention, mesh=mesh)
            register_fsdp_forward_method(attention, "neighbor_context")


def replicate(model: LanguageModel, world: World) -> DistributedDataParallel:
    """Wrap the model in DDP: each process has a full copy, and gradients are averaged over the processes."""
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        find_unused_parameters=model.config.retrieval,  # a batch without neighbors skips encoder and CCA
        gradient_as_bucket_view=True,
    )


def skip_gradient_sync(call: object) -> AbstractContextManager[object]:
    """In the block, DDP only accumulates gradients locally; only a step's last portion needs to exchange them."""
    return call.no_sync() if isinstance(call, DistributedDataParallel) else nullcontext()


def ensure_neighbor(batch: Batch, pad_id: int) -> Batch:
    """If no chunk of the batch has a neighbor, append a sequence of padding that has one; it has no labels.

    This makes encoder and cross-attention run without changing the loss, with gradients of zero. Use it where
    sharded processes must run the same sublayers, or where encoder and cross-attention are all that is trained.
    """
    assert batch.retrieved is not None
    if bool((batch.retrieved != pad_id).any()):
        return batch
    retrieved = _append_padding_row(batch.retrieved, pad_id)
    retrieved[-1, 0, 0, 0] = 0 if pad_id else 1  # any token but padding
    rows = torch.from_numpy(batch.rows)
    return replace(
        batch,
        rows=_append_padding_row(rows, NO_ROW).numpy(),
        seq=_append_padding_row(batch.seq, pad_id),
        labels=_append_padding_row(batch.labels, pad_id),
        documents=_append_padding_row(batch.documents, 0),
        bytes=_append_padding_row(batch.bytes, 0),
        retrieved=retrieved,
    )


def _append_padding_row(rows: Tensor, value: int) -> Tensor:
    return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), value)])


def full_copy(tensor: Tensor) -> Tensor:
    """A full copy in main memory. For a sharded tensor, all processes must call this."""
    full_tensor = getattr(tensor, "full_tensor", None)
    full = tensor.detach() if full_tensor is None else full_tensor().detach()
    return full.to("cpu", copy=True).contiguous()


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, sharded as `like` is if `like` is sharded and has its shape."""
    placements: Any = getattr(like, "placements", None)
    if placements is None or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, placements)  # type: ignore[attr-defined]


def full_weights(model: LanguageModel) -> dict[str, Tensor]:
    """A full copy of the model's own weights in main memory. For a sharded model, all processes must call this."""
    return {name: full_copy(tensor) for name, tensor in model.own_weights().items()}
