"""The configuration of the network."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError

NORM_NAMES = ("rmsnorm", "gated_rmsnorm", "layernorm")
# Older config.json files lack these settings; their defaults reproduce the network of that time.
ADDED_LATER = {"copy_tokens", "cross_attn_sink"}


@dataclass(frozen=True)
class ModelConfig(Config, section="model"):
    """The settings that the user chooses: the section `model` of params.yaml. Layer numbers start at 1."""

    enc_dim: int = setting(896, minimum=1)
    enc_depth: int = setting(2, minimum=1)
    enc_cross_attn_layers: tuple[int, ...] | None = setting(None, minimum=1)  # None: every layer
    dec_dim: int = setting(768, minimum=1)
    dec_depth: int = setting(12, minimum=1)
    dec_cross_attn_layers: tuple[int, ...] = setting((1, 3, 6, 9), minimum=1)
    heads: int = setting(8, minimum=1)
    dim_head: int = setting(64, minimum=2)
    enc_attn_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    enc_ff_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    dec_attn_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    dec_ff_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    gated_rmsnorm: bool = setting(False)
    use_deepnet: bool = setting(False)
    tie_embeddings: bool = setting(False)
    # These two are not in the paper.
    copy_tokens: int = setting(0, minimum=0)  # cross-attention matches this many last tokens to find what follows
    cross_attn_sink: bool = setting(False)  # each head of cross-attention can attend to nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim_head % 2:
            raise ConfigError(f"{self.dotted('dim_head')}: found {self.dim_head}, expected an even number")
        if self.copy_tokens > self.dim_head:
            allowed = f"at most {self.dotted('dim_head')} = {self.dim_head}"
            raise ConfigError(f"{self.dotted('copy_tokens')}: found {self.copy_tokens}, expected {allowed}")
        depths = {"enc_cross_attn_layers": self.enc_depth, "dec_cross_attn_layers": self.dec_depth}
        for name, depth in depths.items():
            layers = getattr(self, name) or ()
            if max(layers, default=0) > depth or len(set(layers)) < len(layers):
                allowed = f"different layers from 1 to {self.dotted(name[:3] + '_depth')} = {depth}"
                raise ConfigError(f"{self.dotted(name)}: found {list(layers)}, expected {allowed}")


@dataclass(frozen=True)
class RETROConfig(ModelConfig):
    """The complete configuration of the network: the arguments of RETRO, and the contents of config.json."""

    num_tokens: int = setting(28996, minimum=1)
    max_seq_len: int = setting(2048, minimum=1)
    chunk_size: int = setting(64, minimum=1)
    pad_id: int = setting(0, minimum=0)
    enc_scale_residual: float | None = setting(None, above=0.0)  # None: DeepNet's alpha with use_deepnet, else 1
    dec_scale_residual: float | None = setting(None, above=0.0)
    # One of NORM_NAMES, or a module class whose constructor takes a width. None: "gated_rmsnorm" with
    # gated_rmsnorm, else "rmsnorm".
    norm_klass: Any = None
    retrieval: bool = setting(True)  # False: the plain decoder, without encoder and cross-attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copy_tokens > self.chunk_size:
            raise ConfigError(f"copy_tokens: found {self.copy_tokens}, expected at most chunk_size = {self.chunk_size}")
        if not self.pad_id < self.num_tokens:
            raise ConfigError(f"pad_id: found {self.pad_id}, expected less than num_tokens = {self.num_tokens}")
        norm = self.norm_klass
        if not (norm is None or norm in NORM_NAMES or _is_module_class(norm)):
            allowed = f"None, a module class or one of {', '.join(NORM_NAMES)}"
            raise ConfigError(f"norm_klass: found {norm!r}, expected {allowed}")
        if self.gated_rmsnorm and norm not in (None, "gated_rmsnorm"):
            raise ConfigError(f"gated_rmsnorm=True and norm_klass={norm!r} exclude each other")

    @property
    def copy_rows(self) -> bool:
        """Whether copying needs the output rows of neighbor tokens: untied, they differ from the embeddings."""
        return self.copy_tokens > 0 and not self.tie_embeddings

    def deepnet(self, side: str) -> tuple[float, float]:
        """DeepNet's alpha (skip connections) and beta (init) for side "enc" or "dec" (Wang et al. 2022, figure 2)."""
        if not self.use_deepnet:
            return 1.0, 1.0
        n, m = self.enc_depth, self.dec_depth
        if side == "enc":
            return 0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)
        return (3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json: every argument, no derived values.

        Raises ConfigError if `norm_klass` is a class.
        """
        if not isinstance(self.norm_klass, str | None):
            allowed = f"one of {', '.join(NORM_NAMES)}, because a class cannot be saved"
            raise ConfigError(f"norm_klass: found {self.norm_klass!r}, expected {allowed}")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RETROConfig":
        """The inverse of `to_dict`. Raises ConfigError for unknown keys and for missing ones not in ADDED_LATER."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"unknown model config keys {unknown}; known are {sorted(names)}")
        if missing := sorted(names - set(values) - ADDED_LATER):
            raise ConfigError(f"missing model config keys {missing}")
        return cls(**values)


def _is_module_class(value: object) -> bool:
    if not isinstance(value, type):
        return False
    from torch import nn  # takes seconds to import; those who check params do not need it

    return issubclass(value, nn.Module)
