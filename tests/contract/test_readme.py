"""What README.md and the pages in docs/ say is so; their longer commands run in test_pipeline.py."""

import argparse
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_corpus, tiny_encoder
from small_run import small_run, write_model
from tiny_bases import tiny_base

from stages.common.params import read_yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
TEXT = "\n\n".join(PAGES.values())
PROGRAMS = ("dvc", "git", "make", "mlflow", "pip", "python", "ray", "retro", "rm", "source", "torchrun")


def program(which: str) -> str:
    """The one Python block of all pages that holds `which`."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if which in block]
    return str(found)


def commands() -> Iterator[tuple[list[str], bool]]:
    """The commands of all pages; whether they are whole, in an indented block, or mentioned between backquotes."""
    fences = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
    for text in PAGES.values():
        prose = fences.sub("", text)
        blocks = re.findall(r"^ {4,}(\S.*)$", prose, flags=re.MULTILINE)
        for number, line in enumerate(blocks + re.findall(r"`([^`\n]+)`", prose)):
            if line.split()[0] not in PROGRAMS or len(line.split()) == 1:
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True  # which leaves out comments
            joined = "\0".join(lexer)
            for part in re.split(r"\0(?:;|&&|\|)\0", joined):
                yield part.strip("\0").split("\0"), number < len(blocks)


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 170


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", README))
    assert sorted(PAGES.keys() - {"README.md"} - linked) == []


def test_every_python_block_is_run_by_a_test() -> None:
    tested = (
        "torch.randint",
        "chunks_to_precalculated_knn_(",
        "TrainingWrapper(",
        'pretrained("models/retro")',
        "Retrofit(",
    )
    tested += ("mlflow.pyfunc",)
    assert len({program(which) for which in tested}) == len(re.findall(r"^ *```python$", TEXT, flags=re.MULTILINE))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a few documents in texts/ and a tiny encoder for the functions over raw files."""
    monkeypatch.chdir(tmp_path)
    tiny_corpus(tmp_path / "texts", num_documents=6)
    monkeypatch.setenv("RETRO_BERT", str(tiny_encoder(tmp_path / "bert")))
    return tmp_path


def variables_of(text: str) -> dict[str, Any]:
    """Runs a program as a script runs, in this process; the variables that it leaves."""
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, "README", "exec"), found)
    return found


def test_the_network_in_ten_lines_runs() -> None:
    assert 9.0 < variables_of(program("torch.randint"))["loss"].item() < 11.0  # ln 20,000 = 9.9


