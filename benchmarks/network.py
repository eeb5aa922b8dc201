"""Measure the network against retro-pytorch 0.3.9: training step, memory, writing; prints ratios.

retro-pytorch requires old versions of many packages, so it is installed into its own folder, without its
dependencies (this project's environment has those that it needs):

    pip install --no-deps --target /tmp/retro-pytorch retro-pytorch==0.3.9
    python benchmarks/network.py --theirs /tmp/retro-pytorch | tee benchmarks/results/DATE-network-cpu.txt
    python benchmarks/network.py --theirs /tmp/retro-pytorch --device cuda   # a larger network, bfloat16

Both sides take turns in one run, so that other load on the machine affects both; results are medians over the turns.
`--load 2 --only training` measures the steps beside two programs of one thread that compute without pause.
Without --theirs only this project is measured. Takes five minutes on two cores. If the processor has no bfloat16
products, that type is skipped, because it would take hours.
"""

import argparse
import dataclasses
import importlib
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the stages, before torch loads OpenMP

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import record_result

from retro_model.core.devices import fast_float32_products, keep_freed_memory, resolve_number_type
from retro_model.inference.cached_decoder import CachedDecoder
from retro_model.network.config import RETROConfig
from retro_model.network.flops import step_flops
from retro_model.network.model import RETRO
from retro_model.training.throughput import DATA_SHEETS, known_chip


@dataclass(frozen=True)
class Setting:
    """What to measure, and on which device."""

    device: str
    network: Mapping[str, Any]  # constructor arguments of both sides' RETRO
    batch: int
    length: int  # tokens per row in a training step
    memory_length: int  # tokens per row in the memory measurement
    dtypes: Mapping[str, torch.dtype]
    compiled: bool  # whether to measure this project compiled, too
    prompt: int = 64
    written: int = 448
    places: tuple[int, int] = (200, 2000)  # positions where the time per token is measured
    neighbors: int = 2

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return int(self.network["chunk_size"])

    @property
    def config(self) -> RETROConfig:
        """The network as this project's config."""
        return RETROConfig(**self.network)


MAKE_BENCH = {
    "full": ["--theirs {theirs}"],
    "quick": ["--turns 1 --only writing --theirs {theirs}"],
}
SET_UP_AS_OURS = "theirs, set up as ours"  # their network, in a process set up as this project's trainer does
AUTOCAST = {"bfloat16 autocast": torch.bfloat16}
NUMBER_TYPES = {"float32": torch.float32, **AUTOCAST}
SETTINGS = {
    "cpu": Setting(
        device="cpu",
        network={
            "num_tokens": 8192, "max_seq_len": 2048, "enc_dim": 256, "enc_depth": 2, "dec_dim": 256, "dec_depth": 6,
            "dec_cross_attn_layers": (3, 6), "heads": 8, "dim_head": 64, "chunk_size": 64,
        },
        batch=4, length=512, memory_length=2048, dtypes=NUMBER_TYPES, compiled=False,
    ),
    "cuda": Setting(
        device="cuda",
        network={
            "num_tokens": 28996, "max_seq_len": 2048, "enc_dim": 896, "enc_depth": 2, "dec_dim": 768, "dec_depth": 12,
            "dec_cross_attn_layers": (3, 6, 9, 12), "heads": 8, "dim_head": 64, "chunk_size": 64,
            "dec_attn_dropout": 0.25, "dec_ff_dropout": 0.25, "use_deepnet": True,
        },
        batch=8, length=2048, memory_length=2048, dtypes=AUTOCAST, compiled=True,
    ),
}  # fmt: skip

# ---- the two sides ---------------------------------------------------------------------------------


def build(side: str, setting: Setting, theirs: str | None) -> nn.Module:
    """Build a new model of "ours" or "theirs"."""
    torch.manual_seed(0)
    if side == "ours":
        return RETRO(**setting.network).to(setting.device)
    if theirs not in sys.path:
        sys.path.insert(0, str(theirs))
    warnings.simplefilter("ignore")
    model: nn.Module = importlib.import_module("retro_pytorch").RETRO(**setting.network)
    return model.to(setting.device)


