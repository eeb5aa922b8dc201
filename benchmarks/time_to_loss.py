"""Measure how soon this project reaches the validation loss that retro-pytorch 0.3.9 has after some minutes.

Both train the network of params.yaml on the same documents and neighbors on two CPU cores, with the same number of
sequences per step, AdamW, warm-up followed by a constant rate, and the same number type. retro-pytorch gets the data
of its own dataset: one document per sequence, padded. This project packs documents. The loss is that of held-out
documents, one per sequence for both; the clock stops meanwhile. The two take turns, so that other load on the
machine affects both. Each has its own process: this project sets up memory as its trainer does, retro-pytorch keeps
the defaults.

    pip install --no-deps --target /tmp/retro-pytorch retro-pytorch==0.3.9
    dvc repro knn                                                             # the data
    python benchmarks/time_to_loss.py --theirs /tmp/retro-pytorch --minutes 10

Takes a little more than twice the minutes.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import record_result
from training import one_document_a_sequence, open_sequences

from retro_model.core.devices import NumberType, fast_float32_products, keep_freed_memory, resolve_number_type
from retro_model.core.prefetch import prefetch
from retro_model.training.optimizer import autocast, make_optimizer, set_learning_rate
from retro_model.training.run import build_model
from retro_model.training.sequences import Batch, PackedSequences
from stages.common.params import read_params

CPU = torch.device("cpu")
Loss = Callable[[Batch], Tensor]

MAKE_BENCH: dict[str, list[str]] = {"full": ["--theirs {needed_theirs}"], "quick": []}  # needs data and retro-pytorch


def ours(params: SimpleNamespace, training: PackedSequences) -> tuple[nn.Module, Loss, Iterator[Batch]]:
    """This project's network, its loss and its packed batches."""
    torch.manual_seed(params.seed)
    model = build_model(params.model, training.chunks.facts, params.seq_len, retrieval=True)
    size = params.train.batch_size

    def loss(batch: Batch) -> Tensor:
        return model(batch.seq, batch.retrieved, return_loss=True, labels=batch.labels, documents=batch.documents)

    def batches() -> Iterator[Batch]:
        first = 0
        while True:
            yield training.batch(training.training_rows(params.seed, first, size))
            first += size

    return model, loss, prefetch(batches())


def theirs(folder: str, params: SimpleNamespace, training: PackedSequences) -> tuple[nn.Module, Loss, Iterator[Batch]]:
    """retro-pytorch's network of the same shape, its loss, and batches of one document a sequence."""
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    from retro_pytorch import RETRO  # type: ignore[import-not-found]

    facts, config = training.chunks.facts, params.model
    torch.manual_seed(params.seed)
    model = RETRO(
        num_tokens=facts["vocab_size"], chunk_size=facts["chunk_size"], pad_id=facts["pad_id"],
        max_seq_len=params.seq_len, enc_dim=config.enc_dim, enc_depth=config.enc_depth,
        enc_cross_attn_layers=config.enc_cross_attn_layers, dec_dim=config.dec_dim, dec_depth=config.dec_depth,
        dec_cross_attn_layers=config.dec_cross_attn_layers, heads=config.heads, dim_head=config.dim_head,
    )  # fmt: skip
    padded, size = one_document_a_sequence(training), params.train.batch_size

    def loss(batch: Batch) -> Tensor:
        # Like a dataset of one document per sequence: the inputs and, at the end, the last label.
        return model(torch.cat([batch.seq, batch.labels[:, -1:]], dim=1), batch.retrieved, return_loss=True)

    def batches() -> Iterator[Batch]:
        for epoch in range(1000):
            rows = np.random.default_rng([params.seed, epoch]).permutation(padded)
            for first in range(0, len(rows) - size + 1, size):
                yield training.batch(rows[first : first + size])

    return model, loss, prefetch(batches())


@torch.no_grad()
def validation_loss(loss: Loss, validation: PackedSequences, number_type: NumberType, sequences: int) -> float:
    """The mean loss over the labels of held-out documents, one per sequence, with their neighbors."""
    padded = one_document_a_sequence(validation)
    rows = padded[np.linspace(0, len(padded) - 1, min(sequences, len(padded))).round().astype(int)]
    total, labels = 0.0, 0
    for first in range(0, len(rows), 4):
        batch = validation.batch(rows[first : first + 4])
        with autocast(number_type, CPU):
            total += float(loss(one_document(batch))) * batch.num_labels
        labels += batch.num_labels
    return total / labels


def one_document(batch: Batch) -> Batch:
    """Set all document numbers of a padded batch to 0: each of its sequences has one document."""
    return replace(batch, documents=torch.zeros_like(batch.documents))


