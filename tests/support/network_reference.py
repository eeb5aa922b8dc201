"""RETRO once more, slowly: one token at a time, one head at a time, in float64, without a batch.

Nothing here is shared with the network but its weights. Attention is written with relative positions
only: a score is the real part of a product of complex numbers, turned by the distance.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_model.network.model import RETRO, Residual

Key = tuple[Tensor, Tensor, int]  # key and value of all heads (H, F), and position
Encoded = dict[int, tuple[Tensor, Tensor]]  # the real tokens of one neighbor by position: encoded, and output row


def score(query_F: Tensor, key_F: Tensor, distance: int) -> Tensor:
    """The attention score of two vectors that are `distance` (query minus key) apart."""
    half = len(query_F) // 2
    query = torch.complex(query_F[:half], query_F[half:])
    key = torch.complex(key_F[:half], key_F[half:])
    angle = distance * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = query * key.conj() * torch.complex(angle.cos(), angle.sin())
    return turned.real.sum() / math.sqrt(len(query_F))


def weights_of(query_HF: Tensor, position: int, keys: Sequence[Key]) -> Tensor:
    """How much of each key one token takes: (H, keys)."""
    heads = []
    for head, query_F in enumerate(query_HF):
        scores = torch.stack([score(query_F, key[head], position - place) for key, _, place in keys])
        weights = (scores - scores.max()).exp()
        heads.append(weights / weights.sum())
    return torch.stack(heads)


def weigh(weights: Tensor, keys: Sequence[Key]) -> Tensor:
    """The weighted values of all keys: (H * F,)."""
    heads = []
    for head, of_head in enumerate(weights):
        heads.append(sum(weight * value[head] for weight, (_, value, _) in zip(of_head, keys, strict=True)))
    return torch.cat(heads)


def attend_one(query_HF: Tensor, position: int, keys: Sequence[Key]) -> Tensor:
    """What one token gets from all keys: (H * F,)."""
    return weigh(weights_of(query_HF, position, keys), keys)


def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    """One vector through any of the norms."""
    if isinstance(module, torch.nn.Identity):
        return x
    if isinstance(module, torch.nn.LayerNorm):
        centered = x - x.mean()
        return centered / (centered.square().mean() + module.eps).sqrt() * module.weight + module.bias
    normed = x / (x.square().mean() + 1e-6).sqrt() * module.gain
    return normed * (1 / (1 + (-module.gate * x).exp())) if hasattr(module, "gate") else normed


def residual(layer: Residual, x: Tensor, f: object) -> Tensor:
    """The sublayer f around x, as pre-norm or as DeepNet's post-norm."""
    if layer.post_norm:
        return norm(layer.norm, layer.alpha * x + f(x))
    return layer.alpha * x + f(norm(layer.norm, x))


def split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(heads, -1)


def self_attention(layer: Residual, xs: list[Tensor], heads: int, sees: object) -> list[Tensor]:
    """Self-attention over a list of tokens; `sees(i, j)` says whether token i may look at token j."""
    inner = layer.inner
    inputs = xs if layer.post_norm else [norm(layer.norm, x) for x in xs]
    projected = [(inner.qkv.weight @ x).chunk(3) for x in inputs]
    out = []
    for i, x in enumerate(xs):
        keys = [(split(k, heads), split(v, heads), j) for j, (_, k, v) in enumerate(projected) if sees(i, j)]
        got = inner.out.weight @ attend_one(split(projected[i][0], heads), i, keys)
        out.append(residual(layer, x, lambda _, got=got: got))
    return out


def cross_attention(layer: Residual, x: Tensor, position: int, context: list[tuple[Tensor, int]], heads: int) -> Tensor:
    """One token's look at a context of (vector, position)."""
    inner = layer.inner

    def f(y: Tensor) -> Tensor:
        keys = []
        for vector, place in context:
            k, v = (inner.key_value.weight @ vector).chunk(2)
            keys.append((split(k, heads), split(v, heads), place))
        return inner.out.weight @ attend_one(split(inner.query.weight @ y, heads), position, keys)

    return residual(layer, x, f)


