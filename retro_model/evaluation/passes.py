"""The passes over the held-out text that an evaluation compares: its columns and its sweeps.

A sweep takes what was stored: other numbers of neighbors, a part of each, or those of a share of the
database. Nothing is searched again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import Float64Array, FloatArray, IntArray
from retro_model.core.progress import Progress
from retro_model.core.rows import NO_ROW
from retro_model.evaluation.inputs import Inputs
from retro_model.evaluation.scoring import Part, Scorer
from retro_model.evaluation.statistics import COLUMNS, DIGITS, Curve, bits_per_byte
from retro_model.network.model import RETRO
from retro_model.training.copying import Rule, best_weight, mixed_losses, rule_of_rows

# What of the database is left in the sweep over its size: documents by a hash of their numbers.
DATABASE_SHARES = (0.1, 1 / 3, 1.0)
PARTS: tuple[Part, ...] = ("neighbor", "continuation", "both")

# The pass of the baseline over the valid split, on which the control's weight is chosen.
VALID = "baseline on valid"
# Passes whose losses are kept token by token.
KEPT = ("baseline", "off", "on", VALID)


class Pass(NamedTuple):
    """One reading of all held-out rows, by the model of that name."""

    name: str
    model: str
    scorer: Scorer
    neighbors: IntArray | None
    part: Part = "both"


@dataclass(frozen=True)
class Scored:
    """What came of the passes, by their names."""

    losses: dict[str, FloatArray]  # of KEPT alone, nats (rows, M)
    row_losses: dict[str, Float64Array]  # of every pass, nats (rows,)
    timings: dict[str, float]


def columns(
    inputs: Inputs, train: Inputs, scorer: Scorer, on_train: Scorer | None, knn: int, seed: int
) -> Iterator[Pass]:
    """The passes that are columns; `on_train` scores with the train chunks where the database is another one."""
    yield Pass("baseline", "baseline", scorer, None)
    yield Pass("off", "retro", scorer, None)
    yield Pass("on", "retro", scorer, inputs.neighbors["ids"][scorer.rows][:, :knn])
    yield Pass("random", "retro", scorer, random_neighbors(len(scorer.rows), knn, inputs.database.rows, seed))
    if on_train is not None:
        yield Pass("on_train", "retro", on_train, train.neighbors["ids"][on_train.rows][:, :knn])


def sweeps(inputs: Inputs, scorer: Scorer, ks: Sequence[int], knn: int) -> Iterator[Pass]:
    """The passes of the sweeps that are no columns: over numbers of neighbors `ks`, parts and shares."""
    nearest = inputs.neighbors["ids"][scorer.rows]
    for k in ks:
        if k not in (0, knn):
            yield Pass(f"knn {k}", "retro", scorer, nearest[:, :k])
    for part in PARTS:
        if part != "both":
            yield Pass(f"part {part}", "retro", scorer, nearest[:, :knn], part)
    documents = inputs.database["documents"][:]
    for share in DATABASE_SHARES:
        if share < 1:
            yield Pass(f"share {share}", "retro", scorer, neighbors_of_share(nearest, documents, share)[:, :knn])


def score_all(models: Mapping[str, RETRO], passes: list[Pass]) -> Scored:
    """The losses of every pass."""
    scored = Scored({}, {}, {})
    with Progress("evaluate", sum(each.scorer.num_sequences for each in passes), unit="sequence") as shown:
        for each in passes:
            started = time.perf_counter()
            losses = each.scorer.losses(models[each.model], each.neighbors, shown, each.part)
            seconds = time.perf_counter() - started
            scored.row_losses[each.name] = losses.sum(axis=1, dtype=np.float64)
            if each.name in COLUMNS:
                scored.timings[f"tokens_per_second_{each.name}"] = float(each.scorer.is_label.sum()) / seconds
            if each.name in KEPT:
                scored.losses[each.name] = losses
    return scored


def sweep_curves(scored: Scored, scorer: Scorer, inputs: Inputs, ks: Sequence[int], knn: int) -> dict[str, Curve]:
    """Bits per byte by number of neighbors, by what of them is shown, and by share of the database."""

    def bpb(name: str) -> float:
        return round(float(bits_per_byte(scored.row_losses[name].sum(), scorer.bytes.sum())), DIGITS)

    by_knn = [(k, bpb({0: "off", knn: "on"}.get(k, f"knn {k}"))) for k in ks]
    parts = {"none": bpb("off")} | {part: bpb("on" if part == "both" else f"part {part}") for part in PARTS}
    by_part = [(part, found, round(parts["none"] - found, DIGITS)) for part, found in parts.items()]
    nearest, documents = inputs.neighbors["ids"][scorer.rows], inputs.database["documents"][:]
    by_share = []
    for share in DATABASE_SHARES:
        left = (neighbors_of_share(nearest, documents, share) != NO_ROW).sum(axis=1)
        figures = (round(float(left.mean()), DIGITS), round(float((left < knn).mean()), DIGITS))
        by_share.append((round(share, 3), bpb("on" if share == 1 else f"share {share}"), *figures))
    return {
        "knn": Curve(("knn", "test_bpb"), tuple(by_knn)),
        "part": Curve(("part", "test_bpb", "gain"), tuple(by_part)),
        "database": Curve(("share", "test_bpb", "neighbors_left", "chunks_short"), tuple(by_share)),
    }


# ---- the control without a network that reads -------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """The plain decoder mixed with the bigram rule, and what the rule alone gets right."""

    row_losses: Float64Array  # nats (rows,)
    weight: float  # of the rule
    hits_own: float  # share of the labels, with the neighbors of the column `on`
    hits_random: float  # with those of the column `random`


def mix_with_rule(
    scored: Scored, inputs: Inputs, scorer: Scorer, valid: Inputs, valid_scorer: Scorer, knn: int, seed: int
) -> Mixed:
    """The column `mixed`: its weight is the one with the lowest bits per byte on the valid split."""
    nearest = valid.neighbors["ids"][valid_scorer.rows][:, :knn]
    weight = best_weight(scored.losses[VALID], _rule(valid_scorer, nearest))
    own = _rule(scorer, inputs.neighbors["ids"][scorer.rows][:, :knn])
    drawn = _rule(scorer, random_neighbors(len(scorer.rows), knn, inputs.database.rows, seed))
    num_labels = int(scorer.is_label.sum())
    return Mixed(
        mixed_losses(scored.losses["baseline"], own, weight).sum(axis=1),
        weight,
        float(own.right.sum()) / num_labels,
        float(drawn.right.sum()) / num_labels,
    )


def _rule(scorer: Scorer, neighbors: IntArray) -> Rule:
    """The bigram rule on the scorer's rows, over the neighbors (rows, K) that each row has."""
    assert scorer.database is not None, "neighbors are rows of a database"
    return rule_of_rows(scorer.inputs, scorer.labels, scorer.follows, neighbors, scorer.database)


# ---- which neighbors --------------------------------------------------------------------------------


def random_neighbors(num_rows: int, knn: int, database_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """The control: (num_rows, knn) rows of the database, each as likely as any other."""
    return np.random.default_rng(seed).integers(database_rows, size=(num_rows, knn))


def neighbors_of_share(ids: IntArray, documents: IntArray, share: float) -> npt.NDArray[np.int64]:
    """The neighbors (rows, K) that a share of the database's documents holds, nearest first, then -1.

    `documents` (database rows,) are the numbers of documents; which of them a share has follows from a hash
    of the number, so a smaller share is a part of a larger one. Nothing is searched again: of K stored, a
    tenth of the database leaves K / 10 on average.
    """
    kept = (ids != NO_ROW) & (_hash_shares(documents[np.maximum(ids, 0)]) < share)
    order = np.argsort(~kept, axis=1, kind="stable")
    left = np.where(np.take_along_axis(kept, order, axis=1), np.take_along_axis(ids, order, axis=1), NO_ROW)
    return left.astype(np.int64)


def _hash_shares(numbers: IntArray) -> Float64Array:
    """A hash of each number, from 0 to 1 (the mixing of splitmix64)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
