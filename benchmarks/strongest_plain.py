"""RETRO beside the strongest plain decoder that the same training time gives.

RETRO costs more than the decoder inside it: the time to train encoder and cross-attention. This program gives
that time to plain decoders instead, and compares all of them on the test documents:

- one step of each network is timed in turns, in one process; RETRO's time is that of the baseline's steps plus
  that of its own steps, and each plain decoder gets as many steps as fit into it, with one cosine over them;
- plain decoders come with tied and untied embeddings, at the size of RETRO's decoder and at RETRO's number of
  weights (more layers of the same width), and each with several learning rates;
- for the first seed the learning rate of each is chosen by the validation loss after a share of its steps, and
  the strongest of the four by the validation loss after all of them; the other seeds train that one;
- what decides is the paired bootstrap over test documents, RETRO against the strongest plain decoder; the better
  one of tied and untied plain decoders at the steps of RETRO's own decoder stands beside.

    dvc repro knn baseline                                            # the data, and what RETRO starts from
    python benchmarks/strongest_plain.py --seeds 0 1 2 | tee benchmarks/results/DATE-strongest-plain.txt

The settings are those of params.yaml. Embedding, index and search are not counted; they are printed by `make
repro`. A run that was stopped goes on where it was when the same command is given again. With the default
settings it takes about twelve times the training of `make repro`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import measured

from retro_model.artifacts import Artifact
from retro_model.checkpoint import from_pretrained
from retro_model.dataset import PackedSequences
from retro_model.devices import fast_float32_products
from retro_model.figures import FloatArray, bits_per_byte, bootstrap_sums, interval, sum_by_document
from retro_model.scoring import Scorer, choose_spans
from retro_model.trainer import Trainer
from retro_model.training import ModelConfig, TrainConfig, build_model, train_model
from stages.params import read_params

MAKE_BENCH: dict[str, list[str]] = {"full": [], "quick": []}  # it takes longer than all the others together

LEARNING_RATES = (0.5, 1.0, 2.0)  # times that of params.yaml
SHARE = 0.25  # of the steps, after which the learning rate is chosen
SAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Plain:
    """A plain decoder that competes."""

    name: str
    model: ModelConfig


@dataclass(frozen=True)
class Bench:
    """What all runs have in common."""

    data: Path
    work: Path
    params: SimpleNamespace

    def train(self, name: str, model: ModelConfig, train: TrainConfig, seed: int, base: Path | None = None) -> Path:
        """Trains a network, or finds it trained; RETRO around `base`, a plain decoder without. Its folder."""
        folder = self.work / f"seed-{seed}" / name
        if not (folder / "model").exists():
            params = self.params
            neighbors = None if base is None else self.data / "neighbors"
            retrofit = None if base is None else replace(params.retrofit, init_from=str(base))
            train_model(
                self.data / "chunks", neighbors, self.data / "tokenizer", model, train, retrofit,
                knn=params.knn, seq_len=params.seq_len, seed=seed, out_folder=folder / "model",
                work_folder=folder / "work", log_every=10**9,
            )  # fmt: skip
        return folder / "model"

    def plain(self, name: str, model: ModelConfig, steps: int, lr: float, seed: int) -> Path:
        """Trains a plain decoder with one cosine over `steps`."""
        warmup = min(self.params.train.warmup, steps)
        config = self.params.train.of_baseline()
        train = replace(config, steps=steps, lr=lr, warmup=warmup, validate_every=max(1, steps // 4))
        return self.train(f"{name}-{steps}-{lr:g}", model, train, seed)


def valid_loss(folder: Path) -> float:
    """The best validation loss of a trained model."""
    return float(Artifact.open(folder, "model", verify=False).facts["valid_loss"])


def num_weights(model: ModelConfig, bench: Bench, retrieval: bool) -> int:
    """The number of weights of a network."""
    facts = Artifact.open(bench.data / "chunks/train", "chunks", verify=False).facts
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(model, facts, bench.params.seq_len, retrieval).parameters())


def competitors(bench: Bench) -> list[Plain]:
    """Plain decoders, tied and untied, at the size of RETRO's decoder and at RETRO's number of weights."""
    config, found = bench.params.model, []
    wanted = num_weights(config, bench, retrieval=True)
    for tied in (True, False):
        model = replace(config, tie_embeddings=tied)
        found.append(Plain("tied" if tied else "untied", model))
        depths = range(config.dec_depth, 4 * config.dec_depth)
        deeper = [replace(model, dec_depth=depth) for depth in depths]
        nearest = min(deeper, key=lambda model: abs(num_weights(model, bench, False) - wanted))
        if nearest.dec_depth > model.dec_depth:
            found.append(Plain(f"{found[-1].name}-{nearest.dec_depth}-layers", nearest))
    return found


def seconds_of_steps(bench: Bench, networks: Mapping[str, ModelConfig], turns: int) -> dict[str, float]:
    """The median seconds of a step of each network, taken in turns; "retro" is RETRO's step."""
    params, trainers = bench.params, {}
    chunks = {split: Artifact.open(bench.data / "chunks" / split, "chunks") for split in ("train", "valid")}
    neighbors = {split: Artifact.open(bench.data / "neighbors" / split, "neighbors") for split in chunks}
    for name, config in networks.items():
        retrieval = name == "retro"
        plain = build_model(config, chunks["train"].facts, params.seq_len, retrieval=False)
        model = build_model(config, chunks["train"].facts, params.seq_len, retrieval)
        if retrieval and params.retrofit.model() is not None and params.retrofit.freeze == "decoder":
            decoder = set(plain.state_dict())
            for weight_name, weight in model.named_parameters():
                weight.requires_grad_(weight_name not in decoder)
        data = [
            PackedSequences(chunks[split], params.seq_len, neighbors[split], chunks["train"], params.knn)
            if retrieval
            else PackedSequences(chunks[split], params.seq_len)
            for split in chunks
        ]
        train = params.train if retrieval else params.train.of_baseline()
        trainers[name] = Trainer(model, *data, train, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(turns + 1):
        for name, trainer in trainers.items():
            data_of_step = trainer.data(turn)
            started = time.perf_counter()
            with fast_float32_products(trainer.world.device):
                trainer.step(data_of_step)
            if turn:  # the first does not count
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


# ---- comparing on the test documents -----------------------------------------------------------------


class TestDocuments:
    """The test split, and what each model costs on it."""

    def __init__(self, bench: Bench) -> None:
        chunks, database = (Artifact.open(bench.data / "chunks" / split, "chunks") for split in ("test", "train"))
        self.scorer = Scorer(chunks, database, choose_spans(chunks["documents"][:], None, 0), bench.params.seq_len)
        ids = Artifact.open(bench.data / "neighbors/test", "neighbors")["ids"]
        self.nearest = ids[self.scorer.rows][:, : bench.params.knn]
        self.bytes = sum_by_document(self.scorer.bytes, self.scorer.documents)

    def losses(self, folder: Path, retrieval: bool = False) -> FloatArray:
        """The summed nats of each document."""
        losses = self.scorer.losses(from_pretrained(folder), self.nearest if retrieval else None)
        return sum_by_document(losses.sum(axis=1), self.scorer.documents)

    def bpb(self, losses: FloatArray) -> float:
        """Bits per byte over all documents."""
        return float(bits_per_byte(losses.sum(), self.bytes.sum()))

    def saved(self, losses: FloatArray, other: FloatArray) -> tuple[float, float, float]:
        """What the first saves against the other, in bits per byte, and the 95% interval over documents."""
        sums = bootstrap_sums(np.stack([losses, other, self.bytes], axis=1), SAMPLES, 0)
        return self.bpb(other) - self.bpb(losses), *interval(bits_per_byte(sums[:, 1] - sums[:, 0], sums[:, 2]))


def choose_rate(bench: Bench, plain: Plain, steps: int, rates: Sequence[float], seed: int) -> float:
    """The learning rate with the lowest validation loss after a share of the steps."""
    if len(rates) == 1:
        return rates[0]
    short = max(1, round(SHARE * steps))
    losses = {rate: valid_loss(bench.plain(f"{plain.name}-short", plain.model, short, rate, seed)) for rate in rates}
    print(f"  {plain.name}: " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items()), flush=True)
    return min(losses, key=losses.__getitem__)


