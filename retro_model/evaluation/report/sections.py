"""Tables and notes on where the gain comes from: copying, overlap, single documents, memorized text."""

from collections.abc import Iterator, Mapping

from retro_model.evaluation.by_overlap import LONG_RUN
from retro_model.evaluation.names import ModelNames
from retro_model.evaluation.report.html import Table
from retro_model.evaluation.statistics import Curve
from retro_model.evaluation.subsets import ALPHAS, OVERLAP_CLASSES, SHARED_WITH_TRAIN

# ---- tables ----------------------------------------------------------------------------------------


def parts_table(metrics: Mapping[str, float | int]) -> Table:
    """The gain without what could explain it away: the best document, overlap, text of the train split."""
    little, shared = metrics["share_chunks_little_overlap"], metrics["share_chunks_shared_32"]
    parts = (
        ("without_best", "without the document that gained most", "each column without its own"),
        (
            "little_overlap",
            "where there is little overlap",
            f"{little:.1%} of the chunks, as in the first row by overlap",
        ),
        (
            "unshared_32",
            "without text of the train split",
            f"{1 - shared:.1%} of the chunks; the others hold {SHARED_WITH_TRAIN} tokens in a row, or a whole chunk "
            "if that is shorter, of a train document",
        ),
    )
    rows = []
    for part, title, note in parts:
        names = [f"gain_{pair}_{part}" for pair in ("on_vs_off", "on_vs_baseline")]
        if names[0] in metrics:
            rows.append((title, note, *(_gain_of_part(*_with_ends(metrics, name)) for name in names)))
    return Table(
        "Does the gain hold?",
        ("", "saved against off", "saved against baseline"),
        tuple(rows),
        "Bits per byte saved in parts of the text, with 95% intervals over the documents of the part.",
    )


def _with_ends(metrics: Mapping[str, float | int], name: str) -> tuple[float, float | None, float | None]:
    return metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high")


def _gain_of_part(gain: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{signed(gain)}\n(one piece of text: no interval)"
    return f"{signed(gain)}\n({signed(low)} to {signed(high)})"


def leakage_table(curve: Curve, num_neighbors: int) -> Table:
    """The gain by how much chunks share with their `num_neighbors` nearest neighbors."""
    rows = []
    for row in curve.rows:
        cells = dict(zip(curve.head, row, strict=True))
        gains = _gain_of_part(*row[-6:-3]), _gain_of_part(*row[-3:])
        figures = (f"{cells[column]:.4f}" for column in ("baseline", "mixed", "off", "on"))
        rows.append((f"at most {percent(cells['alpha'])}", f"{cells['chunks']:,} chunks", *figures, *gains))
    return Table(
        "Where it helps: by overlap with the database",
        ("longest shared run", "baseline", "mixed", "off", "on", "saved against off", "saved against baseline"),
        tuple(rows),
        f"Chunks that share at most this part of a chunk, in a row, with one of their {num_neighbors} "
        "nearest neighbors; in bits per byte, with 95% intervals over the documents of the part.",
    )


def overlap_table(curve: Curve) -> Table:
    """The gain by how many tokens a chunk shares with the neighbors that were read with it."""
    rows = []
    for first, chunks, baseline, off, on, *gains, helped, hurt in curve.rows:
        figures = (f"{baseline:.4f}", f"{off:.4f}", f"{on:.4f}", _gain_of_part(*gains[:3]), _gain_of_part(*gains[3:]))
        rows.append((overlap_name(first), f"{chunks:,} chunks", *figures, f"{helped:.1%}", f"{hurt:.1%}"))
    saved = ("saved against off", "saved against baseline")
    return Table(
        "Where it helps: by overlap with what was read",
        ("tokens shared in a row", "baseline", "off", "on", *saved, "tokens helped", "tokens hurt"),
        tuple(rows),
        "Chunks by the longest run of tokens that they share with what was read beside them; in bits per byte, "
        "with 95% intervals over the documents of the part.",
    )


def overlap_name(first: int) -> str:
    """The range of shared tokens that starts at `first`, in words."""
    later = [start for start in OVERLAP_CLASSES if start > first]
    return f"{first} to {later[0] - 1}" if later else f"{first} or more"


def percent(part: float) -> str:
    """A share as a percentage with at most one decimal."""
    return f"{part:.1%}".replace(".0%", "%")


def signed(value: float) -> str:
    """Four decimals and a sign; the minus sign is as wide as the plus."""
    return f"{value:+.4f}".replace("-", "\u2212")


# ---- notes -----------------------------------------------------------------------------------------


def rule_in_words(metrics: Mapping[str, float | int], names: ModelNames) -> str:
    """What copying without a network saves, and how much of that retrieval saves."""
    gain, low, high = (metrics[f"gain_mixed_vs_baseline{end}"] for end in ("", "_low", "_high"))
    words = (
        f"copying alone (the bigram rule) is right for {metrics['rule_hits_own']:.1%} of the tokens, with random "
        f"neighbors for {metrics['rule_hits_random']:.1%}; mixed into the {names.plain} (weight "
        f"{metrics['mixed_weight']:g}, chosen on valid) it saves {gain:+.4f} ({low:+.4f} to {high:+.4f})"
    )
    if "share_of_rule_gained" in metrics:
        words += f"; {names.retrieving} gains {metrics['share_of_rule_gained']:.0%} of that"
    return words


def notes_on_overlap(metrics: Mapping[str, float | int]) -> Iterator[str]:
    """Whether the gain is more than copying, and whether training read neighbors with more overlap."""
    titles = {"gain_on_vs_off": "against off", "gain_on_vs_baseline": "against the baseline"}
    names = {name: f"{name}_little_overlap" for name in titles}
    if all(name in metrics for name in names.values()):
        gains = " and ".join(f"{_gain_of_part(*_with_ends(metrics, names[name]))} {titles[name]}" for name in titles)
        yield (
            f"Chunks that share at most {percent(ALPHAS[0])} of a chunk in a row with their nearest neighbors are "
            f"{metrics['share_chunks_little_overlap']:.1%} of all; there retrieval saves {gains}."
            f"{_copying_in_words(metrics, names, titles)}"
        )
    else:
        yield (
            f"Every chunk shares more than {percent(ALPHAS[0])} of a chunk in a row with its nearest neighbors: "
            "whether retrieval gives more than copying cannot be seen here."
        )
    if "read_run_mean_train" in metrics and "read_run_mean_test" in metrics:
        train, test = (
            f"{metrics[f'read_run_mean_{split}']:.1f} tokens in a row ({metrics[f'read_run_8_share_{split}']:.1%} of "
            f"the chunks: {LONG_RUN} or more)"
            for split in ("train", "test")
        )
        yield (
            f"With the neighbors that are read beside them, train chunks share {train} on average, the chunks "
            f"scored here {test}. Documents that nearly repeat another one are dropped between splits, but not "
            "within the train split, so training neighbors can share more than those read here."
        )


def _copying_in_words(metrics: Mapping[str, float | int], names: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """Says that the gain is copying, where chunks with little overlap do not show a gain of their own."""
    copied = [
        titles[name] for name in names if metrics[f"{name}_low"] > 0 and metrics.get(f"{names[name]}_low", 0) <= 0
    ]
    if not copied:
        return ""
    return (
        f" The interval {' and '.join(copied)} does not exclude zero there: the gain is copying from overlapping "
        "passages."
    )
