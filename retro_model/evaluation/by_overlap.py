"""What chunks share with other text, in tokens in a row: with their neighbors, and with all of the train split."""

from typing import NamedTuple

import numpy as np

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.evaluation.inputs import Inputs
from retro_model.evaluation.overlap import longest_shared_runs
from retro_model.evaluation.scoring import Scorer
from retro_model.evaluation.shared_runs import share_a_run
from retro_model.evaluation.statistics import DIGITS
from retro_model.evaluation.subsets import LEAKAGE_NEIGHBORS, SHARED_WITH_TRAIN

# From so many tokens in a row on, a chunk is counted as one that shares much with what is read beside it.
LONG_RUN = 8


class Shared(NamedTuple):
    """Longest runs of tokens, and which of the scored rows stand in part in the train split."""

    nearest: IntArray  # (rows,) with the nearest neighbors in the database, and in the train split
    read: IntArray  # (rows,) with the neighbors that are read beside the row
    read_in_test: IntArray  # the same, of rows that have any
    read_in_train: IntArray  # of as many train rows
    with_train: BoolArray  # (rows,) with any document of the train split, SHARED_WITH_TRAIN tokens in a row


def find_shared(inputs: Inputs, train: Inputs, train_rows: Inputs, scorer: Scorer, knn: int, seed: int) -> Shared:
    """What the scored rows share, with neighbors from `inputs` and from the train split (`train`).

    `train_rows` are the train split's own chunks and neighbors.
    """
    nearest = runs_shared_with_nearest(train, scorer)
    if inputs is not train:  # whatever the database, what was trained on can be repeated by heart
        nearest = np.maximum(nearest, runs_shared_with_nearest(inputs, scorer))
    read = runs_shared_with_read(inputs, scorer, knn)
    length = min(SHARED_WITH_TRAIN, scorer.labels.shape[1])
    return Shared(
        nearest=nearest,
        read=read,
        read_in_test=read[scorer.follows],
        read_in_train=runs_of_train_sample(train_rows, int(scorer.follows.sum()), knn, seed),
        with_train=share_a_run(scorer.labels, train.database, length),
    )


def runs_shared_with_nearest(inputs: Inputs, scorer: Scorer) -> IntArray:
    """The longest run of tokens (rows,) that each row's labels share with its ten nearest in the database."""
    return _longest_runs(inputs.database, scorer.labels, inputs.neighbors["ids"][scorer.rows][:, :LEAKAGE_NEIGHBORS])


def runs_shared_with_read(inputs: Inputs, scorer: Scorer, knn: int) -> IntArray:
    """The same with the neighbors that were read beside each row: those of the row before, if it is scored."""
    ids = np.full((len(scorer.rows), knn), NO_ROW)
    ids[scorer.follows] = inputs.neighbors["ids"][scorer.rows[scorer.follows] - 1][:, :knn]
    return _longest_runs(inputs.database, scorer.labels, ids)


def runs_of_train_sample(train_rows: Inputs, num: int, knn: int, seed: int) -> IntArray:
    """The same of `num` train rows drawn at random, all of them after a row of their document; or of all there are."""
    rows = 1 + np.flatnonzero(np.diff(train_rows.chunks["documents"][:]) == 0)
    rows = np.sort(np.random.default_rng(seed).choice(rows, size=min(num, len(rows)), replace=False))
    labels = train_rows.chunks["tokens"][rows][:, 1:]
    return _longest_runs(train_rows.database, labels, train_rows.neighbors["ids"][rows - 1][:, :knn])


def read_run_metrics(shared: Shared) -> dict[str, float | int]:
    """How long the runs are in train and test, and how many are long; nothing of a split that has none."""
    metrics: dict[str, float | int] = {}
    for split, runs in (("train", shared.read_in_train), ("test", shared.read_in_test)):
        if len(runs):
            metrics[f"read_run_mean_{split}"] = round(float(np.mean(runs)), DIGITS)
            metrics[f"read_run_8_share_{split}"] = round(float(np.mean(runs >= LONG_RUN)), DIGITS)
    return metrics


def _longest_runs(database: Artifact, labels: IntArray, ids: IntArray) -> IntArray:
    runs = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(labels), 1024):  # retrieved tokens are large: few rows at a time
        some = slice(start, start + 1024)
        retrieved = retrieved_tokens(database, ids[some])
        runs.append(longest_shared_runs(labels[some], retrieved, database.facts["pad_id"]))
    return np.concatenate(runs)
