"""Start training from a trained model: RETROfit (section 4.2.3), or continued training.

    retrofit = RetrofitConfig(init_from="models/baseline", freeze="decoder")
    start_from(model, retrofit.model(), retrofit.freeze)

From a plain decoder, the new model takes the decoder's weights; its encoder and cross-attention keep their new
weights. From a model with retrieval it takes all weights. With a frozen decoder only encoder and cross-attention
are trained, and without neighbors the model equals the one it started from.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retro_model.core.artifacts import Artifact
from retro_model.core.config import optional_path, setting
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.network.config import RETROConfig
from retro_model.network.model import RETRO
from retro_model.network.pretrained import without_weights
from retro_model.retrofit.config import AdapterSizes
from retro_model.training.trainer import TrainConfig

# Network settings that do not affect the plain decoder.
_RETRIEVAL_SETTINGS = {"enc_dim", "enc_depth", "enc_cross_attn_layers", "dec_cross_attn_layers", "enc_scale_residual"}
_RETRIEVAL_SETTINGS |= {"copy_tokens", "cross_attn_sink"}


@dataclass(frozen=True)
class RetrofitConfig(AdapterSizes, section="retrofit"):
    """Which trained model RETRO starts from, and the training settings for that case.

    `init_from` is a model's folder. If it is "" or an empty folder, RETRO trains from new weights with the
    settings of `train`. Otherwise `steps` and `lr` replace those of `train`.

    `base` is the folder or hub name of a causal language model of transformers. If it is not "", adapters around that
    model are trained in place of RETRO; the sizes are theirs, and `freeze` "decoder" freezes the base.
    """

    base: str = setting("")
    init_from: str = setting("")
    freeze: str = setting("decoder", choices=("nothing", "decoder"))
    steps: int = setting(400, minimum=1)
    lr: float = setting(4e-3, above=0.0)

    def model(self) -> Artifact | None:
        """The model to start from; None for new weights.

        Raises ConfigError if the folder does not exist, MissingArtifactError if it holds no complete model, and
        MismatchError if it holds RETRO where `base` asks for adapters, or the other way round.
        """
        path = optional_path("retrofit.init_from", self.init_from)
        if path is None:
            return None
        start = Artifact.open(path, "model")
        if bool(start.facts.get("base")) != bool(self.base):
            has = "adapters" if start.facts.get("base") else "RETRO's weights"
            raise MismatchError(
                f"{start.folder}: found {has}, but retrofit.base is {self.base!r}; run `dvc repro` (stage baseline), "
                "or start from another model (retrofit.init_from)"
            )
        return start

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """`config` with the steps and learning rate for training from a trained model."""
        return replace(config, steps=self.steps, lr=self.lr, warmup=min(config.warmup, self.steps))


def start_from(model: RETRO, start: Artifact, freeze: str) -> None:
    """Copy the weights of `start` into `model`; with `freeze` "decoder", freeze the plain decoder's weights.

    Raises MismatchError, which names the setting, if the two networks have different shapes.
    """
    base = RETRO.from_pretrained(start.folder)
    if base.config.retrieval and not model.config.retrieval:
        raise MismatchError(f"{start.folder}: a model with retrieval, expected a plain decoder for a plain decoder")
    _check_shapes(model.config, base.config, start.folder)
    _copy_weights(model, base, freeze == "decoder")


def retrofit(base: RETRO, *, freeze: bool = True, **overrides: Any) -> RETRO:
    """A model with retrieval around a decoder that was trained without it (RETROfit, section 4.2.3).

    `overrides` are fields of RETROConfig that belong to retrieval (encoder and cross-attention) or are dropout
    rates. Encoder and cross-attention are new, the rest is a copy of `base`; without neighbors the logits are
    exactly those of `base`. With `freeze` only the new weights are trained.

    Raises ConfigError if `base` has retrieval, or for other overrides.
    """
    if base.config.retrieval:
        raise ConfigError("retrofit needs a model with retrieval=False: this one has retrieval already")
    allowed = _RETRIEVAL_SETTINGS | {"enc_attn_dropout", "enc_ff_dropout", "dec_attn_dropout", "dec_ff_dropout"}
    if others := sorted(set(overrides) - allowed):
        raise ConfigError(f"retrofit cannot change {others[0]}: it belongs to the decoder that is there")
    model = RETRO.from_config(replace(base.config, retrieval=True, **overrides))
    reference = base.embedding.weight
    model.to(device=reference.device, dtype=reference.dtype)
    _copy_weights(model, base, freeze)
    return model


def _copy_weights(model: RETRO, base: RETRO, freeze: bool) -> None:
    """Copy the weights of `base`; with `freeze`, make the plain decoder's weights untrainable."""
    model.load_state_dict({**model.state_dict(), **base.state_dict()})
    decoder = _decoder_names(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (freeze and name in decoder))


def _check_shapes(config: RETROConfig, base: RETROConfig, folder: Path) -> None:
    """Raise MismatchError unless all settings agree that determine weight shapes or what the decoder computes."""
    free = {"retrieval", "max_seq_len", *(name for name in vars(config) if name.endswith("dropout"))}
    for name, found in vars(base).items():
        expected = getattr(config, name)
        if name in free or (name in _RETRIEVAL_SETTINGS and not base.retrieval) or found == expected:
            continue
        raise MismatchError(
            f"{folder}: made with {name} {found}, expected {expected}; set {_key(name)} to {found}, or start from "
            "another model (retrofit.init_from)"
        )


def _key(name: str) -> str:
    elsewhere = {"num_tokens": "the tokenizer's vocabulary", "pad_id": "the tokenizer's padding"}
    return elsewhere.get(name, name if name == "chunk_size" else f"model.{name}")


def _decoder_names(config: RETROConfig) -> set[str]:
    """The weight names of the plain decoder."""
    with without_weights():
        return set(RETRO.from_config(replace(config, retrieval=False)).state_dict())