def random_batch(setting: Setting, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens (rows, length + 1), and neighbors with continuations (rows, L, K, R)."""
    generator, vocabulary = torch.Generator().manual_seed(0), setting.network["num_tokens"]
    seq = torch.randint(1, vocabulary, (rows, length + 1), generator=generator)
    shape = rows, length // setting.chunk_size, setting.neighbors, 2 * setting.chunk_size
    retrieved = torch.randint(1, vocabulary, shape, generator=generator)
    return seq.to(setting.device), retrieved.to(setting.device)


def step(
    model: Callable[..., Tensor], seq: Tensor, retrieved: Tensor | None, dtype: torch.dtype, **options: Any
) -> None:
    """Run forward and backward. The optimizer is left out: it is the same for both."""
    with torch.autocast(seq.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model(seq, retrieved, return_loss=True, **options)
    torch.autograd.backward(loss)


# ---- measuring -------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def in_turns(tasks: Mapping[str, Callable[[], object]], turns: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each task in each turn, without a first warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            synchronize(device)
            start = time.perf_counter()
            task()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def other_programs(number: int) -> Iterator[None]:
    """Keep `number` processes busy with matrix products, each in one thread."""
    processes = [get_context("spawn").Process(target=compute_forever, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def compute_forever() -> None:
    """Multiply matrices without end."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        matrix @ matrix


def matrix_limit(setting: Setting, dtype: torch.dtype) -> float:
    """The speed of the fastest matrix product in FLOP/s: what a step could reach if it did nothing else."""
    shapes = [(2048, 256, 1536), (2048, 2048, 2048), (8192, 256, 1024)]
    if setting.device != "cpu":
        shapes = [(8192, 8192, 8192), (16384, 4096, 8192)]
    fastest = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, dtype=dtype, device=setting.device)
        b = torch.randn(n, k, dtype=dtype, device=setting.device)
        tasks = {"product": lambda a=a, b=b: nn.functional.linear(a, b)}
        with fast_float32_products(torch.device(setting.device)):
            fastest = max(fastest, 2 * m * k * n / min(in_turns(tasks, 8, setting.device)["product"]))
    return fastest


def data_sheet(chip: str) -> float | None:
    """The dense bfloat16 FLOP/s in the data sheet of the chip, None if it is unknown."""
    known = known_chip(chip)
    return None if known is None else DATA_SHEETS[known][0]


def chip_of(device: str) -> str:
    """The name of the processor or GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().split("\n")
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown processor")


# ---- training step ---------------------------------------------------------------------------------


def training(setting: Setting, theirs: str | None, turns: int) -> dict[str, dict[str, float]]:
    """Measure training steps; print and return their seconds by number type and task.

    Each side has its own process, because the two manage process memory differently.
    """
    sides = ["ours"]
    if theirs:
        sides += ["theirs", SET_UP_AS_OURS] if setting.device == "cpu" else ["theirs"]
    print(
        f"\none training step, batch {setting.batch} x {setting.length} tokens, k = {setting.neighbors} "
        f"(forward and backward; median of {turns} turns)"
    )
    medians: dict[str, dict[str, float]] = {}
    for dtype_name, dtype in setting.dtypes.items():
        with ExitStack() as stack:
            tasks: dict[str, Callable[[], object]] = {}
            for side in sides:
                arguments = side, setting, theirs, dtype, torch.get_num_threads()
                pool = stack.enter_context(get_context("spawn").Pool(1, prepare, arguments))
                tasks |= {name: partial(pool.apply, run, (name,)) for name in pool.apply(names)}
            seconds = {name: statistics.median(of_turns) for name, of_turns in in_turns(tasks, turns, "cpu").items()}
        print_training(setting, dtype_name, seconds, matrix_limit(setting, dtype))
        medians[dtype_name] = seconds
    return medians


prepared: dict[str, Callable[[], None]] = {}  # in the process of one side: its steps by name


def prepare(side: str, setting: Setting, theirs: str | None, dtype: torch.dtype, threads: int) -> None:
    """Build the steps of one side in the process that runs them."""
    torch.set_num_threads(threads)
    if setting.device == "cpu" and side != "theirs":
        keep_freed_memory()
    prepared.update(training_tasks(side, setting, theirs, dtype))


def names() -> list[str]:
    """The names of this process's steps."""
    return list(prepared)


