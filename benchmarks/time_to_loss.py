"""How long this project takes to reach the validation loss that retro-pytorch 0.3.9 has after some minutes.

Both train the network of params.yaml from the same documents and neighbors on two CPU cores, with the same
number of sequences a step, AdamW, warm-up and then a constant rate, in the same number type. retro-pytorch
gets what its own dataset gives: a document a sequence, padded. This project packs. The loss is that of the
held-out documents, a document a sequence for both; the clock stands still while it is taken.

    pip install --no-deps --target /tmp/retro-pytorch retro-pytorch==0.3.9
    dvc repro knn                                                             # the data
    python benchmarks/time_to_loss.py --theirs /tmp/retro-pytorch --minutes 10

With --only theirs and then --only ours the two halves run at different times, over --record.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import measured
from training import one_document_a_sequence, open_sequences

from retro_model.ahead import ahead
from retro_model.dataset import Batch, PackedSequences
from retro_model.devices import NumberType, resolve_number_type
from retro_model.optimization import autocast, make_optimizer, set_learning_rate
from retro_model.training import build_model
from stages.params import read_params

CPU = torch.device("cpu")
Loss = Callable[[Batch], Tensor]

MAKE_BENCH: dict[str, list[str]] = {"full": ["--theirs {needed_theirs}"], "quick": []}  # needs the data, and both


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

    return model, loss, ahead(batches())


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
        # What a dataset of one document a sequence gives: the inputs and, at the end, the last label.
        return model(torch.cat([batch.seq, batch.labels[:, -1:]], dim=1), batch.retrieved, return_loss=True)

    def batches() -> Iterator[Batch]:
        for epoch in range(1000):
            rows = np.random.default_rng([params.seed, epoch]).permutation(padded)
            for first in range(0, len(rows) - size + 1, size):
                yield training.batch(rows[first : first + size])

    return model, loss, ahead(batches())


@torch.no_grad()
def validation_loss(loss: Loss, validation: PackedSequences, number_type: NumberType, sequences: int) -> float:
    """The mean over the labels of held-out documents, a document a sequence, with their neighbors."""
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
    """The batch of padded sequences without the numbers of its documents, of which each sequence has one."""
    return replace(batch, documents=torch.zeros_like(batch.documents))


def train(
    side: tuple[nn.Module, Loss, Iterator[Batch]],
    params: SimpleNamespace,
    validation: PackedSequences,
    stop: Callable[[float, float], bool],
    sequences: int,
    between: float,
) -> list[tuple[float, int, float]]:
    """(seconds, steps, validation loss) each `between` seconds, until `stop` says so of seconds and loss."""
    model, loss, batches = side
    model.train()  # without dropout; retro-pytorch has no loss in eval mode
    number_type = resolve_number_type(params.train.number_type, CPU)
    optimizer = make_optimizer(model, params.train.lr, params.train.weight_decay)
    curve: list[tuple[float, int, float]] = []
    seconds, validated = 0.0, 0.0
    for step, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        set_learning_rate(optimizer, params.train.lr * min(1.0, step / params.train.warmup))
        with autocast(number_type, CPU):
            value = loss(batch)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), params.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if seconds - validated >= between:
            validated = seconds
            curve.append((seconds, step, validation_loss(loss, validation, number_type, sequences)))
            print(f"  {seconds:6.0f} s  step {step:5,}  validation loss {curve[-1][2]:.4f}", flush=True)
            if stop(seconds, curve[-1][2]):
                break
    return curve


def main() -> None:
    """Trains what the command line asks for and prints the two times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="the folder that retro-pytorch was installed into")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for retro-pytorch")
    parser.add_argument("--most", type=float, default=20.0, help="minutes after which this project gives up")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sequences", type=int, default=64, help="of validation")
    parser.add_argument("--only", choices=["theirs", "ours"])
    parser.add_argument("--record", type=Path, default=Path("/tmp/time_to_loss.json"), help="between the halves")
    parser.add_argument("--between", type=float, default=5.0, help="seconds of training between two losses")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    between = arguments.between
    params = read_params("knn", "seq_len", "seed", "model", "train")
    data = [open_sequences(arguments.data, split, params.seq_len, params.knn) for split in ("train", "valid")]
    if arguments.only != "ours":
        side = theirs(arguments.theirs, params, data[0])
        print(f"retro-pytorch, {sum(p.numel() for p in side[0].parameters()):,} weights")
        limit = arguments.minutes * 60
        curve = train(side, params, data[1], lambda now, _: now >= limit, arguments.sequences, between)
        arguments.record.write_text(json.dumps(curve))
    if arguments.only != "theirs":
        seconds, steps, target = json.loads(arguments.record.read_text())[-1]
        side = ours(params, data[0])
        print(f"this project, {sum(p.numel() for p in side[0].parameters()):,} weights")
        most = arguments.most * 60
        curve = train(
            side, params, data[1], lambda now, loss: loss <= target or now >= most, arguments.sequences, between
        )
        reached = curve[-1]
        print(f"retro-pytorch: validation loss {target:.4f} after {seconds:.0f} s, {steps:,} steps")
        if reached[2] > target:
            print(f"this project: not reached in {reached[0]:.0f} s; {reached[2]:.4f}")
            return
        print(f"this project: {reached[2]:.4f} after {reached[0]:.0f} s, {reached[1]:,} steps")
        print(f"RATIO of the times, ours to theirs: {reached[0] / seconds:.2f}")
        ratio = reached[0] / seconds
        measured(f"time to loss {target:.2f}", ratio=ratio, at_most=0.2, ours=reached[0], theirs=seconds, unit="s")


if __name__ == "__main__":
    main()
