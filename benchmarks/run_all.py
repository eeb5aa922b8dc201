"""Run the benchmarks in this folder (except large.py, which needs a GPU) and print one table of their results.

The table compares this project, retro-pytorch and the limit.

    make bench                                  # about an hour on two otherwise idle cores
    python benchmarks/run_all.py --quick        # some at toy size: checks that they run, not how fast
    python benchmarks/run_all.py --only network search

retro-pytorch is installed, without its dependencies, into its own folder below .retro/; if that fails, its column
stays empty. The table says which targets are met. benchmarks/measured.py explains how a benchmark joins.
"""

import argparse
import ast
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
THEIRS = HERE.parent / ".retro" / "retro-pytorch"
REQUIREMENT = "retro-pytorch==0.3.9"
CONSTANT = "MAKE_BENCH"
NEEDED = "{needed_theirs}"


def programs(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the command lines of each benchmark in a folder, without importing any."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if [target.id for target in targets if isinstance(target, ast.Name)] == [CONSTANT]:
                found[file.stem] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return found


def command(file: Path, line: str, theirs: Path | None) -> list[str]:
    """Build the command for a line such as `--turns 3 --theirs {theirs}`."""
    if theirs is None:
        line = " ".join(piece for piece in _pieces(line) if "{theirs}" not in piece)
    return [sys.executable, str(file), *shlex.split(line.format(theirs=theirs, needed_theirs=theirs))]


def _pieces(line: str) -> list[str]:
    """Split a line into options, each together with its values."""
    pieces: list[str] = []
    for word in line.split():
        if word.startswith("-") or not pieces:
            pieces.append(word)
        else:
            pieces[-1] += f" {word}"
    return pieces


def run(folder: Path, size: str, only: Sequence[str] | None, theirs: Path | None) -> tuple[list[dict[str, Any]], int]:
    """Run all benchmarks in order; return their records and how many runs failed."""
    records, failed = [], 0
    with tempfile.TemporaryDirectory() as name:
        records_file = Path(name) / "measured.jsonl"
        for program, lines in programs(folder).items():
            if only and program not in only:
                continue
            for line in lines[size]:
                if theirs is None and NEEDED in line:
                    print(f"\n---- {program}: left out, it compares with retro-pytorch and nothing else")
                    continue
                records_file.write_text("")
                started = time.monotonic()
                print(f"\n---- {program} {line}", flush=True)
                done = subprocess.run(
                    command(folder / f"{program}.py", line, theirs),
                    env={**os.environ, "RETRO_MEASURED": str(records_file)},
                    check=False,
                )
                failed += done.returncode != 0
                verdict = f"FAILED with {done.returncode}" if done.returncode else "done"
                print(f"---- {program}: {verdict} after {time.monotonic() - started:.0f} s", flush=True)
                records += [json.loads(record) for record in records_file.read_text().splitlines()]
    return records, failed


def meets_target(record: Mapping[str, Any]) -> bool | None:
    """Whether the ratio meets the target; None without a target or a ratio."""
    if record["ratio"] is None or record["at_least"] is record["at_most"] is None:
        return None
    if record["at_least"] is not None:
        return bool(record["ratio"] >= record["at_least"])
    return bool(record["ratio"] <= record["at_most"])


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Format the records as a Markdown table, followed by the number of targets met."""
    lines = [
        "| what | this project | retro-pytorch | limit | ratio | target | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        ours, theirs, limit = (_number(record[name], record["unit"]) for name in ("ours", "theirs", "limit"))
        target = next(
            (f"{sign} {record[name]:g}" for name, sign in (("at_least", ">="), ("at_most", "<=")) if record[name]), ""
        )
        verdict = {True: "met", False: "**not met**", None: ""}[meets_target(record)]
        ratio = _number(record["ratio"])
        lines.append(f"| {record['what']} | {ours} | {theirs} | {limit} | {ratio} | {target} | {verdict} |")
    verdicts = [meets_target(record) for record in records]
    lines.append(f"\n{verdicts.count(True)} targets met, {verdicts.count(False)} not met")
    return "\n".join(lines)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def machine() -> str:
    """The processor, its cores, the GPU if there is one, and torch's version."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def install_theirs() -> Path | None:
    """Install retro-pytorch unless it is there; return its folder, or None if that fails."""
    if not (THEIRS / "retro_pytorch").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--target", str(THEIRS), REQUIREMENT], check=False).returncode:
            print(f"{REQUIREMENT} cannot be installed: only this project is measured")
            return None
    return THEIRS


def main() -> int:
    """Measure what the command line asks for; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at toy size: that it runs, not how fast")
    parser.add_argument("--only", nargs="+", choices=sorted(programs(HERE)), help="these programs alone")
    parser.add_argument("--theirs", type=Path, help="where retro-pytorch is; by default it is installed")
    parser.add_argument("--without-theirs", action="store_true", help="measure this project alone")
    arguments = parser.parse_args()
    theirs = None if arguments.without_theirs else arguments.theirs or install_theirs()
    records, failed = run(HERE, "quick" if arguments.quick else "full", arguments.only, theirs)
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine()}{' (toy size)' if arguments.quick else ''}\n\n{table(records)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
