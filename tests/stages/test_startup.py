"""What a stage imports before it works: seconds of every run, so each library has to be needed.

The processes run what the stages call, and then look which modules are loaded.
"""

import subprocess
import sys
from pathlib import Path

import yaml
from index_builders import committed_params
from paths import ROOT, SUPPORT


def loaded_after(code: str, folder: Path, *names: str) -> set[str]:
    """Which of the modules are loaded when a process has run the code."""
    program = f"{code}\nimport sys; print(*(name for name in {names!r} if name in sys.modules))"
    environment = {"PYTHONPATH": f"{ROOT}:{SUPPORT}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


TRAINING = """
from dataclasses import replace
from pathlib import Path
from small_training import TRAIN, run
from woven import write_woven
from retro_model.training.config import RetrofitConfig

woven, here = write_woven(Path("data")), Path.cwd()
one = replace(TRAIN, steps=1, warmup=0)
run(woven, here, one, neighbors=None, work_folder=here / "first", out_folder=here / "baseline")
run(woven, here, one, work_folder=here / "second", retrofit=RetrofitConfig(init_from="baseline", steps=1))
run(woven, here, one, work_folder=here / "second", retrofit=RetrofitConfig(init_from="baseline", steps=1))  # resumed
"""


def test_training_imports_neither_the_compiler_of_torch_nor_transformers(tmp_path: Path) -> None:
    """For the baseline, for RETRO that starts from it, and for a training that goes on from its checkpoint."""
    assert loaded_after(TRAINING, tmp_path, "torch", "torch._dynamo", "transformers", "faiss", "mlflow") == {"torch"}


CHECKING = """
from pathlib import Path
from stages.common.params import parse_params, read_yaml

parse_params(read_yaml(Path("params.yaml")))
"""


def test_the_tokenizer_is_made_without_a_large_library(tmp_path: Path) -> None:
    """Without a base; with one, its kind is looked up in transformers."""
    heavy = "torch", "transformers", "faiss", "mlflow", "pandas", "dvc"
    assert loaded_after("import stages.tokenizer, tokenizers", tmp_path, *heavy, "tokenizers") == {"tokenizers"}


def test_checking_the_params_imports_no_large_library(tmp_path: Path) -> None:
    """Every stage does it, so the classes of settings are in files that import nothing large."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(committed_params()))
    assert loaded_after(CHECKING, tmp_path, "torch", "transformers", "faiss", "mlflow", "pandas", "dvc") == set()
