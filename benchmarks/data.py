"""Measure data preparation against its limits: chunking, embedding, and the stages at growing sizes.

    python benchmarks/data.py chunk     against `tokenizers` alone, in batches on all cores, on the same text
    python benchmarks/data.py embed     against the encoder's forward pass alone, on inputs in memory
    python benchmarks/data.py curve     chunk to knn on 10,000, 100,000 and 1,000,000 chunks: time and memory

benchmarks/search.py compares knn with faiss's own search. Both sides of a comparison take turns in one process;
results are medians. `chunk` and `embed` use the docstrings of the packages installed here. `curve` generates its
text and vectors: the encoder is tiny, and the vectors for index and knn form clusters, as real ones do. Each of its
stages runs in its own process; memory is the private memory of that process (RssAnon), without the file pages that
it maps.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from measured import record_result  # noqa: E402

import stages  # noqa: F401, E402  applies the process settings of every stage
from retro_model.core.artifacts import Artifact, ArtifactWriter, rows_per_part  # noqa: E402
from retro_model.corpus.chunking import batches, make_chunks  # noqa: E402
from retro_model.corpus.documents import Corpus, CorpusConfig  # noqa: E402
from retro_model.corpus.tokenizer import Tokenizer  # noqa: E402
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer  # noqa: E402

MAKE_BENCH = {
    "full": ["chunk", "embed"],
    "quick": ["curve --sizes 2000"],
}
CORPUS = CorpusConfig(valid=0.02, test=0.02)
PACKAGES = (
    "python",
    "sklearn",
    "numpy",
    "pandas",
    "torch",
    "transformers",
    "matplotlib",
    "scipy",
    "sqlalchemy",
    "mlflow",
)
STAGES = ("chunk", "embed", "index", "knn")
CURVE = (10_000, 100_000, 1_000_000)
DIM = 384


def in_turns(tasks: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Return the median seconds of each task, not counting a first warm-up turn. Tasks return their own seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            took = task()
            if turn:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def clock(task: Callable[[], object]) -> float:
    """Time a call, in seconds."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def quiet(task: Callable[[], object]) -> Callable[[], float]:
    """Return a function that times the task with its output suppressed."""

    def run() -> float:
        with Path(os.devnull).open("w") as nowhere:
            out, err = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = nowhere
            try:
                return clock(task)
            finally:
                sys.stdout, sys.stderr = out, err

    return run


def real_text(folder: Path) -> Path:
    """Write the docstrings of installed packages, some ten megabytes, and return their folder."""
    import importlib.util

    from retro_model.sample import SampleConfig, write_sample

    there = tuple(name for name in PACKAGES if name == "python" or importlib.util.find_spec(name) is not None)
    counts = write_sample(folder / "documents", SampleConfig(packages=there, max_bytes=1 << 30))
    print(f"text: docstrings of {', '.join(there)}: {counts}")
    return folder / "documents"


def chunk(folder: Path, turns: int) -> None:
    """Compare the whole chunk stage with `tokenizers` alone."""
    documents = real_text(folder)
    config = TokenizerConfig(vocab_size=4096)
    make_tokenizer(documents, CORPUS, config, folder / "tokenizer")
    tokenizer = Tokenizer.open(folder / "tokenizer")
    texts = [[document.text for document in batch] for batch in batches(Corpus(documents, CORPUS).documents())]
    num_bytes = sum(len(text.encode()) for batch in texts for text in batch)

    def alone() -> None:
        for batch in texts:
            tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)

    took = in_turns(
        {
            "tokenizers alone": quiet(alone),
            "reading and checking alone": quiet(lambda: [None for _ in Corpus(documents, CORPUS).documents()]),
            "the chunk stage": quiet(
                lambda: make_chunks(documents, CORPUS, folder / "tokenizer", 64, folder / "chunks")
            ),
        },
        turns,
    )
    print(f"\nchunk: {num_bytes / 1e6:.1f} MB in {len(texts)} batches")
    for name, seconds in took.items():
        print(f"    {name:28} {seconds:7.2f} s  {num_bytes / 1e6 / seconds:6.2f} MB/s")
    print(f"    RATIO of the stage to tokenizers alone: {took['tokenizers alone'] / took['the chunk stage']:.2f}")
    ours, limit = (num_bytes / 1e6 / took[name] for name in ("the chunk stage", "tokenizers alone"))
    record_result(
        "chunk beside tokenizers alone", ratio=ours / limit, at_least=0.7, ours=ours, limit=limit, unit="MB/s"
    )


