"""The passes over the held-out text that an evaluation compares: its columns and its sweeps.

Sweeps reuse the stored neighbors: other numbers of them, a part of each, or those from a share of the database.
Nothing is searched again.
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
from retro_model.network.language_model import LanguageModel
from retro_model.training.copying import Rule, best_weight, mixed_losses, rule_of_rows

# Shares of the database's documents in the sweep over its size, chosen by a hash of their numbers.
DATABASE_SHARES = (0.1, 1 / 3, 1.0)
PARTS: tuple[Part, ...] = ("neighbor", "continuation", "both")

# The baseline's pass over the valid split, on which the weight of `mixed` is chosen.
VALID = "baseline on valid"
# Passes whose losses are kept per token.
KEPT = ("baseline", "off", "on", VALID)


class Pass(NamedTuple):
    """One pass of a model over all rows of a scorer."""

    name: str
    model: str
    scorer: Scorer
    neighbors: IntArray | None
    part: Part = "both"


@dataclass(frozen=True)
class PassScores:
    """Losses by name of the pass."""

    losses: dict[str, FloatArray]  # nats (rows, M), only for passes in KEPT
    row_losses: dict[str, Float64Array]  # nats (rows,), for every pass
    timings: dict[str, float]


def column_passes(
    inputs: Inputs, train: Inputs, scorer: Scorer, on_train: Scorer | None, knn: int, seed: int
) -> Iterator[Pass]:
    """Yield the passes that are columns.

    `on_train` scores with neighbors from the train chunks, if the database is another one.
    """
    yield Pass("baseline", "baseline", scorer, None)
    yield Pass("off", "retro", scorer, None)
    yield Pass("on", "retro", scorer, inputs.neighbors["ids"][scorer.rows][:, :knn])
    yield Pass("random", "retro", scorer, random_neighbors(len(scorer.rows), knn, inputs.database.rows, seed))
    if on_train is not None:
        yield Pass("on_train", "retro", on_train, train.neighbors["ids"][on_train.rows][:, :knn])


def sweep_passes(inputs: Inputs, scorer: Scorer, ks: Sequence[int], knn: int) -> Iterator[Pass]:
    """Yield the other passes that sweeps need: over numbers of neighbors `ks`, parts and database shares."""
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


def score_all(models: Mapping[str, LanguageModel], passes: list[Pass]) -> PassScores:
    """Run every pass."""
    scored = PassScores({}, {}, {})
    with Progress("evaluate", sum(each.scorer.num_sequences for each in passes), unit="sequence") as progress:
        for each in passes:
            started = time.perf_counter()
            losses = each.scorer.losses(models[each.model], each.neighbors, progress, each.part)
            seconds = time.perf_counter() - started
            scored.row_losses[each.name] = losses.sum(axis=1, dtype=np.float64)
            if each.name in COLUMNS:
                scored.timings[f"tokens_per_second_{each.name}"] = float(each.scorer.is_label.sum()) / seconds
            if each.name in KEPT:
                scored.losses[each.name] = losses
    return scored


def sweep_curves(scored: PassScores, scorer: Scorer, inputs: Inputs, ks: Sequence[int], knn: int) -> dict[str, Curve]:
    """Bits per byte by number of neighbors, by part of each neighbor, and by share of the database."""

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


# ---- the control: the bigram rule instead of a network that reads neighbors --------------------------


@dataclass(frozen=True)
class RuleMixture:
    """The plain decoder mixed with the bigram rule, and how often the rule alone is right."""

    row_losses: Float64Array  # nats (rows,)
    weight: float  # of the rule in the mixture
    hits_own: float  # share of labels that the rule gets right with the neighbors of `on`
    hits_random: float  # the same with the neighbors of `random`


def mix_with_rule(
    scored: PassScores, inputs: Inputs, scorer: Scorer, valid: Inputs, valid_scorer: Scorer, knn: int, seed: int
) -> RuleMixture:
    """Compute the column `mixed`, with the weight that gives the lowest bits per byte on the valid split."""
    nearest = valid.neighbors["ids"][valid_scorer.rows][:, :knn]
    weight = best_weight(scored.losses[VALID], _apply_rule(valid_scorer, nearest))
    own = _apply_rule(scorer, inputs.neighbors["ids"][scorer.rows][:, :knn])
    drawn = _apply_rule(scorer, random_neighbors(len(scorer.rows), knn, inputs.database.rows, seed))
    num_labels = int(scorer.is_label.sum())
    return RuleMixture(
        mixed_losses(scored.losses["baseline"], own, weight).sum(axis=1),
        weight,
        float(own.right.sum()) / num_labels,
        float(drawn.right.sum()) / num_labels,
    )


def _apply_rule(scorer: Scorer, neighbors: IntArray) -> Rule:
    """The bigram rule on the scorer's rows, each with its neighbors (rows, K)."""
    assert scorer.database is not None, "neighbors are rows of a database"
    return rule_of_rows(scorer.inputs, scorer.labels, scorer.follows, neighbors, scorer.database)


# ---- choosing neighbors -----------------------------------------------------------------------------


def random_neighbors(num_rows: int, knn: int, database_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """The control: database rows (num_rows, knn), drawn uniformly."""
    return np.random.default_rng(seed).integers(database_rows, size=(num_rows, knn))


def neighbors_of_share(ids: IntArray, documents: IntArray, share: float) -> npt.NDArray[np.int64]:
    """Keep the neighbors (rows, K) that lie in a share of the database's documents: nearest first, then -1.

    `documents` (database rows,) holds document numbers. A hash of the number decides which documents belong to a
    share, so a smaller share is a subset of a larger one. Nothing is searched again: of K stored neighbors, a tenth
    of the database leaves K / 10 on average.
    """
    kept = (ids != NO_ROW) & (_hash_shares(documents[np.maximum(ids, 0)]) < share)
    order = np.argsort(~kept, axis=1, kind="stable")
    left = np.where(np.take_along_axis(kept, order, axis=1), np.take_along_axis(ids, order, axis=1), NO_ROW)
    return left.astype(np.int64)


def _hash_shares(numbers: IntArray) -> Float64Array:
    """Hash each number to a value from 0 to 1 (the mixing function of splitmix64)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
