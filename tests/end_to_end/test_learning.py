"""What RETRO is for: text whose continuation stands in its neighbors is learned with them, and not without."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_up_scores import scores_of
from woven import Woven, write_woven

from retro_model.core.artifacts import Artifact
from retro_model.evaluation.passes import random_neighbors
from retro_model.evaluation.scoring import Scorer, choose_spans
from retro_model.evaluation.statistics import metrics_of
from retro_model.network.config import ModelConfig
from retro_model.network.model import RETRO
from retro_model.training.config import TrainConfig
from retro_model.training.run import TrainingRun, train_model
from retro_model.training.trainer import TrainingResult

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Task:
    """A network, and how long it needs to learn what its neighbors are for."""

    model: ModelConfig
    num_documents: int
    steps: int
    batch_size: int
    seq_len: int
    lr: float
    warmup: int


# Cross-attention that looks for what followed the last tokens, as in the default settings, learns it in seconds. That
# of the paper has to find out what a position in a neighbor means, which takes minutes.
LAYERS: dict[str, Any] = {"enc_depth": 1, "dec_depth": 2, "dec_cross_attn_layers": (1, 2), "heads": 2}
COPYING = ModelConfig(enc_dim=32, dec_dim=32, dim_head=16, copy_tokens=3, cross_attn_sink=True, **LAYERS)
PAPER = ModelConfig(enc_dim=64, dec_dim=64, dim_head=32, **LAYERS)
TASKS = [
    pytest.param(Task(COPYING, 200, steps=100, batch_size=8, seq_len=64, lr=6e-3, warmup=10), id="copying"),
    pytest.param(
        Task(PAPER, 400, steps=400, batch_size=16, seq_len=128, lr=4e-3, warmup=30),
        id="paper",
        marks=pytest.mark.torture,
    ),
]


@dataclass(frozen=True)
class Learned:
    """A woven corpus and what is learned from it."""

    woven: Woven
    seq_len: int
    model: Path
    result: TrainingResult


@pytest.fixture(scope="module", params=TASKS)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    task: Task = request.param
    folder = tmp_path_factory.mktemp("learned")
    woven = write_woven(folder, num_documents=task.num_documents)
    train = TrainConfig(
        steps=task.steps,
        batch_size=task.batch_size,
        lr=task.lr,
        warmup=task.warmup,
        validate_every=task.steps,
        neighbor_dropout=0.3,
        number_type="float32",
    )
    run = TrainingRun(
        woven.chunks,
        woven.neighbors,
        woven.tokenizer,
        task.model,
        train,
        knn=2,
        seq_len=task.seq_len,
        seed=0,
        out_folder=folder / "retro",
    )
    return Learned(woven, task.seq_len, folder / "retro", train_model(run))


def test_true_neighbors_halve_the_validation_loss_and_shuffled_ones_give_nothing(learned: Learned) -> None:
    metrics = learned.result.metrics
    assert metrics["valid_loss"] < metrics["valid_loss_off"] / 2
    assert metrics["valid_loss_shuffled"] > 0.98 * metrics["valid_loss_off"]


def test_the_evaluation_sees_the_same_on_whole_documents(learned: Learned) -> None:
    """Their own neighbors save most of the loss, any others none of it."""
    held_out, database = (Artifact.open(learned.woven.chunks / split, "chunks") for split in ("valid", "train"))
    scorer = Scorer(held_out, database, choose_spans(held_out["documents"][:], None, 0), learned.seq_len)
    model = RETRO.from_pretrained(learned.model)
    own = Artifact.open(learned.woven.neighbors / "valid", "neighbors")["ids"][scorer.rows][:, :2]
    drawn = random_neighbors(len(scorer.rows), 2, database.rows, seed=0)
    columns = {"off": None, "on": own, "random": drawn}
    losses = {name: scorer.losses(model, neighbors) for name, neighbors in columns.items()}
    scores = scores_of(scorer, **losses)
    metrics = metrics_of(scores, scores.bootstrap(200, 0))
    assert metrics["gain_on_vs_off_low"] > metrics["test_bpb_off"] / 2
    assert metrics["gain_random_vs_off_high"] < 0.02 * metrics["test_bpb_off"]
