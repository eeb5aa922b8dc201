"""The settings of training: the sections `train` and `retrofit` of params.yaml.

Like every file of settings, it imports nothing that takes long to load: each stage checks all params first.
"""

from dataclasses import dataclass, replace
from typing import Any

from retro_model.core.artifacts import Artifact
from retro_model.core.config import Config, optional_path, setting
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.retrofit.config import AdapterSizes


@dataclass(frozen=True)
class TrainConfig(Config, section="train"):
    """The training settings: the section `train` of params.yaml. A step is one update of the weights."""

    steps: int = setting(800, minimum=1)
    batch_size: int = setting(4, minimum=1)  # sequences per step
    accumulation: int = setting(1, minimum=1)  # portions (micro-batches) per step
    lr: float = setting(4e-3, above=0.0)
    schedule: str = setting("cosine", choices=("cosine", "constant"))
    warmup: int = setting(30, minimum=0)  # steps
    final_lr: float = setting(0.1, minimum=0.0, maximum=1.0)  # at the end of the cosine, as a share of lr
    weight_decay: float = setting(0.1, minimum=0.0)
    clip: float = setting(1.0, minimum=0.0)  # maximum gradient norm; 0: no clipping
    neighbor_dropout: float = setting(0.1, minimum=0.0, maximum=1.0)  # share of sequences without neighbors
    random_neighbors: float = setting(0.0, minimum=0.0, maximum=1.0)  # share of chunks with random neighbors
    validate_every: int = setting(200, minimum=1)  # steps
    validate_sequences: int = setting(32, minimum=0)  # evenly spaced in the split; 0: all
    number_type: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False)
    checkpoint_activations: bool = setting(False)  # less memory, a third more time
    processes: int = setting(0, minimum=0)  # that split a step; 0: one per GPU, or one
    shard: bool = setting(False)  # FSDP: each process holds a part of the weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation:
            allowed = f"a divisor of train.batch_size = {self.batch_size}"
            raise ConfigError(f"train.accumulation: found {self.accumulation}, expected {allowed}")
        if self.warmup > self.steps:
            allowed = f"at most train.steps = {self.steps}"
            raise ConfigError(f"train.warmup: found {self.warmup}, expected {allowed}")

    def of_baseline(self) -> "TrainConfig":
        """The same settings for the plain decoder, without those of retrieval."""
        return replace(self, neighbor_dropout=0.0, random_neighbors=0.0)

    def identity(self) -> dict[str, Any]:
        """The settings that determine the result; a resumed run may change the others (processes, shard)."""
        return {name: value for name, value in vars(self).items() if name not in ("processes", "shard")}


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