Point = tuple[float, int, float]  # seconds of training, steps, validation loss


@dataclass
class Run:
    """The training of one side, continued at each of its turns."""

    side: tuple[nn.Module, Loss, Iterator[Batch]]
    params: SimpleNamespace
    validation: PackedSequences
    sequences: int  # of the validation split
    between: float  # seconds of training per turn
    seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        model, _, _ = self.side
        model.train()  # also for the validation loss: retro-pytorch has none in eval mode; there is no dropout
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        self.number_type = resolve_number_type(self.params.train.number_type, CPU)
        self.optimizer = make_optimizer(model, self.params.train.lr, self.params.train.weight_decay)

    def turn(self) -> Point:
        """Train for `between` seconds, then compute the validation loss."""
        start = self.seconds
        while self.seconds - start < self.between:
            batch = next(self.side[2])
            started = time.perf_counter()
            self._step(batch)
            self.seconds += time.perf_counter() - started
        return (
            self.seconds,
            self.steps,
            validation_loss(self.side[1], self.validation, self.number_type, self.sequences),
        )

    def _step(self, batch: Batch) -> None:
        (model, loss, _), settings = self.side, self.params.train
        self.steps += 1
        set_learning_rate(self.optimizer, settings.lr * min(1.0, self.steps / settings.warmup))
        with autocast(self.number_type, CPU):
            value = loss(batch)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


running: list[Run] = []  # the run of this process's side
process_settings = ExitStack()  # settings that last until that process ends


def start(arguments: argparse.Namespace, is_theirs: bool) -> None:
    """Create the run of one side in the process that trains it."""
    torch.set_num_threads(2)
    params = read_params("knn", "seq_len", "seed", "model", "train")
    training, validation = (
        open_sequences(arguments.data, split, params.seq_len, params.knn) for split in ("train", "valid")
    )
    if not is_theirs:  # as the trainer does
        keep_freed_memory()
        process_settings.enter_context(fast_float32_products(CPU))
    side = theirs(arguments.theirs, params, training) if is_theirs else ours(params, training)
    running.append(Run(side, params, validation, arguments.sequences, arguments.between))


def turn() -> Point:
    """Continue this process's run for one turn."""
    return running[0].turn()


def weights() -> int:
    """The number of weights that this process's run trains."""
    return running[0].weights


@dataclass
class Curve:
    """The results of one side's process."""

    weights: int
    points: list[Point] = field(default_factory=list)


def first_point_at(curve: Curve, target: float) -> Point | None:
    """The first point whose loss is at most the target, None if there is none."""
    return next((point for point in curve.points if point[2] <= target), None)


def main() -> None:
    """Train both sides in turns and print the two times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", required=True, help="the folder that retro-pytorch was installed into")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of training per side")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sequences", type=int, default=64, help="validation sequences")
    parser.add_argument("--between", type=float, default=10.0, help="seconds of training between two losses")
    print(compare(parser.parse_args()))


def compare(arguments: argparse.Namespace) -> str:
    """Train both sides, each in its own process, and return the report."""
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(get_context("spawn").Pool(1, start, (arguments, is_theirs)))
            for name, is_theirs in (("retro-pytorch", True), ("this project", False))
        }
        curves = {name: Curve(pool.apply(weights)) for name, pool in pools.items()}
        while min(curve.points[-1][0] if curve.points else 0 for curve in curves.values()) < arguments.minutes * 60:
            for name, pool in pools.items():
                seconds, steps, loss = point = pool.apply(turn)
                curves[name].points.append(point)
                print(f"  {name:14} {seconds:6.0f} s  step {steps:5,}  validation loss {loss:.4f}", flush=True)
    return report(curves)


def report(curves: dict[str, Curve]) -> str:
    """The final result of each side, and when this project reached the other's final loss."""
    lines = []
    for name, curve in curves.items():
        seconds, steps, loss = curve.points[-1]
        lines.append(
            f"{name}: {curve.weights:,} weights; validation loss {loss:.4f} after {seconds:.0f} s, {steps:,} steps"
        )
    other, mine = curves.values()
    seconds, _, target = other.points[-1]
    point = first_point_at(mine, target)
    if point is None:
        return "\n".join([*lines, f"this project has not reached {target:.4f}"])
    lines.append(f"this project reached {target:.4f} after {point[0]:.0f} s, {point[1]:,} steps")
    ratio = point[0] / seconds
    record_result(f"time to loss {target:.2f}", ratio=ratio, at_most=0.2, ours=point[0], theirs=seconds, unit="s")
    return "\n".join([*lines, f"RATIO of the times, ours to theirs: {ratio:.2f}"])


if __name__ == "__main__":
    main()
