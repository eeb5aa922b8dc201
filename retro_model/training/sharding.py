"""How a network is laid over memory and processes: nothing here changes what it computes, but for rounding.

Names of weights stay what they are, so that a checkpoint loads in any number of processes, spread in any way.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from retro_model.core.rows import NO_ROW
from retro_model.network.model import RETRO, Residual
from retro_model.training.distributed import World
from retro_model.training.sequences import Batch


def checkpoint_activations(model: RETRO) -> None:
    """From now on the model keeps only what each sublayer is given, and computes the rest again going backward."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def shard(model: RETRO, world: World) -> None:
    """Cuts weights, gradients and what is made of them among the processes (`fully_shard`).

    Each process holds its part; a sublayer's weights are put together while it runs. All processes must
    run the same sublayers in the same order: see `alike`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    encoder = [] if model.encoder is None else list(model.encoder.blocks)
    for block in [*model.decoder, *encoder]:
        fully_shard(block.attention, mesh=mesh)
        fully_shard(block.feed_forward, mesh=mesh)
        if block.cross_attention is not None:
            fully_shard(block.cross_attention.inner.key_value, mesh=mesh)  # the context's part runs by itself
            fully_shard(block.cross_attention, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "token_losses")


def replicate(model: RETRO, world: World) -> DistributedDataParallel:
    """The model as every process has a copy of it; gradients become their mean over the processes."""
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        find_unused_parameters=model.config.retrieval,  # a batch without neighbors leaves encoder and CCA out
        gradient_as_bucket_view=True,
    )


def gradients_stay(call: object) -> AbstractContextManager[object]:
    """While the block runs, gradients only add up here: a portion that is not the last need not be exchanged."""
    return call.no_sync() if isinstance(call, DistributedDataParallel) else nullcontext()


def alike(batch: Batch, pad_id: int) -> Batch:
    """The batch, and if none of its chunks has a neighbor a sequence that has one: padding, without labels.

    Then encoder and cross-attention run, and learn nothing: for a process whose batch has no neighbors while
    another's has, and where they are all that is trained.
    """
    assert batch.retrieved is not None
    if bool((batch.retrieved != pad_id).any()):
        return batch
    retrieved = _with_padding(batch.retrieved, pad_id)
    retrieved[-1, 0, 0, 0] = 0 if pad_id else 1  # any token but padding
    rows = torch.from_numpy(batch.rows)
    return replace(
        batch,
        rows=_with_padding(rows, NO_ROW).numpy(),
        seq=_with_padding(batch.seq, pad_id),
        labels=_with_padding(batch.labels, pad_id),
        documents=_with_padding(batch.documents, 0),
        bytes=_with_padding(batch.bytes, 0),
        retrieved=retrieved,
    )


def _with_padding(rows: Tensor, value: int) -> Tensor:
    return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), value)])


def whole(tensor: Tensor) -> Tensor:
    """A copy in main memory; of a tensor that is cut among processes all of it, and all must ask."""
    full_tensor = getattr(tensor, "full_tensor", None)
    found = tensor.detach() if full_tensor is None else full_tensor().detach()
    return found.to("cpu", copy=True).contiguous()


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is cut among processes."""
    placements: Any = getattr(like, "placements", None)
    if placements is None or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, placements)  # type: ignore[attr-defined]


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights in main memory."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}
