"""The sample: docstrings of installed modules, parsed and never run."""

import inspect
import sys
import textwrap
from pathlib import Path

import pytest

from retro_model.core.errors import ConfigError, DocumentError
from retro_model.sample import (
    SampleConfig,
    choose,
    find_package,
    module_text,
    prose,
    read_modules,
    write_sample,
)

LONG = "It has more than sixty characters of text, so that it is not left out as too short."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose modules must not be imported."""
    files = {
        "__init__.py": f'"""The package. {LONG}"""\nraise SystemExit("imported")\n',
        "first.py": f'"""First. {LONG}"""\ndef function():\n    r"""Function \\d. {LONG}"""\n',
        "part/__init__.py": f'"""The part. {LONG}"""\n',
        "part/second.py": f'"""Second. {LONG}"""\n',
        "tests/test_first.py": f'"""A test. {LONG}"""\n',
        "test_alone.py": f'"""A test. {LONG}"""\n',
        "conftest.py": f'"""A test. {LONG}"""\n',
        "_vendor/other.py": f'"""Vendored. {LONG}"""\n',
        "template-file.py": f'"""No module. {LONG}"""\n',
        "old.py": 'print "Python 2"\n',
        "silent.py": "x = 1\n",
    }
    for name, content in files.items():
        path = tmp_path / "site" / "sampled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "site" / "alone.py").write_text(f'"""Alone. {LONG}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path


def written(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.iterdir())}


def test_one_document_a_module_named_by_its_dotted_path(package: Path) -> None:
    config = SampleConfig(packages=("sampled", "alone"), min_bytes=1)
    metrics = write_sample(package / "sample", config)
    found = written(package / "sample")
    assert list(found) == [
        "alone.txt",
        "sampled.first.txt",
        "sampled.part.second.txt",
        "sampled.part.txt",
        "sampled.txt",
    ]
    assert found["sampled.first.txt"] == f"First. {LONG}\n\nfunction\nFunction \\d. {LONG}\n"
    assert metrics == {"sample_documents": 5, "sample_bytes": sum(len(text) for text in found.values())}
    assert "sampled" not in sys.modules


def test_a_part_of_a_package_can_be_named(package: Path) -> None:
    write_sample(package / "sample", SampleConfig(packages=("sampled.part", "sampled.first"), min_bytes=1))
    names = ["sampled.first.txt", "sampled.part.second.txt", "sampled.part.txt"]
    assert list(written(package / "sample")) == names


def test_modules_with_little_text_are_skipped_and_the_bytes_are_limited(package: Path) -> None:
    write_sample(package / "sample", SampleConfig(packages=("sampled",), min_bytes=150))
    assert list(written(package / "sample")) == ["sampled.first.txt"]
    for limit in range(130, 500, 40):
        metrics = write_sample(package / "sample", SampleConfig(("sampled",), min_bytes=1, max_bytes=limit))
        assert metrics["sample_bytes"] <= limit


def test_which_modules_are_chosen_depends_on_their_names_and_sizes_only() -> None:
    modules = {f"module{number}": "x" * 100 for number in range(50)}
    config = SampleConfig(min_bytes=100, max_bytes=2000)
    chosen = choose(modules, config)
    assert len(chosen) == 20
    assert chosen == sorted(chosen) == choose(dict(reversed(modules.items())), config)
    more = choose({**modules, "another": "x" * 100}, config)
    assert len(set(chosen) - set(more)) <= 1


def test_a_failed_run_leaves_the_sample_that_was_there(package: Path) -> None:
    write_sample(package / "sample", SampleConfig(packages=("sampled",), min_bytes=1))
    before = written(package / "sample")
    with pytest.raises(DocumentError, match="no module of sampled has 10000 to 2900000 bytes"):
        write_sample(package / "sample", SampleConfig(packages=("sampled",), min_bytes=10_000))
    with pytest.raises(ConfigError, match=r"sample\.packages: missing_package is not installed"):
        write_sample(package / "sample", SampleConfig(packages=("sampled", "missing_package")))
    assert written(package / "sample") == before
    assert sorted(path.name for path in package.iterdir()) == ["sample", "site"]


@pytest.mark.parametrize("name", ["missing_package", "sys", "sampled.nothing", "sampled.part.none", "..", "a b", ""])
def test_a_package_that_is_not_there_is_one_line(package: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"sample\.packages: ") as caught:
        find_package(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packages", [(), ("python", "python")])
def test_packages_that_make_no_sense_are_refused(packages: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sample\.packages: found"):
        SampleConfig(packages=packages)


def test_the_text_of_a_module_is_what_python_says_its_docstrings_are() -> None:
    source = inspect.getsource(textwrap)
    text = module_text(source.encode())
    position = 0
    for owner in (textwrap.TextWrapper, textwrap.TextWrapper.wrap, textwrap.fill, textwrap.dedent):
        docstring = prose(inspect.getdoc(owner) or "")
        position = text.index(docstring, position) + len(docstring)
    assert "\n\nTextWrapper.wrap\nwrap(text : string) -> [string]" in text


def test_docstrings_below_conditions_and_functions_are_found_in_order() -> None:
    source = f"""
if True:
    try:
        class A:
            '''One. {LONG}'''
            async def b(self):
                '''Two. {LONG}'''
                def c():
                    '''Three. {LONG}'''
    except ImportError:
        pass
def d():
    '''Short.'''
"""
    assert module_text(source.encode()) == f"A\nOne. {LONG}\n\nA.b\nTwo. {LONG}\n\nA.b.c\nThree. {LONG}\n"
    assert module_text(b"x = 1") == module_text(b"not python") == module_text(b"\x00") == ""


def test_examples_at_a_prompt_are_left_out_with_their_heading() -> None:
    docstring = "Prose.\n\nExamples\n--------\n>>> a\n1\n\n>>> b\n... c\n2\n\nSee this:\n>>> d\n\nNotes\n-----\nMore."
    assert prose(docstring) == "Prose.\n\nSee this:\n\nNotes\n-----\nMore."
    assert prose("Half \ud800 a pair") == "Half ? a pair"


def test_the_standard_library_is_read_without_what_is_installed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "os.py",
        "json/decoder.py",
        "test/support.py",
        "site-packages/numpy/core.py",
        "idlelib/editor.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name}. {LONG}"""\n')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [name for name, _ in read_modules("python", find_package("python"))] == ["json.decoder", "os"]


@pytest.mark.slow
def test_the_default_sample_is_large_enough(tmp_path: Path) -> None:
    metrics = write_sample(tmp_path / "sample", SampleConfig())
    assert metrics["sample_documents"] > 150
    assert 2_600_000 < metrics["sample_bytes"] <= 2_900_000
