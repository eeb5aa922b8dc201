"""Attention weights from each token to each neighbor token, recorded during a forward pass.

    attention = neighbor_attention_maps(model, seq, retrieved, documents)
    attention.neighbors_BNKR[0, 70, 1, 5]    # from token 70 to token 5 of the second neighbor that it attends to

The model itself is not changed: a forward hook on each cross-attention recomputes the weights from queries and
keys. Shape suffixes are those of model.py and attention.py.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retro_model.network.attention import NeighborAttention, unshift
from retro_model.network.kernels import rotate
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import Stream, attends_retrieval, stream_of


class AttentionMaps(NamedTuple):
    """Attention weights, averaged over the heads and cross-attention layers of the decoder.

    The last token of a chunk attends to the neighbors of its own chunk, the others to those of the previous
    chunk. A token's weights in both fields sum to 1, or to 0 if it attends to no neighbors.
    """

    neighbors_BNKR: Tensor  # float32, or float64 for a float64 model; zero at padding
    nothing_BN: Tensor  # the weight of the sink; zero without one


@torch.no_grad()
def neighbor_attention_maps(
    model: LanguageModel, seq: Tensor, retrieved: Tensor, documents: Tensor | None = None
) -> AttentionMaps:
    """The attention to neighbors on this batch. The arguments are those of the model.

    Put the model in eval mode first: dropout would change the layers' inputs, and the weights do not include it.
    """
    retrieved_BLKR = retrieved if retrieved.dim() == 4 else retrieved[:, :, None]
    found: list[list[Tensor]] = [[] for _ in model.cross_attentions]  # for each layer, the weights of each call
    hooks = [
        layer.register_forward_pre_hook(partial(_append_weights, of_layer=of_layer))
        for layer, of_layer in zip(model.cross_attentions, found, strict=True)
    ]
    try:
        model.run_layers(seq, retrieved, documents)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(found):  # the batch has no neighbors, or the model no cross-attention
        empty = seq.new_zeros((*seq.shape, *retrieved_BLKR.shape[2:]), dtype=torch.float32)
        return AttentionMaps(empty, empty.new_zeros(seq.shape))
    weights_AMJ = torch.stack([torch.cat(of_layer) for of_layer in found]).sum(0) / len(found)
    stream = stream_of(seq, documents, model.config.chunk_size)
    weights_BNJ = _to_rows(weights_AMJ, stream, seq, retrieved_BLKR, model.config.pad_id)
    sinks = weights_BNJ.shape[2] - retrieved_BLKR[0, 0].numel()
    neighbors_BNKR = weights_BNJ[:, :, sinks:].reshape(*seq.shape, *retrieved_BLKR.shape[2:])
    return AttentionMaps(neighbors_BNKR, weights_BNJ[:, :, :sinks].sum(2))


def _append_weights(
    layer: nn.Module, arguments: tuple[Tensor, Tensor, partial[Tensor]], *, of_layer: list[Tensor]
) -> None:
    """Append the weights of one layer, averaged over its heads: (A, M, J), with a sink (A, M, 1 + J).

    Queries are x without its first `lead` tokens.
    """
    assert isinstance(layer, NeighborAttention)
    x_QD, table_MF, attend = arguments
    query_AMHF = layer.queries(x_QD)
    key_AJHF = attend.keywords["context_BJHF"][:, :, : layer.heads]  # drop the values, which follow the keys
    precise = torch.promote_types(query_AMHF.dtype, torch.float32)
    query_AHMF = rotate(query_AMHF.to(precise), table_MF).transpose(1, 2)
    key_AHJF = rotate(key_AJHF.to(precise), attend.keywords["key_table_JF"]).transpose(1, 2)
    with torch.autocast(x_QD.device.type, enabled=False):
        scores_AHMJ = query_AHMF @ key_AHJF.mT / math.sqrt(query_AHMF.shape[-1])
    mask_AJ = attend.keywords["mask_BJ"]
    of_layer.append(scores_AHMJ.masked_fill(~mask_AJ[:, None, None], -math.inf).softmax(-1).mean(1))


def _to_rows(weights_AMJ: Tensor, stream: Stream, seq: Tensor, retrieved_BLKR: Tensor, pad_id: int) -> Tensor:
    """Map the weights of the attending chunks back to the tokens of each row: (B, N, J)."""
    chunk_size = weights_AMJ.shape[1]
    active_BL = (retrieved_BLKR != pad_id).flatten(2).any(2)
    if seq.shape[1] % chunk_size:  # the incomplete chunk at the end of a row has no neighbors
        active_BL = torch.cat([active_BL, active_BL.new_zeros(len(seq), 1)], dim=1)
    order_C = torch.arange(active_BL.numel(), device=seq.device) if stream.order_C is None else stream.order_C
    active_C = active_BL.flatten()[order_C]
    weights_CMJ = weights_AMJ.new_zeros(len(order_C), *weights_AMJ.shape[1:])
    weights_CMJ[active_C] = weights_AMJ
    none_before = weights_CMJ.new_zeros(chunk_size - 1, weights_CMJ.shape[2])
    weights_TJ = unshift(weights_CMJ, none_before) * attends_retrieval(stream.index_C, active_C, chunk_size)[:, None]
    in_rows_CMJ = torch.empty_like(weights_CMJ).index_copy(0, order_C, weights_TJ.view_as(weights_CMJ))
    return in_rows_CMJ.view(len(seq), -1, weights_CMJ.shape[2])[:, : seq.shape[1]]
