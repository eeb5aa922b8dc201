"""dvc.yaml says the truth: each stage declares the packages that it imports from and the params that it reads.

DVC runs a stage again when something declared changes, and knows nothing else: an import or a key that is
missing here would give stale results without a word.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from paths import ROOT

from retro_model.corpus import chunking
from retro_model.embedding import embed

STAGES: dict[str, dict[str, list[object]]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("retro_model", "stages")
UNTRACKED_SECTIONS = {"runtime"}  # changes no byte of an output


def module_file(module: str) -> Path | None:
    """The file of a first-party module; None for anything else."""
    path = ROOT / module.replace(".", "/")
    if module.partition(".")[0] not in PACKAGES:
        return None
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imports(file: Path) -> frozenset[Path]:
    """First-party files that `file` imports, at any depth of its code, and the packages that hold them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    files: set[Path] = set()
    for name in names:
        if module_file(name) is None:
            continue
        parts = name.split(".")
        files.update(filter(None, (module_file(".".join(parts[:depth])) for depth in range(1, len(parts) + 1))))
    return frozenset(files)


def closure(stage: str) -> set[str]:
    """All first-party files that run when the stage runs."""
    return files_behind(ROOT / "stages" / "__init__.py", ROOT / "stages" / f"{stage}.py")


def files_behind(*files: Path) -> set[str]:
    """The files and all first-party files that they import, at any depth."""
    todo, found = list(files), set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo.extend(imports(file))
    return {file.relative_to(ROOT).as_posix() for file in found}


def unit(file: str) -> str:
    """What a stage declares for a file: the package that it is in, or the file itself outside of any."""
    parts = file.split("/")
    return "/".join(parts[:2])


def code_read(stage: str) -> set[str]:
    """The packages and modules that hold the stage's code."""
    return {unit(file) for file in closure(stage)}


def params_read(stage: str) -> set[str]:
    """The names in the stage's closure of `read_params(...)` calls, which are literals."""
    names = set()
    for file in closure(stage) - {"stages/common/params.py"}:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read_params":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), f"{file}: read_params with a name that is computed"
                    names.add(str(argument.value))
    return names - UNTRACKED_SECTIONS


def dvc_stages() -> set[str]:
    return {path.stem for path in (ROOT / "stages").glob("*.py") if "run_stage(" in path.read_text()}


def test_every_stage_module_is_a_stage_and_the_other_way_round() -> None:
    assert set(STAGES) == dvc_stages()
    assert list(STAGES) == ["sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_packages_are_those_that_are_imported_from(stage: str) -> None:
    dependencies = map(str, STAGES[stage]["deps"])
    declared = {name for name in dependencies if name.split("/")[0] in PACKAGES}
    expected = ", ".join(sorted(code_read(stage)))
    assert declared == code_read(stage), f"stage {stage} in dvc.yaml: the code it imports is in {expected}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_params_are_those_that_are_read(stage: str) -> None:
    assert sorted(map(str, STAGES[stage].get("params", []))) == sorted(params_read(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_description_and_a_constant_command(stage: str) -> None:
    assert STAGES[stage]["desc"]
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


@pytest.mark.parametrize("job", [chunking, embed], ids=["chunk", "embed"])
def test_kept_parts_are_named_by_all_code_that_decides_their_bytes(job: ModuleType) -> None:
    """All of it but core and jobs, which carry and store bytes and do not make them."""
    behind = {file for file in files_behind(Path(str(job.__file__))) if not file.endswith("__init__.py")}
    makers = {file for file in behind if file.split("/")[1] not in ("core", "jobs")}
    named = [name.replace(".", "/") for name in job.CODE]
    assert makers and all(any(file == f"{name}.py" or file.startswith(f"{name}/") for name in named) for file in makers)
    assert all(any(file == f"{name}.py" or file.startswith(f"{name}/") for file in makers) for name in named)


def test_documents_of_the_repository_are_no_dependency_twice() -> None:
    for stage, content in STAGES.items():
        dependencies = list(map(str, content["deps"]))
        assert len(set(dependencies)) == len(dependencies), stage


NETWORK_ALONE = """
import sys
import einops, torch

class NothingElse:
    loaded = {name.split(".")[0] for name in sys.modules} | sys.stdlib_module_names
    ours = {"retro_model", "retro_model.core"}
    ours |= {f"retro_model.core.{name}" for name in ("errors", "printable", "config")}

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top == "retro_model" and not name.startswith("retro_model.network") and name not in self.ours:
            raise ImportError(name)
        if top != "retro_model" and top not in self.loaded:
            raise ImportError(name)

sys.meta_path.insert(0, NothingElse())
from retro_model.network.model import RETRO

model = RETRO(num_tokens=9, max_seq_len=8, chunk_size=4, enc_dim=8, enc_depth=1, dec_dim=8, dec_depth=1,
              dec_cross_attn_layers=(1,), heads=1, dim_head=4, copy_tokens=1)
model(torch.ones(1, 9).long(), torch.ones(1, 2, 2, 8).long(), return_loss=True).backward()
for name in ("retro_model.core.artifacts", "safetensors", "transformers"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} can be imported here")
"""


def test_the_network_runs_where_only_torch_and_einops_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", NETWORK_ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
