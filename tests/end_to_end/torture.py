"""Faults, drawn from a seed, against the whole pipeline on a tiny corpus; a table of what came of each.

    python tests/end_to_end/torture.py                     # 100 faults (make torture)
    python tests/end_to_end/torture.py --faults 12 --seed 7

One project is run once undisturbed. Then, again and again, a stage has to run (its entry in dvc.lock, its run
cache and its work in progress are taken away), and meanwhile, before or after something breaks. What must come
of it: the next `dvc repro` ends with the very files and the very dvc.lock of the undisturbed run; or it stops
with one line that says what to do, and once that is done, the next one does. Anything else is LOST, and so is
a traceback.

A fault lands at a point, not at a time: tests/support/faults/sitecustomize.py counts the stage's operations on files.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from project import Project, stages_run  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

OUTS = {
    "sample": ("data/sample",),
    "tokenizer": ("data/tokenizer", "metrics/tokenizer.json"),
    "chunk": ("data/chunks", "metrics/chunk.json"),
    "embed": ("data/embeddings", "metrics/embed.json"),
    "index": ("data/index", "metrics/index.json"),
    "knn": ("data/neighbors", "metrics/knn.json"),
    "baseline": ("models/baseline", "metrics/baseline.json", "plots/baseline.csv"),
    "train": ("models/retro", "metrics/train.json", "plots/train.csv"),
    "evaluate": ("plots/evaluate", "reports", "metrics/evaluate.json"),
}
# What each stage reads, all of it. (DVC's dependencies can be wider: a whole folder of splits.)
INPUTS = {
    "chunk": ("data/tokenizer",),
    "embed": ("data/chunks", "data/tokenizer"),
    "index": ("data/embeddings/train",),
    "knn": ("data/index", "data/embeddings", "data/chunks"),
    "baseline": ("data/chunks/train", "data/chunks/valid", "data/tokenizer"),
    "train": (
        "data/neighbors/train", "data/neighbors/valid", "data/chunks/train", "data/chunks/valid", "data/tokenizer",
    ),
    "evaluate": (
        "models/retro", "models/baseline", "data/neighbors/test", "data/neighbors/valid", "data/neighbors/train",
        "data/chunks/test", "data/chunks/valid", "data/chunks/train", "data/tokenizer",
    ),
}  # fmt: skip
WRITTEN = ("data", "models", "metrics", "plots", "reports")
KEEPS_WORK = ("chunk", "embed", "index", "knn", "baseline", "train")
DAMAGES = ("cut short", "made longer", "one bit flipped", "emptied", "deleted")
SIGNALS = ("kill", "kill everything", "interrupt", "terminate")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fault was and what came of it; `lost` says why, or is empty."""

    kind: str
    where: str
    what: str
    seconds: float = 0.0
    lost: str = ""


class Lost(Exception):
    """What must not be."""


