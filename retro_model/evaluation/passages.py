"""Passages of held-out text for the report: what was retrieved, and how it changed each token's loss.

A passage is the labels of one chunk. Retrieval changes their loss through the neighbors of the chunk before. The
report shows these neighbors, the longest run of tokens that they share with the passage, and the neighbor tokens
that the model attended to most when it predicted labels that became much cheaper.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from retro_model.core.arrays import FloatArray, IntArray
from retro_model.core.devices import fast_float32_products
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.corpus.chunks import describe_rows
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.evaluation.overlap import Run, longest_shared_run
from retro_model.evaluation.report.html import CHEAPER_BITS, Look, Neighbor, Passage, Token
from retro_model.evaluation.scoring import Scorer
from retro_model.network.attention_maps import neighbor_attention_maps
from retro_model.network.language_model import LanguageModel

NEIGHBORS_SHOWN = 4
SHORTEST_RUN_SHOWN = 2  # a single common token means nothing
BEGIN_OF_DOCUMENT, END_OF_DOCUMENT = "\u27e8begin of document\u27e9", "\u27e8end of document\u27e9"
ATTENTION_DIGITS, BITS_DIGITS = 4, 4  # both are rounded to these before they are compared
GAINED_MOST, GAINED_LEAST, AT_RANDOM = "gained most", "gained least", "at random"


def choose_passages(
    scorer: Scorer, saved: FloatArray, neighbors: IntArray, num: int, seed: int
) -> list[tuple[str, int]]:
    """Choose a third that gained most, a third that gained least, the rest at random: (label, place in `scorer.rows`).

    Candidates are full chunks whose preceding chunk is scored and has a neighbor. No document is used twice while
    there are others. `saved` (rows,) is how much retrieval lowered each row's loss. Ties are in row order, and
    in reverse among those that gained least.
    """
    follows = (np.diff(scorer.rows) == 1) & (np.diff(scorer.documents) == 0) & (neighbors[:-1, 0] != NO_ROW)
    (candidates,) = np.nonzero(np.append(False, follows) & scorer.is_label.all(axis=1))
    by_gain = candidates[np.argsort(-saved[candidates], kind="stable")]
    shuffled = np.random.default_rng(seed).permutation(candidates)
    chosen: list[tuple[str, int]] = []
    for label, order, count in (
        (GAINED_MOST, by_gain, num // 3),
        (GAINED_LEAST, by_gain[::-1], num // 3),
        (AT_RANDOM, shuffled, num - 2 * (num // 3)),
    ):
        taken = {place for _, place in chosen}
        seen = {scorer.documents[place] for place in taken}
        left = [int(place) for place in order if place not in taken]
        chosen += [(label, place) for place in _other_documents_first(left, scorer.documents, seen)[:count]]
    return chosen


def _other_documents_first(places: Sequence[int], documents: IntArray, seen: set[int]) -> list[int]:
    """Move places whose document was already seen to the end; otherwise keep the order."""
    first: list[int] = []
    later: list[int] = []
    for place in places:
        (later if documents[place] in seen else first).append(place)
        seen.add(documents[place])
    return first + later


def build_passages(
    chosen: Sequence[tuple[str, int]],
    scorer: Scorer,
    losses_off: FloatArray,
    losses_on: FloatArray,
    neighbors: IntArray,
    distances: FloatArray,
    attention: FloatArray,
    tokenizer: Tokenizer,
) -> Iterator[Passage]:
    """Yield the chosen passages with their texts. Losses are nats (rows, M), neighbors (rows, K).

    `attention` (chosen, M, K, R) is the result of `attention_of_rows` for the chosen rows.
    """
    chunks, database = scorer.sequences.chunks, scorer.database
    assert database is not None
    befores = [place - 1 for _, place in chosen]
    shown = [[row for row in neighbors[place][:NEIGHBORS_SHOWN] if row != NO_ROW] for place in befores]
    query_names = describe_rows(chunks, scorer.rows[[place for _, place in chosen]])
    names = describe_rows(database, [row for rows in shown for row in rows])
    for number, ((label, place), before, rows) in enumerate(zip(chosen, befores, shown, strict=True)):
        ids = scorer.labels[place].tolist()
        retrieved = retrieved_tokens(database, neighbors[before])
        texts = [
            END_OF_DOCUMENT if token == chunks.facts["end_id"] else text
            for token, text in zip(ids, token_texts(tokenizer, ids), strict=True)
        ]
        bits = np.stack([losses_off[place], losses_on[place]], axis=1) / math.log(2)
        looks = find_looks(scorer.labels[place], bits[:, 0] - bits[:, 1], attention[number], retrieved)
        tokens = [
            Token(text, off, on, look=look) for text, (off, on), look in zip(texts, bits.tolist(), looks, strict=True)
        ]
        found = []
        for row, distance, of_row in zip(rows, distances[before].tolist(), retrieved, strict=False):
            neighbor, shared = _neighbor(names[int(row)], distance, of_row, scorer, place, tokenizer)
            found.append(neighbor)
            tokens[shared] = [replace(token, shared=True) for token in tokens[shared]]
        yield Passage(
            label=label,
            source=query_names[int(scorer.rows[place])],
            before=tokenizer.decode(scorer.labels[before].tolist()),
            tokens=tuple(tokens),
            neighbors=tuple(found),
        )


def _neighbor(
    name: str, distance: float, retrieved: IntArray, scorer: Scorer, place: int, tokenizer: Tokenizer
) -> tuple[Neighbor, slice]:
    """Return a retrieved neighbor, and the slice of the passage's tokens that it shares."""
    assert scorer.database is not None
    facts = scorer.database.facts
    pad_id, begin_id = facts["pad_id"], facts["begin_id"]
    num_tokens = len(retrieved) // 2
    texts = [text for half in np.split(retrieved, 2) for text in token_texts(tokenizer, half.tolist())]
    texts = [
        BEGIN_OF_DOCUMENT if token == begin_id else text for token, text in zip(retrieved.tolist(), texts, strict=True)
    ]
    run = longest_shared_run(scorer.labels[place], retrieved, pad_id)
    if run.length < SHORTEST_RUN_SHOWN:
        run = Run(0, 0, 0)
    neighbor = Neighbor(name, distance, tuple(texts), num_tokens, run.neighbor, run.neighbor + run.length)
    return neighbor, slice(run.query, run.query + run.length)