def main() -> None:
    """Trains, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path(".retro/strongest-plain"), help="where models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="times train.lr")
    parser.add_argument("--turns", type=int, default=9, help="steps of each network that are timed")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    params = read_params("knn", "seq_len", "model", "train", "retrofit")
    bench = Bench(arguments.data, arguments.work, params)

    plains = competitors(bench)
    base = next(plain for plain in plains if plain.model == params.model)
    networks = {"retro": params.model, **{plain.name: plain.model for plain in plains}}
    seconds = seconds_of_steps(bench, networks, arguments.turns)
    around = params.retrofit.model() is not None
    own_steps = params.retrofit.steps if around else params.train.steps
    budget = own_steps * seconds["retro"] + (params.train.steps * seconds[base.name] if around else 0)
    steps = {plain.name: max(1, round(budget / seconds[plain.name])) for plain in plains}
    print(f"RETRO: {num_weights(params.model, bench, True):,} weights, trained for {budget:.0f} s")
    print(f"  its decoder {params.train.steps:,} steps of {seconds[base.name] * 1e3:.0f} ms" if around else "")
    print(f"  retrieval {own_steps:,} steps of {seconds['retro'] * 1e3:.0f} ms, {arguments.threads} threads")
    print("plain decoders, trained as long:")
    for plain in plains:
        weights = num_weights(plain.model, bench, False)
        each = f"{steps[plain.name]:,} steps of {seconds[plain.name] * 1e3:.0f} ms"
        print(f"  {plain.name:<16} {weights:,} weights, {each}", flush=True)

    first = arguments.seeds[0]
    rates = [factor * params.train.lr for factor in arguments.rates]
    print(f"learning rates: validation loss after {SHARE:.0%} of the steps, seed {first}")
    chosen = {plain.name: choose_rate(bench, plain, steps[plain.name], rates, first) for plain in plains}
    trained = {
        plain.name: bench.plain(plain.name, plain.model, steps[plain.name], chosen[plain.name], first)
        for plain in plains
    }
    strongest = min(plains, key=lambda plain: valid_loss(trained[plain.name]))
    print(f"validation loss after all steps, seed {first}:")
    for name, folder in trained.items():
        print(f"  {name:<16} {valid_loss(folder):.4f} at {chosen[name]:g}", flush=True)
    print(f"strongest plain decoder: {strongest.name}")

    test = TestDocuments(bench)
    print(f"bits per byte of {len(test.bytes):,} test documents; saved by RETRO, with 95% intervals")
    same_size = [plain for plain in plains if plain.model.dec_depth == params.model.dec_depth]
    for seed in arguments.seeds:
        own = {
            plain.name: bench.plain(f"{plain.name}-own", plain.model, params.train.steps, params.train.lr, seed)
            for plain in same_size
        }
        equal_steps = min(own, key=lambda name: valid_loss(own[name]))
        plain = bench.plain(strongest.name, strongest.model, steps[strongest.name], chosen[strongest.name], seed)
        retro = bench.train("retro", params.model, params.train, seed, own[base.name] if around else None)
        losses = test.losses(retro, retrieval=True)
        print(f"seed {seed}: RETRO {test.bpb(losses):.4f}")
        for title, folder in (
            (f"{equal_steps}, {params.train.steps:,} steps, as RETRO's decoder", own[equal_steps]),
            (f"strongest plain decoder: {strongest.name}, {steps[strongest.name]:,} steps", plain),
        ):
            others = test.losses(folder)
            saved, low, high = test.saved(losses, others)
            share = saved / test.bpb(others)
            print(
                f"  {test.bpb(others):.4f}  {title}: {saved:+.4f} ({low:+.4f} to {high:+.4f}), {share:+.1%}", flush=True
            )
        measured(f"saved against the strongest plain decoder, seed {seed}", ratio=share, at_least=0.0)


if __name__ == "__main__":
    main()
