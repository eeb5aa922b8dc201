"""Evaluation against a slow reference, and what must not change its figures."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from browser import PHONE, needs_browser, show
from copying_reference import slow_rule
from fixtures import change_fact
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_scores import scores_of

from retro_model.core.artifacts import Artifact, ArtifactWriter
from retro_model.core.errors import ConfigError, DocumentError, MismatchError, TrainingError
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.tokenizer import Tokenizer, save
from retro_model.corpus.tokenizer_training import train
from retro_model.embedding.config import EmbedConfig
from retro_model.evaluation.by_overlap import (
    SharedRuns,
    read_run_metrics,
    runs_of_train_sample,
    runs_shared_with_nearest,
    runs_shared_with_read,
)
from retro_model.evaluation.config import EvaluateConfig
from retro_model.evaluation.evaluate import EvaluationResult, EvaluationRun, evaluate_models, spans_with_text
from retro_model.evaluation.inputs import Inputs, Searching
from retro_model.evaluation.names import ModelNames
from retro_model.evaluation.overlap import longest_shared_run, longest_shared_runs
from retro_model.evaluation.passages import (
    BEGIN_OF_DOCUMENT,
    NEIGHBORS_SHOWN,
    attention_of_rows,
    build_passages,
    find_looks,
    token_texts,
)
from retro_model.evaluation.passes import neighbors_of_share, random_neighbors
from retro_model.evaluation.report.content import headline
from retro_model.evaluation.report.html import Look
from retro_model.evaluation.report.sections import notes_on_overlap, rule_in_words
from retro_model.evaluation.scoring import Scorer, Span, Window, choose_spans, pack, sliding_windows
from retro_model.evaluation.statistics import (
    PIECE,
    ColumnScores,
    bootstrap_sums,
    documents_curve,
    interval,
    metrics_of,
    resampled_units,
)
from retro_model.evaluation.subsets import ALPHAS, leakage_curve, metrics_of_parts, overlap_curve
from retro_model.network.attention_maps import neighbor_attention_maps
from retro_model.network.model import RETRO
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig
from retro_model.training.copying import WEIGHTS, Rule

CHUNK_SIZE, SEQ_LEN, STORED, KNN = 8, 32, 12, 2
LENGTH = SEQ_LEN // CHUNK_SIZE
RETRO_NAMES = ModelNames.of("")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "<b>one</b>",
    "caf\u00e9",
    "&",
    "\U0001f600",
    "under",
    "my",
    "old",
    "roof",
]

# ---- a small world: artifacts as the stages write them, models with random weights -----------------


@dataclass(frozen=True)
class World:
    """Folders as evaluate_models takes them."""

    root: Path

    def folder(self, name: str) -> Path:
        return self.root / name

    def chunks(self, split: str) -> Artifact:
        return Artifact.open(self.root / "chunks" / split, "chunks")

    def neighbors(self) -> Artifact:
        return Artifact.open(self.root / "neighbors/test", "neighbors")

    def model(self, name: str) -> RETRO:
        return RETRO.from_pretrained(self.root / name)

    def evaluate(self, out: Path, **changes: Any) -> EvaluationResult:
        settings = {"sweep_knn": (0, 1, 2, 4), "max_chunks": None, "bootstrap_samples": 200, "passages": 6}
        arguments: dict[str, Any] = {"knn": KNN, "seq_len": SEQ_LEN, "seed": 0, "batch_size": 3}
        arguments |= {name: changes.pop(name) for name in tuple(changes) if name in arguments}
        none = {name: str(self.root / "none") for name in ("compare", "database")}
        searching = Searching(CorpusConfig(), EmbedConfig(), IndexConfig(), NeighborsConfig(stored=STORED))
        run = EvaluationRun(
            self.root,
            self.root / "baseline",
            self.root / "retro",
            EvaluateConfig(**(none | settings | changes)),
            searching,
            work_folder=out / "work",
            out_metrics=out / "metrics/evaluate.json",
            out_plots=out / "plots",
            out_report=out / "reports/evaluate.html",
            **arguments,
        )
        return evaluate_models(run)


def texts(seed: int, lengths: Sequence[int]) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=length)) for length in lengths]


def write_chunks(folder: Path, tokenizer: Tokenizer, documents: list[str], split: str, first: int) -> None:
    """The rows of section "Decisions": [begin] + tokens + [end], cut every CHUNK_SIZE, padded at the end."""
    rows, ids, sizes, lines = [], [], [], []
    for number, text in enumerate(documents, start=first):
        encoded = tokenizer.encode_batch([text])
        stream = np.array([tokenizer.begin_id, *encoded.ids, tokenizer.end_id])
        count = -(-(len(stream) - 1) // CHUNK_SIZE)
        before = 0
        for place in range(count):
            row = stream[place * CHUNK_SIZE : (place + 1) * CHUNK_SIZE + 1]
            rows.append(np.pad(row, (0, CHUNK_SIZE + 1 - len(row)), constant_values=tokenizer.pad_id))
            labels = np.array([min((place + 1) * CHUNK_SIZE, len(encoded.ids))])
            covered = int(encoded.bytes_covered(np.array([0]), labels)[0])
            ids.append(number)
            sizes.append(covered - before)
            before = covered
        source = f"{split}/<{number}>.txt"
        entry = {"document": number, "source": source, "record": None, "first_chunk": len(rows) - count}
        lines.append(json.dumps(entry | {"chunks": count, "tokens": len(stream) - 2, "bytes": before}))
    with ArtifactWriter(folder / split, "chunks", rows_per_shard=50) as writer:
        writer.append(
            tokens=np.array(rows, dtype=np.uint16),
            documents=np.array(ids, dtype=np.int32),
            bytes=np.array(sizes, dtype=np.int32),
        )
        (folder / split / "documents.jsonl").write_text("\n".join(lines) + "\n")
        writer.add_file("documents.jsonl")
        facts = {"split": split, "chunk_size": CHUNK_SIZE, "tokenizer": tokenizer.fingerprint}
        writer.facts.update(facts | tokenizer.facts() | {"documents": len(documents), "lossy_documents": 0})


def write_neighbors(folder: Path, test: Artifact, train_chunks: Artifact) -> None:
    random = np.random.default_rng(3)
    ids = np.stack([random.permutation(train_chunks.rows)[:STORED] for _ in range(test.rows)])
    distances = np.sort(random.random((test.rows, STORED), dtype=np.float32), axis=1)
    ids[::7, 3:], distances[::7, 3:] = NO_ROW, np.inf
    ids[5], distances[5] = NO_ROW, np.inf
    with ArtifactWriter(folder, "neighbors") as writer:
        writer.append(ids=ids.astype(np.int32), distances=distances)
        writer.facts.update(chunks=test.fingerprint, database=train_chunks.fingerprint, index="index", stored=STORED)


def write_model(folder: Path, tokenizer: Tokenizer, train_chunks: Artifact, retrieval: bool) -> None:
    torch.manual_seed(int(retrieval))
    model = RETRO(
        num_tokens=tokenizer.vocab_size,
        max_seq_len=SEQ_LEN,
        enc_dim=12,
        enc_depth=1,
        dec_dim=16,
        dec_depth=2,
        dec_cross_attn_layers=(1, 2),
        heads=2,
        dim_head=8,
        chunk_size=CHUNK_SIZE,
        pad_id=tokenizer.pad_id,
        retrieval=retrieval,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # as it starts, it predicts nothing: every token costs the same
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    with ArtifactWriter(folder, "model") as writer:
        model.save_pretrained(folder)
        writer.add_file("config.json")
        writer.add_file("model.safetensors")
        writer.facts.update(retrieval=retrieval, chunk_size=CHUNK_SIZE, seq_len=SEQ_LEN, index="index")
        writer.facts.update(tokenizer=tokenizer.fingerprint, chunks=train_chunks.fingerprint)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve documents of 1 to 150 words to test on, so shorter than a chunk and longer than two windows."""
    root = tmp_path_factory.mktemp("world")
    lengths = (1, 3, 40, 90, 7, 25, 61, 12, 33, 5, 150, 18)
    train_texts, test_texts = texts(1, lengths * 2), texts(2, lengths)
    save(root / "tokenizer", *train(iter(train_texts), 300), "bpe")
    tokenizer = Tokenizer.open(root / "tokenizer")
    write_chunks(root / "chunks", tokenizer, train_texts, "train", 0)
    write_chunks(root / "chunks", tokenizer, test_texts, "test", len(train_texts))
    write_chunks(root / "chunks", tokenizer, texts(3, lengths), "valid", 2 * len(train_texts))
    (root / "none").mkdir()
    made = World(root)
    for split in ("train", "valid", "test"):
        write_neighbors(root / "neighbors" / split, made.chunks(split), made.chunks("train"))
    write_model(root / "baseline", tokenizer, made.chunks("train"), retrieval=False)
    write_model(root / "retro", tokenizer, made.chunks("train"), retrieval=True)
    return made