# ---- attention to neighbors --------------------------------------------------------------------------


def attention_of_rows(model: LanguageModel, scorer: Scorer, neighbors: IntArray, places: Sequence[int]) -> FloatArray:
    """Return the attention of each row's tokens to the neighbors of the row before: (places, M, K, R) float32.

    `places` index `scorer.rows`; `neighbors` (rows, K) covers all of `scorer.rows`. Each row is read in the window
    that scores it. The last token of a row reads the neighbors of its own row, so its attention is zero here.
    """
    database = scorer.database
    assert database is not None
    model.eval()
    sequences, chunks = np.nonzero(scorer.layout.scored)
    order = np.argsort(scorer.layout.rows[sequences, chunks])  # each row is scored exactly once
    sequences, chunks = sequences[order[places]], chunks[order[places]]
    num_tokens = scorer.labels.shape[1]
    found = np.zeros((len(places), num_tokens, neighbors.shape[1], 2 * num_tokens), dtype=np.float32)
    for start in range(0, len(places), scorer.batch_size):
        block = slice(start, start + scorer.batch_size)
        rows = scorer.layout.rows[sequences[block]]
        batch = scorer.sequences.batch(rows, neighbors="none").to(scorer.device)
        ids = np.full((*rows.shape, neighbors.shape[1]), NO_ROW, dtype=np.int64)
        ids[rows != NO_ROW] = neighbors[np.searchsorted(scorer.rows, rows[rows != NO_ROW])]
        retrieved = torch.from_numpy(retrieved_tokens(database, ids)).to(scorer.device)
        bfloat16 = torch.autocast(scorer.device.type, torch.bfloat16, enabled=scorer.number_type == "bfloat16")
        with fast_float32_products(scorer.device), bfloat16:
            attention_BNKR = neighbor_attention_maps(model, batch.seq, retrieved, batch.documents).neighbors_BNKR
        for place, (attention_NKR, chunk) in enumerate(zip(attention_BNKR, chunks[block], strict=True), start=start):
            inside = slice(chunk * num_tokens, (chunk + 1) * num_tokens - 1)
            found[place, :-1] = attention_NKR[inside].float().cpu().numpy()
    return found


def find_looks(labels: IntArray, saved: FloatArray, attention: FloatArray, retrieved: IntArray) -> list[Look | None]:
    """For each label that became cheaper by CHEAPER_BITS or more, the neighbor token with most attention; else None.

    `saved` (M,) is in bits; `attention` (M, K, R) and `retrieved` (K, R) belong to the neighbors that the labels'
    tokens read. Of ties the first is taken. A token without attention to the neighbors gets None.
    """
    looks: list[Look | None] = []
    rounded = attention.astype(np.float64).round(ATTENTION_DIGITS)
    for label, bits, shares in zip(labels.tolist(), saved.round(BITS_DIGITS).tolist(), rounded, strict=True):
        neighbor, token = (int(index) for index in np.unravel_index(shares.argmax(), shares.shape))
        share = float(shares[neighbor, token])
        copied = int(retrieved[neighbor, token]) == label
        looks.append(Look(neighbor, token, share, copied) if bits >= CHEAPER_BITS and share > 0 else None)
    return looks


# ---- texts -------------------------------------------------------------------------------------------


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text of those before it; a special token adds nothing.

    A character spelled by several tokens belongs to the last of them.
    """
    prefixes = tokenizer.decode_batch([ids[:stop] for stop in range(1, len(ids) + 1)])
    texts, before = [], ""
    for number, prefix in enumerate(prefixes, start=1):
        # an incomplete character at the end of a prefix belongs to the token that completes it
        text = prefix if number == len(prefixes) else prefix.rstrip("\ufffd")
        texts.append(text.removeprefix(before))
        before = text
    return texts
