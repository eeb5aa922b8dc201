"""dvc.yaml says the truth: each stage declares exactly the code that it imports and the params that it reads.

DVC runs a stage again when something declared changes, and knows nothing else: an import or a key that is
missing here would give stale results without a word.
"""

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
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
    todo, found = [ROOT / "stages" / "__init__.py", ROOT / "stages" / f"{stage}.py"], set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo.extend(imports(file))
    return {file.relative_to(ROOT).as_posix() for file in found}


def params_read(stage: str) -> set[str]:
    """The names in the stage's closure of `read_params(...)` calls, which are literals."""
    names = set()
    for file in closure(stage) - {"stages/params.py"}:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read_params":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), f"{file}: read_params with a name that is computed"
                    names.add(str(argument.value))
    return names - UNTRACKED_SECTIONS


def dvc_stages() -> set[str]:
    return {path.stem for path in (ROOT / "stages").glob("*.py") if "run_stage(" in path.read_text()} - {"harness"}


def test_every_stage_module_is_a_stage_and_the_other_way_round() -> None:
    assert set(STAGES) == dvc_stages()
    assert list(STAGES) == ["sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_code_is_the_imported_code(stage: str) -> None:
    declared = [str(dependency) for dependency in STAGES[stage]["deps"] if str(dependency).endswith(".py")]
    expected = "\n".join(f"      - {file}" for file in sorted(closure(stage)))
    assert declared == sorted(closure(stage)), f"stage {stage} in dvc.yaml: the code it imports is\n{expected}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_params_are_those_that_are_read(stage: str) -> None:
    assert sorted(map(str, STAGES[stage].get("params", []))) == sorted(params_read(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_description_and_a_constant_command(stage: str) -> None:
    assert STAGES[stage]["desc"]
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


def test_stages_never_import_each_other() -> None:
    for stage in STAGES:
        others = {f"stages/{other}.py" for other in STAGES} - {f"stages/{stage}.py"}
        assert not closure(stage) & others


def test_the_library_knows_no_stage_and_no_dvc_and_no_mlflow() -> None:
    for file in (ROOT / "retro_model").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            banned = {module.split(".")[0] for module in modules} & {"stages", "dvc", "mlflow"}
            assert not banned, f"{file}: imports {banned}"


def test_the_network_is_read_without_faiss_files_or_params() -> None:
    allowed = {"retro_model.errors", "retro_model.attention", "retro_model.kernels"}
    standard = {"dataclasses", "inspect", "math", "functools", "typing", "collections", "os", "enum"}
    for name in ("model", "attention", "kernels"):
        for node in ast.parse((ROOT / "retro_model" / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                top = module.split(".")[0]
                assert top in standard | {"torch", "einops"} or module in allowed, f"{name}.py imports {module}"


def test_documents_of_the_repository_are_no_dependency_twice() -> None:
    for stage, content in STAGES.items():
        dependencies = list(map(str, content["deps"]))
        assert len(set(dependencies)) == len(dependencies), stage
