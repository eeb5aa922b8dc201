"""RETRO, a language model that attends to retrieved text (Borgeaud et al. 2022, arXiv 2112.04426).

Read it from top to bottom: small parts, encoder, stream of chunks, chunked cross-attention, the model and
its loss, initialization. "Section", "equation" and "algorithm" refer to the paper. Notable features:

- The text is split into chunks of M tokens. Each chunk comes with K neighbors, retrieved in advance from a
  database. A neighbor has R tokens: a similar chunk and its continuation.
- The encoder encodes the neighbors and cross-attends to the chunk that retrieved them. The decoder attends to
  the encoded neighbors from the last token of that chunk on, so no token sees what later tokens retrieved.
- Internally a batch is a flat stream of T = C * M tokens, one document after the other. Only self-attention and
  the shift of chunked cross-attention depend on document boundaries; everything else works on single tokens
  or chunks. So packed sequences need neither padding nor attention masks.
- Optional copying (`copy_tokens`): cross-attention starts out matching the last tokens of the text against the
  tokens of each neighbor, which the paper's network does not learn in a short training.
- A chunk without neighbors skips chunked cross-attention entirely. A model that gets no neighbors is therefore
  exactly its plain decoder, and a trained decoder can be extended with retrieval later (RETROfit).

Shape suffixes:

    B  rows of a batch                 M  tokens in a chunk                 D  decoder width
    N  tokens in a row                 K  neighbors of a chunk              E  encoder width
    L  chunks in a row                 R  tokens in a neighbor              V  vocabulary size
    C  chunks in the stream            J  K * R, neighbor tokens per chunk  T  C * M, tokens in the stream
    A  chunks that have neighbors      H  heads                             F  features per head
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro_model.core.errors import ConfigError
from retro_model.network.attention import (
    CrossAttention,
    NeighborAttention,
    SelfAttention,
    attend_context,
    attend_documents,
    attending_chunks,
    rotary_table,
    unshift,
)
from retro_model.network.config import RETROConfig
from retro_model.network.flops import step_flops
from retro_model.network.kernels import ROWS_OF_LOGITS, linear_cross_entropy, rms_norm, rotary_attention
from retro_model.network.language_model import LanguageModel

# ---- small parts -----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * gain (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x_D: Tensor) -> Tensor:
        """Normalize x over its last axis."""
        return rms_norm(x_D, self.gain)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * sigmoid(w x) (Zhang et al. 2021, section 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gate = nn.Parameter(torch.ones(dim))

    def forward(self, x_D: Tensor) -> Tensor:
        """Normalize and gate x."""
        return super().forward(x_D) * torch.sigmoid(self.gate * x_D)


NORMS: dict[str, type[nn.Module]] = {
    "rmsnorm": RMSNorm,
    "gated_rmsnorm": GatedRMSNorm,
    "layernorm": nn.LayerNorm,
}


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them; the hidden width is 4 * dim."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        """The update of x, without the skip connection."""
        out: Tensor = self.out(self.dropout(F.gelu(self.up(x_D))))
        return out


class Residual(nn.Module):
    """Pre-norm: alpha x + f(norm(x)). Post-norm (DeepNet): norm(alpha x + f(x)) (Wang et al. 2022, equation 1)."""

    def __init__(self, inner: nn.Module, norm: nn.Module, alpha: float, post_norm: bool) -> None:
        super().__init__()
        self.norm, self.inner = norm, cast("Any", inner)
        self.alpha, self.post_norm = alpha, post_norm

    def forward(self, x_D: Tensor, *args: Any) -> Tensor:
        """Apply the sublayer f with its skip connection; `args` are passed on to f."""
        skipped = x_D if self.alpha == 1 else self.alpha * x_D
        if self.post_norm:
            normed: Tensor = self.norm(skipped + self.inner(x_D, *args))
            return normed
        added: Tensor = skipped + self.inner(self.norm(x_D), *args)
        return added


@dataclass(frozen=True)
class Side:
    """The settings of the encoder or of the decoder, and factories for its sublayers."""

    config: RETROConfig
    dim: int
    depth: int
    cross_attn_layers: tuple[int, ...] | None  # None: every layer
    attn_dropout: float
    ff_dropout: float
    alpha: float  # scale of the skip connections
    beta: float  # gain of DeepNet's initialization
    reads_neighbors: bool  # cross-attention goes to neighbors (decoder), or to the retrieving chunk (encoder)

    @classmethod
    def encoder(cls, config: RETROConfig) -> "Side":
        """The settings of the encoder."""
        alpha, beta = config.deepnet("enc")
        return cls(
            config, config.enc_dim, config.enc_depth, config.enc_cross_attn_layers, config.enc_attn_dropout,
            config.enc_ff_dropout, config.enc_scale_residual or alpha, beta, reads_neighbors=False,
        )  # fmt: skip

    @classmethod
    def decoder(cls, config: RETROConfig) -> "Side":
        """The settings of the decoder."""
        alpha, beta = config.deepnet("dec")
        return cls(
            config, config.dec_dim, config.dec_depth, config.dec_cross_attn_layers, config.dec_attn_dropout,
            config.dec_ff_dropout, config.dec_scale_residual or alpha, beta, reads_neighbors=True,
        )  # fmt: skip

    def norm(self) -> nn.Module:
        """A new norm layer of the configured class and this side's width."""
        klass = self.config.norm_klass or ("gated_rmsnorm" if self.config.gated_rmsnorm else "rmsnorm")
        return (NORMS[klass] if isinstance(klass, str) else klass)(self.dim)

    def final_norm(self) -> nn.Module:
        """The final norm; the identity with post-norm, where the last sublayer already ends in a norm."""
        return nn.Identity() if self.config.use_deepnet else self.norm()

    def residual(self, inner: nn.Module) -> Residual:
        """Wrap a sublayer with a norm and a skip connection."""
        return Residual(inner, self.norm(), self.alpha, self.config.use_deepnet)

    def self_attention(self) -> Residual:
        """A self-attention sublayer."""
        return self.residual(SelfAttention(self.dim, self.config.heads, self.config.dim_head, self.attn_dropout))

    def cross_attention(self, layer: int) -> Residual | None:
        """The cross-attention sublayer of a layer (from 1); None if this layer has none."""
        config = self.config
        if not config.retrieval or (self.cross_attn_layers is not None and layer not in self.cross_attn_layers):
            return None
        if not self.reads_neighbors:
            sizes = self.dim, config.dec_dim, config.heads, config.dim_head, self.attn_dropout
            return self.residual(CrossAttention(*sizes))
        sizes = self.dim, config.enc_dim, config.heads, config.dim_head, self.attn_dropout
        copying, rows, sink = config.copy_tokens, config.copy_rows, config.cross_attn_sink
        return self.residual(NeighborAttention(*sizes, copy_tokens=copying, copy_rows=rows, sink=sink))

    def feed_forward(self) -> Residual:
        """A feed-forward sublayer."""
        return self.residual(FeedForward(self.dim, self.ff_dropout))


