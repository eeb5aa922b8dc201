"""The settings of the adapters: the new weights that give a base model retrieval."""

import dataclasses
from dataclasses import dataclass

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError
from retro_model.network.config import RETROConfig

WEIGHTS_NAME = "adapters.safetensors"

EVERY = 3  # by default every third layer gets cross-attention ...
FIRST = 6  # ... from the sixth on, as in the paper
WIDTH_STEP = 64  # the default width of the encoder is a multiple of this


@dataclass(frozen=True)
class BaseSizes:
    """The sizes of a base model that the adapters depend on."""

    vocab_size: int  # rows of the embedding matrix
    width: int
    depth: int
    max_seq_len: int
    pad_id: int | None


@dataclass(frozen=True)
class AdapterSizes(Config):
    """The sizes of the adapters. Layer numbers start at 1. None: derived from the base by `AdapterConfig.resolved`."""

    cross_attn_layers: tuple[int, ...] | None = setting(None, minimum=1)  # None: every third from the sixth
    enc_dim: int | None = setting(None, minimum=1)  # None: a third of the base's width
    enc_depth: int = setting(2, minimum=1)
    heads: int | None = setting(None, minimum=1)  # None: so many that all heads have half the base's width
    dim_head: int = setting(64, minimum=2)
    copy_tokens: int = setting(3, minimum=0)  # as in ModelConfig


@dataclass(frozen=True)
class AdapterConfig(AdapterSizes):
    """All settings of the adapters; None: derived from the base by `resolved`."""

    chunk_size: int = setting(64, minimum=1)
    retrieval: bool = setting(True)  # False: the base alone
    enc_cross_attn_layers: tuple[int, ...] | None = setting((), minimum=1)  # None: every layer, as in the paper
    dropout: float = setting(0.0, minimum=0.0, below=1.0)  # in encoder and cross-attention
    cross_attn_sink: bool = setting(True)  # as in ModelConfig
    pad_id: int | None = setting(None, minimum=0)  # None: the base's; if it has none, the first id that no token has
    layers: str | None = setting(None)  # where the base keeps its decoder layers; None: found by name

    def resolved(self, base: BaseSizes) -> "AdapterConfig":
        """The same settings with those that are None derived from the base.

        Raises ConfigError for a layer number beyond the base's depth, or a pad_id beyond its vocabulary.
        """
        cross_attn_layers = self.cross_attn_layers
        if cross_attn_layers is None:
            cross_attn_layers = tuple(range(FIRST, base.depth + 1, EVERY)) or (base.depth,)
        if not self.retrieval:
            cross_attn_layers = ()
        elif not cross_attn_layers or max(cross_attn_layers) > base.depth:
            allowed = f"one or more layers from 1 to {base.depth}, the depth of the base"
            raise ConfigError(f"cross_attn_layers: found {list(cross_attn_layers)}, expected {allowed}")
        pad_id = self.pad_id
        if pad_id is None:
            pad_id = base.vocab_size if base.pad_id is None else base.pad_id
        if pad_id > base.vocab_size:
            allowed = f"at most {base.vocab_size}, the first id beyond the base's vocabulary"
            raise ConfigError(f"pad_id: found {pad_id}, expected {allowed}")
        return dataclasses.replace(
            self,
            enc_dim=self.enc_dim or WIDTH_STEP * max(1, round(base.width / 3 / WIDTH_STEP)),
            cross_attn_layers=cross_attn_layers,
            heads=self.heads or max(1, base.width // (2 * self.dim_head)),
            pad_id=pad_id,
        )

    def network(self, base: BaseSizes) -> RETROConfig:
        """The network's config, with the base in the place of the decoder. For resolved settings."""
        assert self.pad_id is not None and self.enc_dim and self.heads, "not resolved"
        assert self.cross_attn_layers is not None, "not resolved"
        return RETROConfig(
            num_tokens=max(base.vocab_size, self.pad_id + 1),
            max_seq_len=base.max_seq_len,
            chunk_size=self.chunk_size,
            pad_id=self.pad_id,
            enc_dim=self.enc_dim,
            enc_depth=self.enc_depth,
            enc_cross_attn_layers=self.enc_cross_attn_layers,
            dec_dim=base.width,
            dec_depth=base.depth,
            dec_cross_attn_layers=self.cross_attn_layers,
            heads=self.heads,
            dim_head=self.dim_head,
            enc_attn_dropout=self.dropout,
            enc_ff_dropout=self.dropout,
            dec_attn_dropout=self.dropout,
            copy_tokens=self.copy_tokens,
            cross_attn_sink=self.cross_attn_sink,
            retrieval=self.retrieval,
        )
