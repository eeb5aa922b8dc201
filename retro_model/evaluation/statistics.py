"""The figures of an evaluation: bits per byte, perplexity and gains with their intervals, over all of the text.

All are functions of the losses of chunk rows, so that none needs a model or a file. subsets.py has those of
parts of the text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float64Array, IntArray

# Every column that there can be, in the order in which they are shown; the last two only where asked for.
COLUMNS = ("baseline", "mixed", "off", "on", "random", "on_train", "compared")
# Which of two columns gains against which.
DIFFERENCES = (
    ("on", "off"),
    ("on", "baseline"),
    ("random", "off"),
    ("on", "random"),
    ("on", "mixed"),
    ("mixed", "baseline"),
    ("on", "on_train"),
    ("on", "compared"),
)

# A token counts as helped or hurt from this change of its loss on, in bits.
NOTICEABLE_BITS = 0.1

# Documents that gained and that lost most are shown, so many of each.
DOCUMENTS_SHOWN = 5

# Fewer documents than this say little of how much they differ: then pieces of so many rows are resampled.
LEAST_DOCUMENTS, PIECE = 20, 8

# Digits that are written: what lies behind them depends on the order of floating-point sums.
DIGITS = 6


@dataclass(frozen=True)
class Curve:
    """A small table that is written as CSV."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def column(self, name: str) -> tuple[Any, ...]:
        """The values of one column, from top to bottom."""
        return tuple(row[self.head.index(name)] for row in self.rows)


def bits_per_byte(loss_sum: Any, byte_sum: Any) -> Any:
    """Summed nats over summed bytes, as bits a byte."""
    return loss_sum / math.log(2) / byte_sum


def sum_by_document(values: npt.NDArray[Any], documents: IntArray) -> Float64Array:
    """The sum of each document's rows, in the order of the documents."""
    _, numbers = np.unique(documents, return_inverse=True)
    return np.bincount(numbers, weights=values.astype(np.float64)).astype(np.float64)


