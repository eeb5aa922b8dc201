"""Train a model with or without retrieval: open the inputs, run the trainer, write the model's folder.

    run = TrainingRun(
        Path("data/chunks"), Path("data/neighbors"), Path("data/tokenizer"), model_config, train_config,
        knn=2, seq_len=512, seed=0, out_folder=Path("models/retro"), work_folder=work,
    )
    result = train_model(run)

The sequences of a step, its neighbor dropout and its dropout are functions of the seed and the step number. So a
stopped run that resumes from its last checkpoint in `work_folder` gives the same result as an uninterrupted one,
bit for bit on a CPU in float32. `out_folder` gets the weights with the best validation loss; equal settings and
inputs give equal bytes on one machine.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retro_model.core.artifacts import Artifact, ArtifactWriter, whole_folder
from retro_model.core.devices import resolve_number_type
from retro_model.network.config import ModelConfig
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import RETRO
from retro_model.training.base import around_base, check_train_config, start_from_adapters
from retro_model.training.checkpoints import Checkpoints
from retro_model.training.config import RetrofitConfig, TrainConfig
from retro_model.training.copying import copying_potential
from retro_model.training.distributed import World, launch, resolve_processes
from retro_model.training.mlmodel import write_mlmodel
from retro_model.training.sequences import PackedSequences
from retro_model.training.trainer import Log, Trainer, TrainingResult
from retro_model.training.warm_start import start_from

logger = logging.getLogger(__name__)


def build_model(config: ModelConfig, facts: Mapping[str, Any], seq_len: int, retrieval: bool) -> RETRO:
    """A new network for chunks with the given facts; without `retrieval`, only its plain decoder."""
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


def train_model(run: "TrainingRun", log: Log = _log_nothing, threads: int | None = None) -> TrainingResult:
    """Train on the split "train", validate on "valid", and write the best weights to `out_folder`.

    `log` receives a record every `log_every` steps and at each validation: loss, learning_rate, grad_norm,
    tokens_per_second and peak_share; at validations also train_loss, valid_loss, valid_bits_per_byte, and with
    retrieval valid_loss_off (no neighbors) and valid_loss_shuffled (neighbors of other chunks).

    This starts `train_config.processes` processes, unless torchrun has started them and each of them calls this.
    Only process 0 logs, saves and writes. With several processes `device` must be cpu or cuda.

    Raises MismatchError or ConfigError if settings and artifacts do not match, and TrainingError if loss or gradient
    is not finite or a process dies.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sequences = run.train_config.batch_size // run.train_config.accumulation
    processes = resolve_processes(run.train_config.processes, run.device, sequences)
    with launch(processes, run.device, run.train) as world:
        return run.train(world, log)


