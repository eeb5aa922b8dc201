"""The bigram rule: predict tokens by copying from the neighbors alone, without a network.

The rule finds occurrences of the current token in the neighbors that it attends to, and predicts the token that
follows there. It is the simplest use of retrieval. So it shows before training how much there is to gain
(`copying_potential`), and mixed with a plain decoder it is a control that a trained RETRO should beat
(`mixed_losses`).

    rule = rule_of_rows(inputs, labels, follows, neighbor_ids, database)
    rule.right[labels != pad_id].mean()        # the share of tokens that it predicts correctly

Shape suffixes: C chunks, M tokens in a chunk, K neighbors, R tokens in a neighbor.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float64Array, FloatArray, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.training.sequences import PackedSequences

# Candidate weights of the rule. Not 1: a label that the rule gives probability 0 would have infinite loss.
WEIGHTS = tuple(step / 50 for step in range(50))

# Chunks whose neighbors are held in memory at once.
CHUNKS_AT_ONCE = 1024


class Rule(NamedTuple):
    """The rule's predictions, each (C, M); 0 or False where the label is padding."""

    probability: Float64Array  # of the label: its share of the followers of all matches; 0 without a match
    matched: BoolArray  # whether the current token occurs in the neighbors, followed by another token
    right: BoolArray  # whether the label is the most frequent follower (the smallest id of equally frequent ones)


def neighbors_read(follows_C: BoolArray, num_tokens: int) -> npt.NDArray[np.int64]:
    """For each token, the chunk whose neighbors it attends to, -1 for none: (C, M).

    As in chunked cross-attention (section 2.4): the last token of a chunk attends to the neighbors of its own chunk,
    the others to those of the previous chunk if it belongs to the same document (`follows_C`).
    """
    own_C = np.arange(len(follows_C))
    read_CM = np.repeat(np.where(follows_C, own_C - 1, NO_ROW)[:, None], num_tokens, axis=1)
    read_CM[:, -1] = own_C
    return read_CM


def bigram_rule(
    inputs_CM: IntArray, labels_CM: IntArray, retrieved_CKR: IntArray, follows_C: BoolArray, pad_id: int
) -> Rule:
    """The rule's predictions of the labels.

    `follows_C` says which chunks continue the document of the previous chunk; it must be False for the first. A
    match is a pair of adjacent tokens in one neighbor, neither of them padding.
    """
    empty = np.zeros(labels_CM.shape, dtype=np.bool_)
    rule = Rule(np.zeros(labels_CM.shape), empty, empty.copy())
    read_CM = neighbors_read(follows_C, labels_CM.shape[1])
    asked = (read_CM != NO_ROW) & (labels_CM != pad_id)
    vocabulary = 1 + max(int(tokens.max(initial=0)) for tokens in (inputs_CM, labels_CM, retrieved_CKR))

    # Encode every pair of adjacent tokens as one number: chunk, token, follower. Sorting then groups the
    # followers of a token in the neighbors of a chunk.
    before, after = retrieved_CKR[..., :-1].astype(np.int64), retrieved_CKR[..., 1:]
    chunks = np.arange(len(retrieved_CKR))[:, None, None]
    real = (before != pad_id) & (after != pad_id)
    pairs, counts = np.unique((((chunks * vocabulary) + before) * vocabulary + after)[real], return_counts=True)
    if not len(pairs):
        return rule
    contexts, first = np.unique(pairs // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, first)
    most = np.repeat(np.maximum.reduceat(counts, first), np.diff(first, append=len(pairs)))
    candidates = pairs[counts == most]
    _, smallest = np.unique(candidates // vocabulary, return_index=True)
    best = candidates[smallest] % vocabulary

    asked_labels = labels_CM[asked].astype(np.int64)
    context = read_CM[asked] * vocabulary + inputs_CM[asked]
    place, known = _look_up(contexts, context)
    pair_place, pair_known = _look_up(pairs, context * vocabulary + asked_labels)
    rule.matched[asked] = known
    rule.right[asked] = known & (best[place] == asked_labels)
    rule.probability[asked] = np.where(pair_known, counts[pair_place] / totals[place], 0.0)
    return rule


def _look_up(sorted_values: IntArray, wanted: IntArray) -> tuple[IntArray, BoolArray]:
    """The index of each wanted value in `sorted_values`, and whether it is present; if not, the index is arbitrary."""
    places = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return places, sorted_values[places] == wanted


def rule_of_rows(
    inputs_CM: IntArray, labels_CM: IntArray, follows_C: BoolArray, neighbors_CK: IntArray, database: Artifact
) -> Rule:
    """The rule with the database rows `neighbors_CK` (-1: none) as neighbors, computed block by block."""
    parts = []
    for start in range(0, len(labels_CM), CHUNKS_AT_ONCE):
        some = slice(max(start - 1, 0), start + CHUNKS_AT_ONCE)  # the first chunk reads the previous one's neighbors
        retrieved = retrieved_tokens(database, neighbors_CK[some])
        part = bigram_rule(inputs_CM[some], labels_CM[some], retrieved, follows_C[some], database.facts["pad_id"])
        parts.append([values[start - some.start :] for values in part])
    return Rule(*(np.concatenate(values) for values in zip(*parts, strict=True)))


# ---- mixed with a network ---------------------------------------------------------------------------


def mixed_losses(losses_CM: FloatArray, rule: Rule, weight: float) -> Float64Array:
    """Losses in nats of the mixture (1 - weight) * network + weight * rule; the network's own where nothing matches."""
    mixed: Float64Array = losses_CM.astype(np.float64)
    if weight > 0:
        with np.errstate(divide="ignore"):  # log(0) = -inf contributes nothing
            of_rule = np.log(weight) + np.log(rule.probability[rule.matched])
        mixed[rule.matched] = -np.logaddexp(np.log1p(-weight) - mixed[rule.matched], of_rule)
    return mixed


def best_weight(losses_CM: FloatArray, rule: Rule) -> float:
    """The weight from WEIGHTS with the lowest loss; the smallest of equally good ones."""
    sums = [float(mixed_losses(losses_CM, rule, weight).sum()) for weight in WEIGHTS]
    return WEIGHTS[int(np.argmin(sums))]


# ---- before training --------------------------------------------------------------------------------


class CopyingPotential(NamedTuple):
    """The share of tokens that the rule predicts correctly with a chunk's own neighbors, and with shuffled ones."""

    own: float
    shuffled: float

    def line(self) -> str:
        """Both shares in a sentence, for the terminal."""
        return (
            f"copying the token that followed the current one in the neighbors is right for {self.own:.0%} of the "
            f"validation tokens (shuffled neighbors: {self.shuffled:.0%})"
        )


def copying_potential(sequences: PackedSequences, rows: IntArray) -> CopyingPotential:
    """How often the rule is right in the sequences of the chunk rows `rows` (B, L); -1 is padding."""
    batch = sequences.batch(rows, neighbors="none")
    documents = batch.documents.numpy()
    follows = np.diff(documents, axis=1, prepend=NO_ROW) == 0
    inputs, labels = (tokens.numpy().reshape(-1, sequences.chunk_size) for tokens in (batch.seq, batch.labels))
    assert sequences.database is not None, "without neighbors there is nothing to copy"
    shares = []
    for shuffled in (False, True):
        ids = sequences.neighbor_ids(rows, shuffled).reshape(-1, sequences.knn)
        rule = rule_of_rows(inputs, labels, follows.ravel(), ids, sequences.database)
        shares.append(float(rule.right.sum() / max(1, batch.num_labels)))
    return CopyingPotential(*shares)
