"""A copy of this repository in a temporary folder, with a tiny corpus, encoder and model, run by real `dvc`.

The files are those that git lists here, as they are in the working tree: what a fresh clone would have, and
nothing else.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fixtures import tiny_corpus, tiny_encoder
from index_builders import committed_params
from paths import ROOT
from ruamel.yaml import YAML  # keeps the file's comments; DVC brings it

TINY = {
    "documents": "tiny/documents",
    "chunk_size": 16,
    "seq_len": 64,
    "knn": 2,
    "sample.packages": ["json", "einops"],
    "tokenizer.vocab_size": 400,
    "corpus.valid": 0.15,
    "corpus.test": 0.15,
    "embed.encoder": "tiny/encoder",
    "index.builder": committed_params()["index"]["builder"],
    "neighbors.stored": 8,
    "model.enc_dim": 16,
    "model.enc_depth": 1,
    "model.dec_dim": 32,
    "model.dec_depth": 2,
    "model.dec_cross_attn_layers": [2],
    "model.heads": 2,
    "model.dim_head": 16,
    "train.steps": 6,
    "train.batch_size": 4,
    "train.warmup": 2,
    "train.validate_every": 3,
    "retrofit.steps": 6,
    "evaluate.max_chunks": 40,
    "evaluate.sweep_knn": [0, 1, 2],
    "evaluate.passages": 2,
    "evaluate.bootstrap_samples": 50,
}


class Project:
    """A git repository with the pipeline in it; commands run there as a user would type them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",  # the same sums whatever else runs beside
        }

    @classmethod
    def create(cls, root: Path) -> "Project":
        """A fresh project with tiny params, committed."""
        project = cls(root)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / "dvc.lock").unlink(missing_ok=True)
        tiny_corpus(root / "tiny" / "documents")
        tiny_encoder(root / "tiny" / "encoder")
        project.set(**TINY)
        project.run("git", "init", "-q", "-b", "main")
        project.commit("start")
        return project

    def clone(self, root: Path) -> "Project":
        """What a colleague gets by `git clone`."""
        self.run("git", "clone", "-q", str(self.root), str(root))
        return Project(root)

    def run(
        self, *command: str, check: bool = True, timeout: float = 1500, apart: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the project; a failure shows what it printed. `apart`: in a process group of its own."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            start_new_session=apart,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def repro(self, *arguments: str) -> list[str]:
        """Runs `dvc repro`; the stages that it ran, in order."""
        return stages_run(self.run("dvc", "repro", *arguments).stdout)

    def commit(self, message: str) -> None:
        """Commits all that is not ignored."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", message)

    def set(self, **changes: Any) -> None:
        """Changes keys of params.yaml, given by their dotted names."""
        yaml, file = YAML(), self.root / "params.yaml"
        content = yaml.load(file)
        for key, value in changes.items():
            *path, last = key.split(".")
            section = content
            for name in path:
                section = section[name]
            assert last in section, key
            section[last] = value
        with file.open("w") as stream:
            yaml.dump(content, stream)


def stages_run(output: str) -> list[str]:
    """The stages that DVC's output says were run (and not skipped, or restored from the run cache)."""
    return re.findall(r"Running stage '([\w-]+)'", output)
