"""A training run of seconds: its settings, and how it is started, here or in a process that a test starts."""

from pathlib import Path
from typing import Any

import torch
from woven import Woven

from retro_model.core.artifacts import Artifact, file_digest
from retro_model.network.config import ModelConfig
from retro_model.training.checkpoints import Checkpoints
from retro_model.training.config import TrainConfig
from retro_model.training.distributed import ALONE, World
from retro_model.training.run import TrainingRun, build_model, train_model
from retro_model.training.sequences import PackedSequences
from retro_model.training.trainer import Trainer, TrainingResult

CHUNK, SEQ_LEN, VOCABULARY = 8, 32, 40
MODEL = ModelConfig(
    enc_dim=8,
    enc_depth=1,
    dec_dim=16,
    dec_depth=2,
    dec_cross_attn_layers=(2,),
    heads=2,
    dim_head=8,
    dec_ff_dropout=0.1,
)
TRAIN = TrainConfig(
    steps=12,
    batch_size=4,
    accumulation=2,
    lr=1e-2,
    warmup=2,
    neighbor_dropout=0.3,
    validate_every=5,
    validate_sequences=3,
    number_type="float32",
)


def run(woven: Woven, folder: Path, train: TrainConfig = TRAIN, **arguments: Any) -> TrainingResult:
    options: dict[str, Any] = {"knn": 2, "seq_len": SEQ_LEN, "seed": 0, "out_folder": folder / "retro"}
    neighbors = arguments.pop("neighbors", woven.neighbors)
    model = arguments.pop("model", MODEL)
    called = {name: arguments.pop(name) for name in ("log", "threads") if name in arguments}
    settings = {**options, **arguments}
    return train_model(TrainingRun(woven.chunks, neighbors, woven.tokenizer, model, train, **settings), **called)


def make_trainer(
    woven: Woven,
    train: TrainConfig = TRAIN,
    checkpoints: Checkpoints | None = None,
    seed: int = 0,
    world: World = ALONE,
) -> Trainer:
    chunks = {split: Artifact.open(woven.chunks / split, "chunks") for split in ("train", "valid")}
    data = [
        PackedSequences(chunks[split], SEQ_LEN, Artifact.open(woven.neighbors / split, "neighbors"), chunks["train"], 2)
        for split in ("train", "valid")
    ]
    torch.manual_seed(seed)
    model = build_model(MODEL, chunks["train"].facts, SEQ_LEN, retrieval=True)
    return Trainer(model, *data, train, seed=seed, checkpoints=checkpoints, world=world)


def folder_digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


class Killed(BaseException):
    """What a test stops a run with; nothing catches it."""
