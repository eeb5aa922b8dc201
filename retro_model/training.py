"""Training, with retrieval or without: the settings, the loop, and the folder of the model that came out.

    result = train_model(
        Path("data/chunks"), Path("data/neighbors"), Path("data/tokenizer"), model_config, train_config,
        knn=2, seq_len=512, seed=0, out_folder=Path("models/retro"), work_folder=work,
    )

What a step does is a function of the seed and of the step's number: its sequences, whose neighbors are
dropped, the dropout. So a run that was stopped continues from its last checkpoint in `work_folder` as if
nothing had been, bit for bit on a CPU in float32. `out_folder` gets the best weights by validation
loss; equal settings and inputs give equal bytes on one machine.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retro_model.artifacts import Artifact, ArtifactWriter, whole_folder
from retro_model.config import Config, setting
from retro_model.dataset import PackedSequences
from retro_model.devices import resolve_number_type
from retro_model.errors import ConfigError
from retro_model.model import RETRO
from retro_model.resume import Checkpoints
from retro_model.trainer import Log, TrainConfig, Trainer, TrainingResult

__all__ = ["ModelConfig", "TrainConfig", "TrainingResult", "build_model", "train_model"]


@dataclass(frozen=True)
class ModelConfig(Config, section="model"):
    """The network's shape, as far as the data do not say it; RETRO's arguments by name."""

    enc_dim: int = setting(128, minimum=1)
    enc_depth: int = setting(1, minimum=1)
    enc_cross_attn_layers: tuple[int, ...] | None = setting(None, minimum=1)  # None: every layer
    dec_dim: int = setting(256, minimum=1)
    dec_depth: int = setting(3, minimum=1)
    dec_cross_attn_layers: tuple[int, ...] = setting((2, 3), minimum=1)
    heads: int = setting(4, minimum=1)
    dim_head: int = setting(32, minimum=2)
    enc_attn_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    enc_ff_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    dec_attn_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    dec_ff_dropout: float = setting(0.0, minimum=0.0, below=1.0)
    gated_rmsnorm: bool = setting(False)
    use_deepnet: bool = setting(False)
    tie_embeddings: bool = setting(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim_head % 2:
            raise ConfigError(f"model.dim_head: found {self.dim_head}, expected an even number")
        depths = {"enc_cross_attn_layers": self.enc_depth, "dec_cross_attn_layers": self.dec_depth}
        for name, depth in depths.items():
            layers = getattr(self, name) or ()
            if max(layers, default=0) > depth or len(set(layers)) < len(layers):
                allowed = f"different layers from 1 to model.{name[:3]}_depth = {depth}"
                raise ConfigError(f"model.{name}: found {list(layers)}, expected {allowed}")


def build_model(config: ModelConfig, facts: Mapping[str, Any], seq_len: int, retrieval: bool) -> RETRO:
    """The network for chunks with the given facts; without retrieval, its plain decoder alone."""
    return RETRO(
        num_tokens=facts["vocab_size"],
        chunk_size=facts["chunk_size"],
        pad_id=facts["pad_id"],
        max_seq_len=seq_len,
        retrieval=retrieval,
        **dataclasses.asdict(config),
    )


def _log_nothing(step: int, record: Mapping[str, float]) -> None:
    pass


def train_model(
    chunks_folder: Path,
    neighbors_folder: Path | None,
    tokenizer_folder: Path,
    model_config: ModelConfig,
    train_config: TrainConfig,
    *,
    knn: int,
    seq_len: int,
    seed: int,
    out_folder: Path,
    work_folder: Path | None = None,
    log: Log = _log_nothing,
    device: str = "cpu",
    threads: int | None = None,
    log_every: int = 10,
    checkpoint_every: int = 100,
) -> TrainingResult:
    """Trains on the split "train", validates on "valid", and writes `out_folder` with the best weights.

    Without `neighbors_folder` it trains the baseline: the same decoder and data, no retrieval. With
    `work_folder` a run that was stopped continues there, and the last weights are left in
    `work_folder/last`. `log` gets a record every so often: loss, learning_rate, grad_norm,
    tokens_per_second, and where validated train_loss, valid_loss, valid_loss_off (no neighbors) and
    valid_loss_shuffled (those of other chunks).

    Raises MismatchError or ConfigError where settings and artifacts do not fit together, and
    TrainingError for a loss or gradient that is not finite.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer = Artifact.open(tokenizer_folder, "tokenizer")
    inputs = _Inputs.open(chunks_folder, neighbors_folder, tokenizer)
    training = inputs.sequences("train", seq_len, knn)
    validation = inputs.sequences("valid", seq_len, knn)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(model_config, inputs.chunks["train"].facts, seq_len, inputs.retrieval)
    place = torch.device(device)
    number_type = resolve_number_type(train_config.number_type, place)
    settings = {
        "model": dataclasses.asdict(model_config),
        "train": dataclasses.asdict(train_config),
        "knn": knn if inputs.retrieval else 0,
        "seq_len": seq_len,
        "seed": seed,
        "number_type": number_type,
        "device": place.type,
        "inputs": inputs.fingerprints(),
    }
    checkpoints = None
    if work_folder is not None:
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        checkpoints = Checkpoints(work_folder / "checkpoints", fingerprint)
    trainer = Trainer(model, training, validation, train_config, seed=seed, device=place, checkpoints=checkpoints)
    title = out_folder.name
    if trainer.state.step:
        print(f"{title}: goes on after step {trainer.state.step:,}", file=sys.stderr, flush=True)
    result = trainer.run(title, log, log_every, checkpoint_every)
    facts = {
        "retrieval": inputs.retrieval,
        "knn": knn if inputs.retrieval else 0,
        "chunk_size": training.chunk_size,
        "seq_len": seq_len,
        "number_type": number_type,
        **inputs.facts(),
    }
    if work_folder is not None:
        _write_model(work_folder / "last", model, tokenizer, {**facts, **result.history[-1]})
    model.load_state_dict(result.best_weights)
    assert trainer.state.best is not None
    _write_model(out_folder, model, tokenizer, {**facts, **trainer.state.best})
    return result


