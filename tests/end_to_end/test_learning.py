"""What RETRO is for: text whose continuation stands in its neighbors is learned with them, and not without."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from made_up_scores import scores_of
from woven import Woven, write_woven

from retro_model.core.artifacts import Artifact
from retro_model.evaluation.passes import random_neighbors
from retro_model.evaluation.scoring import Scorer, choose_spans
from retro_model.evaluation.statistics import metrics_of
from retro_model.network.config import ModelConfig
from retro_model.network.model import RETRO
from retro_model.training.run import TrainingRun, train_model
from retro_model.training.trainer import TrainConfig, TrainingResult

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Learned:
    """A woven corpus and what two minutes on two cores learn from it."""

    woven: Woven
    model: Path
    result: TrainingResult


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    woven = write_woven(folder, num_documents=400)
    run = TrainingRun(
        woven.chunks,
        woven.neighbors,
        woven.tokenizer,
        ModelConfig(
            enc_dim=64, enc_depth=1, dec_dim=64, dec_depth=2, dec_cross_attn_layers=(1, 2), heads=2, dim_head=32
        ),
        TrainConfig(
            steps=400,
            batch_size=16,
            lr=4e-3,
            warmup=30,
            validate_every=400,
            neighbor_dropout=0.3,
            number_type="float32",
        ),
        knn=2,
        seq_len=128,
        seed=0,
        out_folder=folder / "retro",
    )
    result = train_model(run)
    torch.set_num_threads(threads)
    return Learned(woven, folder / "retro", result)


def test_true_neighbors_halve_the_validation_loss_and_shuffled_ones_give_nothing(learned: Learned) -> None:
    metrics = learned.result.metrics
    assert metrics["valid_loss"] < metrics["valid_loss_off"] / 2
    assert metrics["valid_loss_shuffled"] > 0.98 * metrics["valid_loss_off"]


def test_the_evaluation_sees_the_same_on_whole_documents(learned: Learned) -> None:
    """Their own neighbors save most of the loss, any others none of it."""
    held_out, database = (Artifact.open(learned.woven.chunks / split, "chunks") for split in ("valid", "train"))
    scorer = Scorer(held_out, database, choose_spans(held_out["documents"][:], None, 0), 128)
    model = RETRO.from_pretrained(learned.model)
    own = Artifact.open(learned.woven.neighbors / "valid", "neighbors")["ids"][scorer.rows][:, :2]
    drawn = random_neighbors(len(scorer.rows), 2, database.rows, seed=0)
    columns = {"off": None, "on": own, "random": drawn}
    losses = {name: scorer.losses(model, neighbors) for name, neighbors in columns.items()}
    scores = scores_of(scorer, **losses)
    metrics = metrics_of(scores, scores.bootstrap(200, 0))
    assert metrics["gain_on_vs_off_low"] > metrics["test_bpb_off"] / 2
    assert metrics["gain_random_vs_off_high"] < 0.02 * metrics["test_bpb_off"]