class Block(nn.Module):
    """One layer of the encoder or decoder: self-attention, cross-attention in some layers, feed-forward.

    It has no `forward`: Encoder and RETRO call the three sublayers with what each of them needs.
    """

    attention: Residual
    cross_attention: Residual | None
    feed_forward: Residual

    def __init__(self, side: Side, layer: int) -> None:
        super().__init__()
        self.attention = side.self_attention()
        self.cross_attention = side.cross_attention(layer)
        self.feed_forward = side.feed_forward()


def block_list(side: Side) -> Sequence[Block]:
    """All layers of one side: a ModuleList, with a type that tells mypy what it contains."""
    blocks = nn.ModuleList(Block(side, layer) for layer in range(1, side.depth + 1))
    return cast("Sequence[Block]", blocks)


# ---- encoder ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Encodes each neighbor, conditioned on the chunk that retrieved it (section 2.3, algorithm 1)."""

    def __init__(self, config: RETROConfig) -> None:
        super().__init__()
        side = Side.encoder(config)
        self.dim_head = config.dim_head
        same = config.enc_dim == config.dec_dim
        self.widen = nn.Identity() if same else nn.Linear(config.dec_dim, config.enc_dim, bias=False)
        self.norm_in = side.norm()
        self.norm_hidden = Side.decoder(config).final_norm()  # identity with post-norm: already normalized
        self.blocks = block_list(side)
        self.norm = side.final_norm()

    def forward(self, embedded_AKRD: Tensor, mask_AKR: Tensor, hidden_AMD: Tensor) -> Tensor:
        """The encoded neighbors of each chunk, concatenated: (A, J, E).

        `mask_AKR` is False at padding. `hidden_AMD` holds the decoder's hidden states of the retrieving chunk.
        """
        _, num_neighbors, length, _ = embedded_AKRD.shape
        dtype = embedded_AKRD.dtype
        positions = torch.arange(max(length, hidden_AMD.shape[1]), device=embedded_AKRD.device)
        table = rotary_table(positions, self.dim_head, dtype)
        table_RF, table_MF = table[:length], table[: hidden_AMD.shape[1]]
        table_JF = table_RF.repeat(num_neighbors, 1)  # positions start at 0 in every neighbor
        attend = partial(attend_neighbors, mask_AKR=mask_AKR)

        hidden_AMD = self.norm_hidden(hidden_AMD)
        widened_AKRE = self.widen(embedded_AKRD).to(dtype)  # keep the residual stream in full precision under autocast
        x_AJE = self.norm_in(widened_AKRE).flatten(1, 2)  # (A, K, R, E) -> (A, KR, E)
        for block in self.blocks:
            x_AJE = block.attention(x_AJE, table_RF, attend)
            if block.cross_attention is not None:
                # Token i of a neighbor and token j of the chunk are at distance i - j.
                context = block.cross_attention.inner.context(hidden_AMD)
                attend_chunk = partial(attend_context, context_BJHF=context, key_table_JF=table_MF)
                x_AJE = block.cross_attention(x_AJE, table_JF, attend_chunk)
            x_AJE = block.feed_forward(x_AJE)
        out: Tensor = self.norm(x_AJE)
        return out


