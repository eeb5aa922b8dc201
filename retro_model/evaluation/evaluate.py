"""Measure what retrieval gains on held-out documents (sections 2.6 and 4 of the paper).

    run = EvaluationRun(Path("data"), Path("models/baseline"), Path("models/retro"), config, ...)
    result = evaluate_models(run)
    result.metrics["gain_on_vs_off"]          # bits per byte that retrieval saves

All columns score the same documents:

- `baseline`: the decoder trained without retrieval
- `mixed`: that decoder mixed with the bigram rule over the nearest neighbors (copying.py); RETRO should beat it
- `off`: RETRO without neighbors
- `on`: RETRO with its nearest neighbors
- `random`: RETRO with neighbors drawn at random from the database, which must not help
- `on_train`: RETRO with neighbors from the train chunks; exists only with another database (`evaluate.database`),
  which `mixed`, `on` and `random` then use
- `compared`: another trained model (`evaluate.compare`)

Bits include those of every label, also the end of a document. Bytes are those of the original text, so that models
with different tokenizers are comparable.
"""

import csv
import io
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import Artifact, write_json, write_whole
from retro_model.core.config import optional_path
from retro_model.core.devices import resolve_number_type
from retro_model.core.errors import ConfigError, DocumentError
from retro_model.corpus.chunks import document_names
from retro_model.evaluation.by_overlap import SharedRuns, find_shared_runs, read_run_metrics
from retro_model.evaluation.comparison import Compared, Comparison
from retro_model.evaluation.config import EvaluateConfig
from retro_model.evaluation.inputs import Inputs, Searching, search_other_database
from retro_model.evaluation.names import ModelNames
from retro_model.evaluation.passages import attention_of_rows, build_passages, choose_passages
from retro_model.evaluation.passes import (
    VALID,
    Pass,
    PassScores,
    RuleMixture,
    column_passes,
    mix_with_rule,
    score_all,
    sweep_curves,
    sweep_passes,
)
from retro_model.evaluation.report.charts import draw
from retro_model.evaluation.report.content import Background, make_page
from retro_model.evaluation.report.html import Passage, render
from retro_model.evaluation.report.sections import rule_in_words
from retro_model.evaluation.scoring import Scorer, Span, choose_spans
from retro_model.evaluation.statistics import (
    COLUMNS,
    DIGITS,
    ColumnScores,
    Curve,
    columns_curve,
    documents_curve,
    gains_curve,
    metrics_of,
)
from retro_model.evaluation.subsets import LEAKAGE_NEIGHBORS, leakage_curve, metrics_of_parts, overlap_curve
from retro_model.inference.retriever import Retriever
from retro_model.network.language_model import LanguageModel
from retro_model.retrofit.loading import open_models

# `time_retrieval` times a batch of TIMED_CHUNKS held-out chunks, and the first TIMED_ALONE of them one by one.
TIMED_CHUNKS, TIMED_ALONE = 256, 16


@dataclass(frozen=True)
class EvaluationResult:
    """Equal inputs give equal `metrics` and `curves`; `timings` vary, so they go to no DVC output."""

    metrics: Mapping[str, float | int]
    curves: Mapping[str, Curve]
    timings: Mapping[str, float]
    names: ModelNames

    def lines(self) -> Iterator[str]:
        """Yield lines that summarize the result for a terminal."""
        for column, bpb, low, high, perplexity in self.curves["columns"].rows:
            figures = f"{bpb:.4f} bits per byte ({low:.4f} to {high:.4f}), perplexity {perplexity:.2f}"
            yield f"evaluate: {column:<9} {figures}"
        for name, title in (("gain_on_vs_off", "off"), ("gain_on_vs_baseline", "baseline")):
            low, high = self.metrics[f"{name}_low"], self.metrics[f"{name}_high"]
            yield f"evaluate: on saves {self.metrics[name]:+.4f} against {title} ({low:+.4f} to {high:+.4f})"
        yield f"evaluate: {rule_in_words(self.metrics, self.names)}"
        speeds = ", ".join(f"{self.timings[f'tokens_per_second_{name}']:,.0f} {name}" for name in ("off", "on"))
        yield f"evaluate: tokens a second: {speeds}"
        if lossy := self.metrics["test_lossy_documents"]:
            yield f"evaluate: careful: the tokenizer spells {lossy:,} test documents only in part; bits are too low"


