"""The training loop: settings, one step, validation, and stopping without losing anything.

What a step does is a function of the seed and of the step's number: its sequences, whose neighbors are
dropped, the dropout. Weights, optimizer and a few counts are therefore all that a checkpoint needs.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retro_model.ahead import ahead
from retro_model.config import Config, setting
from retro_model.dataset import NO_ROW, Batch, IntArray, PackedSequences
from retro_model.devices import resolve_number_type
from retro_model.errors import ConfigError, TrainingError
from retro_model.model import RETRO
from retro_model.optimization import (
    DROPOUT,
    NEIGHBOR_DROPOUT,
    autocast,
    gradient_norm_clipped,
    learning_rate,
    make_optimizer,
    random_numbers,
    reseed,
    set_learning_rate,
)
from retro_model.progress import Progress
from retro_model.resume import Checkpoints, Row, TrainingState, cpu_weights

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainConfig(Config, section="train"):
    """How the network is trained. A step is one update of the weights."""

    steps: int = setting(450, minimum=1)
    batch_size: int = setting(4, minimum=1)  # sequences of a step
    accumulation: int = setting(1, minimum=1)  # portions of a step that are computed one after the other
    lr: float = setting(1.5e-3, above=0.0)
    schedule: str = setting("cosine", choices=("cosine", "constant"))
    warmup: int = setting(30, minimum=0)  # steps
    final_lr: float = setting(0.1, minimum=0.0, maximum=1.0)  # share of lr at the end of the cosine
    weight_decay: float = setting(0.1, minimum=0.0)
    clip: float = setting(1.0, minimum=0.0)  # greatest norm of the gradient; 0: any
    neighbor_dropout: float = setting(0.1, minimum=0.0, maximum=1.0)  # share of sequences without neighbors
    validate_every: int = setting(75, minimum=1)  # steps
    validate_sequences: int = setting(32, minimum=0)  # spread over the split; 0: all
    number_type: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation:
            allowed = f"a divisor of train.batch_size = {self.batch_size}"
            raise ConfigError(f"train.accumulation: found {self.accumulation}, expected {allowed}")
        if self.warmup > self.steps:
            allowed = f"at most train.steps = {self.steps}"
            raise ConfigError(f"train.warmup: found {self.warmup}, expected {allowed}")


@dataclass(frozen=True)
class TrainingResult:
    """What came out, besides weights.

    `history` has a row for each validation and `metrics` sums up: equal for equal inputs. `timings`
    are of this process: they never are.
    """

    metrics: dict[str, float]
    history: list[Row]
    timings: dict[str, float]
    best_weights: dict[str, Tensor]


class Trainer:
    """One training run: a network, its data, its optimizer and how far it has come.

    Without neighbors in the data it trains the plain decoder. `checkpoints` may be None: then a run
    that is stopped is lost.
    """

    def __init__(
        self,
        model: RETRO,
        training: PackedSequences,
        validation: PackedSequences,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.model, self.training, self.validation = model.to(device), training, validation
        self.config, self.seed, self.device, self.checkpoints = config, seed, device, checkpoints
        self.number_type = resolve_number_type(config.number_type, device)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.compute_loss = torch.compile(model) if config.compile else model
        self.state = TrainingState()
        self.best_weights: dict[str, Tensor] = {}
        self.validation_rows = _spread(validation.ordered_rows(), config.validate_sequences)
        if checkpoints is not None and (restored := checkpoints.restore(model, self.optimizer)) is not None:
            self.state, self.best_weights = restored

    def batches(self, step: int) -> list[Batch]:
        """The portions of a step's batch: a function of the seed and the step."""
        config = self.config
        rows = self.training.training_rows(self.seed, step * config.batch_size, config.batch_size)
        chances = random_numbers(self.seed, step, NEIGHBOR_DROPOUT).random(config.batch_size)
        portions = zip(
            np.split(rows, config.accumulation),
            np.split(chances < config.neighbor_dropout, config.accumulation),
            strict=True,
        )
        return [self.training.batch(portion, without=without) for portion, without in portions]

    def step(self, batches: list[Batch]) -> Row:
        """One update of the weights; the mean loss of the labels and what else is worth a record.

        Raises TrainingError, before the weights change, when loss or gradient is not finite.
        """
        config, state = self.config, self.state
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
        reseed(self.seed, state.step, DROPOUT)
        num_labels = sum(batch.num_labels for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch.to(self.device)) * (batch.num_labels / num_labels)
            torch.autograd.backward(loss)
            total += loss.detach()
        norm = gradient_norm_clipped(self.model.parameters(), config.clip)
        mean_loss, gradient_norm = torch.stack([total, norm]).tolist()
        if not (np.isfinite(mean_loss) and np.isfinite(gradient_norm)):
            raise self._not_finite(mean_loss, gradient_norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.tokens += num_labels
        state.positions += sum(batch.labels.numel() for batch in batches)
        state.interval_loss += mean_loss * num_labels
        state.interval_tokens += num_labels
        return {"loss": mean_loss, "learning_rate": rate, "grad_norm": gradient_norm}

    def _loss(self, batch: Batch) -> Tensor:
        with autocast(self.number_type, self.device):
            loss: Tensor = self.compute_loss(
                batch.seq,
                batch.retrieved,
                return_loss=True,
                labels=batch.labels,
                documents=batch.documents,
            )
        return loss

    def _not_finite(self, loss: float, gradient_norm: float, batches: list[Batch]) -> TrainingError:
        rows = ", ".join(_row_range(sequence) for batch in batches for sequence in batch.rows)
        latest = self.checkpoints.latest() if self.checkpoints is not None else None
        return TrainingError(
            f"step {self.state.step + 1}: loss {loss}, gradient norm {gradient_norm}, expected finite "
            f"numbers; train chunks {rows}; last good checkpoint: {latest or 'none'}; "
            f"try a lower train.lr, a longer train.warmup or train.number_type float32"
        )

    def validate(self) -> Row:
        """Adds a row to the history; keeps the weights if they are the best so far."""
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
            state.best, self.best_weights = row, cpu_weights(self.model)
        return row

    @torch.no_grad()
    def _validation_loss(self, neighbors: Literal["own", "shuffled", "none"], suffix: str) -> Row:
        """The mean loss of the labels in nats, and what that is in bits a byte of text."""
        self.model.eval()
        loss, num_labels, num_bytes = 0.0, 0, 0
        size = self.config.batch_size // self.config.accumulation
        for first in range(0, len(self.validation_rows), size):
            rows = self.validation_rows[first : first + size]
            batch = self.validation.batch(rows, neighbors).to(self.device)
            with autocast(self.number_type, self.device):
                losses = self.model.token_losses(batch.seq, batch.retrieved, batch.labels, batch.documents)
            loss += float(losses.double().sum())
            num_labels += batch.num_labels
            num_bytes += int(batch.bytes.sum())
        found = {f"valid_loss{suffix}": loss / num_labels}
        if not suffix:
            found["valid_bits_per_byte"] = loss / np.log(2) / max(num_bytes, 1)
        return found

    def save(self) -> Path | None:
        """Writes a checkpoint, if there is a place for it."""
        if self.checkpoints is None:
            return None
        return self.checkpoints.save(self.state, self.model, self.optimizer, self.best_weights)

    def run(self, title: str, log: Log, log_every: int, checkpoint_every: int) -> TrainingResult:
        """Trains to the last step. Neither interval changes what comes out."""
        clock = _Clock(self.state)
        bar = Progress(title, self.config.steps, unit="step", done=self.state.step)
        with torch.random.fork_rng(), _StopSignals(self.checkpoints is not None) as stop, bar:
            for batches in ahead(map(self.batches, range(self.state.step, self.config.steps))):
                record = self.step(batches)
                validates = self._done or self.state.step % self.config.validate_every == 0
                if validates:
                    with clock.apart():
                        record |= _without_step(self.validate())
                bar.update(1, f"loss {record['loss']:.3f}, {clock.rate():,.0f} tokens/s")
                if validates or self.state.step % log_every == 0:
                    log(self.state.step, {**record, "tokens_per_second": clock.lap()})
                if self._done or stop.asked or self.state.step % checkpoint_every == 0:
                    with clock.apart():
                        self.save()
                stop.obey()
        return self._result(clock)

    @property
    def _done(self) -> bool:
        return self.state.step == self.config.steps

    def _result(self, clock: "_Clock") -> TrainingResult:
        state, best = self.state, self.state.best
        assert best is not None, "the last step validates"
        metrics = {
            **{name: value for name, value in best.items() if name != "step"},
            "best_step": best["step"],
            "tokens_seen": state.tokens,
            "real_token_share": state.tokens / state.positions,
            "num_weights": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        timings = {"tokens_per_second": clock.rate(), "seconds": clock.seconds()}
        return TrainingResult(metrics, state.history, timings, self.best_weights)


def _spread(rows: IntArray, count: int) -> IntArray:
    """`count` of the sequences, at equal distances; all of them for 0 or where there are fewer."""
    if count == 0 or count >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _row_range(rows: IntArray) -> str:
    real = rows[rows != NO_ROW]
    return f"{real[0]}-{real[-1]}"


def _without_step(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step"}


class _Clock:
    """Counts labels a second, leaving validation and saving apart."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.started = self.lap_started = time.monotonic()
        self.first_tokens = self.lap_tokens = state.tokens

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def rate(self) -> float:
        """Labels a second since the start of this process."""
        return (self.state.tokens - self.first_tokens) / max(self.seconds(), 1e-9)

    def lap(self) -> float:
        """Labels a second since the last call."""
        now = time.monotonic()
        rate = (self.state.tokens - self.lap_tokens) / max(now - self.lap_started, 1e-9)
        self.lap_started, self.lap_tokens = now, self.state.tokens
        return rate

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What runs in the block does not count."""
        before = time.monotonic()
        yield
        spent = time.monotonic() - before
        self.started += spent
        self.lap_started += spent


class _StopSignals:
    """Holds Ctrl-C and SIGTERM back until the step is done and saved; a second one acts at once."""

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.asked: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM) if self.active else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._restore()

    def obey(self) -> None:
        """Does what the signal would have done, if one came."""
        if self.asked is not None:
            signal.raise_signal(self.asked)

    def _restore(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