def embed(folder: Path, turns: int, rows: int) -> None:
    """Compare the stage's reading, tokenizing and embedding with the forward pass alone at several batch sizes."""
    import torch

    from retro_model.embedding.config import EmbedConfig
    from retro_model.embedding.embed import embed_rows
    from retro_model.embedding.encoder import Encoder

    documents = real_text(folder)
    make_tokenizer(documents, CORPUS, TokenizerConfig(vocab_size=4096), folder / "tokenizer")
    quiet(lambda: make_chunks(documents, CORPUS, folder / "tokenizer", 64, folder / "chunks"))()
    tokenizer, chunks = Tokenizer.open(folder / "tokenizer"), Artifact.open(folder / "chunks" / "train", "chunks")
    encoder = Encoder.open(EmbedConfig())
    print(f"embed: {encoder.name} in {encoder.config.number_type}, {encoder.batch_size} chunks a batch")

    def drain(iterator: Iterator[Any]) -> None:
        for _ in iterator:
            pass

    def forward(size: int) -> Callable[[], None]:
        ids = torch.randint(1000, 20_000, (size, encoder.config.max_tokens))
        mask = torch.ones_like(ids)

        @torch.inference_mode()
        def run() -> None:
            for _ in range(0, rows, size):
                encoder._model(input_ids=ids, attention_mask=mask)

        return run

    sizes = (8, 16, 32, 64, 128, 256)
    tasks = {f"forward pass alone, batch {size}": quiet(forward(size)) for size in sizes}
    whole = "the stage's way"
    tasks[whole] = quiet(lambda: drain(embed_rows(encoder, tokenizer, chunks, np.arange(rows))))
    took = in_turns(tasks, turns)
    for name, seconds in took.items():
        print(f"    {name:34} {seconds:7.2f} s  {rows / seconds:7.1f} chunks/s")
    best = min(seconds for name, seconds in took.items() if name != whole)
    print(f"    RATIO of the stage to the best forward pass: {best / took[whole]:.2f}")
    ours, limit = rows / took[whole], rows / best
    record_result(
        "embed beside its forward pass", ratio=ours / limit, at_least=0.9, ours=ours, limit=limit, unit="chunks/s"
    )


# ---- the curve -------------------------------------------------------------------------------------------


class PrivateMemory(threading.Thread):
    """Tracks the private memory of this process; `peak` is in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Sample fifty times a second until the process ends."""
        while True:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
            time.sleep(0.02)