def attend_neighbors(qkv_AJHF: Tensor, table_RF: Tensor, dropout: float, *, mask_AKR: Tensor) -> Tensor:
    """Bidirectional attention within each neighbor, masking its padding: (A, J, H, F)."""
    a, k, _ = mask_AKR.shape
    qkv = rearrange(qkv_AJHF, "a (k r) h f -> (a k) r h f", k=k)
    # If a neighbor is all padding, unmask it: softmax over no key would be 0 / 0. Its output is masked later.
    mask_AKR = mask_AKR | ~mask_AKR.any(-1, keepdim=True)
    out = rotary_attention(qkv, None, table_RF, table_RF, mask_BJ=mask_AKR.flatten(0, 1), dropout=dropout)
    return rearrange(out, "(a k) r h f -> a (k r) h f", a=a)


# ---- the stream of chunks --------------------------------------------------------------------------


class Stream(NamedTuple):
    """The order of a batch's chunks in the stream: documents sorted by length, each one contiguous.

    Sorting puts documents with the same number of chunks next to each other, so self-attention processes them
    as one batch, through a view.
    """

    order_C: Tensor | None  # index in the batch of each chunk of the stream; None: the order of the batch
    groups: list[tuple[int, int]]  # (number of documents, chunks per document), in stream order
    index_C: Tensor  # index of each chunk within its document, from 0


