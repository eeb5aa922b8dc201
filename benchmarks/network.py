"""Measure the network beside retro-pytorch 0.3.9: training step, memory, writing; prints ratios.

retro-pytorch wants old versions of half the ecosystem, so it goes into a folder of its own, without its
dependencies (which this project's environment has, as far as they are needed):

    pip install --no-deps --target /tmp/retro-pytorch retro-pytorch==0.3.9
    python benchmarks/network.py --theirs /tmp/retro-pytorch | tee benchmarks/results/DATE-network-cpu.txt

Both are measured in one process, in turns, and the best of the turns counts, so that whatever else the
machine does meets both. Without --theirs only this project is measured. Takes two minutes on two cores.
"""

import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from retro_model.generation import CachedDecoder
from retro_model.model import RETRO, RETROConfig

BATCH, LENGTH, NEIGHBORS = 4, 512, 2
CONFIG: dict[str, Any] = {
    "num_tokens": 8192, "max_seq_len": 2048, "enc_dim": 256, "enc_depth": 2, "dec_dim": 256, "dec_depth": 6,
    "dec_cross_attn_layers": (3, 6), "heads": 8, "dim_head": 64, "chunk_size": 64,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


def build(name: str, theirs: str | None) -> torch.nn.Module:
    """A fresh model of either side."""
    torch.manual_seed(0)
    if name == "ours":
        return RETRO(**CONFIG)
    if theirs not in sys.path:
        sys.path.insert(0, str(theirs))
    warnings.simplefilter("ignore")
    from retro_pytorch import RETRO as Theirs

    return Theirs(**CONFIG)  # type: ignore[no-any-return]


def batch(length: int = LENGTH, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Random tokens and neighbors."""
    generator = torch.Generator().manual_seed(0)
    seq = torch.randint(1, CONFIG["num_tokens"], (rows, length + 1), generator=generator)
    shape = rows, length // CONFIG["chunk_size"], NEIGHBORS, 2 * CONFIG["chunk_size"]
    return seq, torch.randint(1, CONFIG["num_tokens"], shape, generator=generator)


def step(model: torch.nn.Module, seq: Tensor, retrieved: Tensor | None, dtype: torch.dtype, **options: Any) -> None:
    """Forward and backward, without the optimizer, which is the same for both."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model(seq, retrieved, return_loss=True, **options)
    loss.backward()
    model.zero_grad(set_to_none=True)


def in_turns(tasks: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """The best time of each task in seconds, after one run that does not count."""
    best = dict.fromkeys(tasks, float("inf"))
    for turn in range(turns + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def products(config: RETROConfig, rows: int, length: int, neighbors: int) -> float:
    """Floating-point operations of the matrix products of one step, forward and backward (three times forward)."""
    inner = config.heads * config.dim_head
    tokens, m = rows * length, config.chunk_size
    enc_tokens = tokens // m * neighbors * 2 * m
    d, e = config.dec_dim, config.enc_dim

    def layer(width: int) -> float:
        return 2 * (4 * width * inner + 8 * width * width)  # qkv and out, feed-forward: for each token

    decoder = tokens * config.dec_depth * (layer(d) + 2 * inner * length)  # causal: half of all scores
    encoder = config.enc_depth * (
        enc_tokens * (layer(e) + 4 * inner * 2 * m)  # self-attention
        + enc_tokens * (4 * e * inner + 4 * inner * m) + tokens * 4 * d * inner  # looks at the chunk
    )  # fmt: skip
    cross = len(config.dec_cross_attn_layers) * (
        tokens * (4 * d * inner + 4 * inner * neighbors * 2 * m) + enc_tokens * 4 * e * inner
    )
    head = 2 * tokens * d * config.num_tokens
    return 3.0 * (decoder + head + (encoder + cross if neighbors else 0))


def limits() -> dict[str, float]:
    """The fastest matrix product in FLOP/s, by dtype: what a step could reach if it were nothing else."""
    found = {}
    for name, dtype in DTYPES.items():
        best = 0.0
        for m, k, n in ((2048, 256, 1536), (2048, 2048, 2048), (8192, 256, 1024)):
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            seconds = in_turns({"it": lambda a=a, b=b: torch.nn.functional.linear(a, b)}, 4)["it"]  # type: ignore[misc]
            best = max(best, 2 * m * k * n / seconds)
        found[name] = best
    return found


def training(theirs: str | None, turns: int) -> None:
    """Time training steps in both number types."""
    models = {name: build(name, theirs) for name in (["ours", "theirs"] if theirs else ["ours"])}
    ours = models["ours"]
    seq, retrieved = batch()
    labels, documents = seq[:, 1:], torch.arange(LENGTH // 64).repeat(BATCH, 1) // 3
    peak = limits()
    print(f"\none training step, batch {BATCH} x {LENGTH} tokens, k = {NEIGHBORS} (forward and backward)")
    for dtype_name, dtype in DTYPES.items():
        tasks: dict[str, Callable[[], None]] = {
            name: lambda model=model, dtype=dtype: step(model, seq, retrieved, dtype)  # type: ignore[misc]
            for name, model in models.items()
        }
        tasks["without neighbors"] = lambda dtype=dtype: step(ours, seq, None, dtype)  # type: ignore[misc]
        tasks["packed documents"] = (
            lambda dtype=dtype: step(  # type: ignore[misc]
                ours, seq[:, :-1], retrieved, dtype, labels=labels, documents=documents
            )
        )
        best = in_turns(tasks, turns)
        work = {name: products(RETROConfig(**CONFIG), BATCH, LENGTH, NEIGHBORS) for name in best}
        work["without neighbors"] = products(RETROConfig(**CONFIG), BATCH, LENGTH, 0)
        print(f"  {dtype_name}; fastest matrix product {peak[dtype_name] / 1e9:,.0f} GFLOP/s")
        for name, seconds in best.items():
            share = work[name] / seconds / peak[dtype_name]
            tokens = BATCH * LENGTH / seconds
            print(f"    {name:20} {seconds * 1e3:8.0f} ms  {tokens:8,.0f} tokens/s  {share:6.1%} of that")
        print(f"    retrieval costs a factor of {best['ours'] / best['without neighbors']:.2f}")
        if theirs:
            print(f"    RATIO of tokens a second, ours to theirs: {best['theirs'] / best['ours']:.2f}")


def peak_memory(name: str, theirs: str | None, dtype: torch.dtype) -> None:
    """Print, for `memory`, the bytes that one step adds to the process at its peak."""
    model, (seq, retrieved) = build(name, theirs), batch(2048)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step(model, seq, retrieved, dtype)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def memory(theirs: str | None, threads: int) -> None:
    """Measure the memory of a step, each in a process of its own."""
    print(f"\npeak memory that one step adds, batch {BATCH} x 2048 tokens, k = {NEIGHBORS}")
    for dtype_name in DTYPES:
        used = {}
        for name in ["ours", "theirs"] if theirs else ["ours"]:
            command = [sys.executable, __file__, "--threads", str(threads), "--peak", name, dtype_name]
            command += ["--theirs", theirs] if theirs else []
            used[name] = int(subprocess.run(command, check=True, capture_output=True).stdout)
            print(f"    {dtype_name:20} {name:8} {used[name] / 2**20:8,.0f} MiB")
        if theirs:
            print(f"    RATIO of memory, ours to theirs: {used['ours'] / used['theirs']:.2f}")


@torch.no_grad()
def writing(theirs: str | None) -> None:
    """448 tokens after 64, without the search: neighbors are given. The other side calls its model anew for each."""
    print("\nwriting 448 tokens after a prompt of 64, neighbors given, float32, batch 1")
    seq, retrieved = batch(2048, rows=1)
    ours = build("ours", theirs).eval()

    def write(start: int, end: int, stamps: dict[int, float] | None = None) -> float:
        decoder, begin, place = CachedDecoder(ours, 1, end), time.perf_counter(), 0  # type: ignore[arg-type]
        while place < end:
            width = min(decoder.room(place), start - place) if place < start else 1
            ends = (place + 1) % 64 == 0
            found = {0: retrieved[0, (place + 1) // 64 - 1]} if ends else {}
            hidden = decoder.read(seq[:, place : place + width], torch.tensor([width]), found)
            (hidden[:, -1] @ ours.output_weight_VD.T).argmax(-1).item()  # type: ignore[operator]
            place += width
            if stamps is not None:
                stamps[place] = time.perf_counter()
        return time.perf_counter() - begin

    mine = min(write(64, 512) for _ in range(3))
    print(f"    ours   {mine:8.2f} s  {448 / mine:8,.0f} tokens/s")
    if theirs:
        other = build("theirs", theirs).eval()
        lengths = range(64 + 8, 512, 32)  # every 32nd of the 448 calls, spread evenly
        seconds = []
        for length in lengths:
            start = time.perf_counter()
            other(seq[:, :length], retrieved[:, : length // 64])
            seconds.append(time.perf_counter() - start)
        whole = sum(seconds) / len(seconds) * 448
        print(f"    theirs {whole:8.2f} s  {448 / whole:8,.0f} tokens/s  (from {len(seconds)} of the 448 calls)")
        print(f"    RATIO of tokens a second, ours to theirs: {whole / mine:.0f}")
    early, late = float("inf"), float("inf")
    for _ in range(3):
        stamps: dict[int, float] = {}
        write(128, 2040, stamps)
        pace = lambda at: sorted(stamps[n] - stamps[n - 1] for n in range(at - 30, at + 30))[30]  # noqa: E731, B023
        early, late = min(early, pace(222)), min(late, pace(1998))
    print(
        f"    a token at position 200: {early * 1e3:.2f} ms, at 2,000: {late * 1e3:.2f} ms, factor {late / early:.2f}"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="the folder that retro-pytorch was installed into")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=["training", "memory", "writing"])
    parser.add_argument("--peak", nargs=2, metavar=("WHO", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak_memory(arguments.peak[0], arguments.theirs, DTYPES[arguments.peak[1]])
        return
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in x),
        "?",
    )
    print(f"{cpu}, {arguments.threads} threads, torch {torch.__version__}")
    print("network:", ", ".join(f"{key} {value}" for key, value in CONFIG.items()))
    if arguments.only in (None, "training"):
        training(arguments.theirs, arguments.turns)
    if arguments.only in (None, "memory"):
        memory(arguments.theirs, arguments.threads)
    if arguments.only in (None, "writing"):
        writing(arguments.theirs)


if __name__ == "__main__":
    main()
