"""Measure what 1% more documents cost: chunks made again, bytes that a DVC remote would get, seconds to neighbors.

    python benchmarks/growing.py                       10,000 chunks
    python benchmarks/growing.py --chunks 100000 --stages chunk embed --without-full

Chunks a folder of made-up documents, embeds it with a tiny encoder, indexes and searches it; then adds documents,
either all at one place of the order or scattered, and does it again with the parts that were kept. The text, the
tokenizer and the encoder are made up, so seconds of embed are far below those of a real encoder; the shares are not.
All stages run in this process. Each run with kept parts is compared with a clean one, byte for byte, unless
--without-full leaves the clean one out; then times are compared with the first run.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from measured import record_result  # noqa: E402

import stages  # noqa: F401, E402  applies the process settings of every stage
from data import quiet  # noqa: E402
from retro_model.core.artifacts import SPLITS, Artifact, file_digest  # noqa: E402
from retro_model.corpus import chunking  # noqa: E402
from retro_model.corpus.documents import CorpusConfig  # noqa: E402
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer  # noqa: E402
from retro_model.embedding.config import EmbedConfig  # noqa: E402
from retro_model.embedding.embed import make_embeddings  # noqa: E402
from retro_model.jobs.parts import Parts  # noqa: E402
from retro_model.search.build import make_index  # noqa: E402
from retro_model.search.keys import IndexConfig  # noqa: E402
from retro_model.search.neighbors import NeighborsConfig, make_neighbors  # noqa: E402

MAKE_BENCH: dict[str, list[str]] = {"full": [""], "quick": ["--chunks 1000"]}
CORPUS = CorpusConfig()
CHUNKS_PER_DOCUMENT = 10
STAGES = ("chunk", "embed", "index", "knn")
OUT = {"chunk": "chunks", "embed": "embeddings", "index": "index", "knn": "neighbors"}


class Run(NamedTuple):
    """What a run wrote and did: digest and size of each file, chunks tokenized and embedded, seconds by stage."""

    files: dict[str, dict[str, int]]
    chunks: int
    tokenized: int
    embedded: int
    seconds: dict[str, float]


def write_documents(folder: Path, names: list[str], seed: int) -> None:
    """Write documents of Zipf-distributed words; their lengths differ, and the mean is CHUNKS_PER_DOCUMENT chunks."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = np.array(
        ["".join(letters[np.random.default_rng(n).integers(0, 26, 2 + n % 9)]) for n in range(20_000)]
    )
    weights = 1 / np.arange(2, len(vocabulary) + 2)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        num_words = int(36 * CHUNKS_PER_DOCUMENT * generator.uniform(0.2, 1.8))
        words = generator.choice(vocabulary, num_words, p=weights / weights.sum())
        (folder / name).write_text(" ".join(words), encoding="utf-8")


def run(folder: Path, out: Path, parts: Parts | None, chosen: list[str]) -> Run:
    """Run the chosen stages on `folder`/text, writing below `out`, with the parts that are kept."""
    chunks, embeddings, index = (out / OUT[stage] for stage in STAGES[:3])
    tokenizer, config = folder / "tokenizer", EmbedConfig(encoder=str(folder / "encoder"), max_tokens=16)
    counts = {"tokenized": 0, "embedded": 0}
    original = chunking.chunk_texts

    def count(*arguments: Any) -> Iterator[Any]:
        for made in original(*arguments):
            counts["tokenized"] += len(made.rows)
            yield made

    def embed() -> None:
        outcome = make_embeddings(chunks, tokenizer, config, embeddings, device="cpu", parts=parts)
        counts["embedded"] = int(outcome.timings["chunks_embedded"])

    calls: dict[str, Callable[[], object]] = {
        "chunk": lambda: chunking.make_chunks(folder / "text", CORPUS, tokenizer, 64, chunks, parts=parts),
        "embed": embed,
        "index": lambda: make_index(embeddings, IndexConfig(builder="faiss"), index),
        "knn": lambda: make_neighbors(embeddings, index, chunks, NeighborsConfig(), out / "neighbors", parts=parts),
    }
    chunking.chunk_texts = count
    try:
        seconds = {stage: quiet(calls[stage])() for stage in chosen}
    finally:
        chunking.chunk_texts = original
    files = {
        stage: {file_digest(file): file.stat().st_size for file in (out / OUT[stage]).rglob("*") if file.is_file()}
        for stage in chosen
    }
    total = sum(Artifact.open(chunks / split, "chunks", verify=False).rows for split in SPLITS)
    return Run(files, total, counts["tokenized"], counts["embedded"], seconds)


def report(title: str, before: Run, after: Run, full: Run) -> None:
    """Print what growing cost, beside a run without parts."""
    print(f"\n{title}: {before.chunks:,} chunks before, {after.chunks:,} after")
    share = {"tokenized": after.tokenized / after.chunks, "embedded": after.embedded / after.chunks}
    print(f"    chunks tokenized again {share['tokenized']:.2%}, embedded again {share['embedded']:.2%}")
    pushed = {}
    for stage in after.files:
        new = sum(size for digest, size in after.files[stage].items() if digest not in before.files[stage])
        everything = sum(after.files[stage].values())
        pushed[stage] = new, everything
        print(
            f"    {OUT[stage]:<10} pushed {new / 1e6:8.2f} of {everything / 1e6:8.2f} MB ({new / everything:6.1%}), "
            f"{len(after.files[stage]):,} files; {after.seconds[stage]:6.1f} s, a full run {full.seconds[stage]:6.1f} s"
        )
    new, everything = (sum(pushed[stage][place] for stage in ("chunk", "embed")) for place in (0, 1))
    times = sum(after.seconds.values()), sum(full.seconds.values())
    print(f"    chunks and embeddings: {new / everything:.2%} of the bytes pushed")
    print(f"    {' + '.join(after.files)}: {times[0]:.1f} s, a full run {times[1]:.1f} s ({times[0] / times[1]:.0%})")
    what = f"1% more documents, {title}: "
    record_result(f"{what}share of chunks embedded", ratio=share["embedded"], at_most=0.02)
    if title == "together":
        record_result(f"{what}share of chunk and embedding bytes pushed", ratio=new / everything, at_most=0.03)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--without-full", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    arguments = parser.parse_args()
    from fixtures import tiny_encoder

    num_documents = max(arguments.chunks // CHUNKS_PER_DOCUMENT, 60)
    num_new = max(num_documents // 100, 1)
    print(f"{num_documents:,} documents, {num_new} more; {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text, parts = folder / "text", Parts(folder / "parts", 1 << 40)
        write_documents(text, [f"{number:08d}.txt" for number in range(num_documents)], 0)
        tiny_encoder(folder / "encoder")
        quiet(lambda: make_tokenizer(text, CORPUS, TokenizerConfig(), folder / "tokenizer"))()
        before = run(folder, folder / "before", parts, arguments.stages)
        places = {
            "together": [f"{num_documents // 2:08d}-{number:06d}.txt" for number in range(num_new)],
            "scattered": [f"{number * num_documents // num_new:08d}-new.txt" for number in range(num_new)],
        }
        for seed, (title, names) in enumerate(places.items(), start=1):
            write_documents(text, names, seed)
            after = run(folder, folder / title, parts, arguments.stages)
            full = before
            if not arguments.without_full:
                full = run(folder, folder / f"{title}-full", None, arguments.stages)
                assert after.files == full.files, "a run with parts and a clean run write the same bytes"
            report(title, before, after, full)
            for file in names:
                (text / file).unlink()


if __name__ == "__main__":
    main()