def stream_of(seq: Tensor, documents: Tensor | None, chunk_size: int) -> Stream:
    """The stream of a batch (B, N); `documents` (B, chunks) as in `RETRO.forward`, None: each row is one document."""
    rows, length = seq.shape
    chunks = -(-length // chunk_size)
    if documents is None:
        return stream_of_rows(rows, chunks, seq.device)
    if documents.shape[1] < chunks:  # an incomplete chunk at the end belongs to the document before it
        last = documents[:, -1:] if documents.shape[1] else documents.new_zeros(rows, 1)
        documents = torch.cat([documents, last], dim=1)
    return stream_of_documents(documents)


def stream_of_rows(rows: int, chunks: int, device: torch.device) -> Stream:
    """The stream of a batch in which each row is one document."""
    return Stream(None, [(rows, chunks)], torch.arange(chunks, device=device).repeat(rows))


def stream_of_documents(documents_BL: Tensor) -> Stream:
    """The stream of packed rows: a run of adjacent chunks with the same id, within a row, is one document."""
    first_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    first_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    starts = first_BL.flatten().nonzero().squeeze(1)
    place_C = torch.arange(first_BL.numel(), device=starts.device)
    lengths = torch.diff(starts, append=starts.new_tensor([len(place_C)]))
    lengths, by_length = lengths.sort(stable=True)
    index_C = place_C - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    order_C = starts[by_length].repeat_interleave(lengths) + index_C
    sizes, counts = torch.unique_consecutive(lengths, return_counts=True)
    return Stream(order_C, list(zip(counts.tolist(), sizes.tolist(), strict=True)), index_C)


def attends_retrieval(index_C: Tensor, active_C: Tensor, chunk_size: int) -> Tensor:
    """Whether each token of the stream attends to neighbors: (T,).

    The last token of a chunk attends to the neighbors of its own chunk. The others attend to the neighbors of the
    previous chunk of the document, so the first M - 1 tokens of a document attend to none.
    """
    before_C = torch.zeros_like(active_C)
    before_C[1:] = active_C[:-1] & (index_C[1:] > 0)
    return torch.cat([repeat(before_C, "c -> c m", m=chunk_size - 1), active_C[:, None]], dim=1).flatten()


# ---- chunked cross-attention -----------------------------------------------------------------------


class Retrieval(NamedTuple):
    """The encoded neighbors of a batch, with all that chunked cross-attention needs to attend to them."""

    encoded_AJE: Tensor
    rows_AJD: Tensor | None  # from RETRO.output_rows
    mask_AKR: Tensor  # False at padding and missing neighbors
    mask_AJ: Tensor  # the same per key; with a sink, one more key at the front
    active_A: Tensor | None  # stream indices of the chunks that have neighbors; None: all chunks have some
    attends_T: Tensor  # which tokens attend to neighbors
    query_table_MF: Tensor
    key_table_JF: Tensor


def cross_positions(config: RETROConfig, num_neighbors: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables of the queries (M, F) and keys (J, F) of chunked cross-attention.

    Query i and token j of a neighbor are at distance i - j + M - 1 (appendix B): the first query is the last
    token of the retrieving chunk, and its position is that of token M - 1 of each neighbor. The sink, if there
    is one, is the first key, at position 0. With `copy_tokens` all positions are 0, so that a match scores the
    same at any distance.
    """
    query_M = torch.arange(config.chunk_size, device=like.device) + config.chunk_size - 1
    key_J = torch.arange(length, device=like.device).repeat(num_neighbors)
    if config.cross_attn_sink:
        key_J = F.pad(key_J, (1, 0))
    if config.copy_tokens:
        query_M, key_J = torch.zeros_like(query_M), torch.zeros_like(key_J)
    return rotary_table(query_M, config.dim_head, like.dtype), rotary_table(key_J, config.dim_head, like.dtype)


def cross_mask(config: RETROConfig, mask_AKR: Tensor) -> Tensor:
    """The key mask of chunked cross-attention: (A, J), with a sink (A, 1 + J). The sink is never masked."""
    return F.pad(mask_AKR.flatten(1), (1 if config.cross_attn_sink else 0, 0), value=True)


def encode_retrieved(
    config: RETROConfig,
    encoder: Encoder,
    embed: Callable[[Tensor], Tensor],
    output_rows: Callable[[Tensor], Tensor | None],
    retrieved_CKR: Tensor,
    hidden_TD: Tensor,
    index_C: Tensor,
) -> Retrieval:
    """Encode the neighbors of all chunks of the stream that have some; at least one chunk must.

    `embed` maps ids to embeddings, and `output_rows` is `RETRO.output_rows`. `hidden_TD` holds the decoder's hidden
    states, and `index_C` the index of each chunk within its document.
    """
    mask_CKR = retrieved_CKR != config.pad_id
    active_C = mask_CKR.any(-1).any(-1)
    active_A = None if bool(active_C.all()) else active_C.nonzero().squeeze(1)
    hidden_CMD = rearrange(hidden_TD, "(c m) d -> c m d", m=config.chunk_size)
    if active_A is not None:
        retrieved_CKR, mask_CKR, hidden_CMD = retrieved_CKR[active_A], mask_CKR[active_A], hidden_CMD[active_A]
    _, num_neighbors, length = retrieved_CKR.shape
    embedded_AKRD = embed(retrieved_CKR)
    return Retrieval(
        encoder(embedded_AKRD, mask_CKR, hidden_CMD),
        output_rows(retrieved_CKR),
        mask_CKR,
        cross_mask(config, mask_CKR),
        active_A,
        attends_retrieval(index_C, active_C, config.chunk_size),
        *cross_positions(config, num_neighbors, length, embedded_AKRD),
    )


def chunked_cross_attention(cross: Residual, x_TD: Tensor, retrieval: Retrieval, chunk_size: int) -> Tensor:
    """CCA with its residual (section 2.4, equation 4): (T, D). Tokens without neighbors pass through unchanged."""
    lead = cross.inner.lead
    attending_CMD = attending_chunks(x_TD, chunk_size, lead)
    active_A = retrieval.active_A
    attending_AMD = attending_CMD if active_A is None else attending_CMD[active_A]
    attend = partial(
        attend_context,
        context_BJHF=cross.inner.neighbor_context(retrieval.encoded_AJE, retrieval.mask_AKR, retrieval.rows_AJD),
        key_table_JF=retrieval.key_table_JF,
        mask_BJ=retrieval.mask_AJ,
    )
    changed = cross(attending_AMD, retrieval.query_table_MF, attend)[:, lead:]
    if active_A is not None:
        changed = attending_CMD[:, lead:].to(changed.dtype).index_copy(0, active_A, changed)
    return torch.where(retrieval.attends_T[:, None], unshift(changed, x_TD[: chunk_size - 1]), x_TD)


# ---- the model -------------------------------------------------------------------------------------


class RETRO(LanguageModel):
    """The decoder with retrieval. The keyword arguments are the fields of RETROConfig."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.config = config = RETROConfig(**arguments)
        side = Side.decoder(config)
        self.embedding = nn.Embedding(config.num_tokens, config.dec_dim)
        self.norm_in = side.norm()
        self.decoder = block_list(side)
        self.norm = side.norm()
        self.unembedding = None
        if not config.tie_embeddings:
            self.unembedding = nn.Linear(config.dec_dim, config.num_tokens, bias=False)
        self.encoder = Encoder(config) if config.retrieval else None
        initialize(self)

    @classmethod
    def from_config(cls, config: RETROConfig) -> "RETRO":
        """A newly initialized model with the given config."""
        return cls(**vars(config))

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "RETRO":
        """Load a model that `save_pretrained` wrote, in eval mode and in `dtype` (None: the dtype it was saved in).

        Raises MissingArtifactError, DamagedArtifactError or MismatchError unless the folder holds exactly the
        tensors of the network, each with the right shape.
        """
        from retro_model.network.pretrained import load_config, load_weights, without_weights

        config = load_config(folder)
        with without_weights():
            model = cls.from_config(config)
        model.load_state_dict(load_weights(folder, model.state_dict()), assign=True)  # keeps the saved dtype
        for parameter in model.parameters():
            parameter.requires_grad_()
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write model.safetensors and config.json; equal weights give equal bytes."""
        from retro_model.network.pretrained import save_model

        save_model(folder, self.config, self.state_dict())

    def save_weights(self, folder: str | PathLike[str], weights: Mapping[str, Tensor]) -> None:
        """As `save_pretrained`, with these weights."""
        from retro_model.network.pretrained import save_model

        save_model(folder, self.config, weights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def frozen(self) -> bool:
        """Whether the plain decoder is frozen."""
        return not self.embedding.weight.requires_grad

    @property
    def cross_attentions(self) -> list[NeighborAttention]:
        """The attention to neighbors of each layer that has it, from the first to the last."""
        return [block.cross_attention.inner for block in self.decoder if block.cross_attention]

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each sublayer, and recompute the rest in the backward pass."""
        for module in self.modules():
            if isinstance(module, Residual):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]

    def step_flops(self, rows: int, length: int, neighbors: int) -> float:
        """FLOPs of the matrix products of a training step: see flops.py."""
        return step_flops(self.config, rows, length, neighbors)

    @property
    def output_weight_VD(self) -> Tensor:
        """The output matrix, which maps hidden states to logits; the embedding matrix if they are tied."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def output_rows(self, retrieved_AKR: Tensor) -> Tensor | None:
        """The RMS-normalized output matrix rows of the neighbors' tokens: (A, J, D); None without `copy_rows`."""
        if not self.config.copy_rows:
            return None
        return F.rms_norm(F.embedding(retrieved_AKR.flatten(1), self.output_weight_VD), (self.config.dec_dim,))

    def forward(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        return_loss: bool = False,
        *,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, V), or with `return_loss` the mean cross-entropy over labels that are not pad.

        `seq` is (B, N); with `return_loss` and no labels it is (B, N + 1) and also supplies the labels.
        `retrieved` is (B, N // M, K, R), or (B, N // M, R) for one neighbor. Padding in it is masked; a neighbor
        that is all padding counts as missing. None: no retrieval.
        `documents` (B, chunks) holds the document id of each chunk; attention never crosses documents.
        """
        seq, labels = sequence_and_labels(seq, labels, return_loss)
        hidden_TD, stream = self.hidden_states(seq, retrieved, documents)
        if labels is None:
            logits = F.linear(hidden_TD, self.output_weight_VD)
            return self._to_rows(logits, stream, seq)
        labels_T, labeled = self._labels(labels, stream, seq)
        if len(labeled) < len(labels_T):
            hidden_TD, labels_T = hidden_TD[labeled], labels_T[labeled]
        return linear_cross_entropy(hidden_TD, self.output_weight_VD, labels_T) / max(len(labeled), 1)

    def token_losses(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of each token in nats: (B, N) float32, 0 where the label is pad."""
        if labels is None:
            raise ConfigError("token_losses needs labels of the shape of seq")
        hidden_TD, stream = self.hidden_states(seq, retrieved, documents)
        labels_T, labeled = self._labels(labels, stream, seq)
        losses_T = hidden_TD.new_zeros(len(labels_T), dtype=torch.float32)
        for indices in torch.split(labeled, ROWS_OF_LOGITS):
            logits = F.linear(hidden_TD[indices], self.output_weight_VD).float()
            losses_T = losses_T.index_copy(0, indices, F.cross_entropy(logits, labels_T[indices], reduction="none"))
        return self._to_rows(losses_T, stream, seq)

    def hidden_states(
        self, seq: Tensor, retrieved: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, Stream]:
        """The final hidden states after the last norm (T, D), in stream order, and the stream."""
        check_batch(self.config, seq, retrieved, documents)
        stream = stream_of(seq, documents, self.config.chunk_size)
        tokens_T = self._to_stream(seq, stream, "seq", seq)
        retrieved_CKR = None if retrieved is None else self._retrieved_to_stream(retrieved, stream, seq)
        return self._decode(tokens_T, retrieved_CKR, stream), stream

    def run_layers(self, seq: Tensor, retrieved: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Run all layers for hooks on them, without logits."""
        self.hidden_states(seq, retrieved, documents)

    def _decode(self, tokens_T: Tensor, retrieved_CKR: Tensor | None, stream: Stream) -> Tensor:
        """Algorithm 1: run the decoder; the first layer with cross-attention calls the encoder."""
        chunk_size = self.config.chunk_size
        groups = [(count, chunks * chunk_size) for count, chunks in stream.groups]
        position_N = torch.arange(max(length for _, length in groups), device=tokens_T.device)
        table_NF = rotary_table(position_N, self.config.dim_head, self.embedding.weight.dtype)
        attend = partial(attend_documents, groups=groups)

        x_TD = self.norm_in(self.embedding(tokens_T))
        retrieval: Retrieval | None = None
        for block in self.decoder:
            x_TD = block.attention(x_TD, table_NF, attend)
            if block.cross_attention is not None and retrieved_CKR is not None:
                if retrieval is None:
                    assert self.encoder is not None
                    retrieval = encode_retrieved(
                        self.config, self.encoder, self.embedding, self.output_rows, retrieved_CKR, x_TD, stream.index_C
                    )
                x_TD = chunked_cross_attention(block.cross_attention, x_TD, retrieval, chunk_size)
            x_TD = block.feed_forward(x_TD)
        normed: Tensor = self.norm(x_TD)
        return normed

    # -- converting between rows and the stream

    def _to_stream(self, tokens_BN: Tensor, stream: Stream, name: str, seq: Tensor) -> Tensor:
        """Pad rows of tokens to whole chunks and flatten them in stream order: (T,)."""
        if tokens_BN.shape != seq.shape:
            raise ConfigError(f"{name} must have the shape of seq, {tuple(seq.shape)}: {tuple(tokens_BN.shape)}")
        chunk_size = self.config.chunk_size
        tail = -tokens_BN.shape[1] % chunk_size
        tokens_CM = F.pad(tokens_BN.long(), (0, tail), value=self.config.pad_id).reshape(-1, chunk_size)
        return (tokens_CM if stream.order_C is None else tokens_CM[stream.order_C]).flatten()

    def _labels(self, labels: Tensor, stream: Stream, seq: Tensor) -> tuple[Tensor, Tensor]:
        """The labels in stream order (T,), and the indices of those that are not pad."""
        check_ids("labels", labels, self.config.num_tokens)
        labels_T = self._to_stream(labels, stream, "labels", seq)
        return labels_T, (labels_T != self.config.pad_id).nonzero().squeeze(1)

    def _retrieved_to_stream(self, retrieved: Tensor, stream: Stream, seq: Tensor) -> Tensor | None:
        """The neighbors of each chunk of the stream: (C, K, R), or None if no chunk has any.

        The incomplete chunk at the end of a row gets padding.
        """
        if not bool((retrieved != self.config.pad_id).any()):
            return None
        retrieved_BLKR = retrieved.long() if retrieved.dim() == 4 else retrieved.long()[:, :, None]
        tail = 1 if seq.shape[1] % self.config.chunk_size else 0
        retrieved_BLKR = F.pad(retrieved_BLKR, (0, 0, 0, 0, 0, tail), value=self.config.pad_id)
        retrieved_CKR = retrieved_BLKR.flatten(0, 1)  # (B, L, K, R) -> (C, K, R)
        return retrieved_CKR if stream.order_C is None else retrieved_CKR[stream.order_C]

    def _to_rows(self, x_T: Tensor, stream: Stream, seq: Tensor) -> Tensor:
        """Turn per-token values in stream order (T, ...) back into rows, without the padding: (B, N, ...)."""
        x_CM = rearrange(x_T, "(c m) ... -> c m ...", m=self.config.chunk_size)
        if stream.order_C is not None:
            x_CM = torch.empty_like(x_CM).index_copy(0, stream.order_C, x_CM)
        return rearrange(x_CM, "(b l) m ... -> b (l m) ...", b=len(seq))[:, : seq.shape[1]]


def sequence_and_labels(seq: Tensor, labels: Tensor | None, return_loss: bool) -> tuple[Tensor, Tensor | None]:
    """What a model reads, and the labels of its loss; None if it gives logits. The arguments are those of a call."""
    if return_loss and labels is None:
        if seq.dim() != 2:
            raise ConfigError(f"seq must be integers (batch, tokens), at least 1 x 2: {tuple(seq.shape)}")
        return seq[:, :-1], seq[:, 1:]
    if labels is not None and not return_loss:
        raise ConfigError("labels need return_loss=True; for the loss of each token there is token_losses")
    return seq, labels


def check_batch(config: RETROConfig, seq: Tensor, retrieved: Tensor | None, documents: Tensor | None) -> None:
    """Raise ConfigError unless the arguments match the config and each other."""
    if seq.dim() != 2 or seq.is_floating_point() or not seq.numel():
        raise ConfigError(f"seq must be integers (batch, tokens), at least 1 x 1: {seq.dtype} {tuple(seq.shape)}")
    rows, length = seq.shape
    if length > config.max_seq_len:
        raise ConfigError(f"seq has {length} tokens; max_seq_len is {config.max_seq_len}")
    check_ids("seq", seq, config.num_tokens)
    chunks = length // config.chunk_size
    if documents is not None and (
        documents.dim() != 2
        or len(documents) != rows
        or documents.shape[1] not in (chunks, -(-length // config.chunk_size))
    ):
        raise ConfigError(f"documents must be ({rows}, {chunks}), one number a chunk: {tuple(documents.shape)}")
    if retrieved is None:
        return
    if not config.retrieval:
        raise ConfigError("retrieved was given to a model with retrieval=False")
    if retrieved.dim() not in (3, 4) or retrieved.is_floating_point():
        raise ConfigError(
            f"retrieved must be integers (batch, chunks, neighbors, tokens): {retrieved.dtype} {tuple(retrieved.shape)}"
        )
    if tuple(retrieved.shape[:2]) != (rows, chunks):
        raise ConfigError(
            f"retrieved must hold {rows} rows of {chunks} chunks ({length} tokens in chunks of "
            f"{config.chunk_size}): {len(retrieved)} rows of {retrieved.shape[1]} chunks"
        )
    if retrieved.numel() and retrieved.shape[-1] < config.chunk_size:
        raise ConfigError(
            f"retrieved has neighbors of {retrieved.shape[-1]} tokens; at least chunk_size = {config.chunk_size}"
        )
    check_ids("retrieved", retrieved, config.num_tokens)


def check_ids(name: str, ids: Tensor, num_tokens: int) -> None:
    """Raise ConfigError for an id outside the vocabulary. Skipped on a GPU, where it would force a synchronization."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    lowest, highest = (int(end) for end in ids.aminmax())
    if lowest < 0 or highest >= num_tokens:
        raise ConfigError(f"{name} has token ids {lowest} to {highest}; num_tokens is {num_tokens}")


# ---- initialization --------------------------------------------------------------------------------

# With copy_tokens, at initialization:
COPY_OUTPUT_SCALE = 0.5  # scale of the copied token that cross-attention adds to the residual stream
COPY_SCORE_SCALE = 3.0  # attention scores of copying, relative to those of other attention


@torch.no_grad()
def initialize(model: RETRO) -> None:
    """Initialize all weights; the new model predicts a nearly uniform distribution, so its loss is about ln(V)."""
    config = model.config
    nn.init.normal_(model.embedding.weight, std=0.02)
    if model.unembedding is None:
        # Tied embeddings are also the output weights. The input is normalized, so their scale is free; a small
        # one keeps a new model from predicting its own input, and no gain has to grow before it learns.
        nn.init.normal_(model.embedding.weight, std=1 / config.dec_dim)
    else:
        nn.init.normal_(model.unembedding.weight, std=0.02 * config.dec_dim**-0.5)
    for block in model.decoder:
        initialize_block(cast("nn.Module", block), Side.decoder(config))
    if model.encoder is not None:
        initialize_encoder(config, model.encoder)
        if config.copy_tokens:
            start_copying(model.encoder, model.cross_attentions)


def initialize_encoder(config: RETROConfig, encoder: Encoder) -> None:
    """Initialize the matrices of the encoder."""
    for block in encoder.blocks:
        initialize_block(cast("nn.Module", block), Side.encoder(config))
    if isinstance(encoder.widen, nn.Linear):
        nn.init.normal_(encoder.widen.weight, std=config.dec_dim**-0.5)


def start_copying(encoder: Encoder, attentions: Iterable[NeighborAttention]) -> None:
    """Initialize cross-attention to copy: queries match keys of equal tokens and retrieve the token that follows.

    With random weights several parts would have to fit together before any of them helps, and no short training
    gets there. A new encoder passes embeddings through almost unchanged. So it is enough to give keys the
    projection of queries, and to make the output projection the inverse of the value projection (of the
    embeddings, or with `copy_rows` of the output rows). Each head copies a different part of a token.

    Scores start large. If matches barely stood out, cross-attention would add noise, and the model would first
    learn to attend to nothing, and then stop learning from neighbors.
    """
    widen_ED = None
    if isinstance(encoder.widen, nn.Linear):
        nn.init.orthogonal_(encoder.widen.weight)
        widen_ED = encoder.widen.weight
    for attention in attentions:
        key, value = attention.key_value.weight.chunk(2)
        attention.query.weight.mul_(COPY_SCORE_SCALE**0.5)
        key.copy_(attention.query.weight if widen_ED is None else attention.query.weight @ widen_ED.T)
        if attention.copy_rows is None:
            nn.init.orthogonal_(value)
            copied = value if widen_ED is None else value @ widen_ED
        else:
            nn.init.zeros_(value)
            nn.init.orthogonal_(copied := attention.copy_rows.weight)
        attention.out.weight.copy_(COPY_OUTPUT_SCALE * copied.T)


def initialize_block(block: nn.Module, side: Side) -> None:
    """Initialize with std 1 / sqrt(fan-in), which preserves scale; smaller for outputs to the residual stream.

    With DeepNet: Xavier normal, with gain beta for values, outputs and feed-forward (Wang et al. 2022).
    """
    shrink = (2 * side.depth) ** -0.5
    for name, weight in block.named_parameters():
        if weight.dim() != 2:
            continue
        parts = weight.chunk({"qkv": 3, "key_value": 2}.get(name.split(".")[-2], 1))
        for number, part in enumerate(parts):
            if side.config.use_deepnet:
                query_or_key = "query" in name or ("qkv" in name and number < 2) or ("key_value" in name and number < 1)
                nn.init.xavier_normal_(part, gain=1.0 if query_or_key else side.beta)
            else:
                is_output = name.endswith("out.weight")
                nn.init.normal_(part, std=part.shape[1] ** -0.5 * (shrink if is_output else 1.0))
