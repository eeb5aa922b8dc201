"""The bigram rule against a slow reference, and that it sees what the network sees."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from copying_reference import PAD, slow_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from woven import write_woven

from retro_model.core.artifacts import Artifact
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.network.model import RETRO
from retro_model.training.copying import (
    WEIGHTS,
    Rule,
    best_weight,
    bigram_rule,
    copying_potential,
    mixed_losses,
    rule_of_rows,
)
from retro_model.training.sequences import PackedSequences


def assert_equal(found: Rule, expected: Rule) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_the_rule_is_that_of_loops(seed: int, num_chunks: int, num_tokens: int, knn: int) -> None:
    """Few tokens, so that there are ties, pads, missing neighbors and borders of documents everywhere."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 5, (num_chunks, num_tokens + 1))
    retrieved = random.integers(0, 5, (num_chunks, knn, 2 * num_tokens))
    retrieved[random.random((num_chunks, knn)) < 0.2] = PAD
    documents = np.sort(random.integers(0, 3, num_chunks))
    follows = np.diff(documents, prepend=-1) == 0
    found = bigram_rule(tokens[:, :-1], tokens[:, 1:], retrieved, follows, PAD)
    assert_equal(found, slow_rule(tokens[:, :-1], tokens[:, 1:], retrieved, documents))


def test_only_the_last_token_of_a_chunk_reads_its_own_neighbors() -> None:
    tokens = np.array([[7, 8, 7, 8], [8, 7, 8, 7], [7, 8, 7, 8]])  # 8 follows 7 and 7 follows 8 throughout
    knows = np.array([7, 8, 7, 0, 0, 0])
    retrieved = np.stack([knows, np.zeros(6, int), knows])[:, None]
    follows = np.array([False, True, False])
    rule = bigram_rule(tokens[:, :-1], tokens[:, 1:], retrieved, follows, PAD)
    expected = [[False, False, True], [True, True, False], [False, False, True]]
    assert rule.right.tolist() == rule.matched.tolist() == expected
    assert rule.probability.tolist() == np.array(expected, dtype=float).tolist()


def test_of_equally_frequent_followers_the_smallest_is_predicted() -> None:
    retrieved = np.array([[[5, 9, 5, 3, 5, 9, 5, 3, 5, 4]]])

    def predicted(label: int) -> tuple[bool, float]:
        rule = bigram_rule(np.array([[5]]), np.array([[label]]), retrieved, np.array([False]), PAD)
        assert rule.matched.item()
        return bool(rule.right.item()), float(rule.probability.item())

    assert predicted(3) == (True, 2 / 5) and predicted(9) == (False, 2 / 5)
    assert predicted(4) == (False, 1 / 5) and predicted(8) == (False, 0.0)


def test_two_neighbors_are_not_one_text() -> None:
    """The last token of one neighbor and the first of the next are no pair."""
    retrieved = np.array([[[4, 5], [6, 7]]])
    rule = bigram_rule(np.array([[5]]), np.array([[6]]), retrieved, np.array([False]), PAD)
    assert not rule.matched.any() and not rule.probability.any()


