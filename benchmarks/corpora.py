"""Choose the sample corpus by a rule: compare how much retrieval can give on the docstrings of several packages.

The rule uses train and validation documents and no network: the share of the validation tokens that copying from a
chunk's own neighbors gets right, minus the share with shuffled neighbors (`retro_model/training/copying.py`). The
candidate with the largest difference wins. `train` prints the same two shares for the corpus that it trains on.

Every candidate is cut to the same size, because a larger database finds closer neighbors. Candidates are the packages
that this project installs and that have enough docstrings; `--candidates` names others, and "+" joins packages.

    python benchmarks/corpora.py | tee benchmarks/results/DATE-corpora.txt

Takes about two minutes for each candidate on one core, most of it for the embeddings.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import record_result

import stages  # noqa: F401  applies the process settings of every stage
from retro_model.core.artifacts import Artifact
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.tokenizer_training import make_tokenizer
from retro_model.embedding.embed import make_embeddings
from retro_model.sample import write_sample
from retro_model.search.build import make_index
from retro_model.search.neighbors import make_neighbors
from retro_model.training.copying import CopyingPotential, copying_potential
from retro_model.training.sequences import PackedSequences
from stages.common.params import read_params

MAKE_BENCH: dict[str, list[str]] = {"full": [], "quick": []}  # reads params.yaml; chooses, measures no speed

CANDIDATES = (
    "transformers",
    "python+sklearn",
    "ray",
    "torch",
    "scipy",
    "sympy",
    "mlflow",
    "sqlalchemy",
    "networkx",
    "pandas",
    "matplotlib",
    "numpy",
)


def potential(packages: tuple[str, ...], max_bytes: int, folder: Path) -> tuple[dict[str, float], CopyingPotential]:
    """Prepare a corpus in `folder` up to its neighbors; return its counts and what copying is right for."""
    params = read_params("sample", "corpus", "tokenizer", "chunk_size", "seq_len", "embed", "index", "neighbors", "knn")
    documents, tokenizer, chunks = folder / "sample", folder / "tokenizer", folder / "chunks"
    embeddings, index, neighbors = folder / "embeddings", folder / "index", folder / "neighbors"
    write_sample(documents, replace(params.sample, packages=packages, max_bytes=max_bytes))
    make_tokenizer(documents, params.corpus, params.tokenizer, tokenizer)
    counts = make_chunks(documents, params.corpus, tokenizer, params.chunk_size, chunks)
    make_embeddings(chunks, tokenizer, params.embed, embeddings)
    make_index(embeddings, params.index, index)
    make_neighbors(embeddings, index, chunks, params.neighbors, neighbors)
    database, valid = (Artifact.open(chunks / split, "chunks") for split in ("train", "valid"))
    found = Artifact.open(neighbors / "valid", "neighbors")
    sequences = PackedSequences(valid, params.seq_len, found, database, params.knn)
    return counts, copying_potential(sequences, sequences.ordered_rows())


def main() -> None:
    """Measure each candidate and print them, the best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), help='packages, joined by "+"')
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="size of each corpus")
    arguments = parser.parse_args()
    measured = []
    for candidate in arguments.candidates:
        with tempfile.TemporaryDirectory() as folder:
            counts, shares = potential(tuple(candidate.split("+")), arguments.max_bytes, Path(folder))
        measured.append((shares.own - shares.shuffled, candidate, counts, shares))
        print(f"{candidate}: {shares.line()}", file=sys.stderr, flush=True)
    print(
        f"Right by copying from neighbors, share of the validation tokens; {arguments.max_bytes:,} bytes each at most"
    )
    print(f"{'corpus':<16} {'own':>6} {'shuffled':>9} {'difference':>11} {'documents: train':>17} {'valid':>6}")
    for difference, candidate, counts, shares in sorted(measured, key=lambda row: -row[0]):
        documents = f"{counts['train_documents']:>17,} {counts['valid_documents']:>6,}"
        print(f"{candidate:<16} {shares.own:>6.1%} {shares.shuffled:>9.1%} {difference:>11.1%} {documents}")
        record_result(f"right by copying, {candidate}", ratio=difference)


if __name__ == "__main__":
    main()