@dataclass(frozen=True)
class EvaluationRun:
    """An evaluation: what it reads, its settings, and where it writes.

    `data_folder` holds tokenizer, chunks and neighbors as the stages write them. `searching` has the settings for
    searching another database; artifacts built for that go to `work_folder`.
    """

    data_folder: Path
    baseline_folder: Path
    retro_folder: Path
    config: EvaluateConfig
    searching: Searching
    _: KW_ONLY
    knn: int
    seq_len: int
    seed: int
    out_metrics: Path
    out_plots: Path
    out_report: Path
    work_folder: Path
    base: str = ""  # the base of adapters, as in `retrofit.base`
    device: str = "cpu"
    batch_size: int = 8


def evaluate_models(run: EvaluationRun) -> EvaluationResult:
    """Evaluate both models on the test split; write `out_metrics`, `out_plots`/evaluate_* and `out_report`.

    Equal inputs give equal files. The batch size changes only digits beyond those written.

    Raises an ArtifactError if the inputs do not belong together, ConfigError if `knn` or a sweep needs more
    neighbors than are stored, DocumentError if there is nothing to score or to retrieve from, TrainingError if a
    loss is not finite.
    """
    started = time.perf_counter()
    opened = _OpenInputs.open(run)
    inputs, train, scorer, knn, seed = opened.inputs, opened.train, opened.scorer, run.knn, run.seed
    passes = [*column_passes(inputs, train, scorer, opened.on_train, knn, seed)]
    passes += [
        *sweep_passes(inputs, scorer, run.config.sweep_knn, knn),
        Pass(VALID, "baseline", opened.valid_scorer, None),
    ]
    scored = score_all(opened.models, passes)
    mixed = mix_with_rule(scored, inputs, scorer, opened.valid, opened.valid_scorer, knn, seed)
    shared = find_shared_runs(inputs, train, opened.train_rows, scorer, knn, seed)
    background = opened.background()
    metrics, curves = _compute_results(opened, scored, mixed, shared)
    passages = _make_passages(opened, scored)
    page = make_page(metrics, curves, passages, background)
    write_json(run.out_metrics, metrics)
    for name, curve in curves.items():
        write_whole(run.out_plots / f"evaluate_{name}.csv", to_csv(curve))
    drawings = {chart.name: draw(chart) for chart in page.charts}
    for name, drawing in drawings.items():
        write_whole(run.out_plots / f"evaluate_{name}.png", drawing.png)
    write_whole(run.out_report, render(page, drawings))
    return EvaluationResult(
        metrics, curves, {**scored.timings, "seconds": time.perf_counter() - started}, background.names
    )


@dataclass(frozen=True)
class _OpenInputs:
    """All inputs of an evaluation, opened and checked."""

    run: EvaluationRun
    models: Mapping[str, LanguageModel]
    train: Inputs  # test chunks with neighbors from the train chunks
    valid: Inputs
    train_rows: Inputs
    inputs: Inputs  # test chunks with neighbors from the database: the train chunks or another one
    documents: Path | None  # of the other database
    counts: Counter[str]  # its documents, kept and dropped
    scorer: Scorer
    valid_scorer: Scorer
    on_train: Scorer | None  # with neighbors from the train chunks, if there is another database
    compared: Compared | None

    @classmethod
    def open(cls, run: EvaluationRun) -> "_OpenInputs":
        """Open the inputs; search the other database and score the other model, if there are any."""
        config, seed = run.config, run.seed
        compared_folder = optional_path("evaluate.compare", config.compare)
        documents = optional_path("evaluate.database", config.database)
        train = Inputs.open(run.data_folder)
        valid, train_rows = (train.of_split(run.data_folder, split) for split in ("valid", "train"))
        models = _open_models(run, train)
        _check_knn(train.neighbors, run.knn, config)
        number_type = resolve_number_type(config.number_type, torch.device(run.device))
        options: dict[str, Any] = {"device": run.device, "batch_size": run.batch_size, "number_type": number_type}
        comparison = None
        if compared_folder is not None:  # opened first, so that a broken model fails before hours of work
            work = run.work_folder / "compare"
            comparison = Comparison(compared_folder, run.data_folder, run.searching, work, **options)
        inputs, counts = train, Counter[str]()
        if documents is not None:
            work = run.work_folder / "database"
            inputs, counts = search_other_database(documents, run.data_folder, run.searching, work)
        spans = spans_with_text(inputs.chunks, config.max_chunks, seed)
        valid_spans = spans_with_text(valid.chunks, config.max_chunks, seed)
        return cls(
            run=run,
            models=models,
            train=train,
            valid=valid,
            train_rows=train_rows,
            inputs=inputs,
            documents=documents,
            counts=counts,
            scorer=Scorer(inputs.chunks, inputs.database, spans, run.seq_len, **options),
            valid_scorer=Scorer(valid.chunks, valid.database, valid_spans, run.seq_len, **options),
            on_train=None if documents is None else Scorer(train.chunks, train.database, spans, run.seq_len, **options),
            compared=None if comparison is None else comparison.score(inputs, spans),
        )

    @property
    def nearest(self) -> IntArray:
        """The neighbors that RETRO reads for each scored row: (rows, knn)."""
        nearest: IntArray = self.inputs.neighbors["ids"][self.scorer.rows][:, : self.run.knn]
        return nearest

    def background(self) -> Background:
        """Facts about the inputs, for the report."""
        return Background(
            chunks=self.inputs.chunks,
            database_chunks=self.inputs.database.rows,
            knn=self.run.knn,
            seq_len=self.run.seq_len,
            leakage_neighbors=min(LEAKAGE_NEIGHBORS, self.train.neighbors["ids"].shape[1]),
            documents=None if self.documents is None else self.documents.name,
            counts=self.counts,
            compared=self.compared,
            **_facts_of_models(self.run.retro_folder, self.run.baseline_folder, self.train),
        )