def neighbor_attention(
    layer: Residual, last: list[Tensor], position: int, neighbors: list[Encoded], heads: int, seen: list[Tensor]
) -> Tensor:
    """The look of the last of some tokens at the encoded neighbors of its chunk; `seen` gets its weights (H, keys)."""
    inner = layer.inner
    features = inner.query.weight.shape[0] // heads
    tokens = max(1, inner.copy_tokens)
    # which of the compared tokens a feature is of: blocks, the first ones one larger where they are not equal
    sizes = [features // tokens + (place < features % tokens) for place in range(tokens)]
    of_feature = [place for place in range(tokens) for _ in range(sizes[place])]

    def copying(vectors: list[Tensor | None], weight: Tensor) -> Tensor:
        """The vectors of all heads (H, F), made of those of several tokens, the latest first."""
        out = torch.zeros(heads, features, dtype=weight.dtype)
        for feature, place in enumerate(of_feature):
            if (found := vectors[place]) is not None:
                out[:, feature] = split(weight @ found, heads)[:, feature]
        return out

    def f(y: Tensor) -> Tensor:
        queries = [y if z is last[-1] else z if layer.post_norm else norm(layer.norm, z) for z in reversed(last)]
        keys = []
        if inner.sink is not None:
            keys.append((inner.sink * math.sqrt(features), torch.zeros_like(inner.sink), 0))
        for neighbor in neighbors:
            for place, (vector, row) in neighbor.items():
                weight_k, weight_v = inner.key_value.weight.chunk(2)
                before = [neighbor.get(place - 1 - back, (None, None))[0] for back in range(tokens)]
                key = copying(before if inner.copy_tokens else [vector], weight_k)
                value = weight_v @ vector
                if inner.copy_rows is not None:
                    value = value + inner.copy_rows.weight @ (row / row.square().mean().sqrt())
                keys.append((key, split(value, heads), 0 if inner.copy_tokens else place))
        query = copying(queries, inner.query.weight)
        weights = weights_of(query, 0 if inner.copy_tokens else position, keys)
        seen.append(weights)
        return inner.out.weight @ weigh(weights, keys)

    return residual(layer, last[-1], f)


def feed_forward(layer: Residual, x: Tensor) -> Tensor:
    inner = layer.inner
    return residual(layer, x, lambda y: inner.out.weight @ F.gelu(inner.up.weight @ y))


def encode(model: RETRO, neighbor: list[int], hidden: list[Tensor]) -> Encoded:
    """One neighbor, read with its chunk's hidden states."""
    encoder, heads, pad = model.encoder, model.config.heads, model.config.pad_id
    xs = [model.embedding.weight[token] for token in neighbor]
    if hasattr(encoder.widen, "weight"):
        xs = [encoder.widen.weight @ x for x in xs]
    xs = [norm(encoder.norm_in, x) for x in xs]
    context = [(norm(encoder.norm_hidden, h), j) for j, h in enumerate(hidden)]
    for block in encoder.blocks:
        xs = self_attention(block.attention, xs, heads, lambda i, j: neighbor[j] != pad)
        if block.cross_attention is not None:
            xs = [cross_attention(block.cross_attention, x, i, context, heads) for i, x in enumerate(xs)]
        xs = [feed_forward(block.feed_forward, x) for x in xs]
    rows = model.output_weight_VD[neighbor]
    return {i: (norm(encoder.norm, x), rows[i]) for i, x in enumerate(xs) if neighbor[i] != pad}


def logits(
    model: RETRO,
    document: list[int],
    neighbors: list[list[list[int]]] | None = None,
    seen: dict[int, list[Tensor]] | None = None,
) -> Tensor:
    """The logits (N, V) of one document, whose chunk u got the token lists `neighbors[u]`.

    `seen` is filled with what each position that reads neighbors gave to their real tokens, behind a sink if
    there is one: (H, keys) for each layer.
    """
    config = model.config
    m = config.chunk_size
    xs = [norm(model.norm_in, model.embedding.weight[token]) for token in document]
    encoded: dict[int, list[Encoded]] | None = None
    for block in model.decoder:
        xs = self_attention(block.attention, xs, config.heads, lambda i, j: j <= i)
        if block.cross_attention is not None and neighbors is not None:
            if encoded is None:
                encoded = {
                    u: [
                        encode(model, neighbor, xs[u * m : (u + 1) * m])
                        for neighbor in of_chunk
                        if any(token != config.pad_id for token in neighbor)
                    ]
                    for u, of_chunk in enumerate(neighbors)
                }
            before = list(xs)
            for position in range(len(xs)):
                u = (position + 1) // m - 1  # the last chunk that is complete here
                if encoded.get(u):
                    query = position - ((u + 1) * m - 1)  # i of the attending chunk, from 0
                    here = [] if seen is None else seen.setdefault(position, [])
                    xs[position] = neighbor_attention(
                        block.cross_attention, before[: position + 1], query + m - 1, encoded[u], config.heads, here
                    )
        xs = [feed_forward(block.feed_forward, x) for x in xs]
    return torch.stack([model.output_weight_VD @ norm(model.norm, x) for x in xs])


def attention_to_neighbors(
    model: RETRO, document: list[int], neighbors: list[list[list[int]]]
) -> tuple[Tensor, Tensor]:
    """What each position gives to each neighbor token (N, K, R) and to a sink (N,), as means over heads and layers."""
    m, pad = model.config.chunk_size, model.config.pad_id
    seen: dict[int, list[Tensor]] = {}
    logits(model, document, neighbors, seen)
    found = torch.zeros(len(document), len(neighbors[0]), len(neighbors[0][0]), dtype=torch.float64)
    nothing = torch.zeros(len(document), dtype=torch.float64)
    for position, layers in seen.items():
        weights = sum(of_layer.mean(0) for of_layer in layers) / len(layers)
        of_chunk = neighbors[(position + 1) // m - 1]
        places = [(k, r) for k, neighbor in enumerate(of_chunk) for r, token in enumerate(neighbor) if token != pad]
        if model.config.cross_attn_sink:
            nothing[position], weights = weights[0], weights[1:]
        for (k, r), weight in zip(places, weights, strict=True):
            found[position, k, r] = weight
    return found, nothing