@dataclass(frozen=True)
class TrainingRun:
    """The inputs, settings and output folders of one training.

    Without `neighbors_folder` it trains the baseline: the same decoder and data, no retrieval. `retrofit` may name
    a trained model to start from; by default the weights are new. It may also name a base, a language model of
    transformers: then adapters are trained around it, and the baseline is the base as it is, scored and not trained.
    With `work_folder` a stopped run can resume, and the last weights are written to `work_folder/last`. `history_file`
    is a CSV with a row for each validation so far; it is written anew, and atomically, after each one.
    """

    chunks_folder: Path
    neighbors_folder: Path | None
    tokenizer_folder: Path
    model_config: ModelConfig
    train_config: TrainConfig
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)
    _: KW_ONLY
    knn: int
    seq_len: int
    seed: int
    out_folder: Path
    work_folder: Path | None = None
    history_file: Path | None = None
    device: str = "cpu"
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps

    def train(self, world: World, log: Log = _log_nothing) -> TrainingResult:
        """Train in this process; process 0 also writes the models."""
        tokenizer = Artifact.open(self.tokenizer_folder, "tokenizer")
        inputs = _Inputs.open(self.chunks_folder, self.neighbors_folder, tokenizer, self.retrofit)
        training = inputs.sequences("train", self.seq_len, self.knn)
        validation = inputs.sequences("valid", self.seq_len, self.knn)
        model, base = self._model(inputs, world.device)
        trainer = Trainer(
            model,
            training,
            validation,
            self._settings(inputs),
            seed=self.seed,
            world=world,
            checkpoints=self._checkpoints(inputs, world.device, base),
            history_file=self.history_file,
        )
        title = self.out_folder.name
        if trainer.state.step and world.main:
            logger.info(f"{title}: goes on after step {trainer.state.step:,}")
        elif inputs.retrieval and world.main:
            potential = copying_potential(validation, trainer.validation_rows)
            logger.info(f"{title}: {potential.line()}")
        if trainer.trains:
            result = trainer.run(title, log, self.log_every, self.checkpoint_every)
        else:
            result = trainer.score(log)
        if world.main:
            facts = {
                "retrieval": inputs.retrieval,
                "knn": self.knn if inputs.retrieval else 0,
                "chunk_size": training.chunk_size,
                "seq_len": self.seq_len,
                "number_type": trainer.number_type,
                **({"base": base} if base else {}),
                **inputs.facts(),
            }
            if self.work_folder is not None:
                last = self.work_folder / "last"
                _write_model(last, model, result.last_weights, tokenizer, {**facts, **result.history[-1]})
            assert trainer.state.best is not None
            best = {**facts, **trainer.state.best}
            _write_model(self.out_folder, model, result.best_weights, tokenizer, best)
        return result

    def _model(self, inputs: "_Inputs", device: torch.device) -> tuple[LanguageModel, dict[str, Any]]:
        """The model with its initial weights, and what identifies its base, if it has one."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            facts = inputs.chunks["train"].facts
            if self.retrofit.base:
                return self._around_base(inputs, facts, device)
            model = build_model(self.model_config, facts, self.seq_len, inputs.retrieval)
            if inputs.retrieval:  # start from the baseline's initial decoder: no difference by chance
                torch.manual_seed(self.seed)
                plain = build_model(self.model_config, facts, self.seq_len, retrieval=False)
                model.load_state_dict({**model.state_dict(), **plain.state_dict()})
        if inputs.start is not None:
            start_from(model, inputs.start, self.retrofit.freeze)
        return model, {}

    def _around_base(
        self, inputs: "_Inputs", facts: Mapping[str, Any], device: torch.device
    ) -> tuple[LanguageModel, dict[str, Any]]:
        check_train_config(self.train_config)
        number_type = resolve_number_type(self.train_config.number_type, device)
        model = around_base(self.retrofit, facts, self.seq_len, number_type, inputs.retrieval)
        base = model.describe_base()
        if inputs.start is not None:
            start_from_adapters(model, inputs.start, base)
        if not model.frozen:
            cast("Any", model.base).float()  # in bfloat16, most steps would be smaller than what rounding takes away
        return model, base

    def _settings(self, inputs: "_Inputs") -> TrainConfig:
        from_trained = inputs.start is not None or (self.retrofit.base and inputs.retrieval)
        return self.retrofit.applied_to(self.train_config) if from_trained else self.train_config

    def _checkpoints(self, inputs: "_Inputs", device: torch.device, base: Mapping[str, Any]) -> Checkpoints | None:
        if self.work_folder is None:
            return None
        settings = {
            "model": dataclasses.asdict(self.model_config),
            "train": self._settings(inputs).identity(),
            "freeze": "nothing" if inputs.start is None else self.retrofit.freeze,
            **({"retrofit": dataclasses.asdict(self.retrofit), "base": base} if base else {}),
            "knn": self.knn if inputs.retrieval else 0,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "number_type": resolve_number_type(self.train_config.number_type, device),
            "device": device.type,
            "inputs": inputs.fingerprints(),
        }
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return Checkpoints(self.work_folder / "checkpoints", fingerprint)


@dataclass(frozen=True)
class _Inputs:
    """The input artifacts of a training."""

    chunks: dict[str, Artifact]
    neighbors: dict[str, Artifact]  # empty: no retrieval
    start: Artifact | None  # the model to start from

    @classmethod
    def open(
        cls, chunks_folder: Path, neighbors_folder: Path | None, tokenizer: Artifact, retrofit: RetrofitConfig
    ) -> "_Inputs":
        splits = ("train", "valid")
        chunks = {split: Artifact.open(chunks_folder / split, "chunks") for split in splits}
        for split in splits:
            chunks[split].require(tokenizer=tokenizer.fingerprint)
        neighbors = {}
        if neighbors_folder is not None:
            neighbors = {split: Artifact.open(neighbors_folder / split, "neighbors") for split in splits}
        start = retrofit.model()
        if start is not None:
            start.require(tokenizer=tokenizer.fingerprint)
        return cls(chunks, neighbors, start)

    @property
    def retrieval(self) -> bool:
        return bool(self.neighbors)

    def sequences(self, split: str, seq_len: int, knn: int) -> PackedSequences:
        """The sequences of a split; with retrieval, their neighbors come from the split "train"."""
        if not self.retrieval:
            return PackedSequences(self.chunks[split], seq_len)
        return PackedSequences(self.chunks[split], seq_len, self.neighbors[split], self.chunks["train"], knn)

    def fingerprints(self) -> dict[str, str]:
        artifacts = {
            **{f"chunks/{split}": artifact for split, artifact in self.chunks.items()},
            **{f"neighbors/{split}": artifact for split, artifact in self.neighbors.items()},
            **({} if self.start is None else {"start": self.start}),
        }
        return {name: artifact.fingerprint for name, artifact in artifacts.items()}

    def facts(self) -> dict[str, Any]:
        """The facts of the model artifact that describe its inputs."""
        chunks = self.chunks["train"]
        facts = {"tokenizer": chunks.facts["tokenizer"], "chunks": chunks.fingerprint}
        if self.retrieval:
            facts["neighbors"] = self.neighbors["train"].fingerprint
            facts["index"] = self.neighbors["train"].facts["index"]
        if self.start is not None:
            facts["init_from"] = self.start.fingerprint
            # All chunk artifacts that these weights were trained on before; evaluating on another split would leak.
            facts["init_from_chunks"] = sorted(
                {self.start.facts["chunks"], *self.start.facts.get("init_from_chunks", ())}
            )
        return facts


def _write_model(
    path: Path, model: LanguageModel, weights: dict[str, Tensor], tokenizer: Artifact, facts: Mapping[str, Any]
) -> None:
    """Write a model artifact: weights, config, a copy of the tokenizer, and `facts`."""
    with whole_folder(path) as folder, ArtifactWriter(folder, "model") as writer:
        model.save_weights(folder, weights)
        write_mlmodel(folder, facts["knn"])
        shutil.copytree(tokenizer.folder, folder / "tokenizer")
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            writer.add_file(file.relative_to(folder).as_posix())
        writer.facts.update(facts)
