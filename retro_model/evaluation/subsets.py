"""Where the gain comes from: metrics and curves over parts of the held-out text.

Retrieval can gain by copying text from a neighbor, and a model by repeating text that it was trained on. So gains
are also computed for chunks by what they share with their neighbors, for chunks that share no long run with the
train split, and without the document that gained most. Each part has its own paired bootstrap over its documents.
"""

from typing import NamedTuple

import numpy as np

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.evaluation.statistics import (
    DIGITS,
    ColumnScores,
    Curve,
    helped_and_hurt,
    interval,
    rounded,
    sum_by_document,
)

# Gains reported for every part: of retrieval within RETRO, and of RETRO over the plain decoder.
GAINS_OF_PARTS = (("on", "off"), ("on", "baseline"))

# The paper's leakage curve: the number of neighbors of a chunk that it considers, and the values of alpha.
LEAKAGE_NEIGHBORS = 10
ALPHAS = tuple(eighth / 8 for eighth in range(1, 9))

# Lower bounds of the overlap classes: tokens in a row that a chunk shares with the neighbors read for it.
OVERLAP_CLASSES = (0, 2, 4, 8, 16, 32)

# A chunk that shares this many tokens in a row with the train split counts as seen in training; a shorter chunk must
# be shared as a whole.
SHARED_WITH_TRAIN = 32


class Gain(NamedTuple):
    """Bits per byte saved, and the middle 95% of the resampled gains; None if there is only one piece of text."""

    gain: float
    low: float | None
    high: float | None


def gains_of(scores: ColumnScores, rows: BoolArray, samples: int, seed: int) -> list[Gain]:
    """The gains of GAINS_OF_PARTS over the given rows, rounded. Some of the rows must have bytes."""
    found = []
    resampled = scores.bootstrap(samples, seed, rows) if len(np.unique(scores.units(rows))) > 1 else None
    for one, other in GAINS_OF_PARTS:
        (gain,) = rounded(scores.bpb(other, rows) - scores.bpb(one, rows))
        if resampled is None:
            found.append(Gain(gain, None, None))
        else:
            found.append(Gain(gain, *rounded(*interval(resampled[other] - resampled[one]))))
    return found


# ---- flat metrics ------------------------------------------------------------------------------------


def metrics_of_parts(
    scores: ColumnScores, runs: IntArray, shared_with_train: BoolArray, samples: int, seed: int
) -> dict[str, float | int]:
    """Flat metrics of parts of the text.

    `runs` (rows,) is the longest run of tokens that each row shares with its nearest neighbors. Little overlap is
    the leakage curve's first step, at most an eighth of a chunk. `shared_with_train` (rows,) marks rows that share
    SHARED_WITH_TRAIN tokens in a row with the train split. A part without text has no metrics, and a part with only
    one piece of text no interval.
    """
    little = runs <= ALPHAS[0] * scores.is_label.shape[1]
    metrics: dict[str, float | int] = {}
    metrics["share_chunks_little_overlap"] = round(float(np.mean(little)), DIGITS)
    metrics |= _gain_metrics(scores, little, "little_overlap", samples, seed)
    metrics["share_chunks_shared_32"] = round(float(np.mean(shared_with_train)), DIGITS)
    unshared = ~shared_with_train
    if scores.bytes[unshared].any():
        for column in ("baseline", "off", "on"):
            metrics[f"test_bpb_{column}_unshared_32"] = round(scores.bpb(column, unshared), DIGITS)
    metrics |= _gain_metrics(scores, unshared, "unshared_32", samples, seed)
    for place, (one, other) in enumerate(GAINS_OF_PARTS):
        rest = scores.documents != document_that_gained_most(scores, one, other)
        if scores.bytes[rest].any():
            gain = gains_of(scores, rest, samples, seed)[place]
            metrics |= _gain_and_interval(f"gain_{one}_vs_{other}_without_best", gain)
    return metrics


def document_that_gained_most(scores: ColumnScores, one: str, other: str) -> int:
    """Return the number of the document in which `one` saves most bits over `other`; of ties, the first."""
    saved = sum_by_document(scores.row_losses[other] - scores.row_losses[one], scores.documents)
    return int(np.unique(scores.documents)[np.argmax(saved)])


def _gain_metrics(scores: ColumnScores, rows: BoolArray, part: str, samples: int, seed: int) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {}
    if scores.bytes[rows].any():
        for (one, other), gain in zip(GAINS_OF_PARTS, gains_of(scores, rows, samples, seed), strict=True):
            metrics |= _gain_and_interval(f"gain_{one}_vs_{other}_{part}", gain)
    return metrics


def _gain_and_interval(name: str, gain: Gain) -> dict[str, float | int]:
    ends = zip(("", "_low", "_high"), gain, strict=True)
    return {f"{name}{end}": value for end, value in ends if value is not None}


# ---- curves ------------------------------------------------------------------------------------------

# Curve columns for the gains of each part, in the order of GAINS_OF_PARTS.
GAIN_HEAD = ("gain", "low", "high", "gain_vs_baseline", "low_vs_baseline", "high_vs_baseline")


def leakage_curve(scores: ColumnScores, runs: IntArray, samples: int, seed: int) -> Curve:
    """bpb(alpha) of section 2.6: over chunks that share at most alpha * M tokens in a row with a neighbor.

    `runs` is the longest run of each row. An alpha that leaves no text has no row.
    """
    columns = tuple(column for column in scores.columns if column != "random")
    rows = []
    for alpha in ALPHAS:
        below = runs <= alpha * scores.is_label.shape[1]
        if scores.bytes[below].any():
            figures = rounded(*(scores.bpb(column, below) for column in columns))
            rows.append((alpha, int(below.sum()), *figures, *_gain_cells(scores, below, samples, seed)))
    return Curve(("alpha", "chunks", *columns, *GAIN_HEAD), tuple(rows))


def overlap_curve(scores: ColumnScores, runs: IntArray, samples: int, seed: int) -> Curve:
    """Gains by the longest run that a chunk shares with the neighbors read for it.

    One row per class of `runs` that has text: its lower bound in tokens, its chunks, bits per byte of three columns,
    the gains in bits per byte, and the shares of tokens helped and hurt.
    """
    rows = []
    classes = np.searchsorted(OVERLAP_CLASSES, runs, side="right") - 1
    for number, first in enumerate(OVERLAP_CLASSES):
        here = classes == number
        if scores.bytes[here].any():
            figures = rounded(*(scores.bpb(column, here) for column in ("baseline", "off", "on")))
            shares = rounded(*helped_and_hurt(scores.saved[here][scores.is_label[here]]))
            gains = _gain_cells(scores, here, samples, seed)
            rows.append((first, int(here.sum()), *figures, *gains, *shares))
    head = ("shared_tokens", "chunks", "baseline", "off", "on", *GAIN_HEAD, "share_helped", "share_hurt")
    return Curve(head, tuple(rows))


def _gain_cells(scores: ColumnScores, rows: BoolArray, samples: int, seed: int) -> list[float | None]:
    return [value for gain in gains_of(scores, rows, samples, seed) for value in gain]
