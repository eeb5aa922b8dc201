"""The figures of an evaluation: bits per byte, perplexity, gains with intervals, the leakage curve.

All are functions of the summed losses of chunk rows, so that none needs a model or a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.scoring import Scorer

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]

COLUMNS = ("baseline", "off", "on", "random")
DIFFERENCES = (("on", "off"), ("on", "baseline"), ("random", "off"))

# The paper's leakage curve: the neighbors of a chunk that it looks at, and the steps of alpha.
LEAKAGE_NEIGHBORS = 10
ALPHAS = tuple(eighth / 8 for eighth in range(1, 9))

# A token counts as helped or hurt from this change of its loss on, in bits.
NOTICEABLE_BITS = 0.1

# Digits that are written: what lies behind them depends on the order of floating-point sums.
DIGITS = 6


@dataclass(frozen=True)
class Curve:
    """A small table that is written as CSV."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def bits_per_byte(loss_sum: Any, byte_sum: Any) -> Any:
    """Summed nats over summed bytes, as bits a byte."""
    return loss_sum / math.log(2) / byte_sum


def sum_by_document(values: npt.NDArray[Any], documents: IntArray) -> FloatArray:
    """The sum of each document's rows, in the order of the documents."""
    _, numbers = np.unique(documents, return_inverse=True)
    return np.bincount(numbers, weights=values.astype(np.float64)).astype(np.float64)


def bootstrap_sums(values: FloatArray, samples: int, seed: int) -> FloatArray:
    """Sums (samples, columns) of `values` (documents, columns) over documents drawn with replacement.

    All columns of a sample are of the same documents, which makes differences between them paired.
    """
    random = np.random.default_rng(seed)
    num_documents = len(values)
    sums = np.empty((samples, values.shape[1]))
    step = max(1, 10_000_000 // num_documents)
    for start in range(0, samples, step):
        some = sums[start : start + step]
        counts = random.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=len(some))
        some[:] = counts @ values
    return sums


def interval(samples: FloatArray) -> tuple[float, float]:
    """The middle 95% of the samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Scores:
    """Losses in nats of the same rows in every column, and what they are divided by."""

    scorer: Scorer
    losses: Mapping[str, npt.NDArray[np.floating[Any]]]

    def row_losses(self, column: str) -> FloatArray:
        """The summed loss of each row."""
        sums: FloatArray = self.losses[column].sum(axis=1, dtype=np.float64)
        return sums

    def bpb(self, column: str, rows: npt.NDArray[np.bool_] | slice = slice(None)) -> float:
        """Bits per byte over all rows, or over the given ones."""
        return float(bits_per_byte(self.row_losses(column)[rows].sum(), self.scorer.bytes[rows].sum()))

    def perplexity(self, column: str) -> float:
        """exp of the mean loss of a label."""
        return math.exp(self.row_losses(column).sum() / self.scorer.is_label.sum())

    def saved_bits(self) -> FloatArray:
        """By how many bits retrieval lowered the loss of each label."""
        return (self.losses["off"].astype(np.float64) - self.losses["on"]) / math.log(2)

    def bootstrap(self, samples: int, seed: int) -> dict[str, FloatArray]:
        """Bits per byte of each column over resampled documents."""
        per_row = [*(self.row_losses(column) for column in COLUMNS), self.scorer.bytes]
        per_document = [sum_by_document(values, self.scorer.documents) for values in per_row]
        sums = bootstrap_sums(np.stack(per_document, axis=1), samples, seed)
        return {column: bits_per_byte(sums[:, place], sums[:, -1]) for place, column in enumerate(COLUMNS)}


def metrics_of(scores: Scores, resampled: Mapping[str, FloatArray]) -> dict[str, float | int]:
    """The flat figures of metrics/evaluate.json; gains are bits per byte saved, positive is better."""
    scorer = scores.scorer
    metrics: dict[str, float | int] = {f"test_bpb_{column}": scores.bpb(column) for column in COLUMNS}
    for one, other in DIFFERENCES:
        name = f"gain_{one}_vs_{other}"
        metrics[name] = scores.bpb(other) - scores.bpb(one)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = interval(resampled[other] - resampled[one])
    metrics |= {f"test_perplexity_{column}": scores.perplexity(column) for column in COLUMNS}
    saved = scores.saved_bits()[scorer.is_label]
    metrics["share_tokens_helped"] = float(np.mean(saved >= NOTICEABLE_BITS))
    metrics["share_tokens_hurt"] = float(np.mean(saved <= -NOTICEABLE_BITS))
    metrics["test_documents"] = len(np.unique(scorer.documents))
    metrics["test_chunks"] = len(scorer.rows)
    metrics["test_tokens"] = int(scorer.is_label.sum())
    metrics["test_bytes"] = int(scorer.bytes.sum())
    return {name: round(value, DIGITS) for name, value in metrics.items()}


def leakage_curve(scores: Scores, runs: IntArray, chunk_size: int) -> Curve:
    """bpb(alpha) of section 2.6: over chunks that share at most alpha * M tokens in a row with a neighbor.

    `runs` is the longest run of each row. An alpha under which no text is left has no row.
    """
    columns = ("baseline", "off", "on")
    rows = []
    for alpha in ALPHAS:
        below = runs <= alpha * chunk_size
        if scores.scorer.bytes[below].any():
            figures = (round(scores.bpb(column, below), DIGITS) for column in columns)
            rows.append((alpha, int(below.sum()), *figures))
    return Curve(("alpha", "chunks", *columns), tuple(rows))


def columns_curve(scores: Scores, resampled: Mapping[str, FloatArray]) -> Curve:
    """Bits per byte of the four columns with their intervals."""
    rows = []
    for column in COLUMNS:
        figures = (scores.bpb(column), *interval(resampled[column]), scores.perplexity(column))
        rows.append((column, *(round(figure, DIGITS) for figure in figures)))
    return Curve(("column", "test_bpb", "low", "high", "test_perplexity"), tuple(rows))
