"""The bigram rule: what can be predicted by copying from the neighbors alone, without any network.

The rule looks, in the neighbors that a token attends to, for the places where the same token stands, and
predicts what follows it there. It is the simplest way to profit from retrieval, so it says how much there
is to gain (`copying_potential`, before training), and mixed with a plain decoder it is a control that a
trained RETRO should beat (`mixed_losses`).

    rule = rule_of_rows(inputs, labels, follows, neighbor_ids, database)
    rule.right[labels != pad_id].mean()        # the share of tokens that it gets right

Letters: C chunks, M tokens of a chunk, K neighbors, R tokens of a neighbor.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float64Array, FloatArray, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.training.sequences import PackedSequences

# The weights of the rule that are tried. Not 1: what the rule does not know would cost infinitely much.
WEIGHTS = tuple(step / 50 for step in range(50))

# Chunks whose neighbors are in memory at once.
CHUNKS_AT_ONCE = 1024


class Rule(NamedTuple):
    """The rule's predictions, each (C, M); a padding label has none."""

    probability: Float64Array  # that the rule gives the label: its share of the matches, 0 without a match
    matched: BoolArray  # whether the current token stands in what is read, with a token after it
    right: BoolArray  # whether the most frequent follower (of equally frequent ones the smallest id) is the label


def neighbors_read(follows_C: BoolArray, num_tokens: int) -> npt.NDArray[np.int64]:
    """For each token (C, M) the chunk whose neighbors it attends to, -1 for none.

    The last token of a chunk attends to those of its own chunk, the others to those of the chunk before,
    if it is of the same document (`follows_C`): as in chunked cross-attention (section 2.4).
    """
    own_C = np.arange(len(follows_C))
    read_CM = np.repeat(np.where(follows_C, own_C - 1, NO_ROW)[:, None], num_tokens, axis=1)
    read_CM[:, -1] = own_C
    return read_CM


def bigram_rule(
    inputs_CM: IntArray, labels_CM: IntArray, retrieved_CKR: IntArray, follows_C: BoolArray, pad_id: int
) -> Rule:
    """The rule's predictions of the labels.

    `follows_C` says which chunks continue the one before them; of the first one there is none. A match is
    a pair of tokens next to each other in one neighbor, neither of them padding.
    """
    empty = np.zeros(labels_CM.shape, dtype=np.bool_)
    rule = Rule(np.zeros(labels_CM.shape), empty, empty.copy())
    read_CM = neighbors_read(follows_C, labels_CM.shape[1])
    asked = (read_CM != NO_ROW) & (labels_CM != pad_id)
    vocabulary = 1 + max(int(tokens.max(initial=0)) for tokens in (inputs_CM, labels_CM, retrieved_CKR))

    # Every pair of neighboring tokens as one number: chunk, token, follower. Sorted, the followers of one
    # token in the neighbors of one chunk stand side by side.
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
    """Places of the wanted values, and whether they are there; any place where not."""
    places = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return places, sorted_values[places] == wanted


def rule_of_rows(
    inputs_CM: IntArray, labels_CM: IntArray, follows_C: BoolArray, neighbors_CK: IntArray, database: Artifact
) -> Rule:
    """The rule over rows `neighbors_CK` of the database (-1: none), with few neighbors in memory at a time."""
    parts = []
    for start in range(0, len(labels_CM), CHUNKS_AT_ONCE):
        some = slice(max(start - 1, 0), start + CHUNKS_AT_ONCE)  # the chunk before is read by the first one
        retrieved = retrieved_tokens(database, neighbors_CK[some])
        part = bigram_rule(inputs_CM[some], labels_CM[some], retrieved, follows_C[some], database.facts["pad_id"])
        parts.append([values[start - some.start :] for values in part])
    return Rule(*(np.concatenate(values) for values in zip(*parts, strict=True)))


# ---- mixed with a network ---------------------------------------------------------------------------


def mixed_losses(losses_CM: FloatArray, rule: Rule, weight: float) -> Float64Array:
    """The losses in nats of (1 - weight) * the network + weight * the rule; the network's where nothing matches."""
    mixed: Float64Array = losses_CM.astype(np.float64)
    if weight > 0:
        with np.errstate(divide="ignore"):  # the log of a probability of 0 is -inf, which adds nothing
            of_rule = np.log(weight) + np.log(rule.probability[rule.matched])
        mixed[rule.matched] = -np.logaddexp(np.log1p(-weight) - mixed[rule.matched], of_rule)
    return mixed


def best_weight(losses_CM: FloatArray, rule: Rule) -> float:
    """Which of WEIGHTS gives the lowest loss; of equally good ones the smallest."""
    sums = [float(mixed_losses(losses_CM, rule, weight).sum()) for weight in WEIGHTS]
    return WEIGHTS[int(np.argmin(sums))]


# ---- before training --------------------------------------------------------------------------------


class CopyingPotential(NamedTuple):
    """The share of tokens that the rule gets right, with a chunk's own neighbors and with another's."""

    own: float
    shuffled: float

    def line(self) -> str:
        """Both shares in a sentence, for a terminal."""
        return (
            f"copying the token that followed the current one in the neighbors is right for {self.own:.0%} of the "
            f"validation tokens (shuffled neighbors: {self.shuffled:.0%})"
        )


def copying_potential(sequences: PackedSequences, rows: IntArray) -> CopyingPotential:
    """What the rule gets right in the sequences made of `rows` (B, L), of which -1 is padding."""
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