def _compute_results(
    opened: _OpenInputs, scored: PassScores, mixed: RuleMixture, shared: SharedRuns
) -> tuple[dict[str, float | int], dict[str, Curve]]:
    """Compute the flat metrics and the curves."""
    run, inputs, scorer = opened.run, opened.inputs, opened.scorer
    saved = (scored.losses["off"].astype(np.float64) - scored.losses["on"]) / math.log(2)
    scores = ColumnScores(scorer.documents, scorer.bytes, scorer.is_label, saved)
    num_labels = int(scorer.is_label.sum())
    for column in COLUMNS:
        if column in scored.row_losses:
            scores.add(column, scored.row_losses[column], num_labels)
    scores.add("mixed", mixed.row_losses, num_labels)
    if opened.compared is not None:
        scores.add("compared", opened.compared.row_losses, opened.compared.num_labels)
    drawn = (run.config.bootstrap_samples, run.seed)
    resampled = scores.bootstrap(*drawn)
    metrics = metrics_of(scores, resampled)
    metrics |= metrics_of_parts(scores, shared.nearest, shared.with_train, *drawn)
    metrics |= _rule_metrics(mixed, metrics) | read_run_metrics(shared)
    metrics |= {"test_lossy_documents": inputs.chunks.facts["lossy_documents"], "database_chunks": inputs.database.rows}
    if counts := opened.counts:
        metrics |= {f"database_documents_{name}": counts[name] for name in ("kept", "held_out")}
    curves = {
        "columns": columns_curve(scores, resampled),
        "gains": gains_curve(scores, resampled),
        "leakage": leakage_curve(scores, shared.nearest, *drawn),
        "overlap": overlap_curve(scores, shared.read, *drawn),
        **sweep_curves(scored, scorer, inputs, run.config.sweep_knn, run.knn),
        "documents": documents_curve(scores, document_names(inputs.chunks, scorer.documents)),
    }
    return metrics, curves


def _rule_metrics(mixed: RuleMixture, metrics: Mapping[str, float | int]) -> dict[str, float | int]:
    """How often the bigram rule is right, and RETRO's gain as a share of the rule's, if the rule gains anything."""
    found: dict[str, float | int] = {
        "mixed_weight": mixed.weight,
        "rule_hits_own": round(mixed.hits_own, DIGITS),
        "rule_hits_random": round(mixed.hits_random, DIGITS),
    }
    if metrics["gain_mixed_vs_baseline"] > 0:
        share = metrics["gain_on_vs_baseline"] / metrics["gain_mixed_vs_baseline"]
        found["share_of_rule_gained"] = round(share, DIGITS)
    return found


# ---- inputs ----------------------------------------------------------------------------------------


