"""How much a training step computes: the floating-point operations of its matrix products."""

from retro_model.network.config import RETROConfig


def step_flops(config: RETROConfig, rows: int, length: int, neighbors: int) -> float:
    """FLOPs of one step's matrix products, forward and backward (three times the forward pass).

    The step has `rows` sequences of `length` tokens, each one document, and `neighbors` neighbors per chunk, of two
    chunks' length each. Packed sequences need less, because there is no attention across documents.
    """
    inner, tokens, d = config.heads * config.dim_head, rows * length, config.dec_dim
    decoder = tokens * config.dec_depth * (_layer(d, inner) + 2 * inner * length)  # causal: half of all scores
    head = 2 * tokens * d * config.num_tokens
    return 3.0 * (decoder + head + retrieval_flops(config, tokens, neighbors))


def retrieval_flops(config: RETROConfig, tokens: int, neighbors: int) -> float:
    """FLOPs of encoder and chunked cross-attention in a forward pass over that many tokens."""
    if not neighbors:
        return 0.0
    inner, m, d, e = config.heads * config.dim_head, config.chunk_size, config.dec_dim, config.enc_dim
    enc_tokens = tokens // m * neighbors * 2 * m
    enc_cross_layers = config.enc_depth if config.enc_cross_attn_layers is None else len(config.enc_cross_attn_layers)
    encoder = (
        config.enc_depth * enc_tokens * (_layer(e, inner) + 4 * inner * 2 * m)  # self-attention
        + enc_cross_layers
        * (enc_tokens * (4 * e * inner + 4 * inner * m) + tokens * 4 * d * inner)  # cross-attention to the chunk
        + (enc_tokens * 2 * d * e if d != e else 0)
    )
    cross = len(config.dec_cross_attn_layers or ()) * (
        tokens * (4 * d * inner + 4 * inner * neighbors * 2 * m) + enc_tokens * 4 * e * inner
    )
    return encoder + cross


def _layer(width: int, inner: int) -> float:
    return 2 * (4 * width * inner + 8 * width * width)  # per token: qkv and out, feed-forward
