"""Turns the evaluation's figures into the words, tables and charts of reports/evaluate.html."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from retro_model.core.artifacts import Artifact
from retro_model.evaluation.comparison import Compared
from retro_model.evaluation.names import ModelNames
from retro_model.evaluation.report.charts import Chart, Series
from retro_model.evaluation.report.html import Passage, Report, Table
from retro_model.evaluation.report.sections import (
    leakage_table,
    notes_on_overlap,
    overlap_table,
    parts_table,
    percent,
    rule_in_words,
    signed,
)
from retro_model.evaluation.statistics import DOCUMENTS_SHOWN, LEAST_DOCUMENTS, NOTICEABLE_BITS, PIECE, Curve

# The columns that have a line in charts, and the number of its color; `random` has no line.
COLORS = {"on": 0, "off": 1, "baseline": 2, "mixed": 3, "on_train": 4, "compared": 5}
GAINS = {
    "gain_on_vs_off": ("on, against off", "the same model with and without its neighbors"),
    "gain_on_vs_baseline": ("on, against baseline", "what having retrieval is worth"),
    "gain_random_vs_off": ("random, against off", "the control: no gain is right"),
    "gain_on_vs_random": ("on, against random", "what the right neighbors are worth"),
    "gain_on_vs_mixed": ("on, against mixed", "what the network gets out of its neighbors beyond copying"),
    "gain_mixed_vs_baseline": ("mixed, against baseline", "what copying without a network is worth"),
    "gain_on_vs_on_train": ("on, against on_train", "what the other database is worth"),
    "gain_on_vs_compared": ("on, against compared", "this model and the other one"),
}
PART_NAMES = {"none": "nothing", "neighbor": "neighbor", "continuation": "continuation", "both": "both"}


@dataclass(frozen=True)
class Background:
    """The setup of the evaluation, as far as the page describes it.

    `documents` names the external database, if there is one; `counts` says how many of its documents were read,
    kept and dropped.
    """

    names: ModelNames
    chunks: Artifact
    database_chunks: int
    knn: int
    seq_len: int
    leakage_neighbors: int
    documents: str | None
    counts: Mapping[str, int]
    compared: Compared | None
    started: bool  # the model with retrieval started from a trained one
    started_from_baseline: bool  # that model is the baseline of this evaluation
    started_elsewhere: bool  # that model was trained on other chunks

    def meaning(self, column: str) -> str:
        """A short description of a column."""
        if column == "on" and self.documents:
            return f"{self.names.retrieving}, neighbors from {self.documents}"
        if column == "mixed" and self.documents:
            return f"{self.names.column(column)}, those from {self.documents}"
        if column == "compared" and self.compared:
            how = f"with its {self.compared.knn} nearest neighbors" if self.compared.knn else "which has no retrieval"
            return f"the model {self.compared.name}, {how}"
        return self.names.column(column)


def make_page(
    metrics: Mapping[str, float | int],
    curves: Mapping[str, Curve],
    passages: Sequence[Passage],
    background: Background,
) -> Report:
    """The report that a person reads, from the same figures that are written to files."""
    knn, source = background.knn, f" from {background.documents}" if background.documents else ""
    size = (
        f"{metrics['test_documents']:,} documents, {metrics['test_chunks']:,} chunks, "
        f"{metrics['test_tokens']:,} tokens, {metrics['test_bytes']:,} bytes of held-out text; "
        f"a database of {background.database_chunks:,} chunks{source}; "
        f"{knn} neighbor{'' if knn == 1 else 's'}."
    )
    return Report(
        title="What retrieval gave",
        summary=(headline(metrics, background.names), size),
        tables=(_columns_table(curves["columns"], background), _gains_table(metrics), parts_table(metrics)),
        charts=tuple(_charts(curves, background)),
        details=(
            leakage_table(curves["leakage"], background.leakage_neighbors),
            overlap_table(curves["overlap"]),
            _documents_table(curves["documents"]),
        ),
        passages=tuple(passages),
        notes=tuple(_notes(metrics, background)),
    )


def headline(metrics: Mapping[str, float | int], names: ModelNames) -> str:
    """The result in words; an interval that contains 0 counts as no difference."""
    on, off, baseline = (metrics[f"test_bpb_{column}"] for column in ("on", "off", "baseline"))
    documents = metrics["test_documents"]
    return (
        f"Held-out text ({documents:,} document{'' if documents == 1 else 's'}) costs {on:.4f} bits per byte with "
        f"retrieval, {off:.4f} without, and {baseline:.4f} in the {names.plain}, which never had it: "
        f"{_verdict(metrics, 'gain_on_vs_off', 'retrieval')} against the same model without neighbors, and "
        f"{_verdict(metrics, 'gain_on_vs_baseline', 'it')} against the {names.plain}.{_word_of_caution(metrics)}"
    )


def _word_of_caution(metrics: Mapping[str, float | int]) -> str:
    if metrics["gain_random_vs_off_low"] <= 0:
        return ""
    return (
        f" Careful: random neighbors, the control, save {metrics['gain_random_vs_off']:.4f} too; only what is saved "
        f"beyond that, {signed(metrics['gain_on_vs_random'])}, comes from what was found."
    )


def _verdict(metrics: Mapping[str, float | int], name: str, subject: str) -> str:
    gain, low, high = metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
    if low > 0:
        return f"{subject} saves {gain:.4f}"
    if high < 0:
        return f"{subject} costs {-gain:.4f} more"
    return f"{subject} makes no difference that these documents can show"


# ---- tables ----------------------------------------------------------------------------------------


def _columns_table(curve: Curve, background: Background) -> Table:
    rows = tuple(
        (column, background.meaning(column), f"{bpb:.4f}", f"{low:.4f} to {high:.4f}", f"{perplexity:.2f}")
        for column, bpb, low, high, perplexity in curve.rows
    )
    caption = "The same held-out text for each; perplexity is per token. Lower is better."
    if background.compared and not background.compared.same_tokens:
        caption += " The compared model has other tokens: its perplexity does not compare, its bits per byte do."
    return Table("All columns", ("", "bits per byte", "95% interval", "perplexity"), rows, caption)


def _gains_table(metrics: Mapping[str, float | int]) -> Table:
    rows = []
    for name, (title, note) in GAINS.items():
        if name not in metrics:
            continue
        gain, low, high = metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        if name == "gain_random_vs_off":
            verdict = "a gain: careful" if low > 0 else "no gain"
        rows.append((title, note, signed(gain), f"{signed(low)} to {signed(high)}", verdict))
    helped, hurt = metrics["share_tokens_helped"], metrics["share_tokens_hurt"]
    return Table(
        "What is saved",
        ("", "bits per byte saved", "95% interval", ""),
        tuple(rows),
        "Intervals are of the paired difference, over documents. With its neighbors, "
        f"{helped:.1%} of the tokens cost at least {NOTICEABLE_BITS} bits less than without, "
        f"{hurt:.1%} at least that much more.",
    )


def _documents_table(curve: Curve) -> Table:
    rows = []
    for name, chunks, size, off, on, saved in curve.rows:
        note = f"{chunks:,} chunk{'' if chunks == 1 else 's'}, {size:,} bytes"
        rows.append((name, note, f"{off:.4f}", f"{on:.4f}", f"{saved:+.1f}".replace("-", "\u2212")))
    return Table(
        "Where it helps: by document",
        ("", "off", "on", "bits saved"),
        tuple(rows),
        f"The documents that gained and that lost most, {DOCUMENTS_SHOWN} of each where there are more; "
        "bits per byte, and bits saved in all of the document.",
    )


# ---- charts ----------------------------------------------------------------------------------------


def _charts(curves: Mapping[str, Curve], background: Background) -> Iterator[Chart]:
    yield _gains_chart(curves["gains"])
    if curves["leakage"].rows:
        yield _leakage_chart(curves["leakage"], background)
    if curves["overlap"].rows:
        yield _overlap_chart(curves["overlap"])
    if curves["knn"].rows:
        yield _sweep_chart(
            "knn",
            "By number of neighbors",
            f"The model was trained with {background.knn}; 0 is retrieval off.",
            "neighbors",
            tuple(map(str, curves["knn"].column("knn"))),
            curves["knn"].column("test_bpb"),
            background.names,
        )
    yield _sweep_chart(
        "part",
        "By what is shown of a neighbor",
        "The retrieved chunk alone, the chunk that follows it in its document alone, or both, as in training.",
        "shown",
        tuple(PART_NAMES[part] for part in curves["part"].column("part")),
        curves["part"].column("test_bpb"),
        background.names,
        joined=False,
    )
    yield _database_chart(curves["database"], background)


def _gains_chart(curve: Curve) -> Chart:
    intervals = tuple(zip(curve.column("low"), curve.column("high"), strict=True))
    return Chart(
        "gains",
        "What is saved, with 95% intervals",
        "Paired over the same documents; above 0 the upper one of the two is better. random against off is the "
        "control: it belongs at 0 or below.",
        "a column",
        "bits per byte saved",
        curve.column("one"),
        (Series("bits per byte saved", curve.column("gain"), COLORS["on"], intervals),),
        curve.column("other"),
        "second line: against which",
        joined=False,
    )


def _leakage_chart(curve: Curve, background: Background) -> Chart:
    names = tuple(name for name in curve.head if name in COLORS)
    where = "in the train chunks or in the other database" if background.documents else "in the train chunks"
    return Chart(
        "leakage",
        "By overlap with the database",
        "Chunks whose longest run of tokens shared with one of their "
        f"{background.leakage_neighbors} nearest neighbors {where} is at most this part of a chunk. "
        "What is gained at the left is no copy.",
        "longest shared run, at most",
        "bits per byte",
        tuple(percent(alpha) for alpha in curve.column("alpha")),
        tuple(Series(name, curve.column(name), COLORS[name]) for name in names),
        tuple(f"{count:,}" for count in curve.column("chunks")),
        "second line: chunks",
    )


def _overlap_chart(curve: Curve) -> Chart:
    gains = curve.column("gain")
    ends = zip(gains, curve.column("low"), curve.column("high"), strict=True)
    intervals = tuple((gain, gain) if low is None else (low, high) for gain, low, high in ends)
    return Chart(
        "overlap",
        "What is saved, by overlap",
        "By the longest run of tokens that a chunk shares with the neighbors that were read beside it, with 95% "
        "intervals.",
        "tokens shared in a row, from",
        "bits per byte saved",
        tuple(map(str, curve.column("shared_tokens"))),
        (Series("on, against off", gains, COLORS["on"], intervals),),
        tuple(f"{count:,}" for count in curve.column("chunks")),
        "second line: chunks",
    )


def _sweep_chart(
    name: str,
    title: str,
    caption: str,
    x_label: str,
    places: tuple[str, ...],
    values: tuple[float, ...],
    names: ModelNames,
    joined: bool = True,
) -> Chart:
    series = (Series(names.retrieving, values, COLORS["on"]),)
    return Chart(name, title, caption, x_label, "bits per byte", places, series, joined=joined)


def _database_chart(curve: Curve, background: Background) -> Chart:
    short = curve.column("chunks_short")[0]
    return Chart(
        "database",
        "By size of the database",
        "Documents are left out by a hash of their numbers, and nothing is searched again: of the neighbors that "
        f"are stored those remain whose documents do. {short:.1%} of the chunks have fewer than {background.knn} left "
        "in the smallest part and are read with those.",
        "part of the database",
        "bits per byte",
        tuple(f"{share:.0%}" for share in curve.column("share")),
        (Series(background.names.retrieving, curve.column("test_bpb"), COLORS["on"]),),
        tuple(f"{left:.1f}" for left in curve.column("neighbors_left")),
        "second line: neighbors left",
    )


# ---- notes -----------------------------------------------------------------------------------------


def _notes(metrics: Mapping[str, float | int], background: Background) -> Iterator[str]:
    chunks, names = background.chunks, background.names
    yield (
        f"Each document of the test split is read in windows of up to {background.seq_len:,} tokens, each of which "
        f"starts half of that after the last, in whole chunks of {chunks.facts['chunk_size']}; each token is scored "
        "once, in the earliest window that holds it. The end of a document is a token that costs bits and has no "
        "bytes. Bytes are those of the original text."
    )
    yield (
        "The first chunk of a document is read without any neighbors, the others with those of the chunk before. "
        "The control draws neighbors from the whole database, each as likely as any other."
    )
    words = rule_in_words(metrics, names)
    yield f"{words[0].upper()}{words[1:]}."
    if background.documents:
        counts = background.counts
        yield (
            f"Neighbors come from {background.documents}: {counts['read']:,} documents read, {counts['kept']:,} kept. "
            f"{counts['held_out']:,} were dropped because they are, or nearly are, held-out documents, and "
            f"{counts['copies']:,} as copies of each other."
        )
    else:
        yield "Neighbors come from the training documents alone."
    yield from notes_on_overlap(metrics)
    yield (
        "Intervals are over the text: what other documents of this kind might give. Each model was trained once, and "
        "how much another seed would change is not in them."
    )
    if metrics["test_documents"] < LEAST_DOCUMENTS:
        yield (
            f"Careful: {metrics['test_documents']:,} documents are few. The intervals are over pieces of {PIECE} "
            "chunks, as if those were independent, and too narrow for what other documents might give."
        )
    if background.started:
        where = "the baseline itself" if background.started_from_baseline else "another trained model"
        yield (
            f"{names.retrieving[0].upper()}{names.retrieving[1:]} started from {where} (retrofit.init_from) and was "
            "then trained with retrieval, so it had more training than the baseline. On against off compares one model "
            "with itself"
            + (
                "."
                if names.base
                else "; benchmarks/strongest_plain.py compares RETRO with plain decoders that were trained as long."
            )
        )
    if background.started_elsewhere:
        yield (
            f"Careful: the model that {names.retrieving} started from was trained on other chunks than these. Whether "
            "the test documents were among them is not known here."
        )
    if background.compared:
        yield from _notes_on_compared(background.compared)
    if lossy := chunks.facts["lossy_documents"]:
        yield (
            f"Careful: the tokenizer cannot spell {lossy:,} of the {chunks.facts['documents']:,} test "
            "documents exactly. What it drops is not predicted, so their bits per byte are too low."
        )
    if metrics["test_chunks"] < chunks.rows:
        yield (
            f"Scored: {metrics['test_chunks']:,} of {chunks.rows:,} test chunks, whole documents in a "
            "random order, the last one cut (evaluate.max_chunks)."
        )


def _notes_on_compared(compared: Compared) -> Iterator[str]:
    how = (
        "reads the same tokens" if compared.same_tokens else "reads the same documents in tokens and chunks of its own"
    )
    yield f"The compared model, {compared.name}, {how}, in windows of its own training length."
    if not compared.same_training:
        yield (
            f"Careful: {compared.name} was trained on other chunks than these models. Whether the test documents "
            "were among them is not known here."
        )
    if compared.lossy_documents:
        yield (
            f"Careful: its tokenizer cannot spell {compared.lossy_documents:,} of the test documents exactly; "
            "what it drops is not predicted, so its bits per byte are too low."
        )
