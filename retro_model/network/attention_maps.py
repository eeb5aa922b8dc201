"""How much attention each token gives to each neighbor token, measured while the network runs.

    attention = neighbor_attention_maps(model, seq, retrieved, documents)
    attention.neighbors_BNKR[0, 70, 1, 5]    # of token 70 to token 5 of the second neighbor that it reads

The network does not change for this: a hook on each cross-attention of the decoder takes its queries and keys,
and computes the weights once more. The letters of model.py and attention.py name the axes.
"""

import math
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from retro_model.network.attention import NeighborAttention, unshift
from retro_model.network.kernels import rotate
from retro_model.network.model import RETRO, Stream, attends_retrieval


class AttentionMaps(NamedTuple):
    """The mean over the heads and cross-attention layers of the decoder; the sum for a token is 1 or 0.

    The last token of a chunk reads the neighbors of its own chunk, the others read those of the chunk before. A
    token that reads no neighbor has zeros.
    """

    neighbors_BNKR: Tensor  # float32, in a model of float64 that; zero at padding
    nothing_BN: Tensor  # the share of the sink; zero without one


@torch.no_grad()
def neighbor_attention_maps(
    model: RETRO, seq: Tensor, retrieved: Tensor, documents: Tensor | None = None
) -> AttentionMaps:
    """The attention to neighbors when the model reads this batch; its arguments are those of `RETRO.forward`.

    The model should be in eval mode: dropout changes what the layers see, and is not in the weights.
    """
    retrieved_BLKR = retrieved if retrieved.dim() == 4 else retrieved[:, :, None]
    totals: list[Tensor] = []
    layers = [
        cast("NeighborAttention", block.cross_attention.inner) for block in model.decoder if block.cross_attention
    ]
    hooks = [layer.register_forward_pre_hook(partial(_add_weights, totals=totals)) for layer in layers]
    try:
        _, stream = model.hidden_states(seq, retrieved, documents)
    finally:
        for hook in hooks:
            hook.remove()
    if not totals:  # no neighbor in the whole batch, or no layer that reads them
        empty = seq.new_zeros((*seq.shape, *retrieved_BLKR.shape[2:]), dtype=torch.float32)
        return AttentionMaps(empty, empty.new_zeros(seq.shape))
    weights_BNJ = _to_rows(torch.stack(totals).sum(0) / len(totals), stream, seq, retrieved_BLKR, model.config.pad_id)
    sinks = weights_BNJ.shape[2] - retrieved_BLKR[0, 0].numel()
    neighbors_BNKR = weights_BNJ[:, :, sinks:].reshape(*seq.shape, *retrieved_BLKR.shape[2:])
    return AttentionMaps(neighbors_BNKR, weights_BNJ[:, :, :sinks].sum(2))


def _add_weights(layer: nn.Module, arguments: tuple[Tensor, Tensor, partial[Tensor]], *, totals: list[Tensor]) -> None:
    """Append the weights of one layer, averaged over its heads: (A, M, J), with a sink (A, M, 1 + J).

    x has the tokens before the first query too, if the layer looks back to them.
    """
    assert isinstance(layer, NeighborAttention)
    x_QD, table_MF, see = arguments
    query_AMHF = layer.queries(x_QD)
    key_AJHF = see.keywords["context_BJHF"][:, :, : layer.heads]  # after the keys come the values
    precise = torch.promote_types(query_AMHF.dtype, torch.float32)
    query_AHMF = rotate(query_AMHF.to(precise), table_MF).transpose(1, 2)
    key_AHJF = rotate(key_AJHF.to(precise), see.keywords["key_table_JF"]).transpose(1, 2)
    with torch.autocast(x_QD.device.type, enabled=False):
        scores_AHMJ = query_AHMF @ key_AHJF.mT / math.sqrt(query_AHMF.shape[-1])
    mask_AJ = see.keywords["mask_BJ"]
    totals.append(scores_AHMJ.masked_fill(~mask_AJ[:, None, None], -math.inf).softmax(-1).mean(1))


def _to_rows(weights_AMJ: Tensor, stream: Stream, seq: Tensor, retrieved_BLKR: Tensor, pad_id: int) -> Tensor:
    """The weights of the attending chunks, given back to the tokens of each row: (B, N, J)."""
    chunk_size = weights_AMJ.shape[1]
    active_BL = (retrieved_BLKR != pad_id).flatten(2).any(2)
    if seq.shape[1] % chunk_size:  # the tail of a row is a chunk of the stream that retrieves nothing
        active_BL = torch.cat([active_BL, active_BL.new_zeros(len(seq), 1)], dim=1)
    order_C = torch.arange(active_BL.numel(), device=seq.device) if stream.order_C is None else stream.order_C
    active_C = active_BL.flatten()[order_C]
    weights_CMJ = weights_AMJ.new_zeros(len(order_C), *weights_AMJ.shape[1:])
    weights_CMJ[active_C] = weights_AMJ
    none_before = weights_CMJ.new_zeros(chunk_size - 1, weights_CMJ.shape[2])
    weights_TJ = unshift(weights_CMJ, none_before) * attends_retrieval(stream.index_C, active_C, chunk_size)[:, None]
    in_rows_CMJ = torch.empty_like(weights_CMJ).index_copy(0, order_C, weights_TJ.view_as(weights_CMJ))
    return in_rows_CMJ.view(len(seq), -1, weights_CMJ.shape[2])[:, : seq.shape[1]]