@dataclass(frozen=True)
class _Inputs:
    """The artifacts that a model is trained from."""

    chunks: dict[str, Artifact]
    neighbors: dict[str, Artifact]  # empty: no retrieval

    @classmethod
    def open(cls, chunks_folder: Path, neighbors_folder: Path | None, tokenizer: Artifact) -> "_Inputs":
        splits = ("train", "valid")
        chunks = {split: Artifact.open(chunks_folder / split, "chunks") for split in splits}
        for split in splits:
            chunks[split].require(tokenizer=tokenizer.fingerprint)
        neighbors = {}
        if neighbors_folder is not None:
            neighbors = {split: Artifact.open(neighbors_folder / split, "neighbors") for split in splits}
        return cls(chunks, neighbors)

    @property
    def retrieval(self) -> bool:
        return bool(self.neighbors)

    def sequences(self, split: str, seq_len: int, knn: int) -> PackedSequences:
        """A split's sequences, with neighbors from the split "train" where there are any."""
        if not self.retrieval:
            return PackedSequences(self.chunks[split], seq_len)
        return PackedSequences(self.chunks[split], seq_len, self.neighbors[split], self.chunks["train"], knn)

    def fingerprints(self) -> dict[str, str]:
        artifacts = {
            **{f"chunks/{split}": artifact for split, artifact in self.chunks.items()},
            **{f"neighbors/{split}": artifact for split, artifact in self.neighbors.items()},
        }
        return {name: artifact.fingerprint for name, artifact in artifacts.items()}

    def facts(self) -> dict[str, Any]:
        """What the model's description says about its data."""
        chunks = self.chunks["train"]
        facts = {"tokenizer": chunks.facts["tokenizer"], "chunks": chunks.fingerprint}
        if self.retrieval:
            facts["neighbors"] = self.neighbors["train"].fingerprint
            facts["index"] = self.neighbors["train"].facts["index"]
        return facts


def _write_model(path: Path, model: RETRO, tokenizer: Artifact, facts: Mapping[str, Any]) -> None:
    """Writes a model artifact: weights, config, a copy of the tokenizer, and `facts`."""
    with whole_folder(path) as folder, ArtifactWriter(folder, "model") as writer:
        model.save_pretrained(folder)
        shutil.copytree(tokenizer.folder, folder / "tokenizer")
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            writer.add_file(file.relative_to(folder).as_posix())
        writer.facts.update(facts)