def run(name: str) -> None:
    """Run one of this process's steps to its end."""
    prepared[name]()


def training_tasks(
    side: str, setting: Setting, theirs: str | None, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """The steps of one side to compare, by the name to print."""
    model = build("ours" if side == "ours" else "theirs", setting, theirs)
    seq, retrieved = random_batch(setting, setting.batch, setting.length)

    def task(called: Callable[..., Tensor], *inputs: Tensor | None, **options: Any) -> None:
        # Our trainer's settings, like the memory settings in `prepare`; "theirs" runs without either.
        with nullcontext() if side == "theirs" else fast_float32_products(torch.device(setting.device)):
            step(called, cast("Tensor", inputs[0]), inputs[1], dtype, **options)
        model.zero_grad(set_to_none=True)
        synchronize(setting.device)

    tasks: dict[str, Callable[[], None]] = {side: partial(task, model, seq, retrieved)}
    if side == "ours":
        chunks = setting.length // setting.chunk_size
        documents = torch.arange(chunks, device=seq.device).repeat(setting.batch, 1) // 3
        packed = {"labels": seq[:, 1:], "documents": documents}
        if setting.compiled:
            tasks["ours, compiled"] = partial(task, torch.compile(model), seq, retrieved)
        tasks["without neighbors"] = partial(task, model, seq, None)
        tasks["packed documents"] = partial(task, model, seq[:, :-1], retrieved, **packed)
    return tasks


def print_training(setting: Setting, dtype_name: str, seconds: Mapping[str, float], limit: float) -> None:
    """Print one number type's steps, their share of the matrix limit, and the ratios."""
    promised = data_sheet(chip_of(setting.device)) if setting.device != "cpu" else None
    print(f"  {dtype_name}; fastest matrix product {limit / 1e9:,.0f} GFLOP/s", end="")
    print(f", the data sheet's {promised / 1e9:,.0f} GFLOP/s" if promised else "")
    for name, of_task in seconds.items():
        neighbors = 0 if name == "without neighbors" else setting.neighbors
        rate = step_flops(setting.config, setting.batch, setting.length, neighbors) / of_task
        tokens = setting.batch * setting.length / of_task
        line = f"    {name:22} {of_task * 1e3:8.0f} ms  {tokens:8,.0f} tokens/s  {rate / limit:6.1%} of that"
        print(line + (f"  {rate / promised:6.1%} of the data sheet's" if promised else ""))
    print(f"    retrieval costs a factor of {seconds['ours'] / seconds['without neighbors']:.2f}")
    tokens = setting.batch * setting.length
    theirs = seconds.get("theirs")
    record_result(
        f"training step, {setting.device}, {dtype_name}",
        ratio=theirs / min(of for name, of in seconds.items() if name.startswith("ours")) if theirs else None,
        at_least=2 if setting.device == "cpu" else 3,
        ours=tokens / min(of for name, of in seconds.items() if name.startswith("ours")),
        theirs=tokens / theirs if theirs else None,
        limit=tokens * limit / step_flops(setting.config, setting.batch, setting.length, setting.neighbors),
        unit="tokens/s",
    )
    if "theirs" in seconds:
        for name in seconds:
            if name.startswith("ours"):
                ratio = seconds["theirs"] / seconds[name]
                print(f"    RATIO of tokens a second, {name} to theirs: {ratio:.2f}")
        if SET_UP_AS_OURS in seconds:
            ratio = seconds[SET_UP_AS_OURS] / seconds["ours"]
            print(f"    ours to theirs in a process set up as this project's trainer sets up its own: {ratio:.2f}")
        most = seconds["theirs"] * limit / step_flops(setting.config, setting.batch, setting.length, setting.neighbors)
        print(f"    a step at the speed of the fastest matrix product would have a ratio of {most:.2f}")


# ---- memory ----------------------------------------------------------------------------------------


def peak_memory(side: str, setting: Setting, theirs: str | None, dtype: torch.dtype) -> int:
    """The peak bytes that one step adds. On a CPU, this process must not have used more memory before."""
    model = build(side, setting, theirs)
    seq, retrieved = random_batch(setting, setting.batch, setting.memory_length)
    if setting.device != "cpu":
        synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, seq, retrieved, dtype)
        synchronize(setting.device)
        return torch.cuda.max_memory_allocated() - before
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step(model, seq, retrieved, dtype)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def memory(setting: Setting, theirs: str | None, threads: int) -> None:
    """Measure the memory of a step, each side in its own process."""
    print(
        f"\npeak memory that one step adds, batch {setting.batch} x {setting.memory_length} tokens, "
        f"k = {setting.neighbors}"
    )
    for dtype_name in setting.dtypes:
        used = {}
        for side in ["ours", "theirs"] if theirs else ["ours"]:
            command = [sys.executable, __file__, "--device", setting.device, "--threads", str(threads)]
            command += ["--peak", side, dtype_name, *(["--theirs", theirs] if theirs else [])]
            used[side] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"    {dtype_name:20} {side:8} {used[side] / 2**20:8,.0f} MiB")
        if theirs:
            print(f"    RATIO of memory, ours to theirs: {used['ours'] / used['theirs']:.2f}")
        ratio = used["ours"] / used["theirs"] if theirs else None
        mebibytes = {side: size / 2**20 for side, size in used.items()}
        record_result(f"memory of a step, {dtype_name}", ratio=ratio, at_most=0.5, unit="MiB", **mebibytes)


