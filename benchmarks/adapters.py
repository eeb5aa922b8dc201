"""Measure what adapters around a base cost beside training the whole model: weights, bytes on disk, memory, time.

    python benchmarks/adapters.py                            # a Llama of 25 million random weights
    python benchmarks/adapters.py --base models/smollm2 --length 512

Each training runs in a process of its own. Its memory is the peak of the process during the steps, less what the
process held before it made the model.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import torch  # noqa: E402
from measured import record_result  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel  # noqa: E402

from retro_model.retrofit.bases import load_base  # noqa: E402
from retro_model.retrofit.model import Retrofit  # noqa: E402
from retro_model.training.optimizer import make_optimizer  # noqa: E402

MAKE_BENCH = {"full": [""], "quick": ["--width 32 --depth 6 --vocabulary 100 --length 64 --steps 1"]}
KINDS = {"adapters": "only the adapters, around a frozen base", "all weights": "the adapters and the base"}
CHUNK, NEIGHBORS = 64, 2


def make_base(options: argparse.Namespace) -> PreTrainedModel:
    """Return the named base, or a Llama of the given sizes with random weights."""
    if options.base is not None:
        return load_base(options.base)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.depth,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
    )
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return base.eval()


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process and save the model; return the figures."""
    before = memory("VmRSS")
    torch.manual_seed(0)
    model = Retrofit(make_base(options), CHUNK, freeze=kind == "adapters").train()
    optimizer = make_optimizer(model, 1e-4, 0.1)
    shape = (options.rows, options.length)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        seq = torch.randint(model.vocab_size, (options.rows, options.length + 1))
        retrieved = torch.randint(model.vocab_size, (options.rows, options.length // CHUNK, NEIGHBORS, 2 * CHUNK))
        model(seq[:, :-1], retrieved, return_loss=True, labels=seq[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = memory("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "trained": sum(weight.numel() for weight in model.own_weights().values()),
        "weights": sum(weight.numel() for weight in model.parameters()),
        "written": written,
        "peak": peak,
        "seconds": min(seconds),
        "tokens": shape[0] * shape[1],
    }


def memory(name: str) -> int:
    """Return a figure of this process in bytes: VmRSS, its memory now, or VmHWM, the peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, name
    return int(found[1]) * 1024


def in_a_process(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one kind in a new process."""
    command = [sys.executable, __file__, *arguments, "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="hub name or folder (default: random weights of the sizes below)")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(measure(options.kind, options)))
        return
    found = {kind: in_a_process(kind, sys.argv[1:]) for kind in KINDS}
    print("trained               weights trained   bytes written   peak memory   tokens/s")
    for kind, figures in found.items():
        share = figures["trained"] / figures["weights"]
        print(
            f"{kind:<20} {figures['trained']:>12,} {share:>4.0%} {figures['written'] / 1e6:>12,.1f} MB "
            f"{figures['peak'] / 1e6:>10,.0f} MB {figures['tokens'] / figures['seconds']:>10,.0f}"
        )
    adapters, everything = found.values()
    record_result(
        "training memory, adapters as a share of all weights",
        ratio=adapters["peak"] / everything["peak"],
        ours=adapters["peak"] / 1e6,
        limit=everything["peak"] / 1e6,
        unit="MB",
    )


if __name__ == "__main__":
    main()
