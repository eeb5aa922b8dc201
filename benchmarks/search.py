"""Measure neighbor search against faiss's own batched search on the same index; prints ratios.

    OMP_NUM_THREADS=2 python benchmarks/search.py | tee benchmarks/results/DATE-search-cpu.txt

The vectors are random but structured like real ones: unit vectors of documents of 20 chunks, around topics. There
are as many topics as documents, and some are common. 28,000 of these vectors need 32 of 512 lists for a recall of
0.95, as 28,000 chunks of real documentation did. For an index with codes, faiss uses its own refine step over the
half-precision vectors, with as many candidates. Queries are chunks of the database itself, so the nearest are often
from the query's own document and do not count.

faiss searches all queries in one call, and in batches; the faster one counts. It searches for k, enough if there
were no documents, and for k plus a surplus that makes up for the query's own document. `Database.nearest` excludes
that document, scores again with the stored half-precision vectors, and sorts by (distance, id). All take turns in
one process; results are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests" / "support")]
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from fixtures import write_vectors  # noqa: E402
from measured import record_result  # noqa: E402

import stages  # noqa: F401, E402  applies the process settings of every stage
from retro_model.core.artifacts import Artifact  # noqa: E402
from retro_model.search.build import make_index  # noqa: E402
from retro_model.search.distances import import_faiss  # noqa: E402
from retro_model.search.index import INDEX_FILE  # noqa: E402
from retro_model.search.keys import IndexConfig  # noqa: E402
from retro_model.search.neighbors import QUERIES_PER_BATCH, SURPLUS, Database  # noqa: E402

DIM, CHUNKS_PER_DOCUMENT = 384, 20
HELD_OUT = 1000
MAKE_BENCH = {
    "full": ["--rows 20000 --queries 2048"],
    "quick": ["--rows 2000 --queries 256 -k 8 --turns 1 --keys Flat IVF16,Flat"],
}
Floats = npt.NDArray[np.float32]


def random_vectors(num_rows: int, seed: int, num_topics: int) -> Floats:
    """Random unit vectors: the sum of a topic (few are common), a part of the document and a part of the chunk.

    They have the spectrum of real vectors, which vary most along their first directions.
    """
    spectrum = np.arange(1, DIM + 1, dtype=np.float32) ** -0.5
    topics = np.random.default_rng(1).standard_normal((num_topics, DIM), dtype=np.float32)
    random = np.random.default_rng(seed)
    num_documents = -(-num_rows // CHUNKS_PER_DOCUMENT)
    weights = np.arange(1, num_topics + 1) ** -0.7
    documents = topics[random.choice(num_topics, num_documents, p=weights / weights.sum())]
    documents += 0.6 * random.standard_normal(documents.shape, dtype=np.float32)
    vectors = np.repeat(documents, CHUNKS_PER_DOCUMENT, axis=0)[:num_rows]
    vectors += 0.7 * random.standard_normal(vectors.shape, dtype=np.float32)
    vectors *= spectrum
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def in_turns(tasks: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the median seconds of each task, without a first warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def with_refine(index: Any, vectors: npt.NDArray[np.float16], factor: float) -> Any:
    """Wrap the index in faiss's refine step: it rescores `factor` times as many candidates as requested."""
    faiss = import_faiss()
    halves = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16)
    halves.is_trained = True
    halves.add(vectors.astype(np.float32))
    both = faiss.IndexRefine(index, halves)
    both.k_factor = factor
    return both


def compare(folder: Path, key: str, num_queries: int, k: int, turns: int) -> None:
    """Measure one index over the vectors in `folder`."""
    faiss = import_faiss()
    start = time.perf_counter()
    outcome = make_index(folder / "embeddings", IndexConfig(key=key, max_memory_gb=64.0), folder / key)
    print(f"    built in {time.perf_counter() - start:.1f} s; {outcome.metrics}")
    embeddings = Artifact.open(folder / "embeddings" / "train", "embeddings", verify=False)
    chunks = Artifact.open(folder / "chunks" / "train", "chunks", verify=False)
    database = Database.open(embeddings, Artifact.open(folder / key, "index"), chunks)
    index = database.index
    alone: Any = faiss.read_index(str(folder / key / INDEX_FILE))
    if index.lists > 1:
        alone.nprobe = index.probes
    first = len(chunks["tokens"]) // 3
    queries = embeddings["vectors"][first : first + num_queries].astype(np.float32)
    documents = chunks["documents"][first : first + num_queries]

    def faiss_alone(count: int, size: int) -> Callable[[], object]:
        return lambda: [alone.search(queries[at : at + size], count) for at in range(0, len(queries), size)]

    def ours() -> None:
        for at in range(0, len(queries), QUERIES_PER_BATCH):
            database.nearest(queries[at : at + QUERIES_PER_BATCH], documents[at : at + QUERIES_PER_BATCH], k)

    fetched = max(index.rescored or 0, k) + SURPLUS
    sizes = {"one call": num_queries, "batches": QUERIES_PER_BATCH}
    if index.rescored:
        alone = with_refine(alone, embeddings["vectors"][:], fetched / k)
    counts = (k,) if index.rescored else (k, fetched)
    tasks = {f"{count}, {name}": faiss_alone(count, size) for count in counts for name, size in sizes.items()}
    took = in_turns({**tasks, "Database.nearest": ours}, turns)
    mine = took["Database.nearest"]
    for count in counts:
        best = min(seconds for name, seconds in took.items() if name.startswith(f"{count}, "))
        print(
            f"    {key:18} faiss, {count:3} nearest {1000 * best / num_queries:7.3f} ms a query;  "
            f"Database.nearest, {k} {1000 * mine / num_queries:7.3f} ms;  RATIO {best / mine:.2f}",
            flush=True,
        )
    best = min(seconds for name, seconds in took.items() if name.startswith(f"{k}, "))
    rates = {"ours": num_queries / mine, "limit": num_queries / best}
    where = f"{len(embeddings['vectors']):,} vectors"
    record_result(f"search, {key}, {where}", ratio=best / mine, at_least=0.8, unit="queries/s", **rates)


def main() -> None:
    """Measure all sizes and keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000, 300_000])
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("-k", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--keys", nargs="+", help="factory strings; by default Flat, IVF and IVF with codes")
    arguments = parser.parse_args()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "?")
    print(f"{cpu.strip()}, {os.cpu_count()} cores, {import_faiss().omp_get_max_threads()} threads")
    for num_rows in arguments.rows:
        num_topics = num_rows // CHUNKS_PER_DOCUMENT
        vectors = {
            "train": random_vectors(num_rows, 2, num_topics),
            "valid": random_vectors(HELD_OUT, 3, num_topics),
            "test": random_vectors(20, 4, num_topics),
        }
        documents = {split: np.arange(len(rows)) // CHUNKS_PER_DOCUMENT for split, rows in vectors.items()}
        lists = 2 ** round(np.log2(4 * np.sqrt(num_rows))) // 2
        keys = arguments.keys or ["Flat", f"IVF{lists},Flat", f"IVF{lists},PQ{DIM // 2}x4fs"]
        print(f"\n{num_rows:,} vectors of {DIM}, {arguments.queries:,} queries")
        with tempfile.TemporaryDirectory() as name:
            write_vectors(Path(name), vectors, documents)
            for key in keys:
                compare(Path(name), key, min(arguments.queries, num_rows), arguments.k, arguments.turns)


if __name__ == "__main__":
    main()