def _facts_of_models(retro_folder: Path, baseline_folder: Path, train: Inputs) -> dict[str, Any]:
    """The models' names; whether RETRO started from a trained model, this baseline, one trained on other chunks."""
    retro, baseline = (Artifact.open(folder, "model", verify=False) for folder in (retro_folder, baseline_folder))
    before = retro.facts.get("init_from_chunks", [])
    base = retro.facts.get("base")
    return {
        "names": ModelNames.of(base["name"] if base else ""),
        "started": bool(before),
        "started_from_baseline": retro.facts.get("init_from") == baseline.fingerprint,
        "started_elsewhere": bool(set(before) - {train.database.fingerprint}),
    }


def _open_models(run: EvaluationRun, inputs: Inputs) -> dict[str, LanguageModel]:
    """Open both models after checking that they were trained on these chunks and neighbors."""
    folders = {"baseline": run.baseline_folder, "retro": run.retro_folder}
    trained_on = {
        "tokenizer": inputs.tokenizer.fingerprint,
        "chunks": inputs.database.fingerprint,
        "chunk_size": inputs.chunks.facts["chunk_size"],
    }
    models = {
        name: Artifact.open(folder, "model").require(retrieval=name == "retro", **trained_on)
        for name, folder in folders.items()
    }
    models["retro"].require(base=models["baseline"].facts.get("base"))
    inputs.neighbors.require(index=models["retro"].facts["index"])
    return open_models(models, run.base, run.device)


def spans_with_text(chunks: Artifact, max_chunks: int | None, seed: int) -> list[Span]:
    """Choose the documents to score, without those that have no bytes: bits per byte would be undefined.

    Raises DocumentError if no document is left.
    """
    chosen = choose_spans(chunks["documents"][:], max_chunks, seed)
    spans = [span for span in chosen if chunks["bytes"][span.first : span.stop].any()]
    if not spans:
        raise DocumentError(f"{chunks.folder}: no text to evaluate on; add documents to this split")
    return spans


def _check_knn(neighbors: Artifact, knn: int, config: EvaluateConfig) -> None:
    stored = neighbors["ids"].shape[1]
    for key, wanted in (("knn", knn), ("evaluate.sweep_knn", max(config.sweep_knn, default=0))):
        if wanted > stored:
            where = f"which {neighbors.folder} stores"
            raise ConfigError(f"{key}: found {wanted}, expected at most {stored}, {where}")
    if knn < 1:
        raise ConfigError(f"knn: found {knn}, expected at least 1")


# ---- passages ----------------------------------------------------------------------------------------


def _make_passages(opened: _OpenInputs, scored: PassScores) -> tuple[Passage, ...]:
    """Passages for the report: where retrieval gained most, where it gained least, and some at random."""
    run, inputs, scorer, nearest = opened.run, opened.inputs, opened.scorer, opened.nearest
    saved = scored.row_losses["off"] - scored.row_losses["on"]
    chosen = choose_passages(scorer, saved, nearest, run.config.passages, run.seed)
    return tuple(
        build_passages(
            chosen,
            scorer,
            scored.losses["off"],
            scored.losses["on"],
            nearest,
            inputs.neighbors["distances"][scorer.rows],
            attention_of_rows(opened.models["retro"], scorer, nearest, [place for _, place in chosen]),
            inputs.tokenizer,
        )
    )


def to_csv(curve: Curve) -> str:
    """Format the curve as CSV, header first."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([curve.head, *curve.rows])
    return stream.getvalue()


# ---- the cost of retrieval ---------------------------------------------------------------------------


def time_retrieval(data_folder: Path, searching: Searching, knn: int) -> dict[str, float]:
    """Return the milliseconds per chunk for embedding and searching, one chunk at a time and in a batch.

    Raises SourceError if the encoder cannot be loaded.
    """
    retriever = Retriever.open(data_folder, encoder=searching.embed.encoder, device=searching.device)
    chunks = Artifact.open(data_folder / "chunks" / "test", "chunks", verify=False)
    tokens = chunks["tokens"][:TIMED_CHUNKS][:, :-1]
    retriever.retrieve(tokens[:1], knn)  # warm-up: the first call also loads what later calls reuse
    started = time.perf_counter()
    for row in tokens[:TIMED_ALONE]:
        retriever.retrieve(row[None], knn)
    alone, started = time.perf_counter() - started, time.perf_counter()
    retriever.retrieve(tokens, knn)
    batched = time.perf_counter() - started
    return {
        "retrieval_ms_per_chunk_alone": 1000 * alone / len(tokens[:TIMED_ALONE]),
        "retrieval_ms_per_chunk_batched": 1000 * batched / len(tokens),
    }
