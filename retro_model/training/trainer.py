"""The training loop: settings, training step, validation, and stopping on signals after saving a checkpoint.

The sequences of a step, its neighbor dropout and its dropout are functions of the seed and the step number. So a
checkpoint needs only the weights, the optimizer's state and a few counts.

A "portion" is a micro-batch: a step accumulates gradients over `train.accumulation` portions, and the processes
split each portion evenly.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.core.artifacts import write_csv
from retro_model.core.devices import fast_float32_products, keep_freed_memory, resolve_number_type
from retro_model.core.errors import ConfigError, TrainingError
from retro_model.core.prefetch import prefetch
from retro_model.core.progress import Progress
from retro_model.core.rows import NO_ROW
from retro_model.network.language_model import LanguageModel
from retro_model.training.checkpoints import Checkpoints, Row, Saved, TrainingState
from retro_model.training.config import TrainConfig
from retro_model.training.distributed import ALONE, World
from retro_model.training.optimizer import (
    DROPOUT,
    NEIGHBOR_DROPOUT,
    RANDOM_NEIGHBORS,
    autocast,
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    random_numbers,
    reseed,
    restore_optimizer,
    set_learning_rate,
)
from retro_model.training.sequences import Batch, PackedSequences
from retro_model.training.sharding import (
    ensure_neighbor,
    full_weights,
    replicate,
    shard,
    skip_gradient_sync,
)
from retro_model.training.throughput import peak

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    `history` has a row for each validation, and `metrics` summarizes it; both are reproducible. `timings` measure
    this process and are not. The weights are full tensors, in process 0 only.
    """

    metrics: dict[str, float]
    history: list[Row]
    timings: dict[str, float]
    best_weights: dict[str, Tensor]
    last_weights: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The data of one update of the weights."""

    rows: IntArray  # (batch_size, L): the chunk rows of all processes
    portions: list[Batch]  # this process's part of each portion
    num_labels: int  # labels of the step in all processes


class Trainer:
    """One training run: the network, its data, its optimizer and its progress.

    Without neighbors in the data it trains the plain decoder. If `checkpoints` is None, a stopped run cannot
    resume. `history_file` has the rows of all validations so far, as CSV. With several processes, each has a trainer;
    their arguments differ only in `world`.
    """

    def __init__(
        self,
        model: LanguageModel,
        training: PackedSequences,
        validation: PackedSequences,
        config: TrainConfig,
        *,
        seed: int,
        world: World = ALONE,
        checkpoints: Checkpoints | None = None,
        history_file: Path | None = None,
    ) -> None:
        self.training, self.validation, self.config, self.seed = training, validation, config, seed
        self.world, self.checkpoints, self.history_file = world, checkpoints, history_file
        self.number_type = resolve_number_type(config.number_type, world.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.sequences_per_process = _sequences_per_process(config, world)
        self.sharded = config.shard and world.size > 1
        self.frozen = model.frozen
        self.validation_rows = _evenly_spaced(validation.ordered_rows(), config.validate_sequences)
        self.state = TrainingState()
        self.best_weights: dict[str, Tensor] = {}
        saved = self._load_checkpoint()
        if saved is not None:
            self.state = saved.state
            self.best_weights = saved.best_weights if world.main else {}
            model.load_own_weights(saved.weights)
        self.model = model.to(world.device)
        self.compute_loss = self._prepared_model()
        self.optimizer = make_optimizer(self.model, config.lr, config.weight_decay)
        if saved is not None:
            restore_optimizer(self.model, self.optimizer, saved.optimizer)

    def _load_checkpoint(self) -> Saved | None:
        """Load the checkpoint of an earlier run with the same settings and inputs, in every process; None if none.

        Raises TrainingError if the processes find different checkpoints.
        """
        if self.checkpoints is None:
            return None
        if self.world.main:
            self.checkpoints.prune()
        self.world.wait_for_all()
        saved = self.checkpoints.load()
        step = 0 if saved is None else saved.state.step
        if not step == self.world.largest(step) == -self.world.largest(-step):
            raise TrainingError(
                f"{self.checkpoints.folder}: the processes found different checkpoints, this one step {step}, expected "
                "one step for all; give all machines one shared folder, then start again"
            )
        return saved

    def _prepared_model(self) -> Callable[..., Tensor]:
        """Apply activation checkpointing, compilation and DDP or FSDP as configured; return what computes the loss."""
        if self.config.checkpoint_activations:
            self.model.checkpoint_activations()
        if self.config.compile:
            self.model.compile()
        if self.sharded:
            shard(self.model, self.world)
        elif self.world.size > 1:
            return replicate(self.model, self.world)
        return self.model

    def data(self, step: int) -> Step:
        """The data of a step for this process; depends only on seed, step, settings and rank."""
        config, training = self.config, self.training
        rows = training.training_rows(self.seed, step * config.batch_size, config.batch_size)
        chances = random_numbers(self.seed, step, NEIGHBOR_DROPOUT).random(config.batch_size)
        # No neighbor dropout for a frozen decoder: nothing would be learned from a sequence without neighbors.
        without = chances < (0.0 if self.frozen else config.neighbor_dropout)
        cut = (np.split(x, config.accumulation) for x in (rows, without, self._random_neighbors(step, rows)))
        portions = zip(*cut, strict=True)
        return Step(rows, [self._portion(*portion) for portion in portions], training.count_labels(rows))

    def _random_neighbors(self, step: int, rows: IntArray) -> IntArray:
        """Random database rows for the chunks that get random neighbors in a step, -1 for all others: (B, L, knn)."""
        training, random = self.training, random_numbers(self.seed, step, RANDOM_NEIGHBORS)
        drawn = np.full((*rows.shape, training.knn), NO_ROW)
        if training.database is not None:
            chosen = random.random(rows.shape) < self.config.random_neighbors
            drawn[chosen] = random.integers(training.database.rows, size=drawn.shape)[chosen]
        return drawn

    def _portion(self, rows: IntArray, without: BoolArray, replaced: IntArray) -> Batch:
        """This process's part of a portion."""
        mine = slice(self.world.rank * self.sequences_per_process, (self.world.rank + 1) * self.sequences_per_process)
        batch = self.training.batch(rows[mine], without=without[mine], replaced=replaced[mine])
        if batch.retrieved is None or not (self.sharded or self.frozen):
            return batch
        # Encoder and cross-attention must run if nothing else is trained, or, when sharded, if they run in any process.
        if self.frozen or (self.training.neighbor_ids(rows[~without]) != NO_ROW).any():
            return ensure_neighbor(batch, self.training.pad_id)
        return batch

    def step(self, data: Step) -> Row:
        """Update the weights once, and return the mean loss per label, the learning rate and the gradient norm.

        Raises TrainingError, before the weights change, if loss or gradient is not finite.
        """
        config, state, world = self.config, self.state, self.world
        rate = learning_rate(
            state.step,
            peak=config.lr,
            steps=config.steps,
            warmup=config.warmup,
            schedule=config.schedule,
            floor=config.final_lr,
        )
        set_learning_rate(self.optimizer, rate)
        self.model.train()
        reseed(self.seed, state.step, DROPOUT, world.rank)
        total = torch.zeros((), device=world.device)
        for number, portion in enumerate(data.portions, start=1):
            weight = portion.num_labels / data.num_labels
            with skip_gradient_sync(self.compute_loss) if number < len(data.portions) else nullcontext():
                loss = self._loss(portion.to(world.device)) * weight
                torch.autograd.backward(loss * world.size)  # DDP and FSDP average gradients
            total += loss.detach()
        norm = clip_gradients(self.model.parameters(), config.clip)
        mean_loss, gradient_norm = torch.stack([world.sum(total), norm]).tolist()
        if not (np.isfinite(mean_loss) and np.isfinite(gradient_norm)):
            raise self._not_finite(mean_loss, gradient_norm, data.rows)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.tokens += data.num_labels
        state.positions += data.rows.size * self.training.chunk_size
        state.interval_loss += mean_loss * data.num_labels
        state.interval_tokens += data.num_labels
        return {"loss": mean_loss, "learning_rate": rate, "grad_norm": gradient_norm}

    def _loss(self, batch: Batch) -> Tensor:
        with autocast(self.number_type, self.world.device):
            loss: Tensor = self.compute_loss(
                batch.seq,
                batch.retrieved,
                return_loss=True,
                labels=batch.labels,
                documents=batch.documents,
            )
        return loss

    def _not_finite(self, loss: float, gradient_norm: float, rows: IntArray) -> TrainingError:
        return TrainingError(
            f"step {self.state.step + 1}: loss {loss}, gradient norm {gradient_norm}, expected finite "
            f"numbers; train chunks {', '.join(map(_row_range, rows))}; last good checkpoint: {self._last_good()}; "
            f"try a lower train.lr, a longer train.warmup or train.number_type float32"
        )

    def _last_good(self) -> Path | str:
        latest = self.checkpoints.latest() if self.checkpoints is not None else None
        return latest or "none"

    def validate(self) -> Row:
        """Validate, append a row to the history and return it; keep the weights if they are the best so far."""
        state = self.state
        row: Row = {"step": state.step, "train_loss": state.interval_loss / max(state.interval_tokens, 1)}
        if self.validation.neighbors is None:
            row |= self._validation_loss("none", "")
        else:
            row |= self._validation_loss("own", "")
            row |= self._validation_loss("none", "_off")
            row |= self._validation_loss("shuffled", "_shuffled")
        state.interval_loss, state.interval_tokens = 0.0, 0
        state.history.append(row)
        if state.best is None or row["valid_loss"] < state.best["valid_loss"]:
            state.best, self.best_weights = row, self._weights()
        return row

    def _validation_loss(self, neighbors: Literal["own", "shuffled", "none"], suffix: str) -> Row:
        """The mean loss per label in nats, and for an empty suffix also in bits per byte of text.

        Raises TrainingError if the loss is not finite.
        """
        loss, num_labels, num_bytes = self._loss_sums(self.validation, self.validation_rows, neighbors)
        row = {f"valid_loss{suffix}": loss / num_labels}
        if not suffix:
            row["valid_bits_per_byte"] = loss / np.log(2) / max(num_bytes, 1)
        return row

    @torch.no_grad()
    def _loss_sums(
        self, sequences: PackedSequences, all_rows: IntArray, neighbors: Literal["own", "shuffled", "none"]
    ) -> tuple[float, int, int]:
        """Sums over the given sequences: the losses in nats, the labels, and the bytes that these stand for."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for rows in self._portions_of(all_rows):
            batch = sequences.batch(rows, neighbors)
            if self.sharded and batch.retrieved is not None:
                batch = ensure_neighbor(batch, sequences.pad_id)
            batch = batch.to(self.world.device)
            with autocast(self.number_type, self.world.device):
                losses = self.model.token_losses(batch.seq, batch.retrieved, batch.labels, batch.documents)
            portion = [float(losses.double().sum()), batch.num_labels, int(batch.bytes.sum())]
            sums += torch.tensor(portion, dtype=torch.float64)
        loss, num_labels, num_bytes = self.world.sum(sums.to(self.world.device)).tolist()
        if not np.isfinite(loss):
            raise TrainingError(
                f"validation after step {self.state.step}: loss {loss}, expected a finite number; last good "
                f"checkpoint: {self._last_good()}; try a lower train.lr or a longer train.warmup"
            )
        return loss, int(num_labels), int(num_bytes)

    def _portions_of(self, rows: IntArray) -> Iterator[IntArray]:
        """This process's part of some sequences; every process gets the same number of portions."""
        per_round = self.sequences_per_process * self.world.size
        if self.world.size > 1 and len(rows) % per_round:
            rows = np.concatenate([rows, np.full((-len(rows) % per_round, rows.shape[1]), NO_ROW)])
        for first in range(self.world.rank * self.sequences_per_process, len(rows), per_round):
            yield rows[first : first + self.sequences_per_process]

    def _weights(self) -> dict[str, Tensor]:
        """The full weights in process 0; empty in other processes."""
        if not (self.world.main or self.sharded):
            return {}
        weights = full_weights(self.model)  # if sharded, all processes must call this
        return weights if self.world.main else {}

    def save(self) -> Path | None:
        """Write a checkpoint if there is a place for it, and return its path in process 0."""
        if self.checkpoints is None or not (self.world.main or self.sharded):
            return None
        weights, optimizer = self._weights(), optimizer_tensors(self.model, self.optimizer)
        if not self.world.main:
            return None
        return self.checkpoints.save(self.state, weights, optimizer, self.best_weights)

    def run(self, title: str, log: Log, log_every: int, checkpoint_every: int) -> TrainingResult:
        """Train to the last step. The intervals do not affect the result."""
        config, main = self.config, self.world.main
        clock = _Clock(self.state)
        self._write_history()  # drops the rows of validations after the checkpoint
        bar = Progress(title, config.steps, unit="step", done=self.state.step) if main else nullcontext()
        with (
            fast_float32_products(self.world.device),
            torch.random.fork_rng(),
            _StopSignals(self.checkpoints is not None) as stop,
            bar as progress,
        ):
            for data in prefetch(map(self.data, range(self.state.step, config.steps))):
                record = self.step(data)
                validates = self._done or self.state.step % config.validate_every == 0
                if validates:
                    with clock.paused():
                        record |= _without_step(self.validate())
                        self._write_history()
                if progress is not None:
                    progress.update(1, f"loss {record['loss']:.3f}, {clock.rate():,.0f} tokens/s")
                if main and (validates or self.state.step % log_every == 0):
                    log(self.state.step, {**record, **self._speed(clock.lap())})
                stopped = self.world.largest(stop.received)
                if self._done or stopped or self.state.step % checkpoint_every == 0:
                    with clock.paused():
                        path = self.save()
                if stopped:
                    if main:
                        logger.info(f"{title}: stops after step {self.state.step:,}, saved in {path}")
                    stop.raise_again(stopped, main)
        return self._result(clock)

    def _write_history(self) -> None:
        if self.history_file is None or not self.world.main:
            return
        if self.state.history:
            write_csv(self.history_file, self.state.history)
        else:
            self.history_file.unlink(missing_ok=True)  # of another run

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; the base of a Retrofit alone has nothing."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def score(self, log: Log) -> TrainingResult:
        """Validate the weights as they are, without a step; `train_loss` is that of as many train sequences."""
        clock = _Clock(self.state)
        rows = _evenly_spaced(self.training.ordered_rows(), self.config.validate_sequences)
        with fast_float32_products(self.world.device):
            self.state.interval_loss, self.state.interval_tokens, _ = self._loss_sums(self.training, rows, "none")
            row = self.validate()
        self._write_history()
        if self.world.main:
            log(self.state.step, _without_step(row))
        return self._result(clock)

    @property
    def _done(self) -> bool:
        return self.state.step == self.config.steps

    def _speed(self, tokens_per_second: float) -> Row:
        """The rate in labels per second, and its matrix products as a share of the hardware's peak."""
        neighbors = self.training.knn if self.training.neighbors is not None else 0
        length = self.training.seq_len
        a_token = self.model.step_flops(1, length, neighbors) / length
        most = peak(self.world.device, self.number_type).rate * self.world.size
        return {"tokens_per_second": tokens_per_second, "peak_share": tokens_per_second * a_token / most}

    def _result(self, clock: "_Clock") -> TrainingResult:
        state, best = self.state, self.state.best
        assert best is not None, "the last step validates"
        metrics = {
            **{name: value for name, value in best.items() if name != "step"},
            "best_step": best["step"],
            "tokens_seen": state.tokens,
            "real_token_share": state.tokens / max(state.positions, 1),
            "num_weights": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        timings = {**self._speed(clock.rate()), "seconds": clock.seconds()}
        if self.world.main and timings["tokens_per_second"]:  # zero if a finished run was resumed
            self._log_throughput(timings)
        return TrainingResult(metrics, state.history, timings, self.best_weights, self._weights())

    def _log_throughput(self, timings: Row) -> None:
        most = peak(self.world.device, self.number_type)
        logger.info(
            f"trained at {timings['tokens_per_second']:,.0f} tokens/s, {timings['peak_share']:.0%} of "
            f"{self.world.size * most.rate / 1e9:,.0f} GFLOP/s ({most.source})"
        )


def _sequences_per_process(config: TrainConfig, world: World) -> int:
    """The number of sequences of a portion per process. Raises ConfigError if they do not divide evenly."""
    portion = config.batch_size // config.accumulation
    if portion % world.size:
        raise ConfigError(
            f"train.batch_size: found {config.batch_size} in {config.accumulation} portions, expected a multiple of "
            f"{config.accumulation * world.size} for {world.size} processes"
        )
    return portion // world.size


def _evenly_spaced(rows: IntArray, count: int) -> IntArray:
    """`count` evenly spaced sequences; all of them if `count` is 0 or exceeds their number."""
    if count == 0 or count >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _row_range(rows: IntArray) -> str:
    real = rows[rows != NO_ROW]
    return f"{real[0]}-{real[-1]}"


def _without_step(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step"}


class _Clock:
    """Measures labels per second, excluding validation and saving."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.started = self.lap_started = time.monotonic()
        self.first_tokens = self.lap_tokens = state.tokens

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def rate(self) -> float:
        """Labels per second since the start."""
        return (self.state.tokens - self.first_tokens) / max(self.seconds(), 1e-9)

    def lap(self) -> float:
        """Labels per second since the last call."""
        now = time.monotonic()
        rate = (self.state.tokens - self.lap_tokens) / max(now - self.lap_started, 1e-9)
        self.lap_started, self.lap_tokens = now, self.state.tokens
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
        before = time.monotonic()
        yield
        spent = time.monotonic() - before
        self.started += spent
        self.lap_started += spent


class _StopSignals:
    """Delays Ctrl-C and SIGTERM until the step is done and saved; a second signal takes effect at once."""

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.received = 0  # the signal's number; 0: none
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM) if self.active else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def raise_again(self, number: int, main: bool) -> None:
        """Let the signal take its normal effect; it may have reached another process of this training.

        Processes other than 0 exit with its usual status.
        """
        self._restore()
        if not main:
            sys.exit(128 + number)
        signal.raise_signal(number)

    def _restore(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.received:  # it came while the last step was being saved
            signal.raise_signal(self.received)
