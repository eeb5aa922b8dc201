"""Statistics over the whole text: bits per byte, perplexity, and gains with confidence intervals.

All are functions of the losses of chunk rows, so they need no model and no file. subsets.py has the statistics of
parts of the text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float64Array, IntArray

# All possible columns in display order; the last two exist only if the config asks for them.
COLUMNS = ("baseline", "mixed", "off", "on", "random", "on_train", "compared")
# Pairs of columns: the gain of the first over the second is reported.
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

# A token counts as helped or hurt if its loss changes by at least this many bits.
NOTICEABLE_BITS = 0.1

# The number of documents shown that gained most, and of those that lost most.
DOCUMENTS_SHOWN = 5

# With fewer documents than LEAST_DOCUMENTS the bootstrap says little about how much they differ, so pieces of PIECE
# rows are resampled instead.
LEAST_DOCUMENTS, PIECE = 20, 8

# Digits written to files; the digits after them depend on the order of floating-point sums.
DIGITS = 6


@dataclass(frozen=True)
class Curve:
    """A small table, written as CSV."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def column(self, name: str) -> tuple[Any, ...]:
        """The values of one column, top to bottom."""
        return tuple(row[self.head.index(name)] for row in self.rows)


def bits_per_byte(loss_sum: Any, byte_sum: Any) -> Any:
    """Convert summed nats and summed bytes to bits per byte."""
    return loss_sum / math.log(2) / byte_sum


def sum_by_document(values: npt.NDArray[Any], documents: IntArray) -> Float64Array:
    """Sum the rows of each document, in ascending order of document numbers."""
    _, numbers = np.unique(documents, return_inverse=True)
    return np.bincount(numbers, weights=values.astype(np.float64)).astype(np.float64)


def resampled_units(documents: IntArray) -> IntArray:
    """Return the resampling unit of each row (rows,): its document, or a piece of it if documents are few.

    The rows of a document must be consecutive. Resampling a single document always gives the same text: its interval
    would have no width.
    """
    found, first, numbers = np.unique(documents, return_index=True, return_inverse=True)
    if len(found) >= LEAST_DOCUMENTS:
        return documents
    row_of_document = np.arange(len(documents)) - first[numbers]
    pieces: IntArray = np.unique(np.stack([numbers, row_of_document // PIECE]), axis=1, return_inverse=True)[1]
    return pieces.reshape(-1)


def bootstrap_sums(values: Float64Array, samples: int, seed: int) -> Float64Array:
    """Sum `values` (documents, columns) over documents drawn with replacement: (samples, columns).

    All columns of a sample use the same documents, so differences between columns are paired.
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
    """The middle 95% of the samples: its lower and upper end."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class ColumnScores:
    """Losses in nats of the same chunk rows in every column, with the bytes and labels that normalize them.

    `row_losses` (rows,) and `num_labels` are filled column by column. `saved` (rows, M) is how many bits retrieval
    lowered the loss of each label by, 0 where there is no label.
    """

    documents: IntArray  # (rows,)
    bytes: IntArray  # (rows,)
    is_label: BoolArray  # (rows, M)
    saved: Float64Array
    row_losses: dict[str, Float64Array] = field(default_factory=dict)
    num_labels: dict[str, int] = field(default_factory=dict)

    def add(self, column: str, row_losses: Float64Array, num_labels: int) -> None:
        """Add a column; `num_labels` counts the labels of its own tokenizer."""
        assert column in COLUMNS and row_losses.shape == self.bytes.shape, column
        self.row_losses[column], self.num_labels[column] = row_losses, num_labels

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns present, in display order."""
        return tuple(column for column in COLUMNS if column in self.row_losses)

    @property
    def differences(self) -> tuple[tuple[str, str], ...]:
        """The pairs to compare of which both columns are present."""
        return tuple(pair for pair in DIFFERENCES if set(pair) <= self.row_losses.keys())

    def bpb(self, column: str, rows: BoolArray | slice = slice(None)) -> float:
        """Bits per byte over all rows, or over the given ones."""
        return float(bits_per_byte(self.row_losses[column][rows].sum(), self.bytes[rows].sum()))

    def perplexity(self, column: str) -> float:
        """exp of the mean loss per label."""
        return math.exp(self.row_losses[column].sum() / self.num_labels[column])

    def bootstrap(self, samples: int, seed: int, rows: BoolArray | slice = slice(None)) -> dict[str, Float64Array]:
        """Resample bits per byte of each column (samples,), over all rows or the given ones.

        Draws documents, or pieces if documents are few.
        """
        per_row = [*(self.row_losses[column][rows] for column in self.columns), self.bytes[rows]]
        units = self.units(rows)
        per_unit = [sum_by_document(values, units) for values in per_row]
        sums = bootstrap_sums(np.stack(per_unit, axis=1), samples, seed)
        return {column: bits_per_byte(sums[:, place], sums[:, -1]) for place, column in enumerate(self.columns)}

    def units(self, rows: BoolArray | slice = slice(None)) -> IntArray:
        """The resampling unit of each row. A unit without bytes joins the one before it or, at the start, after it.

        The end of a document can be a chunk of its own. A sample of only such chunks would have no bits per byte.
        """
        _, units = np.unique(resampled_units(self.documents[rows]), return_inverse=True)
        has_bytes = sum_by_document(self.bytes[rows], units) > 0
        joined: IntArray = np.maximum(np.cumsum(has_bytes) - 1, 0)[units]
        return joined


# ---- flat metrics ------------------------------------------------------------------------------------


def metrics_of(scores: ColumnScores, resampled: Mapping[str, Float64Array]) -> dict[str, float | int]:
    """Flat metrics of the whole text; gains are bits per byte saved, positive is better.

    `saved_share_vs_baseline` is the gain over the baseline as a share of the baseline's bits.
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
    """The shares of tokens whose loss retrieval lowered, and raised, by NOTICEABLE_BITS or more."""
    if not len(saved):
        return 0.0, 0.0
    return float(np.mean(saved >= NOTICEABLE_BITS)), float(np.mean(saved <= -NOTICEABLE_BITS))


# ---- curves ----------------------------------------------------------------------------------------


def columns_curve(scores: ColumnScores, resampled: Mapping[str, Float64Array]) -> Curve:
    """Bits per byte of all columns with intervals, and their perplexity."""
    rows = []
    for column in scores.columns:
        figures = (scores.bpb(column), *interval(resampled[column]), scores.perplexity(column))
        rows.append((column, *rounded(*figures)))
    return Curve(("column", "test_bpb", "low", "high", "test_perplexity"), tuple(rows))


def gains_curve(scores: ColumnScores, resampled: Mapping[str, Float64Array]) -> Curve:
    """Bits per byte that one column saves over another, with intervals."""
    rows = []
    for one, other in scores.differences:
        gain = scores.bpb(other) - scores.bpb(one)
        figures = rounded(gain, *interval(resampled[other] - resampled[one]))
        rows.append((f"{one} against {other}", one, other, *figures))
    return Curve(("pair", "one", "other", "gain", "low", "high"), tuple(rows))


def documents_curve(scores: ColumnScores, names: Mapping[int, str]) -> Curve:
    """The documents that gained and lost most by retrieval, in bits, the greatest gain first.

    `names` maps document numbers to their sources. No document appears twice.
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
    """Round the values to the digits that are written."""
    return tuple(round(float(value), DIGITS) for value in values)
