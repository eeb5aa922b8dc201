"""Where the gain comes from: the figures of an evaluation over parts of the held-out text.

Retrieval can gain by copying what stands in a neighbor word for word, and a model by repeating what it was
trained on. So the gains are shown over chunks by what they share with their neighbors, over those that
share no long run with the train split, and without the one document that gained most. Each has its own
paired bootstrap over the documents of that part.
"""

from typing import NamedTuple

import numpy as np

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.evaluation.statistics import DIGITS, Curve, Scores, helped_and_hurt, interval, rounded, sum_by_document

# The gains that are shown of every part: what retrieval gives, and what having it is worth.
GAINS_OF_PARTS = (("on", "off"), ("on", "baseline"))

# The paper's leakage curve: the neighbors of a chunk that it looks at, and the steps of alpha.
LEAKAGE_NEIGHBORS = 10
ALPHAS = tuple(eighth / 8 for eighth in range(1, 9))

# Tokens that a chunk shares in a row with what was read beside it, from which each class of overlap begins.
OVERLAP_CLASSES = (0, 2, 4, 8, 16, 32)

# Tokens in a row from which on a chunk counts as known from the train split; a shorter chunk is one run.
SHARED_WITH_TRAIN = 32


class Gain(NamedTuple):
    """Bits per byte saved, with the middle 95% of the resampled ones; None where there is one piece of text only."""

    gain: float
    low: float | None
    high: float | None


def gains_of(scores: Scores, rows: BoolArray, samples: int, seed: int) -> list[Gain]:
    """The gains of GAINS_OF_PARTS over the given rows, some of which have bytes; rounded."""
    found = []
    resampled = scores.bootstrap(samples, seed, rows) if len(np.unique(scores.units(rows))) > 1 else None
    for one, other in GAINS_OF_PARTS:
        (gain,) = rounded(scores.bpb(other, rows) - scores.bpb(one, rows))
        if resampled is None:
            found.append(Gain(gain, None, None))
        else:
            found.append(Gain(gain, *rounded(*interval(resampled[other] - resampled[one]))))
    return found


# ---- flat figures ------------------------------------------------------------------------------------


def metrics_of_parts(
    scores: Scores, runs: IntArray, shared_with_train: BoolArray, samples: int, seed: int
) -> dict[str, float | int]:
    """The flat figures of parts of the text.

    `runs` (rows,) is the longest run of tokens that each row shares with its nearest neighbors; little
    overlap is the leakage curve's first step, at most an eighth of a chunk. `shared_with_train` (rows,)
    says which rows hold SHARED_WITH_TRAIN tokens in a row of the train split. What has no text is left
    out, and so is the interval of a single piece.
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
            metrics |= _named(f"gain_{one}_vs_{other}_without_best", gain)
    return metrics


def document_that_gained_most(scores: Scores, one: str, other: str) -> int:
    """The number of the document in which `one` costs the fewest bits against `other`; of equal ones the first."""
    saved = sum_by_document(scores.row_losses[other] - scores.row_losses[one], scores.documents)
    return int(np.unique(scores.documents)[np.argmax(saved)])


def _gain_metrics(scores: Scores, rows: BoolArray, part: str, samples: int, seed: int) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {}
    if scores.bytes[rows].any():
        for (one, other), gain in zip(GAINS_OF_PARTS, gains_of(scores, rows, samples, seed), strict=True):
            metrics |= _named(f"gain_{one}_vs_{other}_{part}", gain)
    return metrics


def _named(name: str, gain: Gain) -> dict[str, float | int]:
    ends = zip(("", "_low", "_high"), gain, strict=True)
    return {f"{name}{end}": value for end, value in ends if value is not None}


# ---- curves ------------------------------------------------------------------------------------------

# The columns of a curve that say what was gained in each part, in the order of GAINS_OF_PARTS.
GAIN_HEAD = ("gain", "low", "high", "gain_vs_baseline", "low_vs_baseline", "high_vs_baseline")


def leakage_curve(scores: Scores, runs: IntArray, samples: int, seed: int) -> Curve:
    """bpb(alpha) of section 2.6: over chunks that share at most alpha * M tokens in a row with a neighbor.

    `runs` is the longest run of each row. An alpha under which no text is left has no row.
    """
    columns = tuple(column for column in scores.columns if column != "random")
    rows = []
    for alpha in ALPHAS:
        below = runs <= alpha * scores.is_label.shape[1]
        if scores.bytes[below].any():
            figures = rounded(*(scores.bpb(column, below) for column in columns))
            rows.append((alpha, int(below.sum()), *figures, *_gain_cells(scores, below, samples, seed)))
    return Curve(("alpha", "chunks", *columns, *GAIN_HEAD), tuple(rows))


def overlap_curve(scores: Scores, runs: IntArray, samples: int, seed: int) -> Curve:
    """What retrieval gave, by the longest run that a chunk shares with the neighbors that were read with it.

    A row for each class of `runs` that has text: the tokens from which it begins, its chunks, three columns,
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


def _gain_cells(scores: Scores, rows: BoolArray, samples: int, seed: int) -> list[float | None]:
    return [value for gain in gains_of(scores, rows, samples, seed) for value in gain]
