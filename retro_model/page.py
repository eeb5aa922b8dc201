"""The evaluation's figures in words, tables and charts: what reports/evaluate.html says."""

from collections.abc import Iterator, Mapping, Sequence

from retro_model.artifacts import Artifact
from retro_model.figures import LEAKAGE_NEIGHBORS, NOTICEABLE_BITS, Curve
from retro_model.report import Chart, Passage, Report, Series, Table

MEANING = {
    "baseline": "the same decoder, trained without retrieval",
    "off": "RETRO, nothing retrieved",
    "on": "RETRO, with the nearest neighbors",
    "random": "RETRO, with random neighbors (the control)",
}
COLORS = {"on": 0, "off": 1, "baseline": 2, "random": 3}
GAINS = {
    "gain_on_vs_off": ("on, against off", "the same model with and without its neighbors"),
    "gain_on_vs_baseline": ("on, against baseline", "what having retrieval is worth"),
    "gain_random_vs_off": ("random, against off", "the control: no gain is right"),
}


def make_page(
    metrics: Mapping[str, float | int],
    curves: Mapping[str, Curve],
    passages: Sequence[Passage],
    chunks: Artifact,
    database_rows: int,
    *,
    knn: int,
    seq_len: int,
) -> Report:
    """The report for a person to read, from the figures that are written."""
    size = (
        f"{metrics['test_documents']:,} documents, {metrics['test_chunks']:,} chunks, "
        f"{metrics['test_tokens']:,} tokens, {metrics['test_bytes']:,} bytes of held-out text; "
        f"a database of {database_rows:,} chunks; {knn} neighbor{'' if knn == 1 else 's'}."
    )
    return Report(
        title="What retrieval gave",
        summary=(headline(metrics), size),
        tables=(_columns_table(curves["columns"]), _gains_table(metrics)),
        charts=tuple(_charts(curves, knn)),
        passages=tuple(passages),
        notes=tuple(_notes(metrics, chunks, seq_len)),
    )


def headline(metrics: Mapping[str, float | int]) -> str:
    """The result in words; an interval that holds 0 is no difference."""
    on, off, baseline = (metrics[f"test_bpb_{column}"] for column in ("on", "off", "baseline"))
    return (
        f"Held-out text costs {on:.3f} bits per byte with retrieval, {off:.3f} without, and {baseline:.3f} "
        f"in a decoder that never had it: {_verdict(metrics, 'gain_on_vs_off', 'retrieval')} against the "
        f"same model without neighbors, and {_verdict(metrics, 'gain_on_vs_baseline', 'it')} against the "
        "baseline."
    )


def _verdict(metrics: Mapping[str, float | int], name: str, subject: str) -> str:
    gain, low, high = metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
    if low > 0:
        return f"{subject} saves {gain:.3f}"
    if high < 0:
        return f"{subject} costs {-gain:.3f} more"
    return f"{subject} makes no difference that these documents can show"


def _columns_table(curve: Curve) -> Table:
    rows = tuple(
        (column, MEANING[column], f"{bpb:.4f}", f"{low:.4f} to {high:.4f}", f"{perplexity:.2f}")
        for column, bpb, low, high, perplexity in curve.rows
    )
    return Table(
        "Four columns",
        ("", "bits per byte", "95% interval", "perplexity"),
        rows,
        "The same held-out text for each; perplexity is per token. Lower is better.",
    )


def _gains_table(metrics: Mapping[str, float | int]) -> Table:
    rows = []
    for name, (title, note) in GAINS.items():
        gain, low, high = metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart"
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


def signed(value: float) -> str:
    """Four digits with a sign that is as wide as a plus."""
    return f"{value:+.4f}".replace("-", "\u2212")


def _charts(curves: Mapping[str, Curve], knn: int) -> Iterator[Chart]:
    if curves["knn"].rows:
        ks, figures = zip(*curves["knn"].rows, strict=True)
        yield Chart(
            "By number of neighbors",
            f"The model was trained with {knn}; 0 is retrieval off.",
            "neighbors",
            "bits per byte",
            tuple(str(k) for k in ks),
            (Series("RETRO", figures, COLORS["on"]),),
        )
    if curves["leakage"].rows:
        alphas, counts, *lines = zip(*curves["leakage"].rows, strict=True)
        names = curves["leakage"].head[2:]
        numbers = ", ".join(f"{count:,}" for count in counts)
        yield Chart(
            "By overlap with the database",
            "Chunks that share no longer run of tokens with one of their "
            f"{LEAKAGE_NEIGHBORS} nearest neighbors than this part of a chunk ({numbers} chunks). "
            "A gain at the left is no copy.",
            "longest shared run, at most",
            "bits per byte",
            tuple(f"{alpha:.1%}".replace(".0%", "%") for alpha in alphas),
            tuple(Series(name, figures, COLORS[name]) for name, figures in zip(names, lines, strict=True)),
        )


def _notes(metrics: Mapping[str, float | int], chunks: Artifact, seq_len: int) -> Iterator[str]:
    chunk_size = chunks.facts["chunk_size"]
    yield (
        f"Each document of the test split is read in windows of up to {seq_len:,} tokens, each of which "
        f"starts half of that after the last, in whole chunks of {chunk_size}; each token is scored once, in "
        "the earliest window that holds it. The end of a document is a token that costs bits and has no "
        "bytes. Bytes are those of the original text."
    )
    yield (
        "Neighbors come from the training documents alone. The first chunk of a document is read without "
        "any, the others with those of the chunk before. The control draws neighbors from the whole "
        "database, each as likely as any other."
    )
    lossy = chunks.facts["lossy_documents"]
    if lossy:
        yield (
            f"Careful: the tokenizer cannot spell {lossy:,} of the {chunks.facts['documents']:,} test "
            "documents exactly. What it drops is not predicted, so their bits per byte are too low."
        )
    if metrics["test_chunks"] < chunks.rows:
        yield (
            f"Scored: {metrics['test_chunks']:,} of {chunks.rows:,} test chunks, whole documents in a "
            "random order, the last one cut (evaluate.max_chunks)."
        )
