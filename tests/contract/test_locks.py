"""The two locks fit pyproject.toml, name versions alone, and differ only by what autofaiss holds back."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCKS = {"requirements.lock": ("autofaiss", "dev"), "requirements-next.lock": ("dev",)}  # with the extras of each
HELD_BACK = {"faiss-cpu", "numpy", "pandas", "pyarrow"}  # by autofaiss
PYTHONS = ("3.10", "3.11", "3.12")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(lock: str) -> list[str]:
    comment, *rest = (ROOT / lock).read_text().splitlines()
    assert comment.startswith("# ")
    return rest


def locked(lock: str, python: str) -> dict[str, str]:
    """The versions that are installed for this Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    requirements = map(Requirement, lines(lock))
    chosen = [one for one in requirements if one.marker is None or one.marker.evaluate(environment)]
    assert len({one.name for one in chosen}) == len(chosen)
    return {one.name: str(one.specifier).removeprefix("==") for one in chosen}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_versions_alone(lock: str) -> None:
    for line in lines(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.a-z]*( ; .+)?", line), line
    assert "torch==2.13.0" in lines(lock)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_what_the_project_asks_for(lock: str, python: str) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in LOCKS[lock] for line in extras[extra])]
    versions = locked(lock, python)
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[._]", "-", requirement.name.lower())
        assert name in versions and requirement.specifier.contains(versions[name]), (requirement, versions.get(name))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_second_lock_has_no_autofaiss_and_newer_versions_of_what_it_holds_back(python: str) -> None:
    first, second = (locked(lock, python) for lock in LOCKS)
    assert "autofaiss" in first and "autofaiss" not in second
    assert second["numpy"].startswith("2.") and first["numpy"].startswith("1.")
    # The rest is the same: the stage `sample` reads installed packages, and depends on requirements.lock alone.
    assert second.keys() <= first.keys()
    assert {name for name in second if first[name] != second[name]} <= HELD_BACK


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--dry-run", "--always-make", "PYTHON=python3", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("lock", "environment", "gpu"),
    [("", ".venv", "faiss-gpu-cu12==1.12.0"), ("next", ".venv-next", "faiss-gpu-cu12==1.14.1.post1")],
)
def test_make_installs_the_lock_that_is_named(lock: str, environment: str, gpu: str) -> None:
    file = f"requirements{'-' * bool(lock)}{lock}.lock"
    commands = make("install", "GPU=1", *([f"LOCK={lock}"] if lock else [])).stdout
    assert f"-m venv --clear {environment}\n" in commands
    assert f" -r {file} " in commands and f" {gpu} -c {file}\n" in commands
    assert not {name for name in LOCKS if name != file and name in commands}


def test_make_refuses_a_lock_that_is_not_there() -> None:
    assert "LOCK: found newest, expected next or nothing" in make("test", "LOCK=newest").stderr
