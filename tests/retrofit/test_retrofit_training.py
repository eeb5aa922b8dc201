"""The pipeline's trainer trains a Retrofit as it trains RETRO."""

from pathlib import Path

import pytest
import torch
from tiny_bases import tiny_base
from woven import PAD, write_woven

from retro_model import Retrofit
from retro_model.core.artifacts import Artifact
from retro_model.training.config import TrainConfig
from retro_model.training.sequences import PackedSequences
from retro_model.training.trainer import Trainer

M, VOCABULARY, SEQ_LEN = 16, 67, 96


@pytest.mark.slow
def test_the_trainer_teaches_a_frozen_base_to_use_true_neighbors(tmp_path: Path) -> None:
    """Passages of random tokens, packed: only neighbors tell what comes next. Those of other chunks give nothing."""
    woven = write_woven(tmp_path, chunk_size=M, vocab_size=VOCABULARY, num_documents=200)
    chunks = {split: Artifact.open(woven.chunks / split, "chunks") for split in ("train", "valid")}
    training, validation = (
        PackedSequences(chunks[split], SEQ_LEN, Artifact.open(woven.neighbors / split, "neighbors"), chunks["train"], 2)
        for split in ("train", "valid")
    )
    torch.manual_seed(0)
    model = Retrofit(tiny_base("llama", vocab_size=VOCABULARY), M, dim_head=16, heads=2, pad_id=PAD)
    before = {name: weight.clone() for name, weight in model.base.named_parameters()}
    config = TrainConfig(steps=80, batch_size=8, lr=1e-2, warmup=5, number_type="float32", validate_every=80)
    trainer = Trainer(model, training, validation, config, seed=0)
    result = trainer.run("retrofit", lambda *_: None, log_every=80, checkpoint_every=80)
    (row,) = result.history
    on, off, shuffled = (row[f"valid_loss{suffix}"] for suffix in ("", "_off", "_shuffled"))
    assert on < off / 2 and shuffled > 0.95 * off, f"{on:.2f}, shuffled {shuffled:.2f}, without {off:.2f} nats"
    assert all(torch.equal(weight, before[name]) for name, weight in model.base.named_parameters())