def resampled_units(documents: IntArray) -> IntArray:
    """What is drawn to see how much depends on the text (rows,): documents, or pieces of few of them.

    The rows of a document stand one after the other.
    One document drawn again and again is always itself: its interval would have no width.
    """
    found, first, numbers = np.unique(documents, return_index=True, return_inverse=True)
    if len(found) >= LEAST_DOCUMENTS:
        return documents
    row_of_document = np.arange(len(documents)) - first[numbers]
    pieces: IntArray = np.unique(np.stack([numbers, row_of_document // PIECE]), axis=1, return_inverse=True)[1]
    return pieces.reshape(-1)


def bootstrap_sums(values: Float64Array, samples: int, seed: int) -> Float64Array:
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


def interval(samples: Float64Array) -> tuple[float, float]:
    """The middle 95% of the samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Scores:
    """Losses in nats of the same chunk rows in every column, and what they are divided by.

    `row_losses` (rows,) and `num_labels` are filled column by column. `saved` (rows, M) is by how many bits
    retrieval lowered the loss of each label, 0 where there is none.
    """

    documents: IntArray  # (rows,)
    bytes: IntArray  # (rows,)
    is_label: BoolArray  # (rows, M)
    saved: Float64Array
    row_losses: dict[str, Float64Array] = field(default_factory=dict)
    num_labels: dict[str, int] = field(default_factory=dict)

    def add(self, column: str, row_losses: Float64Array, num_labels: int) -> None:
        """Adds a column; `num_labels` is of its own tokenizer."""
        assert column in COLUMNS and row_losses.shape == self.bytes.shape, column
        self.row_losses[column], self.num_labels[column] = row_losses, num_labels

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that there are, in the order in which they are shown."""
        return tuple(column for column in COLUMNS if column in self.row_losses)

    @property
    def differences(self) -> tuple[tuple[str, str], ...]:
        """The pairs of columns that there are and that are compared."""
        return tuple(pair for pair in DIFFERENCES if set(pair) <= self.row_losses.keys())

    def bpb(self, column: str, rows: BoolArray | slice = slice(None)) -> float:
        """Bits per byte over all rows, or over the given ones."""
        return float(bits_per_byte(self.row_losses[column][rows].sum(), self.bytes[rows].sum()))

    def perplexity(self, column: str) -> float:
        """exp of the mean loss of a label."""
        return math.exp(self.row_losses[column].sum() / self.num_labels[column])

    def bootstrap(self, samples: int, seed: int, rows: BoolArray | slice = slice(None)) -> dict[str, Float64Array]:
        """Bits per byte of each column over resampled documents, or pieces where documents are few.

        Over all rows, or over the given ones.
        """
        per_row = [*(self.row_losses[column][rows] for column in self.columns), self.bytes[rows]]
        units = self.units(rows)
        per_unit = [sum_by_document(values, units) for values in per_row]
        sums = bootstrap_sums(np.stack(per_unit, axis=1), samples, seed)
        return {column: bits_per_byte(sums[:, place], sums[:, -1]) for place, column in enumerate(self.columns)}

    def units(self, rows: BoolArray | slice = slice(None)) -> IntArray:
        """What is drawn of the rows, each with a byte at least: what has none is of the unit before or after it.

        The end of a document can be a chunk alone. A sample of nothing else would have no bits per byte.
        """
        _, units = np.unique(resampled_units(self.documents[rows]), return_inverse=True)
        has_bytes = sum_by_document(self.bytes[rows], units) > 0
        joined: IntArray = np.maximum(np.cumsum(has_bytes) - 1, 0)[units]
        return joined


# ---- the flat figures ------------------------------------------------------------------------------


def metrics_of(scores: Scores, resampled: Mapping[str, Float64Array]) -> dict[str, float | int]:
    """The flat figures of the whole text; gains are bits per byte saved, positive is better.

    `saved_share_vs_baseline` is the gain over the baseline as a part of the baseline's bits.
    """
    metrics: dict[str, float | int] = {f"test_bpb_{column}": scores.bpb(column) for column in scores.columns}
    for one, other in scores.differences:
        name = f"gain_{one}_vs_{other}"
        metrics[name] = scores.bpb(other) - scores.bpb(one)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = interval(resampled[other] - resampled[one])
    name = "saved_share_vs_baseline"
    metrics[name] = 1 - scores.bpb("on") / scores.bpb("baseline")
    metrics[f"{name}_low"], metrics[f"{name}_high"] = interval(1 - resampled["on"] / resampled["baseline"])
    metrics |= {f"test_perplexity_{column}": scores.perplexity(column) for column in scores.columns}
    metrics["share_tokens_helped"], metrics["share_tokens_hurt"] = helped_and_hurt(scores.saved[scores.is_label])
    metrics["test_documents"] = len(np.unique(scores.documents))
    metrics["test_chunks"] = len(scores.bytes)
    metrics["test_tokens"] = int(scores.is_label.sum())
    metrics["test_bytes"] = int(scores.bytes.sum())
    return {name: round(value, DIGITS) for name, value in metrics.items()}


def helped_and_hurt(saved: Float64Array) -> tuple[float, float]:
    """The shares of tokens whose loss retrieval lowered, and raised, noticeably."""
    if not len(saved):
        return 0.0, 0.0
    return float(np.mean(saved >= NOTICEABLE_BITS)), float(np.mean(saved <= -NOTICEABLE_BITS))


# ---- curves ----------------------------------------------------------------------------------------


def columns_curve(scores: Scores, resampled: Mapping[str, Float64Array]) -> Curve:
    """Bits per byte of all columns with their intervals."""
    rows = []
    for column in scores.columns:
        figures = (scores.bpb(column), *interval(resampled[column]), scores.perplexity(column))
        rows.append((column, *rounded(*figures)))
    return Curve(("column", "test_bpb", "low", "high", "test_perplexity"), tuple(rows))


def gains_curve(scores: Scores, resampled: Mapping[str, Float64Array]) -> Curve:
    """The bits per byte that one column saves against another, with their intervals."""
    rows = []
    for one, other in scores.differences:
        gain = scores.bpb(other) - scores.bpb(one)
        figures = rounded(gain, *interval(resampled[other] - resampled[one]))
        rows.append((f"{one} against {other}", one, other, *figures))
    return Curve(("pair", "one", "other", "gain", "low", "high"), tuple(rows))


def documents_curve(scores: Scores, names: Mapping[int, str]) -> Curve:
    """The documents that gained and that lost most by retrieval, in bits, the greatest gain first.

    `names` says where each document comes from. A document is in the table once.
    """
    numbers = np.unique(scores.documents)
    sums = [scores.row_losses["off"], scores.row_losses["on"], scores.bytes, np.ones(len(scores.bytes))]
    off, on, size, chunks = (sum_by_document(values, scores.documents) for values in sums)
    saved = np.round((off - on) / math.log(2), DIGITS)
    order = np.argsort(-saved, kind="stable")
    order = order[size[order] > 0]
    if len(order) > 2 * DOCUMENTS_SHOWN:
        order = np.concatenate([order[:DOCUMENTS_SHOWN], order[-DOCUMENTS_SHOWN:]])
    rows = []
    for place in order:
        figures = (bits_per_byte(off[place], size[place]), bits_per_byte(on[place], size[place]), saved[place])
        rows.append((names[int(numbers[place])], int(chunks[place]), int(size[place]), *rounded(*figures)))
    return Curve(("document", "chunks", "bytes", "off", "on", "saved_bits"), tuple(rows))


def rounded(*values: float) -> tuple[float, ...]:
    """The values with as many digits as are written."""
    return tuple(round(float(value), DIGITS) for value in values)