@pytest.fixture(scope="module")
def evaluated(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationResult, Path]:
    out = tmp_path_factory.mktemp("evaluated")
    return world.evaluate(out), out


# ---- windows ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 9))
def test_the_windows_score_each_row_once_in_the_earliest_that_holds_it(first: int, size: int, length: int) -> None:
    windows = sliding_windows(Span(first, first + size), length)
    scored = [row for window in windows for row in range(window.scored, window.stop)]
    assert scored == list(range(first, first + size))
    stride = max(1, length // 2)
    for number, window in enumerate(windows):
        assert window.first == first + number * stride and window.first <= window.scored < window.stop
        assert window.stop - window.first <= length
        for row in range(window.scored, window.stop):
            assert all(not earlier.first <= row < earlier.stop for earlier in windows[:number])


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 9))
def test_packing_keeps_every_window_whole_and_documents_apart(sizes: list[int], length: int) -> None:
    documents = np.repeat(np.arange(len(sizes)), sizes)
    spans = choose_spans(documents, None, 0)
    assert [span.stop - span.first for span in spans] == sizes
    windows = [window for span in spans for window in sliding_windows(span, length)]
    layout = pack(windows, length)
    assert sorted(layout.rows[layout.scored]) == list(range(sum(sizes)))
    assert not layout.scored[layout.rows == NO_ROW].any()
    found = []
    for rows, scored in zip(layout.rows, layout.scored, strict=True):
        real = rows[rows != NO_ROW]
        assert (rows[len(real) :] == NO_ROW).all()
        # what the network takes for one text: rows that follow each other in one document
        cuts = np.flatnonzero((np.diff(real) != 1) | (np.diff(documents[real]) != 0)) + 1
        for piece, counted in zip(np.split(real, cuts), np.split(scored[: len(real)], cuts), strict=True):
            found.append(Window(int(piece[0]), int(piece[counted][0]), int(piece[-1]) + 1))
    assert sorted(found) == sorted(windows)
    filled = sorted((layout.rows != NO_ROW).sum(axis=1))
    assert len(filled) == 1 or sum(filled[:2]) > length, "no two sequences would fit into one"


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 3))
def test_chosen_documents_are_whole_but_for_one(sizes: list[int], max_chunks: int, seed: int) -> None:
    documents = np.repeat(np.arange(len(sizes)) * 3, sizes)
    whole = choose_spans(documents, None, seed)
    chosen = choose_spans(documents, max_chunks, seed)
    assert sum(span.stop - span.first for span in chosen) == min(max_chunks, sum(sizes))
    assert chosen == sorted(chosen) and {span.first for span in chosen} <= {span.first for span in whole}
    assert len(set(chosen) - set(whole)) <= 1
    assert chosen == choose_spans(documents, max_chunks, seed)


# ---- losses ----------------------------------------------------------------------------------------