class Torture:
    """A project, what an undisturbed run of it wrote, and ways to disturb it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.project = Project.create(folder / "project")
        self.root = self.project.root
        self.pristine = folder / "pristine"
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.last_fault: dict[str, Any] = {}
        self.project.environment["PYTHONPATH"] = str(ROOT / "tests" / "support" / "faults")
        self.plain = dict(self.project.environment)
        done = self.repro({"stage": "every"})
        assert done.returncode == 0, done.stdout + done.stderr
        self.steps = {stage: int((self.faults / f"steps-{stage}").read_text()) for stage in OUTS}
        self.files = self.hashes()
        self.lock = self.locked()
        shutil.copytree(self.root, self.pristine, symlinks=True)

    # ---- looking -----------------------------------------------------------------------------------

    def hashes(self) -> dict[str, str]:
        """The sha256 of every file that the pipeline wrote."""
        return {
            path.relative_to(self.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for top in WRITTEN
            for path in sorted((self.root / top).rglob("*"))
            if path.is_file() and path.name != ".gitignore"
        }

    def locked(self) -> Any:
        return YAML(typ="safe", pure=True).load(self.root / "dvc.lock")["stages"]

    def compare(self) -> None:
        """Raises Lost unless everything is as the undisturbed run left it."""
        self.compare_files(self.hashes().keys() | self.files.keys())
        if self.locked() != self.lock:
            raise Lost("another dvc.lock than undisturbed")
        if left := [str(path) for path in self.root.glob("*/*.partial")]:
            raise Lost(f"left behind: {left[0]}")

    def compare_files(self, names: Iterable[str]) -> None:
        """Raises Lost unless these files are those of the undisturbed run."""
        found = self.hashes()
        if different := sorted(name for name in names if found.get(name) != self.files.get(name)):
            raise Lost(f"other files than undisturbed: {', '.join(different[:3])}")

    # ---- running -----------------------------------------------------------------------------------

    def start(self, fault: dict[str, Any] | None = None, *command: str) -> "subprocess.Popen[str]":
        """A command (by default `dvc repro`) in a process group of its own, with a fault to come."""
        environment = dict(self.plain)
        if fault is not None:
            self.last_fault = fault
            for leftover in self.faults.glob("*"):
                if leftover.name in ("reached", "go"):
                    leftover.unlink()
            environment["RETRO_FAULT"] = json.dumps({"folder": str(self.faults), **fault})
        return subprocess.Popen(
            command or ("dvc", "repro"),
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def repro(self, fault: dict[str, Any] | None = None, *command: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(fault, *command)
        out, errors = process.communicate(timeout=900)
        if "Traceback" in out + errors:
            raise Lost(f"a traceback: {' '.join((out + errors).rpartition('Traceback')[2].split())[-300:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    @property
    def reached(self) -> bool:
        return (self.faults / "reached").exists()

    def recover(self) -> str:
        """Runs `dvc repro`, doing what it says, until it has nothing to say; how it went."""
        told = []
        for _ in range(4):
            done = self.repro()
            if done.returncode == 0:
                self.compare()
                ran = stages_run(done.stdout)
                how = (
                    f"ran {', '.join(ran)}" if ran else "from DVC's cache" if "checking out" in done.stdout else "whole"
                )
                return f"said {'; '.join(told)}; then {how}" if told else how
            told.append(self.obey(done))
        raise Lost(f"no end to its advice: {told}")

    def obey(self, done: "subprocess.CompletedProcess[str]") -> str:
        """Does what the one line of a stage says; a short form of it."""
        said = [line for line in done.stderr.splitlines() if line.partition(":")[0] in OUTS]
        said = [line for line in said if not line.endswith(": started")]
        if not said:
            raise Lost(f"no line from a stage: {' '.join((done.stdout + done.stderr).split())[-300:]}")
        line = said[-1]
        if "chmod -R u+w .dvc/cache" in line and self.advised(line):
            subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], cwd=self.root, check=True)
        if folder := re.search(r"[;,] delete (\S+?)(?:[ ;,]|$)", line):
            shutil.rmtree(self.root / folder[1], ignore_errors=True)
            self.said = line
            return f'"delete {Path(folder[1]).name}"'
        if file := re.search(r"[;,] move (\S+) away", line):
            for path in self.root.glob(f"{Path(file[1]).name}*"):
                path.unlink()
            return f'"move {Path(file[1]).name} away"'
        if "run `dvc repro`" in line:
            return '"run dvc repro"'
        raise Lost(f"no advice: {line}")

    def advised(self, line: str) -> bool:
        """Whether this very advice was followed before, and the damage came back."""
        return getattr(self, "said", None) == line

    # ---- what faults need --------------------------------------------------------------------------

    def forget(self, stage: str) -> None:
        """Makes DVC run a stage: no lock entry, no run cache, no work in progress."""
        yaml = YAML()
        lock = yaml.load(self.root / "dvc.lock")
        del lock["stages"][stage]
        with (self.root / "dvc.lock").open("w") as stream:
            yaml.dump(lock, stream)
        shutil.rmtree(self.root / ".dvc" / "cache" / "runs", ignore_errors=True)
        shutil.rmtree(self.work_of(stage), ignore_errors=True)

    def work_of(self, stage: str) -> Path:
        """Where a stage keeps what it has finished."""
        kind = {"chunk": "chunks", "embed": "embeddings"}.get(stage)
        return self.root / ".retro" / ("work" if kind is None else "parts") / (kind or stage)

    def any_file(self, folder: Path) -> Path:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        return self.random.choice([path for path in files if path.stat().st_size] or files)

    def damage(self, path: Path, how: str) -> None:
        """Does `how`, one of DAMAGES, to a file in place."""
        path.chmod(0o644)
        size = path.stat().st_size
        if how == "deleted":
            path.unlink()
        elif how == "cut short":
            os.truncate(path, self.random.randrange(size))
        elif how == "emptied":
            os.truncate(path, 0)
        elif how == "made longer":
            with path.open("ab") as stream:
                stream.write(self.random.randbytes(self.random.randint(1, 64)))
        else:
            content = bytearray(path.read_bytes())
            content[self.random.randrange(size)] ^= 1 << self.random.randrange(8)
            with path.open("r+b") as stream:
                stream.write(content)

    def shown(self, path: Path) -> str:
        """The file's name without what no one would look for: a key of work in progress, a hash."""
        for work in (self.root / ".retro" / "work", self.root / ".retro" / "parts"):
            if path.is_relative_to(work):
                stage, _, *inside = path.relative_to(work).parts
                return f"{stage}'s {'/'.join(inside)}"
        return re.sub(r"md5/(..)/[0-9a-f]+", r"md5/\1/…", path.relative_to(self.root).as_posix())

    # ---- the faults --------------------------------------------------------------------------------

    def stopped(self) -> tuple[str, str]:
        """A stage is killed or stopped at a point, half of the time twice."""
        stage, how = self.random.choice(list(OUTS)), self.random.choice(SIGNALS)
        point = self.random.randint(1, self.steps[stage])
        self.forget(stage)
        done = self.repro({"stage": stage, "action": how, "point": point})
        self.must_have_failed(done, stage)
        where = f"{stage}, step {point} of {self.steps[stage]}"
        if self.random.random() < 0.5:
            again = self.random.randint(1, self.steps[stage])
            done = self.repro({"stage": stage, "action": "kill", "point": again})
            where += f", then kill at {again}"
        return how, where

    def must_have_failed(
        self, done: "subprocess.CompletedProcess[str]", stage: str, vanished: str | None = None
    ) -> None:
        """A stage that was stopped before its end must not look finished to DVC."""
        if done.returncode == 0 and vanished is not None:  # it had read all of that; the next repro brings it back
            self.compare_files(name for name in self.files if not name.startswith(f"{vanished}/"))
        elif done.returncode == 0:
            self.compare()  # then it was finished: the fault came to nothing, or behind its end
        elif not self.reached:
            raise Lost(f"{stage} failed before its point: {done.stdout[-200:]} {done.stderr[-200:]}")

    def full_disk(self) -> tuple[str, str]:
        """From a point on nothing can be created or opened for writing."""
        stage = self.random.choice(list(OUTS))
        point = self.random.randint(1, self.steps[stage])
        self.forget(stage)
        done = self.repro({"stage": stage, "action": "disk full", "point": point})
        self.must_have_failed(done, stage)
        return "disk full", f"{stage}, from step {point} of {self.steps[stage]}"

    def small_files(self) -> tuple[str, str]:
        """No file may grow beyond a limit, for whoever writes it, Python or not (RLIMIT_FSIZE)."""
        stage = self.random.choice(list(OUTS))
        sizes = [path.stat().st_size for out in OUTS[stage] for path in files_of(self.root / out)]
        limit = self.random.choice([1, 100, max(sizes) // 2, max(sizes) - 1])
        self.forget(stage)
        done = self.repro({"stage": stage, "limit": limit})
        self.must_have_failed(done, stage)
        return "file size limit", f"{stage}, {limit:,} bytes"

    def read_only(self) -> tuple[str, str]:
        """Nothing may be written into a stage's inputs: it must not need to."""
        stage = self.random.choice(list(INPUTS))
        self.forget(stage)
        for path in [path for place in INPUTS[stage] for path in files_of(self.root / place)]:
            path.chmod(0o444)
        done = self.repro({"stage": stage, "action": "inputs read-only", "target": INPUTS[stage]})
        if done.returncode:
            raise Lost(f"it wrote into its inputs: {done.stderr[-300:]}")
        return "inputs read-only", stage

    def vanished(self) -> tuple[str, str]:
        """An input is deleted while the stage runs."""
        stage = self.random.choice(list(INPUTS))
        place = self.random.choice(INPUTS[stage])
        point = self.random.randint(1, self.steps[stage])
        self.forget(stage)
        done = self.repro({"stage": stage, "action": "input vanishes", "point": point, "target": place})
        self.must_have_failed(done, stage, vanished=place)
        return "input vanishes", f"{stage}, {place} at step {point} of {self.steps[stage]}"

    def damaged(self) -> tuple[str, str]:
        """A file of an input is damaged before the stage runs."""
        stage = self.random.choice(list(INPUTS))
        place = self.random.choice(INPUTS[stage])
        path, how = self.any_file(self.root / place), self.random.choice(DAMAGES)
        self.forget(stage)
        self.damage(path, how)
        return f"file {how}", f"{self.shown(path)}, then {stage}"

    def rotten(self) -> tuple[str, str]:
        """The same, so that neither size nor time of the file shows it: DVC takes it for unchanged."""
        stage = self.random.choice(list(INPUTS))
        place = self.random.choice(INPUTS[stage])
        path = self.any_file(self.root / place)
        self.forget(stage)
        times = path.stat()
        self.damage(path, "one bit flipped")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return "bit rot", f"{self.shown(path)}, then {stage}"

    def damaged_work(self) -> tuple[str, str]:
        """A stage is killed; a file of what it had done is damaged."""
        stage = self.random.choice(KEEPS_WORK)
        self.forget(stage)
        point = self.random.randint(self.steps[stage] * 2 // 3, self.steps[stage])
        done = self.repro({"stage": stage, "action": "kill", "point": point})
        self.must_have_failed(done, stage)
        path, how = self.any_file(self.work_of(stage)), self.random.choice(DAMAGES)
        self.damage(path, how)
        return f"work {how}", f"{self.shown(path)}, killed at {point} of {self.steps[stage]}"

    def damaged_cache(self) -> tuple[str, str]:
        """An object of DVC's cache is damaged, and what stood in the workspace is gone."""
        stage = self.random.choice(list(INPUTS))
        place = self.random.choice(INPUTS[stage])
        hashes = {hashlib.md5(path.read_bytes()).hexdigest() for path in files_of(self.root / place)}
        name = self.random.choice(sorted(hashes))
        path = self.root / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]
        how = self.random.choice(DAMAGES)
        self.forget(stage)
        shutil.rmtree(self.root / place)
        self.damage(path, how)
        if how != "deleted":
            path.chmod(0o444)  # as DVC leaves it
        return f"cache object {how}", f"{self.shown(path)} of {place}, then {stage}"

    def damaged_record(self) -> tuple[str, str]:
        """MLflow's store or a file of the work's bookkeeping is damaged."""
        name = self.random.choice(["mlflow.db", ".retro/timings.jsonl", "dvc.lock"])
        # An emptied dvc.lock is DVC's own to tell: it names the file, and git or a deletion mends it.
        how = self.random.choice(DAMAGES if name != "dvc.lock" else ("deleted",))
        self.forget("evaluate")
        path = self.root / name
        if name == "mlflow.db" and how == "one bit flipped":
            how = "cut short"  # a bit in an unused page shows nowhere
        self.damage(path, how)
        return f"record {how}", f"{name}, then evaluate"

    def two_at_once(self) -> tuple[str, str]:
        """A second command runs from beginning to end while a stage stands at a point."""
        stage = self.random.choice(list(OUTS))
        point = self.random.randint(1, self.steps[stage])
        second = self.random.choice(
            [("dvc", "repro"), ("python", "-m", f"stages.{stage}"), ("dvc", "status"), ("dvc", "checkout")]
        )
        self.forget(stage)
        process = self.start({"stage": stage, "action": "wait", "point": point})
        while not self.reached and process.poll() is None:
            time.sleep(0.01)
        other = self.start(None, *second)
        out, errors = other.communicate(timeout=600)
        (self.faults / "go").touch()
        first_out, first_errors = process.communicate(timeout=600)
        if "Traceback" in first_out + first_errors + out + errors:
            raise Lost(f"a traceback: {(first_errors + errors)[-400:]}")
        return "two at once", f"{stage} at step {point} of {self.steps[stage]}, beside it {' '.join(second)}"

    def kinds(self) -> list[Callable[[], tuple[str, str]]]:
        """All faults; those that come in many places stand more often."""
        return [
            self.stopped, self.damaged, self.full_disk, self.damaged_work, self.two_at_once, self.stopped,
            self.small_files, self.rotten, self.damaged_cache, self.read_only, self.vanished, self.damaged_record,
        ]  # fmt: skip

    def run(self, count: int, chosen: str | None = None) -> Iterator[Outcome]:
        """`count` faults, one after the other, each from a whole project."""
        kinds = [kind for kind in self.kinds() if chosen is None or kind.__name__ == chosen]
        for kind in itertools.islice(itertools.cycle(kinds), count):
            started, fault, where, lost, what = time.monotonic(), kind.__name__, "", "", ""
            state, self.last_fault = self.random.getstate(), {}
            try:
                fault, where = kind()
                what = self.recover()
            except Lost as error:
                lost, where = str(error), where or str(self.last_fault)
                self.random.setstate(state)
                self.random.random()
                shutil.rmtree(self.root)
                shutil.copytree(self.pristine, self.root, symlinks=True)
            yield Outcome(fault, where, what, time.monotonic() - started, lost)


def files_of(place: Path) -> list[Path]:
    """The files of a folder, or the file itself."""
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def main() -> int:
    """Runs as many faults as the command line asks for; 1 where one was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=108)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind, such as damaged_cache")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture.") as name:
        torture = Torture(Path(name), arguments.seed)
        print(f"undisturbed: {len(torture.files)} files; seed {arguments.seed}", flush=True)
        outcomes = []
        for number, outcome in enumerate(torture.run(arguments.faults, arguments.only), start=1):
            outcomes.append(outcome)
            verdict = f"LOST: {outcome.lost}" if outcome.lost else outcome.what
            print(
                f"{number:4}  {outcome.seconds:5.1f} s  {outcome.kind}: {outcome.where}\n{'':14}{verdict}", flush=True
            )
    print(table(outcomes))
    return int(any(outcome.lost for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """How many of each kind there were, and what came of them."""
    lines = [f"\n{'fault':28} {'times':>5} {'whole again':>12} {'after its advice':>17} {'lost':>5}"]
    by_kind = collections.defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    for kind, of_kind in [*sorted(by_kind.items()), ("all", outcomes)]:
        lost = sum(bool(outcome.lost) for outcome in of_kind)
        advised = sum(outcome.what.startswith("said") for outcome in of_kind)
        lines.append(f"{kind:28} {len(of_kind):5} {len(of_kind) - lost - advised:12} {advised:17} {lost:5}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