# ---- writing ---------------------------------------------------------------------------------------


@torch.no_grad()
def write(model: RETRO, seq: Tensor, retrieved: Tensor, start: int, end: int) -> list[float]:
    """Write the tokens from `start` to `end` one by one; return the seconds from the beginning to each read.

    This includes creating the decoder, reading the tokens before `start` and choosing each token.
    """
    begin = time.perf_counter()
    decoder, place, stamps = CachedDecoder(model, 1, end), 0, []
    chunk_size = model.config.chunk_size
    while place < end:
        width = min(decoder.room(place), start - place) if place < start else 1
        found = {0: retrieved[0, (place + 1) // chunk_size - 1]} if (place + 1) % chunk_size == 0 else {}
        hidden_BSD = decoder.read(seq[:, place : place + width], [width], found)
        decoder.logits(hidden_BSD[:, -1]).argmax(-1).item()
        place += width
        stamps.append(time.perf_counter() - begin)
    return stamps


def pace(stamps: list[float], start: int, end: int, place: int) -> float:
    """The median seconds per token over the sixty tokens around a place, fewer near an end."""
    first = len(stamps) - (end - start)  # earlier stamps are from reading the prompt
    at = first + place - start
    around = range(max(first + 1, at - 30), min(len(stamps), at + 30))
    return statistics.median(stamps[i] - stamps[i - 1] for i in around)


@torch.no_grad()
def writing(setting: Setting, theirs: str | None, turns: int) -> dict[str, float]:
    """Measure writing with given neighbors; print and return the seconds.

    retro-pytorch calls its whole model for each token: every 32nd of these calls is measured, spread evenly.
    """
    print(
        f"\nwriting {setting.written} tokens after a prompt of {setting.prompt}, neighbors given, float32, batch 1 "
        f"(median of {turns} turns)"
    )
    early, late = setting.places
    seq, retrieved = random_batch(setting, 1, setting.network["max_seq_len"])
    ours = cast("RETRO", build("ours", setting, theirs).eval())
    other = build("theirs", setting, theirs).eval() if theirs else None
    end = setting.prompt + setting.written
    lengths = range(setting.prompt + 8, end, 32)
    mine: list[float] = []
    calls: list[float] = []
    for turn in range(turns + 1):
        whole = write(ours, seq, retrieved, setting.prompt, end)[-1]
        if turn:
            mine.append(whole)
        for length in lengths if other is not None and turn else []:
            synchronize(setting.device)
            start = time.perf_counter()
            cast("nn.Module", other)(seq[:, :length], retrieved[:, : length // setting.chunk_size])
            synchronize(setting.device)
            calls.append(time.perf_counter() - start)
    found = {"ours": statistics.median(mine)}
    print(f"    ours   {found['ours']:8.2f} s  {setting.written / found['ours']:8,.0f} tokens/s")
    if other is not None:
        found["theirs"] = statistics.fmean(calls) * setting.written
        note = f"(from {len(lengths)} of the {setting.written} calls, {turns} times)"
        print(f"    theirs {found['theirs']:8.2f} s  {setting.written / found['theirs']:8,.0f} tokens/s  {note}")
        print(f"    RATIO of tokens a second, ours to theirs: {found['theirs'] / found['ours']:.0f}")
    paces: tuple[list[float], list[float]] = [], []
    last = min(late + 40, setting.network["max_seq_len"])
    for _ in range(turns):
        stamps = write(ours, seq, retrieved, setting.prompt, last)
        for place, of_place in zip((early, late), paces, strict=True):
            of_place.append(pace(stamps, setting.prompt, last, place))
    found["early"], found["late"] = (statistics.median(of_place) for of_place in paces)
    rates = {side: setting.written / found[side] for side in ("ours", "theirs") if side in found}
    faster = found["theirs"] / found["ours"] if other is not None else None
    record_result("writing", ratio=faster, at_least=30, unit="tokens/s", **rates)
    record_result(f"a token at {late:,} against one at {early}", ratio=found["late"] / found["early"], at_most=2)
    print(
        f"    a token at position {early}: {found['early'] * 1e3:.2f} ms, at {late:,}: {found['late'] * 1e3:.2f} ms, "
        f"factor {found['late'] / found['early']:.2f}"
    )
    return found


# ---- command line ----------------------------------------------------------------------------------


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="the folder that retro-pytorch was installed into")
    parser.add_argument("--device", choices=sorted(SETTINGS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--load", type=int, default=0, help="other programs that compute meanwhile, each in one thread")
    parser.add_argument("--compile", action="store_true", help="measure a compiled model too (with cuda: always)")
    parser.add_argument("--only", choices=["training", "memory", "writing"])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(NUMBER_TYPES),
        help="number types of training steps; default: those of the device",
    )
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = SETTINGS[arguments.device]
    if arguments.compile:
        setting = dataclasses.replace(setting, compiled=True)
    native = resolve_number_type("auto", torch.device(setting.device)) == "bfloat16"
    if not (arguments.dtypes or arguments.peak or native):
        print("bfloat16: left out, this processor has no products of it")
        arguments.dtypes = ["float32"]
    if arguments.dtypes:
        setting = dataclasses.replace(setting, dtypes={name: NUMBER_TYPES[name] for name in arguments.dtypes})
    if arguments.peak:
        side, dtype_name = arguments.peak
        print(peak_memory(side, setting, arguments.theirs, setting.dtypes[dtype_name]))
        return
    print(f"{chip_of(setting.device)}, {arguments.threads} threads, torch {torch.__version__}")
    print("network:", ", ".join(f"{key} {value}" for key, value in setting.network.items()))
    if arguments.only in (None, "training"):
        with other_programs(arguments.load):
            training(setting, arguments.theirs, arguments.turns)
    if arguments.only in (None, "memory"):
        memory(setting, arguments.theirs, arguments.threads)
    if arguments.only in (None, "writing"):
        writing(setting, arguments.theirs, arguments.turns)


if __name__ == "__main__":
    main()