def slow_losses(
    world: World, model: RETRO, neighbors: npt.NDArray[Any] | None, look_up: Any = retrieved_tokens
) -> npt.NDArray[Any]:
    """Every window alone, every document alone, as the definition has it: (rows, M)."""
    chunks, database = world.chunks("test"), world.chunks("train")
    tokens, documents = chunks["tokens"][:].astype(np.int64), chunks["documents"][:]
    losses = np.full((chunks.rows, CHUNK_SIZE), np.nan)
    for document in np.unique(documents):
        rows = np.flatnonzero(documents == document)
        for start in range(0, len(rows), LENGTH // 2):
            window = rows[start : start + LENGTH]
            seq = torch.from_numpy(tokens[window, :-1].reshape(1, -1))
            retrieved = None
            if neighbors is not None:
                retrieved = torch.from_numpy(look_up(database, neighbors[window]))[None]
            with torch.no_grad():
                logits = model(seq, retrieved)[0].log_softmax(-1)
            labels = torch.from_numpy(tokens[window, 1:].reshape(-1, 1))
            found = -logits.gather(1, labels).numpy().reshape(len(window), -1)
            fresh = np.isnan(losses[window, 0])
            losses[window[fresh]] = found[fresh]
    return np.where(tokens[:, 1:] == chunks.facts["pad_id"], 0, losses)


def scorer_of(world: World, **changes: Any) -> Scorer:
    chunks = world.chunks("test")
    spans = choose_spans(chunks["documents"][:], changes.pop("max_chunks", None), 0)
    return Scorer(chunks, world.chunks("train"), spans, SEQ_LEN, **changes)


def test_losses_equal_a_slow_reference_in_every_column(world: World) -> None:
    scorer = scorer_of(world)
    nearest = world.neighbors()["ids"][scorer.rows][:, :KNN]
    for name, neighbors in (("baseline", None), ("retro", None), ("retro", nearest)):
        model = world.model(name)
        expected = slow_losses(world, model, neighbors)
        np.testing.assert_allclose(scorer.losses(model, neighbors), expected, atol=2e-5)


def test_bits_per_byte_are_those_of_the_text(world: World, evaluated: tuple[EvaluationResult, Path]) -> None:
    metrics = evaluated[0].metrics
    written = texts(2, (1, 3, 40, 90, 7, 25, 61, 12, 33, 5, 150, 18))
    num_bytes = sum(len(text.encode()) for text in written)
    expected = slow_losses(world, world.model("baseline"), None).sum() / math.log(2) / num_bytes
    assert metrics["test_bpb_baseline"] == pytest.approx(expected, abs=2e-6)
    assert metrics["test_bytes"] == num_bytes
    # an end of document is a label: one for each document, and no byte
    tokenizer = Tokenizer.open(world.folder("tokenizer"))
    num_tokens = sum(len(tokenizer.encode(text)) for text in written)
    assert metrics["test_tokens"] == num_tokens + len(written)
    nats = expected * math.log(2) * num_bytes
    assert metrics["test_perplexity_baseline"] == pytest.approx(math.exp(nats / metrics["test_tokens"]), rel=1e-5)


@pytest.mark.parametrize("part", ["neighbor", "continuation"])
def test_a_part_of_the_neighbors_is_shown_and_the_rest_is_padding(world: World, part: Any) -> None:
    scorer, model = scorer_of(world), world.model("retro")
    nearest = world.neighbors()["ids"][scorer.rows][:, :KNN]

    def shown(database: Artifact, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        tokens = retrieved_tokens(database, ids)
        hidden = slice(CHUNK_SIZE, None) if part == "neighbor" else slice(CHUNK_SIZE)
        tokens[..., hidden] = database.facts["pad_id"]
        return tokens

    expected = slow_losses(world, model, nearest, shown)
    np.testing.assert_allclose(scorer.losses(model, nearest, part=part), expected, atol=2e-5)


def test_a_cut_of_the_documents_scores_their_rows_as_before(world: World) -> None:
    model, whole, cut = world.model("baseline"), scorer_of(world), scorer_of(world, max_chunks=17)
    assert len(cut.rows) == 17
    np.testing.assert_allclose(cut.losses(model, None), whole.losses(model, None)[cut.rows], atol=2e-5)


def test_neighbors_of_a_chunk_change_nothing_before_its_last_token(world: World) -> None:
    scorer, model = scorer_of(world), world.model("retro")
    nearest = world.neighbors()["ids"][scorer.rows][:, :KNN]
    saved = scorer.losses(model, None) - scorer.losses(model, nearest)
    first_rows = np.flatnonzero(np.diff(scorer.documents, prepend=-1))
    assert np.abs(saved[first_rows, :-1]).max() < 1e-5 < np.abs(saved[first_rows[2], -1])


def test_a_loss_that_is_not_finite_stops(world: World, tmp_path: Path) -> None:
    model = world.model("baseline")
    with torch.no_grad():
        model.embedding.weight[:] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        scorer_of(world).losses(model, None)


# ---- figures ---------------------------------------------------------------------------------------


def test_files_are_equal_for_equal_inputs(
    world: World, evaluated: tuple[EvaluationResult, Path], tmp_path: Path
) -> None:
    world.evaluate(tmp_path)
    first = {file.relative_to(evaluated[1]): file.read_bytes() for file in evaluated[1].rglob("*.*")}
    again = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert first == again
    curves = ("gains", "leakage", "overlap", "knn", "part", "database")
    assert set(map(str, first)) == {
        "metrics/evaluate.json",
        "reports/evaluate.html",
        "plots/evaluate_columns.csv",
        "plots/evaluate_documents.csv",
        *(f"plots/evaluate_{name}.{suffix}" for name in curves for suffix in ("csv", "png")),
    }


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_batch_size_changes_no_figure(
    world: World, evaluated: tuple[EvaluationResult, Path], tmp_path: Path, batch_size: int
) -> None:
    other = world.evaluate(tmp_path, batch_size=batch_size)
    assert other.metrics.keys() == evaluated[0].metrics.keys()
    for name, value in evaluated[0].metrics.items():
        assert other.metrics[name] == pytest.approx(value, abs=2e-6, rel=2e-6), name


def test_metrics_are_flat_finite_numbers_and_agree_with_each_other(
    evaluated: tuple[EvaluationResult, Path],
) -> None:
    written = json.loads((evaluated[1] / "metrics/evaluate.json").read_text())
    assert written == evaluated[0].metrics
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in written.values())
    for one, other in (("on", "off"), ("on", "baseline"), ("random", "off"), ("on", "mixed"), ("mixed", "baseline")):
        gain = written[f"test_bpb_{other}"] - written[f"test_bpb_{one}"]
        assert written[f"gain_{one}_vs_{other}"] == pytest.approx(gain, abs=2e-6)
        assert written[f"gain_{one}_vs_{other}_low"] <= gain <= written[f"gain_{one}_vs_{other}_high"]
    curves = evaluated[0].curves
    for pair, one, other, *figures in curves["gains"].rows:
        assert pair == f"{one} against {other}"
        assert figures == [written[f"gain_{one}_vs_{other}{end}"] for end in ("", "_low", "_high")]
    assert written["saved_share_vs_baseline"] == pytest.approx(
        written["gain_on_vs_baseline"] / written["test_bpb_baseline"], abs=2e-6
    )
    assert written["saved_share_vs_baseline_low"] <= written["saved_share_vs_baseline_high"]
    parts = {part: bpb for part, bpb, _ in curves["part"].rows}
    assert curves["part"].column("gain") == pytest.approx([parts["none"] - bpb for bpb in parts.values()], abs=1e-6)
    assert parts["none"] == written["test_bpb_off"] and parts["both"] == written["test_bpb_on"]
    assert list(parts) == ["none", "neighbor", "continuation", "both"] and len({*parts.values()}) == 4
    assert curves["database"].column("share") == (0.1, 0.333, 1.0)
    assert curves["database"].rows[-1][1] == written["test_bpb_on"]
    assert sum(curves["overlap"].column("chunks")) == written["test_chunks"]
    sweep = dict(evaluated[0].curves["knn"].rows)
    assert sweep[0] == written["test_bpb_off"] and sweep[KNN] == written["test_bpb_on"]
    assert len({*sweep.values()}) == len(sweep)
    for column, bpb, low, high, perplexity in evaluated[0].curves["columns"].rows:
        assert bpb == written[f"test_bpb_{column}"] and low <= bpb <= high
        assert perplexity == written[f"test_perplexity_{column}"]


def test_names_of_metrics_are_not_those_of_params(evaluated: tuple[EvaluationResult, Path]) -> None:
    assert not set(evaluated[0].metrics) & {"knn", "seed", "chunk_size", *EvaluateConfig.__dataclass_fields__}


def test_one_document_has_figures_too(world: World, tmp_path: Path) -> None:
    metrics = world.evaluate(tmp_path, max_chunks=1, sweep_knn=[]).metrics
    assert metrics["test_documents"] == metrics["test_chunks"] == 1
    assert metrics["gain_on_vs_off_low"] == metrics["gain_on_vs_off"] == metrics["gain_on_vs_off_high"]
    assert (tmp_path / "plots/evaluate_knn.csv").read_text() == "knn,test_bpb\n"


def test_the_bootstrap_is_paired_and_finds_the_known_error_of_a_mean() -> None:
    random = np.random.default_rng(0)
    loss = random.normal(10, 3, size=400)
    sums = bootstrap_sums(np.stack([loss, loss - 1, np.ones(400)], axis=1), 4000, seed=1)
    assert sums.shape == (4000, 3) and (sums[:, 2] == 400).all()
    np.testing.assert_allclose(sums[:, 0] - sums[:, 1], 400)  # the same documents in both columns
    low, high = interval(sums[:, 0] / sums[:, 2])
    error = 1.96 * loss.std() / 20
    assert (low, high) == pytest.approx((loss.mean() - error, loss.mean() + error), abs=0.05)
    np.testing.assert_array_equal(sums, bootstrap_sums(np.stack([loss, loss - 1, np.ones(400)], axis=1), 4000, 1))


def test_few_documents_are_resampled_in_pieces() -> None:
    """One document drawn again and again is always itself: noise would have an interval of no width."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, size=(400, 1))

    def scores(documents: npt.NDArray[Any]) -> ColumnScores:
        found = ColumnScores(documents, np.ones(400, int), np.ones((400, 1), bool), noise)
        found.add("off", 10 + noise[:, 0], 400)
        found.add("on", 10 + random.normal(0, 1, size=400), 400)
        return found

    one, many = np.zeros(400, int), np.arange(400)
    for documents in (one, many, np.arange(400) // 200):
        resampled = scores(documents).bootstrap(2000, seed=1)
        low, high = interval(resampled["off"] - resampled["on"])
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(2 / 400) / math.log(2), rel=0.25)
    np.testing.assert_array_equal(resampled_units(many), many)
    assert np.unique(resampled_units(one), return_counts=True)[1].tolist() == [PIECE] * (400 // PIECE)
    two = resampled_units(np.array([5] * 9 + [7] * 9))
    assert [len(set(two[:9])), len(set(two[9:])), len(set(two))] == [2, 2, 4]


def test_the_control_draws_rows_of_the_database_only() -> None:
    drawn = random_neighbors(5000, 3, 7, seed=1)
    assert drawn.shape == (5000, 3) and drawn.min() == 0 and drawn.max() == 6
    counts = np.bincount(drawn.ravel())
    assert counts.min() > 0.9 * counts.mean()
    np.testing.assert_array_equal(drawn, random_neighbors(5000, 3, 7, seed=1))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1))
def test_a_share_of_the_database_keeps_whole_documents_and_the_order(
    seed: int, num_rows: int, share: float, other: float
) -> None:
    random = np.random.default_rng(seed)
    documents = np.sort(random.integers(40, size=200))
    ids = np.stack([random.permutation(200)[:20] for _ in range(num_rows)])
    ids[random.random(ids.shape) < 0.1] = NO_ROW
    small, large = (neighbors_of_share(ids, documents, each) for each in sorted((share, other)))
    for before, few, more in zip(ids.tolist(), small.tolist(), large.tolist(), strict=True):
        kept = {documents[row] for row in few if row != NO_ROW}
        assert few == [row for row in before if row != NO_ROW and documents[row] in kept] + [NO_ROW] * few.count(NO_ROW)
        assert few[few.index(NO_ROW) :].count(NO_ROW) == few.count(NO_ROW) if NO_ROW in few else True
        assert {row for row in few if row != NO_ROW} <= set(more)
    whole = neighbors_of_share(ids, documents, 1.0)
    assert [set(row) for row in whole.tolist()] == [set(row) for row in ids.tolist()]


def test_a_tenth_of_the_database_is_about_a_tenth() -> None:
    documents = np.arange(20_000)
    left = neighbors_of_share(np.arange(20_000)[None], documents, 0.1) != NO_ROW
    assert 1800 < left.sum() < 2200


# ---- overlap ---------------------------------------------------------------------------------------

small_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def brute_force(query: list[int], neighbor: list[int]) -> int:
    lengths = [0]
    for start in range(len(query)):
        for stop in range(start + 1, len(query) + 1):
            part = query[start:stop]
            if 0 not in part and any(part == neighbor[at : at + len(part)] for at in range(len(neighbor))):
                lengths.append(len(part))
    return max(lengths)


@settings(deadline=None)
@given(small_tokens, small_tokens)
def test_the_longest_shared_run_is_that_of_brute_force(query: list[int], neighbor: list[int]) -> None:
    run = longest_shared_run(np.array(query), np.array(neighbor), pad_id=0)
    assert run.length == brute_force(query, neighbor)
    assert query[run.query : run.query + run.length] == neighbor[run.neighbor : run.neighbor + run.length]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 1 << 18]))
def test_the_runs_of_many_chunks_are_those_of_each(seed: int, num: int, knn: int, cells: int) -> None:
    random = np.random.default_rng(seed)
    queries, neighbors = random.integers(0, 4, (num, 9)), random.integers(0, 4, (num, knn, 14))
    expected = [
        max(longest_shared_run(query, neighbor, 0).length for neighbor in some)
        for query, some in zip(queries, neighbors, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retro_model.evaluation.overlap.CELLS_AT_ONCE", cells)
        np.testing.assert_array_equal(longest_shared_runs(queries, neighbors, 0), expected)


def test_a_run_longer_than_a_byte_counts() -> None:
    tokens = np.arange(1, 400)
    assert longest_shared_runs(tokens[None], np.stack([[tokens[::-1], tokens]]), 0).tolist() == [399]


def test_overlap_is_with_ones_own_ten_nearest_or_with_what_was_read(world: World) -> None:
    inputs = Inputs.open(world.root)
    scorer = scorer_of(world)
    ids, documents = inputs.neighbors["ids"], inputs.chunks["documents"][:]

    def longest(row: int, neighbors: npt.NDArray[Any]) -> int:
        retrieved = retrieved_tokens(inputs.database, neighbors)
        labels, pad_id = inputs.chunks["tokens"][row][1:], inputs.chunks.facts["pad_id"]
        return max(longest_shared_run(labels, each, pad_id).length for each in retrieved)

    def read_beside(row: int) -> int:
        follows = row > 0 and documents[row] == documents[row - 1]
        return longest(row, ids[row - 1][:KNN]) if follows else 0

    nearest, read = runs_shared_with_nearest(inputs, scorer), runs_shared_with_read(inputs, scorer, KNN)
    assert nearest.tolist() == [longest(row, ids[row][:10]) for row in scorer.rows]
    assert read.tolist() == [read_beside(row) for row in scorer.rows]
    assert len({*nearest}) > 3 and len({*read}) > 3
    alone = Scorer(inputs.chunks, inputs.database, choose_spans(documents[:], None, 0), CHUNK_SIZE)
    assert not alone.follows.any(), "a window of one chunk reads nothing of the chunk before"
    assert scorer.follows.tolist() == [row > 0 and documents[row] == documents[row - 1] for row in scorer.rows]


def test_train_rows_are_compared_with_what_is_read_beside_them(world: World) -> None:
    inputs = Inputs.open(world.root)
    train_rows = inputs.of_split(world.root, "train")
    ids, tokens, documents = (
        train_rows.neighbors["ids"],
        train_rows.chunks["tokens"],
        train_rows.chunks["documents"][:],
    )
    expected = []
    for row in range(1, len(documents)):
        if documents[row] == documents[row - 1]:
            read = retrieved_tokens(train_rows.database, ids[row - 1][:KNN])
            expected.append(max(longest_shared_run(tokens[row][1:], each, 0).length for each in read))
    assert runs_of_train_sample(train_rows, 10_000, KNN, 0).tolist() == expected
    some = runs_of_train_sample(train_rows, 9, KNN, 0)
    assert len(some) == 9 and not set(some.tolist()) - set(expected)
    np.testing.assert_array_equal(some, runs_of_train_sample(train_rows, 9, KNN, 0))
    shared = SharedRuns(*([np.zeros(0, int)] * 2), np.array([7, 8, 3]), np.zeros(0, int), np.zeros(0, bool))
    assert read_run_metrics(shared) == {"read_run_mean_test": 6.0, "read_run_8_share_test": 0.333333}


# ---- the control without a network that reads -------------------------------------------------------


def test_the_control_mixes_the_plain_decoder_with_the_rule(
    world: World, evaluated: tuple[EvaluationResult, Path]
) -> None:
    """Token by token, with the weight that costs least on the valid split."""
    train = world.chunks("train")

    def losses_and_rule(split: str, random: bool = False) -> tuple[npt.NDArray[Any], Rule]:
        chunks, neighbors = world.chunks(split), Artifact.open(world.folder(f"neighbors/{split}"), "neighbors")
        ids = neighbors["ids"][:][:, :KNN]
        if random:
            ids = random_neighbors(chunks.rows, KNN, train.rows, 0)
        scorer = Scorer(chunks, train, choose_spans(chunks["documents"][:], None, 0), SEQ_LEN)
        tokens = chunks["tokens"][:].astype(int)
        rule = slow_rule(tokens[:, :-1], tokens[:, 1:], retrieved_tokens(train, ids), chunks["documents"][:])
        return scorer.losses(world.model("baseline"), None).astype(float), rule

    def mixed(losses: npt.NDArray[Any], rule: Rule, weight: float) -> float:
        plain = np.exp(-losses)
        both = np.where(rule.matched, (1 - weight) * plain + weight * rule.probability, plain)
        return float(-np.log(both).sum())

    metrics = evaluated[0].metrics
    on_valid = [mixed(*losses_and_rule("valid"), weight) for weight in WEIGHTS]
    weight = WEIGHTS[int(np.argmin(on_valid))]
    assert metrics["mixed_weight"] == weight and weight > 0
    losses, rule = losses_and_rule("test")
    expected = mixed(losses, rule, weight) / math.log(2) / metrics["test_bytes"]
    assert metrics["test_bpb_mixed"] == pytest.approx(expected, abs=2e-6)
    assert metrics["rule_hits_own"] == pytest.approx(rule.right.sum() / metrics["test_tokens"], abs=1e-6)
    drawn = losses_and_rule("test", random=True)[1].right.sum() / metrics["test_tokens"]
    assert metrics["rule_hits_random"] == pytest.approx(drawn, abs=1e-6) and drawn != metrics["rule_hits_own"]
    share = metrics["gain_on_vs_baseline"] / metrics["gain_mixed_vs_baseline"]
    assert metrics["share_of_rule_gained"] == pytest.approx(share, abs=1e-5)
    (line,) = [line for line in evaluated[0].lines() if "bigram rule" in line]
    assert f"is right for {metrics['rule_hits_own']:.1%} of the tokens" in line and f"weight {weight:g}" in line


def test_a_control_that_gains_nothing_is_no_measure(evaluated: tuple[EvaluationResult, Path]) -> None:
    metrics = {name: value for name, value in evaluated[0].metrics.items() if name != "share_of_rule_gained"}
    assert " of that" not in rule_in_words(metrics, RETRO_NAMES)


def test_valid_neighbors_of_another_search_are_refused(world: World, tmp_path: Path) -> None:
    for number, (split, fact) in enumerate([("valid", "index"), ("valid", "chunks"), ("train", "database")]):
        copy = shutil.copytree(world.root, tmp_path / f"world{number}")
        change_fact(copy / "neighbors" / split, fact, "another")
        with pytest.raises(MismatchError, match=f"neighbors/{split}: made for {fact} another"):
            World(copy).evaluate(tmp_path / "out")


# ---- parts of the text ------------------------------------------------------------------------------


def test_the_leakage_curve_ends_at_plain_bits_per_byte(evaluated: tuple[EvaluationResult, Path]) -> None:
    curve, metrics = evaluated[0].curves["leakage"], evaluated[0].metrics
    columns, ends = ("baseline", "mixed", "off", "on"), ("", "_low", "_high")
    assert curve.head[:6] == ("alpha", "chunks", *columns)
    everything = tuple(metrics[f"test_bpb_{column}"] for column in columns)
    gains = tuple(metrics[f"gain_on_vs_{other}{end}"] for other in ("off", "baseline") for end in ends)
    assert curve.rows[-1] == (1.0, metrics["test_chunks"], *everything, *gains)
    counts = [row[1] for row in curve.rows]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_the_leakage_curve_leaves_out_what_shares_too_much(world: World) -> None:
    scorer = scorer_of(world)
    ones = np.ones(scorer.labels.shape)
    runs = np.arange(len(scorer.rows)) % (CHUNK_SIZE + 1)
    curve = leakage_curve(scores_of(scorer, baseline=ones, off=ones, on=ones), runs, 10, 0)
    assert curve.head[:5] == ("alpha", "chunks", "baseline", "off", "on")
    for alpha, count, *figures, _, _, _, _, _, _ in curve.rows:
        below = runs <= alpha * CHUNK_SIZE
        assert count == below.sum()
        expected = CHUNK_SIZE * count / math.log(2) / scorer.bytes[below].sum()
        assert figures == pytest.approx([expected] * 3, abs=1e-6)
    assert [row[0] for row in curve.rows] == list(ALPHAS)


def test_tokens_that_gain_and_lose_are_counted(world: World) -> None:
    scorer = scorer_of(world)
    off, on = np.zeros(scorer.labels.shape), np.zeros(scorer.labels.shape)
    (rows,) = np.nonzero(scorer.is_label.all(axis=1))
    off[rows[0], :5] = 1
    on[rows[1], :3] = 1
    on[rows[2]] = 0.01  # too little to count
    scores = scores_of(scorer, off=off, on=on)
    runs = np.where(np.isin(np.arange(len(scorer.rows)), rows[:2]), 5, 0)
    metrics = metrics_of(scores, scores.bootstrap(10, 0))
    metrics |= metrics_of_parts(scores, runs, runs > 99, 10, 0)
    num_labels = int(scorer.is_label.sum())
    assert metrics["share_tokens_helped"] == pytest.approx(5 / num_labels, abs=1e-6)
    assert metrics["share_tokens_hurt"] == pytest.approx(3 / num_labels, abs=1e-6)
    assert metrics["share_chunks_little_overlap"] == pytest.approx(1 - 2 / len(scorer.rows), abs=1e-6)
    lost = 0.01 * CHUNK_SIZE / math.log(2) / scorer.bytes[runs == 0].sum()
    assert metrics["gain_on_vs_off_little_overlap"] == pytest.approx(-lost, abs=1e-6)
    curve = overlap_curve(scores, runs, 10, 0)
    assert curve.column("shared_tokens") == (0, 4) and curve.column("chunks") == (len(scorer.rows) - 2, 2)
    gain = 2 / math.log(2) / scorer.bytes[runs == 5].sum()
    assert curve.column("gain") == pytest.approx((-lost, gain), abs=1e-6)
    assert curve.column("share_helped")[1] == pytest.approx(5 / (2 * CHUNK_SIZE), abs=1e-6)
    assert curve.column("share_hurt")[1] == pytest.approx(3 / (2 * CHUNK_SIZE), abs=1e-6)


def test_the_documents_that_gained_and_lost_most_are_named(world: World) -> None:
    scorer = scorer_of(world)
    off, on = np.zeros(scorer.labels.shape), np.zeros(scorer.labels.shape)
    numbers = np.unique(scorer.documents)
    for place, number in enumerate(numbers):  # the later, the better; the first half loses
        (rows,) = np.nonzero(scorer.documents == number)
        off[rows[0], 0], on[rows[0], 0] = place, 5
    curve = documents_curve(scores_of(scorer, off=off, on=on), {int(number): f"<{number}>" for number in numbers})
    assert len(numbers) == 12 and len(curve.rows) == 10
    expected = [*numbers[:-6:-1], *numbers[4::-1]]
    assert curve.column("document") == tuple(f"<{number}>" for number in expected)
    saved = [(place - 5) / math.log(2) for place in (11, 10, 9, 8, 7, 4, 3, 2, 1, 0)]
    assert curve.column("saved_bits") == pytest.approx(saved, abs=1e-6)


# ---- passages --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 298), max_size=40))
def test_token_texts_make_up_the_text(world: World, ids: list[int]) -> None:
    tokenizer = Tokenizer.open(world.folder("tokenizer"))
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_stands_at_the_last(world: World) -> None:
    tokenizer = Tokenizer.open(world.folder("tokenizer"))
    ids = tokenizer.encode("a\u20acb").tolist()
    found = token_texts(tokenizer, ids)
    assert len(ids) == 5 and found == ["a", "", "", "\u20ac", "b"]


@torch.no_grad()
def test_the_attention_of_a_row_is_that_of_the_window_that_scores_it(world: World) -> None:
    scorer, model = scorer_of(world), world.model("retro")
    nearest = world.neighbors()["ids"][scorer.rows][:, :KNN]
    places = [int(place) for place in np.random.default_rng(0).permutation(len(scorer.rows))]
    found = attention_of_rows(model, scorer, nearest, places)
    tokens = world.chunks("test")["tokens"][:][:, :-1].astype(np.int64)
    spans = choose_spans(scorer.documents, None, 0)
    windows = {
        row: window
        for span in spans
        for window in sliding_windows(span, LENGTH)
        for row in range(window.scored, window.stop)
    }
    for place, attention in zip(places, found, strict=True):
        first, _, stop = windows[place]
        seq = torch.from_numpy(tokens[first:stop].reshape(1, -1))
        retrieved = torch.from_numpy(retrieved_tokens(world.chunks("train"), nearest[first:stop]))[None]
        expected = neighbor_attention_maps(model, seq, retrieved).neighbors_BNKR[0]
        expected = expected[(place - first) * CHUNK_SIZE :][:CHUNK_SIZE].numpy()
        np.testing.assert_allclose(attention[:-1], expected[:-1], atol=1e-5)
        assert not attention[-1].any(), "the last token reads neighbors that are not those of the row before"
        read = place > first and nearest[place - 1, 0] != NO_ROW
        assert attention[:-1].sum(axis=(1, 2)) == pytest.approx(float(read), abs=1e-5)


def test_attention_is_measured_in_the_numbers_that_the_losses_are(world: World) -> None:
    scorers = scorer_of(world), scorer_of(world, number_type="bfloat16", batch_size=3)
    nearest, model = world.neighbors()["ids"][scorers[0].rows][:, :KNN], world.model("retro")
    exact, rounded = (attention_of_rows(model, scorer, nearest, [9, 4, 7, 9]) for scorer in scorers)
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert not np.array_equal(rounded, exact)
    assert attention_of_rows(model, scorers[0], nearest, []).shape == (0, CHUNK_SIZE, KNN, 2 * CHUNK_SIZE)


def test_a_cheaper_token_looked_at_the_first_of_those_with_most_attention() -> None:
    labels, saved = np.array([7, 7, 8, 9, 7]), np.array([2.0, 0.99999, 0.999, 1.0, 5.0])
    retrieved = np.array([[1, 7, 9, 0], [9, 7, 7, 5]])
    attention = np.zeros((5, 2, 4), dtype=np.float32)
    attention[:3, 0, 1] = 0.30001
    attention[:3, 1, 2] = 0.30004  # equal, rounded
    attention[3, 1, 3], attention[3, 0, 0] = 0.5, 0.4
    expected = [Look(0, 1, 0.3, copied=True), Look(0, 1, 0.3, copied=True), None, Look(1, 3, 0.5, copied=False), None]
    assert find_looks(labels, saved, attention, retrieved) == expected


def test_a_passage_holds_what_its_tokens_looked_at(world: World) -> None:
    scorer, knn = scorer_of(world), NEIGHBORS_SHOWN + 1
    stored = world.neighbors()
    nearest, distances = stored["ids"][scorer.rows][:, :knn], stored["distances"][scorer.rows]
    places = np.flatnonzero((nearest[:-1, -1] != NO_ROW) & (np.diff(scorer.documents) == 0)) + 1
    place = next(int(place) for place in places if scorer.is_label[place].all())
    begins = np.flatnonzero(np.diff(world.chunks("train")["documents"][:], prepend=-1))
    nearest[place - 1, 0] = begins[0]
    attention = np.zeros((1, CHUNK_SIZE, knn, 2 * CHUNK_SIZE), dtype=np.float32)
    attention[0, 0, knn - 1, 3], attention[0, 1, 1, 10], attention[0, 2, 0, 0] = 0.9, 0.8, 0.7
    off, on = np.full(scorer.labels.shape, 2.0), np.ones(scorer.labels.shape)
    retrieved = retrieved_tokens(world.chunks("train"), nearest[place - 1])
    scorer.labels[place, 1] = retrieved[1, 10]
    tokenizer = Tokenizer.open(world.folder("tokenizer"))
    (passage,) = build_passages([("label", place)], scorer, off, on, nearest, distances, attention, tokenizer)
    looks = [token.look for token in passage.tokens]
    assert [(look.neighbor, look.token) for look in looks[:3] if look] == [(knn - 1, 3), (1, 10), (0, 0)]
    assert looks[1] is not None and looks[1].copied and not any(looks[3:])
    assert len(passage.neighbors) == NEIGHBORS_SHOWN
    assert passage.neighbors[0].tokens[0] == BEGIN_OF_DOCUMENT, "what may be looked at can be seen"


def test_the_page_shows_sources_and_escapes_them(evaluated: tuple[EvaluationResult, Path]) -> None:
    page = (evaluated[1] / "reports/evaluate.html").read_text()
    assert page.count("<article>") == 6
    assert "test/&lt;" in page and "train/&lt;" in page and "<b>" not in page and "<script" not in page
    articles = page[page.index("<article>") :]
    numbers = re.findall(r"<sup[^>]*>([\d,]*)</sup>", articles)
    assert numbers and articles.count("looked here") > 0 and 'class="copied-count"' in articles


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_report_at_phone_width(evaluated: tuple[EvaluationResult, Path], tmp_path: Path) -> None:
    """The documents hold HTML, and so do their names: none of it may become an element."""
    shown = show(evaluated[1] / "reports/evaluate.html", tmp_path)
    assert shown.needed_width <= shown.given_width <= PHONE
    assert shown.tags["article"] == 6 and shown.tags["svg"] == 6 and shown.tags["table"] == 6
    assert not {"b", "script", "img", "link"} & set(shown.tags)
    assert shown.console == []


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "retrieval saves 0.0200"),
        (-0.01, 0.05, "retrieval makes no difference that these documents can show"),
        (-0.05, -0.01, "retrieval costs 0.0300 more"),
    ],
)
def test_the_headline_claims_no_more_than_the_interval(
    evaluated: tuple[EvaluationResult, Path], low: float, high: float, words: str
) -> None:
    gain = {"gain_on_vs_off": (low + high) / 2, "gain_on_vs_off_low": low, "gain_on_vs_off_high": high}
    assert words in headline({**evaluated[0].metrics, **gain}, RETRO_NAMES)


def test_the_number_of_documents_stands_in_the_headline(evaluated: tuple[EvaluationResult, Path]) -> None:
    assert headline(evaluated[0].metrics, RETRO_NAMES).startswith("Held-out text (12 documents) costs ")
    assert headline({**evaluated[0].metrics, "test_documents": 1}, RETRO_NAMES).startswith(
        "Held-out text (1 document) costs "
    )


@pytest.mark.parametrize(
    ("low_off", "low_baseline", "words"),
    [
        (0.01, 0.02, None),
        (-0.01, 0.02, "The interval against off does not exclude zero there: the gain is copying"),
        (0.01, -0.02, "The interval against the baseline does not exclude zero there: the gain is copying"),
        (-0.01, -0.02, "The interval against off and against the baseline does not exclude zero there: the gain is"),
        (None, 0.02, "The interval against off does not exclude zero there: the gain is copying"),
    ],
)
def test_a_gain_that_needs_overlap_is_called_copying(
    evaluated: tuple[EvaluationResult, Path], low_off: float | None, low_baseline: float, words: str | None
) -> None:
    metrics = {name: value for name, value in evaluated[0].metrics.items() if "little_overlap_" not in name}
    metrics |= {"gain_on_vs_off_low": 0.01, "gain_on_vs_baseline_low": 0.01}
    for name, low in (("gain_on_vs_off", low_off), ("gain_on_vs_baseline", low_baseline)):
        if low is not None:
            metrics |= {f"{name}_little_overlap_low": low, f"{name}_little_overlap_high": low + 0.03}
    note, _ = notes_on_overlap(metrics)
    assert "there retrieval saves" in note
    assert words in note if words else "copying" not in note
    nothing_gained = metrics | {"gain_on_vs_off_low": -0.1, "gain_on_vs_baseline_low": -0.1}
    assert "copying" not in next(notes_on_overlap(nothing_gained)), "what is not gained is not copied"


def test_the_page_says_how_train_and_test_neighbors_differ(evaluated: tuple[EvaluationResult, Path]) -> None:
    figures = {"read_run_mean_train": 9.5, "read_run_mean_test": 4.25}
    _, note = notes_on_overlap({**evaluated[0].metrics, **figures})
    assert "train chunks share 9.5 tokens in a row" in note and "scored here 4.2 tokens in a row" in note
    assert "dropped between splits, but not within the train split, so training neighbors can share more" in note
    without = {name: value for name, value in evaluated[0].metrics.items() if "little_overlap" not in name}
    assert "cannot be seen here" in next(notes_on_overlap(without))


def test_a_control_that_gains_is_said_in_the_headline(evaluated: tuple[EvaluationResult, Path]) -> None:
    control = {"gain_random_vs_off": 0.01, "gain_on_vs_random": 0.002}
    words = "Careful: random neighbors, the control, save 0.0100 too; only what is saved beyond that, +0.0020"
    assert words in headline({**evaluated[0].metrics, **control, "gain_random_vs_off_low": 0.005}, RETRO_NAMES)
    assert "Careful" not in headline({**evaluated[0].metrics, **control, "gain_random_vs_off_low": -0.001}, RETRO_NAMES)


def test_the_page_says_what_was_left_out_and_what_is_lossy(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.root, tmp_path / "world")
    change_fact(tmp_path / "world/chunks/test", "lossy_documents", 3)
    fingerprint = World(tmp_path / "world").chunks("test").fingerprint
    change_fact(tmp_path / "world/neighbors/test", "chunks", fingerprint)
    result = World(tmp_path / "world").evaluate(tmp_path, max_chunks=20)
    assert result.metrics["test_lossy_documents"] == 3
    assert any("careful: the tokenizer spells 3 test documents only in part" in line for line in result.lines())
    page = (tmp_path / "reports/evaluate.html").read_text()
    assert "cannot spell 3 of the 12 test documents exactly" in page
    assert f"Scored: 20 of {world.chunks('test').rows} test chunks" in page


def test_the_page_says_that_retro_had_the_training_of_another_model(world: World, tmp_path: Path) -> None:
    here = world.chunks("train").fingerprint
    for number, (before, here_too) in enumerate([([here], False), (["another", here], True)]):
        copy = shutil.copytree(world.root, tmp_path / f"world{number}")
        change_fact(copy / "retro", "init_from_chunks", before)
        World(copy).evaluate(tmp_path, sweep_knn=[], max_chunks=20)
        page = (tmp_path / "reports/evaluate.html").read_text()
        assert "RETRO started from another trained model" in page
        assert ("Careful: the model that RETRO started from was trained on other chunks" in page) == here_too
    copy = shutil.copytree(world.root, tmp_path / "retrofit")
    change_fact(copy / "retro", "init_from_chunks", [here])
    change_fact(copy / "retro", "init_from", Artifact.open(copy / "baseline", "model").fingerprint)
    World(copy).evaluate(tmp_path, sweep_knn=[], max_chunks=20)
    assert "RETRO started from the baseline itself" in (tmp_path / "reports/evaluate.html").read_text()
    world.evaluate(tmp_path, sweep_knn=[], max_chunks=20)
    assert "RETRO started from" not in (tmp_path / "reports/evaluate.html").read_text()


def test_text_without_a_byte_is_nothing_to_evaluate_on(world: World, tmp_path: Path) -> None:
    chunks = world.chunks("test")
    with ArtifactWriter(tmp_path / "test", "chunks") as writer:
        columns = {name: chunks[name][:5] for name in ("tokens", "documents")}
        writer.append(**columns, bytes=np.zeros(5, dtype=np.int32))
    with pytest.raises(DocumentError, match="no text to evaluate on"):
        spans_with_text(Artifact.open(tmp_path / "test", "chunks"), None, 0)


# ---- what does not belong together -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kind", "fact"),
    [
        ("neighbors/test", "neighbors", "chunks"),
        ("neighbors/test", "neighbors", "database"),
        ("neighbors/test", "neighbors", "index"),
        ("retro", "model", "tokenizer"),
        ("retro", "model", "chunks"),
        ("retro", "model", "retrieval"),
        ("baseline", "model", "retrieval"),
        ("baseline", "model", "chunk_size"),
        ("chunks/test", "chunks", "tokenizer"),
        ("chunks/train", "chunks", "split"),
    ],
)
def test_inputs_of_another_run_are_refused(world: World, tmp_path: Path, folder: str, kind: str, fact: str) -> None:
    shutil.copytree(world.root, tmp_path / "world")
    change_fact(tmp_path / "world" / folder, fact, "another")
    with pytest.raises(MismatchError, match="dvc repro"):
        World(tmp_path / "world").evaluate(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knn": 13}, "knn: found 13, expected at most 12"),
        ({"knn": 0}, "knn: found 0"),
        ({"sweep_knn": (0, 99)}, "evaluate.sweep_knn: found 99"),
        ({"sweep_knn": (2, 1)}, "evaluate.sweep_knn: found"),
        ({"seq_len": 12}, "seq_len: found 12"),
        ({"seq_len": 64}, "seq_len"),
    ],
)
def test_settings_that_cannot_work_are_named(
    world: World, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        world.evaluate(tmp_path, **change)
    assert not list(tmp_path.iterdir())
