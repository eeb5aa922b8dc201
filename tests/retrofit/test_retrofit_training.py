"""The pipeline's trainer trains a Retrofit as it trains RETRO."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from small_training import CHUNK, TRAIN, run
from small_training import VOCABULARY as SMALL_VOCABULARY
from tiny_bases import tiny_base
from woven import PAD, write_woven

from retro_model import Retrofit
from retro_model.core.artifacts import Artifact
from retro_model.retrofit.bases import load_base
from retro_model.training.config import RetrofitConfig, TrainConfig
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


@pytest.mark.parametrize("freeze", ["nothing", "decoder"])
def test_a_base_in_bfloat16_is_trained_in_float32(tmp_path: Path, freeze: Literal["nothing", "decoder"]) -> None:
    """Steps of 1e-5 are lost in the 8 bits of most weights in bfloat16. A frozen base stays as it was saved."""
    woven = write_woven(tmp_path, chunk_size=CHUNK, vocab_size=SMALL_VOCABULARY)
    tiny_base("llama", torch.bfloat16, vocab_size=SMALL_VOCABULARY).save_pretrained(tmp_path / "base")
    train = dataclasses.replace(TRAIN, number_type="bfloat16", warmup=0)
    retrofit = RetrofitConfig(base=str(tmp_path / "base"), freeze=freeze, steps=2, lr=1e-5, dim_head=8)
    run(woven, tmp_path, train, retrofit=retrofit)
    base = load_base(tmp_path / "base")
    model = Retrofit.from_pretrained(tmp_path / "retro", base if freeze == "decoder" else None)
    trained = freeze == "nothing"
    assert model.base.dtype == (torch.float32 if trained else torch.bfloat16)
    before = dict(base.named_parameters())
    for name, weight in model.base.named_parameters():
        share = (weight != before[name].to(weight.dtype)).float().mean()
        assert share > 0.5 if trained else share == 0, f"{name}: {share:.0%} of the weights changed"