# ---- on artifacts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> PackedSequences:
    """Sequences of the valid split of a corpus whose neighbors hold what comes next."""
    woven = write_woven(tmp_path_factory.mktemp("woven"), num_documents=40)
    chunks, database = (Artifact.open(woven.chunks / split, "chunks") for split in ("valid", "train"))
    neighbors = Artifact.open(woven.neighbors / "valid", "neighbors")
    return PackedSequences(chunks, 4 * chunks.facts["chunk_size"], neighbors, database, knn=2)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_rows_in_blocks_are_those_of_loops(
    sequences: PackedSequences, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, database, neighbors = sequences.chunks, sequences.database, sequences.neighbors
    assert database is not None and neighbors is not None
    tokens, documents = chunks["tokens"][:20].astype(np.int64), chunks["documents"][:20]
    ids = neighbors["ids"][:20][:, :2].copy()
    ids[3], ids[5, 1] = NO_ROW, NO_ROW
    monkeypatch.setattr("retro_model.training.copying.CHUNKS_AT_ONCE", at_once)
    found = rule_of_rows(tokens[:, :-1], tokens[:, 1:], np.diff(documents, prepend=-1) == 0, ids, database)
    expected = slow_rule(tokens[:, :-1], tokens[:, 1:], retrieved_tokens(database, ids), documents)
    assert_equal(found, expected)
    assert expected.matched.any()


def test_the_rule_sees_the_neighbors_that_the_network_sees(sequences: PackedSequences) -> None:
    """Where every token stands in every neighbor, a match is a token whose logits the neighbors change."""
    torch.manual_seed(0)
    chunk_size, vocabulary = sequences.chunk_size, sequences.chunks.facts["vocab_size"]
    model = RETRO(
        num_tokens=vocabulary,
        max_seq_len=sequences.seq_len,
        enc_dim=16,
        enc_depth=1,
        dec_dim=16,
        dec_depth=1,
        dec_cross_attn_layers=(1,),
        heads=2,
        dim_head=8,
        chunk_size=chunk_size,
        pad_id=sequences.pad_id,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    rows = sequences.ordered_rows()
    batch = sequences.batch(rows)
    assert batch.retrieved is not None
    retrieved = batch.retrieved.clone()
    retrieved[0, 1] = sequences.pad_id  # a chunk without neighbors
    with torch.no_grad():
        on = model(batch.seq, retrieved, documents=batch.documents)
        off = model(batch.seq, None, documents=batch.documents)
    changed = ((on - off).abs().amax(-1) > 1e-6).numpy().reshape(-1, chunk_size)
    labels = batch.labels.numpy().reshape(-1, chunk_size)
    follows = np.diff(batch.documents.numpy(), axis=1, prepend=-1) == 0
    found = retrieved.flatten(0, 1).numpy()
    found = np.where(found == sequences.pad_id, sequences.pad_id, 1 + sequences.pad_id)
    current = np.full_like(labels, 1 + sequences.pad_id)
    rule = bigram_rule(current, labels, found, follows.ravel(), sequences.pad_id)
    real = labels != sequences.pad_id
    np.testing.assert_array_equal(rule.matched[real], changed[real])
    assert 0 < rule.matched.sum() < real.sum()


def test_the_potential_is_the_share_of_labels_that_loops_get_right(sequences: PackedSequences) -> None:
    rows = np.concatenate([sequences.ordered_rows()[:3], sequences.ordered_rows()[-1:]])
    potential = copying_potential(sequences, rows)
    for neighbors, found in (("own", potential.own), ("shuffled", potential.shuffled)):
        right = labels = 0
        batch = sequences.batch(rows, neighbors=neighbors)  # type: ignore[arg-type]
        assert batch.retrieved is not None
        for place in range(len(rows)):
            inputs, wanted = (
                tokens[place].numpy().reshape(-1, sequences.chunk_size) for tokens in (batch.seq, batch.labels)
            )
            rule = slow_rule(inputs, wanted, batch.retrieved[place].numpy(), batch.documents[place].numpy())
            right += rule.right.sum()
            labels += (wanted != sequences.pad_id).sum()
        assert found == pytest.approx(right / labels)
    assert potential.own > potential.shuffled
    assert potential._replace(own=0.312, shuffled=0.058).line() == (
        "copying the token that followed the current one in the neighbors is right for 31% of the validation tokens "
        "(shuffled neighbors: 6%)"
    )


# ---- mixed with a network ---------------------------------------------------------------------------


def test_mixed_losses_are_those_of_the_mixed_probabilities() -> None:
    random = np.random.default_rng(0)
    losses = random.exponential(3, (6, 5)).astype(np.float32)
    matched = random.random((6, 5)) < 0.6
    rule = Rule(np.where(matched, random.integers(0, 3, (6, 5)) / 2, 0), matched, matched & False)
    for weight in (0.0, 0.3, WEIGHTS[-1]):
        found = mixed_losses(losses, rule, weight)
        for loss, probability, is_match, mixed in zip(
            losses.ravel(), rule.probability.ravel(), matched.ravel(), found.ravel(), strict=True
        ):
            plain = math.exp(-float(loss))
            expected = (1 - weight) * plain + weight * probability if is_match else plain
            assert mixed == pytest.approx(-math.log(expected), rel=1e-6)
    match = np.ones((1, 1), bool)
    unknown = mixed_losses(np.full((1, 1), 900.0), Rule(np.zeros((1, 1)), match, ~match), 0.5)
    assert unknown.item() == pytest.approx(900 + math.log(2)), "a probability that is too small for a float"


def test_the_best_weight_has_the_lowest_loss() -> None:
    """The rule is right in 7 of 10 matches and the network knows nothing: then its weight is close to 0.7."""
    probability = np.array([[1.0] * 7 + [0.0] * 3])
    matched = np.ones((1, 10), bool)
    losses = np.full((1, 10), math.log(1e6))
    rule = Rule(probability, matched, matched)
    assert best_weight(losses, rule) == pytest.approx(0.7)
    assert best_weight(np.zeros((1, 10)), rule) == 0.0, "a network that knows all needs no rule"
    assert best_weight(losses, Rule(probability, ~matched, matched)) == 0.0
    assert len(set(WEIGHTS)) == len(WEIGHTS) and min(WEIGHTS) == 0 and max(WEIGHTS) < 1


def test_without_neighbors_there_is_nothing_to_copy(tmp_path: Path) -> None:
    woven = write_woven(tmp_path, num_documents=20)
    chunks = Artifact.open(woven.chunks / "valid", "chunks")
    sequences = PackedSequences(chunks, 4 * chunks.facts["chunk_size"])
    with pytest.raises(AssertionError, match="nothing to copy"):
        copying_potential(sequences, sequences.ordered_rows())