def write_random_text(folder: Path, num_chunks: int) -> None:
    """Write about `num_chunks` chunks as .jsonl files: Zipf-distributed words, twenty chunks per document."""
    import json

    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = np.array(["".join(generator.choice(letters, 2 + rank % 9)) for rank in range(20_000)])
    weights = 1 / np.arange(2, len(vocabulary) + 2)
    folder.mkdir(parents=True)
    words_per_document, left = 720, max(num_chunks // 20, 60)
    while left:
        count = min(left, 5000)
        words = generator.choice(vocabulary, (count, words_per_document), p=weights / weights.sum())
        with (folder / f"part-{left:08d}.jsonl").open("w") as stream:
            for document in words:
                stream.write(json.dumps({"text": " ".join(document)}) + "\n")
        left -= count


def write_random_vectors(folder: Path, num_chunks: int) -> None:
    """Write chunks and unit vectors around `num_chunks / 50` centers, so close that neighbors share a center."""
    centers = np.random.default_rng(1).standard_normal((max(num_chunks // 50, 20), DIM)).astype(np.float32)
    for split, rows in (("train", num_chunks), ("valid", 1500), ("test", 1500)):
        generator = np.random.default_rng(len(split))
        with ArtifactWriter(folder / "chunks" / split, "chunks") as chunks:
            for start in range(0, rows, 1 << 14):
                count = min(1 << 14, rows - start)
                tokens = generator.integers(3, 4096, (count, 65)).astype(np.uint16)
                documents = ((start + np.arange(count)) // 20).astype(np.int32)
                chunks.append(tokens=tokens, documents=documents, bytes=np.full(count, 256, np.int32))
            chunks.facts.update(
                split=split, chunk_size=64, pad_id=0, begin_id=1, end_id=2, vocab_size=4096, tokenizer="-"
            )
        with ArtifactWriter(folder / "embeddings" / split, "embeddings", rows_per_part(rows)) as vectors:
            for start in range(0, rows, 1 << 14):
                chosen = centers[generator.integers(0, len(centers), min(1 << 14, rows - start))]
                block = chosen + 0.7 * generator.standard_normal(chosen.shape).astype(np.float32)
                block /= np.linalg.norm(block, axis=1, keepdims=True)
                vectors.append(vectors=block.astype(np.float16))
            vectors.facts.update(chunks=Artifact.open(folder / "chunks" / split, "chunks").fingerprint)
            vectors.facts.update(encoder="-", encoder_name="-", pooling="mean", normalize=True, max_tokens=96)
            vectors.facts.update(number_type="float32", device="cpu", dim=DIM, truncated_chunks=0)


def stage(name: str, folder: Path) -> None:
    """Run one stage of the curve in this process; print its seconds, CPU seconds and peak private memory."""
    from retro_model.embedding.config import EmbedConfig
    from retro_model.embedding.embed import make_embeddings
    from retro_model.search.build import make_index
    from retro_model.search.distances import import_faiss
    from retro_model.search.keys import IndexConfig
    from retro_model.search.neighbors import NeighborsConfig, make_neighbors

    import_faiss()
    made = folder / "vectors"
    embedding = EmbedConfig(encoder=str(folder / "encoder"), max_tokens=96)
    calls: dict[str, Callable[[], object]] = {
        "chunk": lambda: make_chunks(folder / "text", CORPUS, folder / "tokenizer", 64, folder / "chunks"),
        "embed": lambda: make_embeddings(folder / "chunks", folder / "tokenizer", embedding, folder / "embeddings"),
        "index": lambda: make_index(made / "embeddings", IndexConfig(), made / "index"),
        "knn": lambda: make_neighbors(
            made / "embeddings", made / "index", made / "chunks", NeighborsConfig(), made / "neighbors"
        ),
    }
    memory = PrivateMemory()
    memory.start()
    seconds = clock(calls[name])
    time.sleep(0.05)
    print(f"MEASURED {seconds} {time.process_time()} {memory.peak}")


def curve(folder: Path, sizes: list[int], chosen: list[str]) -> None:
    """Run the chosen stages at all sizes."""
    from fixtures import tiny_encoder

    head = (
        f"{'chunks':>10}  {'stage':6} {'seconds':>8} {'of cores':>9} {'chunks/s':>10} {'private memory':>15}   on disk"
    )
    print(f"\n{head}", flush=True)
    for size in sizes:
        here = folder / str(size)
        write_random_text(here / "text", size)
        if {"index", "knn"} & set(chosen):
            write_random_vectors(here / "vectors", size)
        tiny_encoder(here / "encoder")
        subprocess_text = here / "few"
        subprocess_text.mkdir()
        shutil.copy(sorted((here / "text").iterdir())[0], subprocess_text)
        quiet(lambda: make_tokenizer(subprocess_text, CORPUS, TokenizerConfig(vocab_size=4096), here / "tokenizer"))()  # noqa: B023
        outs = {"chunk": here / "chunks", "embed": here / "embeddings"}
        outs |= {"index": here / "vectors" / "index", "knn": here / "vectors" / "neighbors"}
        for name in chosen:
            command = [sys.executable, __file__, "stage", "--name", name, "--folder", str(here)]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, of_cores, peak = map(float, done.rpartition("MEASURED ")[2].split())
            on_disk = sum(path.stat().st_size for path in outs[name].rglob("*") if path.is_file())
            rows = size if name in ("index", "knn") else Artifact.open(here / "chunks" / "train", "chunks", False).rows
            index_lines = [line for line in done.splitlines() if line.startswith("index: ")]
            record_result(f"{name}, {rows:,} chunks", ours=rows / seconds, unit="chunks/s")
            print(
                f"{rows:10,}  {name:6} {seconds:8.1f} {of_cores:9.1f} {rows / seconds:10,.0f} {peak / 1e6:12,.0f} MB   "
                f"{on_disk / 1e6:,.0f} MB{'  ' + index_lines[-1] if index_lines else ''}",
                flush=True,
            )
        shutil.rmtree(here)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chunk", "embed", "curve", "stage"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1024, help="chunks to embed in a turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(CURVE), help="chunks of the curve")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="stages of the curve")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    arguments = parser.parse_args()
    if arguments.what == "stage":
        stage(arguments.name, arguments.folder)
        return
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1] for line in processor if "model name" in line), " ?")
    print(f"{cpu.strip()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.what == "chunk":
            chunk(folder, arguments.turns)
        elif arguments.what == "embed":
            embed(folder, arguments.turns, arguments.rows)
        else:
            curve(folder, arguments.sizes, arguments.stages)


if __name__ == "__main__":
    main()
