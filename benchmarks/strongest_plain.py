"""Compare RETRO with the strongest plain decoder that the same training time gives.

RETRO costs more than the decoder inside it: the time to train encoder and cross-attention. This program spends that
time on plain decoders instead, and compares all of them on the test documents:

- One step of each network is timed, in turns in one process. RETRO's time is that of the baseline's steps plus that
  of its own steps. Each plain decoder gets as many steps as fit into it, with one cosine over them.
- Plain decoders have tied or untied embeddings, and the size of RETRO's decoder or RETRO's number of weights (more
  layers of the same width).
- For the first seed, the validation loss after a share of the steps decides the learning rates of tied and untied
  decoders, and the validation loss after all steps decides the strongest of the four. The other seeds train only
  that one.
- The result is the paired bootstrap over test documents, RETRO against the strongest plain decoder. The better of
  the tied and untied plain decoders at the steps of RETRO's own decoder is printed beside it.

    dvc repro knn baseline                                            # the data, and what RETRO starts from
    python benchmarks/strongest_plain.py --seeds 0 1 2 | tee benchmarks/results/DATE-strongest-plain.txt

The settings are those of params.yaml. Embedding, index and search are not counted; `make repro` prints their times.
An interrupted run resumes when the same command is given again, with the step times measured first. With the default
settings it takes about ten times the training of `make repro`.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import record_result

from retro_model.core.arrays import Float64Array
from retro_model.core.artifacts import Artifact
from retro_model.core.devices import fast_float32_products
from retro_model.evaluation.scoring import Scorer, choose_spans
from retro_model.evaluation.statistics import bits_per_byte, bootstrap_sums, interval, sum_by_document
from retro_model.network.config import ModelConfig
from retro_model.network.model import RETRO
from retro_model.training.config import RetrofitConfig, TrainConfig
from retro_model.training.run import TrainingRun, build_model, train_model
from retro_model.training.sequences import PackedSequences
from retro_model.training.trainer import Trainer
from stages.common.params import read_params

MAKE_BENCH: dict[str, list[str]] = {"full": [], "quick": []}  # takes longer than all others together

LEARNING_RATES = (0.5, 1.0, 2.0)  # multiples of train.lr
SHARE = 0.25  # share of the steps after which the learning rate is chosen
SAMPLES = 2000  # bootstrap samples


@dataclass(frozen=True)
class Plain:
    """A plain decoder to compare with."""

    name: str
    model: ModelConfig


@dataclass(frozen=True)
class Run:
    """A training: of a plain decoder, or of RETRO around the decoder that `base` trained."""

    name: str
    model: ModelConfig
    train: TrainConfig
    seed: int
    base: "Run | None" = None


@dataclass(frozen=True)
class Bench:
    """The settings that all runs share."""

    data: Path
    work: Path
    params: SimpleNamespace
    jobs: int  # trainings that run in parallel
    threads: int  # threads per training

    def plain(self, plain: Plain, seed: int, steps: int, lr: float) -> Run:
        """The training of a plain decoder, with one cosine over `steps`."""
        warmup = min(self.params.train.warmup, steps)
        config = self.params.train.of_baseline()
        train = replace(config, steps=steps, lr=lr, warmup=warmup, validate_every=max(1, steps // 4))
        return Run(f"{plain.name}-{steps}-{lr:g}", plain.model, train, seed)

    def own(self, plain: Plain, seed: int) -> Run:
        """The training of a plain decoder with the settings of RETRO's own decoder."""
        return self.plain(plain, seed, self.params.train.steps, self.params.train.lr)

    def retro(self, base: Plain, seed: int) -> Run:
        """The training of RETRO: around its own decoder or from new weights, as the settings say."""
        own = None if self.params.retrofit.model() is None else self.own(base, seed)
        return Run("retro", self.params.model, self.params.train, seed, own)

    def folder(self, run: Run) -> Path:
        """The folder of a run's model and checkpoints."""
        return self.work / f"seed-{run.seed}" / run.name

    def train_all(self, runs: Iterable[Run]) -> None:
        """Train the runs that are not trained yet, `jobs` in parallel."""
        missing = [run for run in runs if not (self.folder(run) / "model").exists()]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.jobs, context, torch.set_num_threads, (self.threads,)) as pool:
            for _ in pool.map(self.train, missing):
                pass

    def train(self, run: Run) -> None:
        """Train one network."""
        params, folder = self.params, self.folder(run)
        retrieval = run.name == "retro"
        base = None if run.base is None else str(self.folder(run.base) / "model")
        training = TrainingRun(
            self.data / "chunks",
            self.data / "neighbors" if retrieval else None,
            self.data / "tokenizer",
            run.model,
            run.train,
            RetrofitConfig() if base is None else replace(params.retrofit, init_from=base),
            knn=params.knn,
            seq_len=params.seq_len,
            seed=run.seed,
            out_folder=folder / "model",
            work_folder=folder / "work",
            log_every=10**9,
        )
        train_model(training)

    def valid_loss(self, run: Run) -> float:
        """The best validation loss of a run."""
        facts = Artifact.open(self.folder(run) / "model", "model", verify=False).facts
        return float(facts["valid_loss"])


