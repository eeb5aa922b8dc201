"""Measure training on the default corpus: the loader against the model, packing, and the cost of logging.

    dvc repro knn                     # the data
    python benchmarks/training.py | tee benchmarks/results/DATE-training-cpu.txt

Network and settings are those of params.yaml. Takes two minutes on two cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import record_result

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.devices import fast_float32_products
from retro_model.core.rows import NO_ROW
from retro_model.training.run import build_model
from retro_model.training.sequences import PackedSequences
from retro_model.training.trainer import Step, Trainer
from stages.common.params import read_params

MAKE_BENCH: dict[str, list[str]] = {"full": [""], "quick": []}  # needs the data of a real run


def open_sequences(data: Path, split: str, seq_len: int, knn: int) -> PackedSequences:
    """Open a split's sequences with their neighbors."""
    chunks = {name: Artifact.open(data / "chunks" / name, "chunks") for name in {split, "train"}}
    neighbors = Artifact.open(data / "neighbors" / split, "neighbors")
    return PackedSequences(chunks[split], seq_len, neighbors, chunks["train"], knn)


def one_document_a_sequence(sequences: PackedSequences) -> IntArray:
    """Rows of sequences (n, L) with one document each, in order, padded with -1 at the end."""
    documents = np.asarray(sequences.chunks["documents"][:])
    length, found = sequences.rows_per_sequence, []
    for rows in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(documents)) + 1):
        for first in range(0, len(rows), length):
            part = rows[first : first + length]
            found.append(np.concatenate([part, np.full(length - len(part), NO_ROW)]))
    return np.stack(found)


def make_trainer(data: Path, params: SimpleNamespace) -> Trainer:
    """The trainer that the stage train builds."""
    training, validation = (open_sequences(data, split, params.seq_len, params.knn) for split in ("train", "valid"))
    torch.manual_seed(params.seed)
    model = build_model(params.model, training.chunks.facts, params.seq_len, retrieval=True)
    return Trainer(model, training, validation, params.train, seed=params.seed)


def loader(trainer: Trainer, batches: int) -> float:
    """Labels per second that the loader delivers when nothing else runs."""
    trainer.data(0)
    started = time.perf_counter()
    labels = sum(trainer.data(step).num_labels for step in range(1, batches + 1))
    return labels / (time.perf_counter() - started)


def in_turns(trainer: Trainer, steps: int) -> dict[str, tuple[float, float]]:
    """(labels per second, share of positions with a label), packed and one document per sequence; steps take turns."""
    training, size = trainer.training, trainer.config.batch_size
    padded = np.random.default_rng(0).permutation(one_document_a_sequence(training))
    seconds: dict[str, list[float]] = {"packed": [], "one document a sequence": []}
    labels, positions = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
    for number in range(steps + 1):
        rows = padded[np.arange(number * size, (number + 1) * size) % len(padded)]
        alone = Step(rows, [training.batch(rows)], training.count_labels(rows))
        for name, data in zip(seconds, (trainer.data(number), alone), strict=True):
            started = time.perf_counter()
            with fast_float32_products(trainer.world.device):
                trainer.step(data)
            if number:  # the first step is a warm-up
                seconds[name].append(time.perf_counter() - started)
                labels[name] += data.num_labels
                positions[name] += data.rows.size * training.chunk_size
    return {
        name: (labels[name] / steps / statistics.median(seconds[name]), labels[name] / positions[name])
        for name in seconds
    }


def logging_seconds(records: int) -> float:
    """The median seconds to log one record in MLflow."""
    from stages.tracking.runs import training_run

    record = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_share"), 1.0)
    with tempfile.TemporaryDirectory() as root:
        os.environ["DVC_ROOT"] = root
        try:
            with training_run("benchmark", "none", {}, {}) as run:
                seconds = []
                for step in range(records):
                    started = time.perf_counter()
                    run.log_step(step, record)
                    seconds.append(time.perf_counter() - started)
        finally:
            del os.environ["DVC_ROOT"]
    return statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    params = read_params("knn", "seq_len", "seed", "model", "train")
    trainer = make_trainer(arguments.data, params)
    found = in_turns(trainer, arguments.steps)
    (packed, share), (alone, alone_share) = found.values()
    delivered = loader(trainer, 10 * arguments.steps)
    log_every, step = 10, trainer.config.batch_size * params.seq_len * share / packed
    cost = logging_seconds(50)
    print(
        f"{trainer.number_type}, {arguments.threads} threads; real tokens a second, medians of {arguments.steps} steps"
    )
    print(f"  model, packed                    {packed:9,.0f}   {share:.1%} of all positions are real tokens")
    print(f"  model, one document a sequence   {alone:9,.0f}   {alone_share:.1%}")
    print(f"  RATIO of packed to one document a sequence: {packed / alone:.2f}")
    print(f"  loader alone                     {delivered:9,.0f}")
    print(f"  RATIO of the loader to the model: {delivered / packed:.1f}")
    print(
        f"  a record in MLflow takes {cost * 1e3:.1f} ms, one each {log_every} steps of {step * 1e3:.0f} ms: ", end=""
    )
    print(f"{cost / step / log_every:.2%} of the time")
    record_result("loader beside the model", ratio=delivered / packed, at_least=10, ours=packed, unit="tokens/s")
    record_result("packed beside one document a sequence", ratio=packed / alone, ours=packed, unit="tokens/s")
    record_result("share of positions that are real tokens", ratio=share, at_least=0.9)
    record_result("share of the time that logging takes", ratio=cost / step / log_every, at_most=0.01)


if __name__ == "__main__":
    main()
