"""Measure whether time and memory grow linearly on texts without a break, long documents and many short ones.

    python benchmarks/long_lines.py                                   # 500 kB and 2 MB of each kind
    python benchmarks/long_lines.py --bytes 2000000 --kinds DNA words --steps encode chunk

Each step runs at n and at 4n bytes, each time in its own process. Prints seconds of processor time, their ratio (4 is
linear) and how much the peak memory of the process grew at 4n. `one` is one document of ordinary words and lines,
`many` are documents of one line; the other kinds are one line without white space.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from measured import record_result  # noqa: E402
from unbroken import KINDS, unbroken_text  # noqa: E402

from retro_model.core.artifacts import SPLITS, Artifact, whole_folder  # noqa: E402
from retro_model.corpus.chunking import make_chunks  # noqa: E402
from retro_model.corpus.chunks import document_texts  # noqa: E402
from retro_model.corpus.documents import Corpus, CorpusConfig  # noqa: E402
from retro_model.corpus.near_duplicates import NearDuplicates  # noqa: E402
from retro_model.corpus.tokenizer import Tokenizer, save  # noqa: E402
from retro_model.corpus.tokenizer_training import train  # noqa: E402

MAKE_BENCH = {
    "full": [""],
    "quick": ["--bytes 4000 --kinds DNA many --steps train encode near-duplicates chunk"],
}
ONE, MANY = "one", "many"  # one ordinary document, and many documents of one line
STEPS = ("train", "encode", "near-duplicates", "chunk")
TRAINED_ON = 50_000  # bytes for the tokenizer of the other steps
WORDS_PER_LINE = 10
SMALL = 2000  # bytes of a first call that is not measured


def make_text(kind: str, num_bytes: int) -> str:
    """Return a text of the kind; that of many documents has one a line."""
    if kind not in (ONE, MANY):
        return unbroken_text(kind, num_bytes)
    random = np.random.default_rng(0)
    words = unbroken_text("words", 5000)
    starts = np.minimum(random.zipf(1.3, num_bytes // 6), len(words) - 5)
    lines = np.array([words[start : start + 5] for start in starts.tolist()])
    return "\n".join(" ".join(line) for line in np.array_split(lines, max(1, len(lines) // WORDS_PER_LINE)))


def write_documents(folder: Path, kind: str, text: str) -> None:
    """Write the text as one document, or as many, beside two short ones: each split needs one."""
    documents = text.split("\n") if kind == MANY else [text]
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as lines:
        for document in [*documents, "a short document", "another short document"]:
            lines.write(json.dumps({"text": document}) + "\n")


def prepare(folder: Path, kind: str, step: str, text: str) -> Callable[[], object]:
    """Return the call to measure."""
    if step == "train":
        return lambda: train(text.split("\n") if kind == MANY else [text], 4096)
    if step == "near-duplicates":
        return lambda: check_near_duplicates(kind, text)
    backend, special = train([make_text(kind, TRAINED_ON)], 2048)
    with whole_folder(folder / "tokenizer") as whole:
        save(whole, backend, special, "bpe")
    if step == "encode":
        tokenizer = Tokenizer.open(folder / "tokenizer")
        return lambda: tokenizer.encode_batch(text.split("\n") if kind == MANY else [text])
    (folder / "text").mkdir()
    write_documents(folder / "text", kind, text)
    return lambda: read_and_chunk(folder)


def check_near_duplicates(kind: str, text: str) -> None:
    """Sign a third of the documents and look the others up; a single one is signed and looked up."""
    documents = text.split("\n") if kind == MANY else [text, text]
    signed = NearDuplicates(0.8)
    for document in documents[::3]:
        signed.add(document)
    for document in documents[1::3]:
        signed.repeated_by(document)


def read_and_chunk(folder: Path) -> None:
    """Split the documents, drop duplicates, write the chunks and decode them again."""
    config = CorpusConfig()
    for _ in Corpus(folder / "text", config).documents():
        pass
    make_chunks(folder / "text", config, folder / "tokenizer", 64, folder / "chunks")
    tokenizer = Tokenizer.open(folder / "tokenizer")
    for split in SPLITS:
        for _ in document_texts(Artifact.open(folder / "chunks" / split, "chunks"), tokenizer):
            pass


def measure_here(kind: str, step: str, num_bytes: int) -> None:
    """Run one step in this process and print seconds of processor time and bytes of memory."""
    text = make_text(kind, num_bytes)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        (Path(name) / "small").mkdir()
        prepare(Path(name) / "small", kind, step, make_text(kind, SMALL))()  # imports, and memory for them
        call = prepare(Path(name), kind, step, text)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = peak_memory()
        started = time.process_time()
        call()
        seconds = time.process_time() - started
    print(f"MEASURED {seconds} {max(0, peak_memory() - before)}")


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def measure(kind: str, step: str, num_bytes: int) -> tuple[float, float]:
    """Run one step in a process of its own; return seconds of processor time and bytes of memory."""
    command = [sys.executable, __file__, "--one", kind, step, str(num_bytes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = done.stdout.rpartition("MEASURED ")[2].split()
    return float(seconds), float(memory)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=500_000, help="n")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS, ONE, MANY], choices=[*KINDS, ONE, MANY])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, step, num_bytes = arguments.one
        measure_here(kind, step, int(num_bytes))
        return
    small, large = arguments.bytes, 4 * arguments.bytes
    print(f"{'kind':14} {'step':16} {small:>12,} B {large:>12,} B {'ratio':>6} {'memory at 4n':>14}", flush=True)
    for kind in arguments.kinds:
        for step in arguments.steps:
            (first, _), (second, memory) = (measure(kind, step, size) for size in (small, large))
            ratio = second / max(first, 1e-9)
            print(
                f"{kind:14} {step:16} {first:12.2f} s {second:12.2f} s {ratio:6.1f} {memory / 1e6:11,.0f} MB",
                flush=True,
            )
            record_result(f"{step}, {kind}, seconds at 4n and n", ratio=ratio, ours=second, unit="s")


if __name__ == "__main__":
    main()