def num_weights(model: ModelConfig, bench: Bench, retrieval: bool) -> int:
    """Count the weights of a network."""
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
    """The median seconds per step of each network, measured in turns; "retro" is RETRO's step."""
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
            if turn:  # the first turn is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


# ---- comparing on the test documents -----------------------------------------------------------------


class TestDocuments:
    """The test split, and each model's losses on it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        chunks, database = (Artifact.open(bench.data / "chunks" / split, "chunks") for split in ("test", "train"))
        self.scorer = Scorer(chunks, database, choose_spans(chunks["documents"][:], None, 0), bench.params.seq_len)
        ids = Artifact.open(bench.data / "neighbors/test", "neighbors")["ids"]
        self.nearest = ids[self.scorer.rows][:, : bench.params.knn]
        self.bytes = sum_by_document(self.scorer.bytes, self.scorer.documents)

    def losses(self, run: Run, retrieval: bool = False) -> Float64Array:
        """The summed nats of each document."""
        model = RETRO.from_pretrained(self.bench.folder(run) / "model")
        losses = self.scorer.losses(model, self.nearest if retrieval else None)
        return sum_by_document(losses.sum(axis=1), self.scorer.documents)

    def bpb(self, losses: Float64Array) -> float:
        """Bits per byte over all documents."""
        return float(bits_per_byte(losses.sum(), self.bytes.sum()))

    def saved(self, losses: Float64Array, other: Float64Array) -> tuple[float, float, float]:
        """Bits per byte that `losses` saves over `other`, with the 95% interval over documents."""
        sums = bootstrap_sums(np.stack([losses, other, self.bytes], axis=1), SAMPLES, 0)
        return self.bpb(other) - self.bpb(losses), *interval(bits_per_byte(sums[:, 1] - sums[:, 0], sums[:, 2]))


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path(".retro/strongest-plain"), help="where models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="learning rates as multiples of train.lr"
    )
    parser.add_argument("--turns", type=int, default=9, help="steps of each network that are timed")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per training")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    params = read_params("knn", "seq_len", "model", "train", "retrofit")
    bench = Bench(arguments.data, arguments.work, params, arguments.jobs, arguments.threads)
    seeds, plains = arguments.seeds, competitors(bench)
    first = seeds[0]
    same_size = [plain for plain in plains if plain.model.dec_depth == params.model.dec_depth]
    base = next(plain for plain in plains if plain.model == params.model)
    steps = equal_time(bench, plains, base, arguments.turns)

    print(f"learning rates: validation loss after {SHARE:.0%} of the steps, seed {first}")
    rates = [factor * params.train.lr for factor in arguments.rates]
    short = {
        plain.name: {
            lr: bench.plain(
                replace(plain, name=f"{plain.name}-short"), first, max(1, round(SHARE * steps[plain.name])), lr
            )
            for lr in rates
        }
        for plain in same_size
    }
    own = [bench.own(base, seed) for seed in seeds] + [bench.own(plain, first) for plain in same_size if plain != base]
    bench.train_all([*(run for runs in short.values() for run in runs.values()), *own])
    chosen = {}  # learning rate by tie_embeddings
    for plain in same_size:
        losses = {lr: bench.valid_loss(run) for lr, run in short[plain.name].items()}
        print(f"  {plain.name}: " + ", ".join(f"{loss:.4f} at {lr:g}" for lr, loss in losses.items()), flush=True)
        chosen[plain.model.tie_embeddings] = min(losses, key=losses.__getitem__)

    def equal(plain: Plain, seed: int) -> Run:
        return bench.plain(plain, seed, steps[plain.name], chosen[plain.model.tie_embeddings])

    bench.train_all([*(equal(plain, first) for plain in plains), *(bench.retro(base, seed) for seed in seeds)])
    print(f"validation loss after all steps, seed {first}:")
    losses_of = {plain.name: bench.valid_loss(equal(plain, first)) for plain in plains}
    for plain in plains:
        lr = chosen[plain.model.tie_embeddings]
        print(f"  {plain.name:<16} {losses_of[plain.name]:.4f} at {lr:g}", flush=True)
    strongest = min(plains, key=lambda plain: losses_of[plain.name])
    print(f"strongest plain decoder: {strongest.name}")
    equal_steps = min(same_size, key=lambda plain: bench.valid_loss(bench.own(plain, first)))
    bench.train_all([*(equal(strongest, seed) for seed in seeds), *(bench.own(equal_steps, seed) for seed in seeds)])

    test = TestDocuments(bench)
    print(f"bits per byte of {len(test.bytes):,} test documents; saved by RETRO, with 95% intervals")
    for seed in seeds:
        retro = test.losses(bench.retro(base, seed), retrieval=True)
        print(f"seed {seed}: RETRO {test.bpb(retro):.4f}")
        for title, run in (
            (f"{equal_steps.name}, {params.train.steps:,} steps, as RETRO's decoder", bench.own(equal_steps, seed)),
            (
                f"strongest plain decoder: {strongest.name}, {steps[strongest.name]:,} steps",
                equal(strongest, seed),
            ),
        ):
            others = test.losses(run)
            saved, low, high = test.saved(retro, others)
            share = saved / test.bpb(others)
            print(
                f"  {test.bpb(others):.4f}  {title}: {saved:+.4f} ({low:+.4f} to {high:+.4f}), {share:+.1%}", flush=True
            )
        record_result(f"saved against the strongest plain decoder, seed {seed}", ratio=share, at_least=0.0)


def equal_time(bench: Bench, plains: list[Plain], base: Plain, turns: int) -> dict[str, int]:
    """How many steps of each plain decoder take as long as RETRO's training; prints how that is computed.

    The step times are stored, so that a resumed run compares the same trainings.
    """
    params, kept = bench.params, bench.work / "seconds.json"
    if not kept.exists():
        networks = {"retro": params.model, **{plain.name: plain.model for plain in plains}}
        measured_now = seconds_of_steps(bench, networks, turns)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(measured_now))
    seconds = json.loads(kept.read_text())
    around = params.retrofit.model() is not None
    own_steps = params.retrofit.steps if around else params.train.steps
    budget = own_steps * seconds["retro"] + (params.train.steps * seconds[base.name] if around else 0)
    steps = {plain.name: max(1, round(budget / seconds[plain.name])) for plain in plains}
    print(f"RETRO: {num_weights(params.model, bench, True):,} weights, trained for {budget:.0f} s")
    if around:
        print(f"  its decoder {params.train.steps:,} steps of {seconds[base.name] * 1e3:.0f} ms")
    print(f"  retrieval {own_steps:,} steps of {seconds['retro'] * 1e3:.0f} ms, {bench.threads} threads")
    print("plain decoders, trained as long:")
    for plain in plains:
        weights = num_weights(plain.model, bench, False)
        each = f"{steps[plain.name]:,} steps of {seconds[plain.name] * 1e3:.0f} ms"
        print(f"  {plain.name:<16} {weights:,} weights, {each}", flush=True)
    return steps


if __name__ == "__main__":
    main()
