"""Token runs that chunks share, word for word, with their neighbors and with the train split."""

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

# A shared run of at least this many tokens counts as long.
LONG_RUN = 8


class SharedRuns(NamedTuple):
    """Longest shared runs in tokens, and which scored rows share text with the train split."""

    nearest: IntArray  # (rows,) shared with the nearest neighbors, in the database and in the train split
    read: IntArray  # (rows,) shared with the neighbors that the model reads for the row
    read_in_test: IntArray  # `read` for the rows that have such neighbors
    read_in_train: IntArray  # the same for as many train rows
    with_train: BoolArray  # (rows,) whether SHARED_WITH_TRAIN tokens in a row occur in the train split


def find_shared_runs(
    inputs: Inputs, train: Inputs, train_rows: Inputs, scorer: Scorer, knn: int, seed: int
) -> SharedRuns:
    """Measure what the scored rows share with their neighbors and with the train split.

    `inputs` has neighbors from the database, `train` neighbors from the train split. `train_rows` holds the train
    split's own chunks and their neighbors.
    """
    nearest = runs_shared_with_nearest(train, scorer)
    if inputs is not train:  # whatever the database, the model may have memorized its train split
        nearest = np.maximum(nearest, runs_shared_with_nearest(inputs, scorer))
    read = runs_shared_with_read(inputs, scorer, knn)
    length = min(SHARED_WITH_TRAIN, scorer.labels.shape[1])
    return SharedRuns(
        nearest=nearest,
        read=read,
        read_in_test=read[scorer.follows],
        read_in_train=runs_of_train_sample(train_rows, int(scorer.follows.sum()), knn, seed),
        with_train=share_a_run(scorer.labels, train.database, length),
    )


def runs_shared_with_nearest(inputs: Inputs, scorer: Scorer) -> IntArray:
    """Return (rows,): the longest run that each row's labels share with its ten nearest neighbors."""
    return _longest_runs(inputs.database, scorer.labels, inputs.neighbors["ids"][scorer.rows][:, :LEAKAGE_NEIGHBORS])


def runs_shared_with_read(inputs: Inputs, scorer: Scorer, knn: int) -> IntArray:
    """Return (rows,): the same for the neighbors read for each row: those of the row before, if it is scored."""
    ids = np.full((len(scorer.rows), knn), NO_ROW)
    ids[scorer.follows] = inputs.neighbors["ids"][scorer.rows[scorer.follows] - 1][:, :knn]
    return _longest_runs(inputs.database, scorer.labels, ids)


def runs_of_train_sample(train_rows: Inputs, num: int, knn: int, seed: int) -> IntArray:
    """Return the same for `num` random train rows, or for all if there are fewer.

    Only rows that follow a row of their document are drawn.
    """
    rows = 1 + np.flatnonzero(np.diff(train_rows.chunks["documents"][:]) == 0)
    rows = np.sort(np.random.default_rng(seed).choice(rows, size=min(num, len(rows)), replace=False))
    labels = train_rows.chunks["tokens"][rows][:, 1:]
    return _longest_runs(train_rows.database, labels, train_rows.neighbors["ids"][rows - 1][:, :knn])


def read_run_metrics(shared: SharedRuns) -> dict[str, float | int]:
    """Mean run length and share of long runs, in train and test; a split without runs has no metrics."""
    metrics: dict[str, float | int] = {}
    for split, runs in (("train", shared.read_in_train), ("test", shared.read_in_test)):
        if len(runs):
            metrics[f"read_run_mean_{split}"] = round(float(np.mean(runs)), DIGITS)
            metrics[f"read_run_8_share_{split}"] = round(float(np.mean(runs >= LONG_RUN)), DIGITS)
    return metrics


def _longest_runs(database: Artifact, labels: IntArray, ids: IntArray) -> IntArray:
    runs = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(labels), 1024):  # in blocks, because the retrieved tokens take much memory
        block = slice(start, start + 1024)
        retrieved = retrieved_tokens(database, ids[block])
        runs.append(longest_shared_runs(labels[block], retrieved, database.facts["pad_id"]))
    return np.concatenate(runs)
