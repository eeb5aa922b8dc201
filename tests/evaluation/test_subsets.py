"""Figures over parts of the text against loops, and where a part has too little text for a figure."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from retro_model.evaluation.statistics import LEAST_DOCUMENTS, PIECE, ColumnScores
from retro_model.evaluation.subsets import (
    ALPHAS,
    GAIN_HEAD,
    OVERLAP_CLASSES,
    document_that_gained_most,
    gains_of,
    leakage_curve,
    metrics_of_parts,
    overlap_curve,
)

SAMPLES, SEED, CHUNK_SIZE = 300, 4, 16


def random_scores(sizes: list[int], seed: int = 0) -> ColumnScores:
    """Rows of documents with so many rows each; the last row of every other document has no byte."""
    random = np.random.default_rng(seed)
    documents = np.repeat(10 + 3 * np.arange(len(sizes)), sizes)
    num_rows = len(documents)
    num_bytes = random.integers(20, 60, num_rows)
    num_bytes[np.cumsum(sizes)[::2] - 1] *= np.array(sizes)[::2] == 1  # documents of one row keep theirs
    num_bytes[np.cumsum(sizes)[np.array(sizes) == 1] - 1] = 30
    shape = (num_rows, CHUNK_SIZE)
    scores = ColumnScores(documents, num_bytes, np.ones(shape, bool), random.normal(0, 1, shape))
    for column, mean in (("baseline", 50), ("mixed", 49), ("off", 51), ("on", 48)):
        scores.add(column, random.normal(mean, 8, num_rows), num_rows * CHUNK_SIZE)
    return scores


def slow_gain(scores: ColumnScores, rows: list[int], one: str, other: str) -> tuple[float, float, float]:
    """The gain, and the middle 95% of samples of units that are put together one by one."""
    documents = sorted({int(scores.documents[row]) for row in rows})
    units: list[list[int]] = []
    for document in documents:
        own = [row for row in rows if scores.documents[row] == document]
        size = len(own) if len(documents) >= LEAST_DOCUMENTS else PIECE
        units += [own[start : start + size] for start in range(0, len(own), size)]
    joined: list[list[int]] = []
    waiting: list[int] = []
    for unit in units:  # what has no byte is of the unit before it, or of the first one
        if scores.bytes[unit].sum() > 0:
            joined.append(waiting + unit)
            waiting = []
        elif joined:
            joined[-1] += unit
        else:
            waiting += unit

    def gain(drawn: list[int]) -> float:
        saved = sum(float(scores.row_losses[other][row] - scores.row_losses[one][row]) for row in drawn)
        return saved / math.log(2) / sum(int(scores.bytes[row]) for row in drawn)

    random = np.random.default_rng(SEED)
    found = []
    for counts in random.multinomial(len(joined), np.full(len(joined), 1 / len(joined)), size=SAMPLES):
        found.append(gain([row for unit, count in zip(joined, counts, strict=True) for row in unit * int(count)]))
    low, high = np.percentile(found, [2.5, 97.5])
    return gain(rows), float(low), float(high)


FEW, MANY = [9, 1, 14, 3, 22, 1, 8], [1, 4, 2] * 12


@pytest.mark.parametrize("sizes", [FEW, MANY])
def test_gains_of_a_part_are_those_of_loops(sizes: list[int]) -> None:
    scores = random_scores(sizes)
    part = np.random.default_rng(1).random(len(scores.documents)) < 0.6
    rows = np.flatnonzero(part).tolist()
    for gain, pair in zip(gains_of(scores, part, SAMPLES, SEED), (("on", "off"), ("on", "baseline")), strict=True):
        assert tuple(gain) == pytest.approx(slow_gain(scores, rows, *pair), abs=2e-6)
    assert gains_of(scores, part, SAMPLES, SEED) == gains_of(scores, part, SAMPLES, SEED)


def test_pieces_without_a_byte_never_stand_alone() -> None:
    """Else a sample of nothing but these would have no bits per byte."""
    documents, num_bytes = np.array([1, 2, 3, 4]), np.array([0, 9, 0, 5])
    scores = ColumnScores(documents, num_bytes, np.ones((4, 2), bool), np.zeros((4, 2)))
    for column in ("baseline", "off", "on"):
        scores.add(column, np.ones(4), 8)
    assert scores.units().tolist() == [0, 0, 0, 1]
    assert all(np.isfinite(bpb).all() for bpb in scores.bootstrap(200, 0).values())


@pytest.mark.parametrize("sizes", [FEW, MANY])
def test_the_curves_have_the_gains_of_their_parts(sizes: list[int]) -> None:
    scores = random_scores(sizes)
    runs = np.random.default_rng(2).integers(0, CHUNK_SIZE + 1, len(scores.documents))
    leakage, overlap = leakage_curve(scores, runs, SAMPLES, SEED), overlap_curve(scores, runs, SAMPLES, SEED)
    assert leakage.column("alpha") == ALPHAS
    bounds = dict(zip(OVERLAP_CLASSES, (*OVERLAP_CLASSES[1:], 10**6), strict=True))
    parts = [(leakage, row, runs <= row[0] * CHUNK_SIZE) for row in leakage.rows]
    parts += [(overlap, row, (runs >= row[0]) & (runs < bounds[row[0]])) for row in overlap.rows]
    assert len(overlap.rows) == 5
    for curve, row, part in parts:
        cells = dict(zip(curve.head, row, strict=True))
        assert cells["chunks"] == part.sum()
        for column in ("baseline", "off", "on"):
            bits = scores.row_losses[column][part].sum() / math.log(2)
            assert cells[column] == pytest.approx(bits / scores.bytes[part].sum(), abs=2e-6)
        expected = [
            slow_gain(scores, np.flatnonzero(part).tolist(), *pair) for pair in (("on", "off"), ("on", "baseline"))
        ]
        assert [cells[name] for name in GAIN_HEAD] == pytest.approx([*expected[0], *expected[1]], abs=2e-6)


def metrics(scores: ColumnScores, runs: npt.NDArray[Any], shared: npt.NDArray[np.bool_]) -> dict[str, float | int]:
    return metrics_of_parts(scores, runs, shared, SAMPLES, SEED)


def named(found: dict[str, float | int], name: str) -> tuple[float | int, ...]:
    return tuple(found[f"{name}{end}"] for end in ("", "_low", "_high"))


@pytest.mark.parametrize("sizes", [FEW, MANY])
def test_the_flat_figures_are_those_of_loops(sizes: list[int]) -> None:
    scores = random_scores(sizes)
    random = np.random.default_rng(3)
    runs = random.integers(0, 2 * CHUNK_SIZE, len(scores.documents)) // 2
    shared = random.random(len(runs)) < 0.4
    found = metrics(scores, runs, shared)
    assert found["share_chunks_shared_32"] == pytest.approx(shared.mean(), abs=1e-6)
    assert found["share_chunks_little_overlap"] == pytest.approx((runs <= 2).mean(), abs=1e-6)
    for one, other in (("on", "off"), ("on", "baseline")):
        saved = scores.row_losses[other] - scores.row_losses[one]
        by_document = {number: saved[scores.documents == number].sum() for number in scores.documents.tolist()}
        best = max(by_document, key=lambda number: by_document[number])
        assert document_that_gained_most(scores, one, other) == best
        for part, rows in (
            ("little_overlap", runs <= 2),
            ("unshared_32", ~shared),
            ("without_best", scores.documents != best),
        ):
            expected = slow_gain(scores, np.flatnonzero(rows).tolist(), one, other)
            assert named(found, f"gain_{one}_vs_{other}_{part}") == pytest.approx(expected, abs=2e-6), part
    for column in ("baseline", "off", "on"):
        bits = scores.row_losses[column][~shared].sum() / math.log(2)
        assert found[f"test_bpb_{column}_unshared_32"] == pytest.approx(bits / scores.bytes[~shared].sum(), abs=2e-6)


def test_one_document_that_gains_all_leaves_nothing_without_it() -> None:
    scores = random_scores([5] * 30)
    scores.row_losses["on"] = scores.row_losses["off"].copy()
    scores.row_losses["on"][35:40] -= 40
    found = metrics(scores, np.zeros(150, int), np.zeros(150, bool))
    assert found["gain_on_vs_off_unshared_32"] > 0
    assert named(found, "gain_on_vs_off_without_best") == (0, 0, 0)


def test_what_has_no_text_is_left_out() -> None:
    scores = random_scores([6, 7])
    everything = np.ones(13, bool)
    found = metrics(scores, np.full(13, CHUNK_SIZE), everything)
    assert found["share_chunks_shared_32"] == 1 and found["share_chunks_little_overlap"] == 0
    assert not any("unshared" in name or "vs_off_little" in name for name in found)
    assert "gain_on_vs_off_without_best" in found
    alone = random_scores([6])
    assert not any("without_best" in name for name in metrics(alone, np.zeros(6, int), ~everything[:6]))


def test_a_single_piece_has_no_interval() -> None:
    """One piece drawn again and again is always itself: an interval of no width would exclude zero."""
    scores = random_scores([6, 7])
    part = scores.documents == scores.documents[0]
    gain, _ = gains_of(scores, part, SAMPLES, SEED)
    assert (gain.low, gain.high) == (None, None)
    assert gain.gain == pytest.approx(slow_gain(scores, np.flatnonzero(part).tolist(), "on", "off")[0], abs=2e-6)
    found = metrics(scores, np.where(part, 0, CHUNK_SIZE), ~part)
    names = [name for name in found if name.startswith("gain") and "without_best" not in name]
    assert not any(name.endswith(("_low", "_high")) for name in names) and len(names) == 4