def enter_small_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with a model for longer texts; its tiny encoder is no package, so its folder has to be named."""
    run = small_run(folder)
    shutil.rmtree(run / "models/retro")
    write_model(run / "models/retro", run / "data", retrieval=True, seq_len=256)
    monkeypatch.chdir(run)


def test_a_model_writes_with_its_retriever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_small_run(tmp_path, monkeypatch)
    variables_of(program('pretrained("models/retro")').replace('open("data")', 'open("data", encoder="encoder")'))
    assert "Return the indices of the largest" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_opens_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_small_run(tmp_path, monkeypatch)
    variables_of(program("mlflow.pyfunc").replace('{"data": "data"}', '{"data": "data", "encoder": "encoder"}'))
    assert "['Return the indices of the largest" in capsys.readouterr().out


def test_a_hugging_face_model_is_trained_with_neighbors_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path)
    tiny_base("llama", vocab_size=400).save_pretrained(run / "base")
    text = program("Retrofit(")
    for is_written, is_run in (("HuggingFaceTB/SmolLM2-135M", "base"), ("512", "32"), ("range(400)", "range(2)"),
                               ('open("data")', 'open("data", encoder="encoder")')):  # fmt: skip
        assert text.count(is_written) == 1, is_written
        text = text.replace(is_written, is_run)
    monkeypatch.chdir(run)
    variables_of(text)
    assert "\nReturn the indices of the largest" in capsys.readouterr().out


@pytest.mark.usefixtures("scratch")
def test_the_functions_over_raw_files_run() -> None:
    found = variables_of(program("knn_("))
    assert (found["seq"].shape, found["retrieved"].shape) == ((513,), (8, 2, 128))
    assert (found["retrieved"] > 0).any()


@pytest.mark.usefixtures("scratch")
def test_the_wrapper_trains_and_writes() -> None:
    assert 0 < variables_of(program("Wrapper"))["loss"].item() < 10


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^ {4,}|`)make ([a-z-]+)", TEXT, flags=re.MULTILINE))))
def test_the_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


class _Refused(Exception):
    """What a parser says to a command that it does not take."""


def _parse(parser: argparse.ArgumentParser, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(self: argparse.ArgumentParser, message: str, *_: object) -> None:
        raise _Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(type(parser), "error", refuse)
    try:
        return parser.parse_args(arguments)
    except SystemExit as end:  # --help
        assert end.code == 0
        return None


@pytest.mark.filterwarnings("ignore")  # DVC's own
@pytest.mark.parametrize("name", ["dvc", "retro"])
def test_dvc_and_retro_take_the_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and options; the stages that they name are those of dvc.yaml."""
    if name == "dvc":
        from dvc.cli.parser import get_main_parser

        parser = get_main_parser()
    else:
        from retro_model.cli import _parser

        parser = _parser()
    found = [(command[1:], whole) for command, whole in commands() if command[0] == name]
    assert len(found) >= 5
    for arguments, whole in found:
        try:
            parsed = _parse(parser, arguments, monkeypatch)
        except _Refused as refused:
            if whole or "arguments are required" not in str(refused):
                raise AssertionError(f"{name} {shlex.join(arguments)}: {refused}") from refused
            continue
        if arguments[0] in ("repro", "commit") and "STAGE" not in arguments:
            stages = read_yaml(ROOT / "dvc.yaml")["stages"]
            assert set(filter(None, parsed.targets or [])) <= set(stages), arguments
    with pytest.raises(_Refused):
        _parse(parser, ["nothing"], monkeypatch)


def test_the_params_that_they_name_exist() -> None:
    params = read_yaml(ROOT / "params.yaml")
    files = (".generate", ".index", ".json", ".jsonl", ".md", ".py", ".safetensors")
    named = re.findall(r"`([a-z]+\.[a-z_]+)[`:]", TEXT) + re.findall(r"-S '?([a-z._]+)=", TEXT)
    named = [name for name in named if name.split(".")[0] in params and not name.endswith(files)]
    assert len(named) >= 20
    for name in named:
        section, _, key = name.partition(".")
        assert section in params and (not key or key in params[section]), name


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_it_names_exist(page: str) -> None:
    """Of the code; `a/b.py` in docs/development.md's table is below retro_model."""
    folders = r"retro_model|stages|tests|benchmarks|docs"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", PAGES[page]):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([a-z_/]+\.py)`", PAGES[page]):
        assert (ROOT / name).exists() or (ROOT / "retro_model" / name).exists(), name


def test_every_package_is_in_the_tree() -> None:
    tree = README[README.index("## Where things are") : README.index("## How fast")]
    for package in sorted((ROOT / "retro_model").glob("*/__init__.py")):
        assert f"retro_model/{package.parent.name} " in tree, package


def test_every_section_of_params_is_in_the_table_of_what_runs_again() -> None:
    table = README[README.index("| you change | runs again |") :].split("\n\n")[0]
    for name in read_yaml(ROOT / "params.yaml"):
        assert name == "sample" or f"`{name}`" in table, name


def test_every_public_name_loads() -> None:
    import retro_model

    assert sorted(retro_model._PUBLIC) == sorted(retro_model.__all__)
    for name in retro_model.__all__:
        assert getattr(retro_model, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'; it has "):
        _ = retro_model.Nothing
