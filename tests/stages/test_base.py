"""All stages with `retrofit.base`: a language model of transformers in place of the decoder, and adapters for it."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import change_fact
from safetensors import safe_open
from stagewise import OUTS, contents, copy_of, refuse, run, run_all, write_params
from tiny_bases import save_base, tiny_base
from transformers import AutoModelForCausalLM

from retro_model import cli
from retro_model.core.artifacts import Artifact
from retro_model.evaluation.names import ModelNames
from retro_model.retrofit.loading import open_model, open_models
from stages import summary

pytestmark = pytest.mark.slow

BASE: dict[str, object] = {"retrofit__base": "tiny/base", "retrofit__dim_head": 16, "retrofit__enc_depth": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run, around a tiny base."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder / "tiny" / "base")
    return run_all(folder, **BASE)


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    folder = copy_of(made, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


def metrics(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"metrics/{stage}.json").read_text())
    return found


def test_evaluate_compares_the_base_with_retrieval_off_on_and_random(work: Path) -> None:
    found = metrics("evaluate")
    assert found["test_bpb_off"] == found["test_bpb_baseline"] != found["test_bpb_on"] != found["test_bpb_random"]
    assert found["gain_on_vs_off_low"] <= found["gain_on_vs_off"] <= found["gain_on_vs_off_high"]
    assert metrics("train")["valid_loss_off"] == metrics("baseline")["valid_loss"]
    models = open_models({name: Artifact.open(f"models/{name}", "model") for name in ("baseline", "retro")})
    assert models["baseline"].base is models["retro"].base  # one copy in memory


def test_the_report_and_the_last_table_name_what_was_compared(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base and its adapters: nowhere a plain decoder or RETRO, which this run has not."""
    names = ModelNames.of("tiny/base")
    assert names.column("baseline") == "base: base as it is" and ModelNames.of("A/b-1").column("baseline")[6:9] == "b-1"
    page = Path("reports/evaluate.html").read_text()
    summary.main()
    table = capsys.readouterr().out.partition("look next")[0]
    for column in ("baseline", "mixed", "off", "on", "random"):
        assert f"<small>{names.column(column)}</small>" in page and f"  {names.column(column)}" in table
    assert "  the base with adapters, retrieval on: saves " in table and "% of the base (95%" in table
    for text in (page, table):
        assert "plain decoder" not in text and "RETRO" not in text


def test_the_baseline_is_the_base_as_it_is(work: Path) -> None:
    """Scored once, with all that dvc.yaml declares; its losses are those of transformers."""
    (row,) = csv.DictReader(Path("plots/baseline.csv").read_text().splitlines())
    assert set(row) == {"step", "train_loss", "valid_loss", "valid_bits_per_byte"} and row["step"] == "0"
    found = metrics("baseline")
    assert found["tokens_seen"] == 0 and found["valid_loss"] == float(row["valid_loss"])
    chunks = Artifact.open("data/chunks/valid", "chunks")
    first = torch.from_numpy(chunks["tokens"][:1].astype("int64"))
    theirs = AutoModelForCausalLM.from_pretrained("tiny/base", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(first[:, :-1]).logits[0], first[0, 1:], reduction="none")
        losses = open_model(Artifact.open("models/baseline", "model")).token_losses(first[:, :-1], labels=first[:, 1:])
    assert torch.equal(losses[0], expected)


def test_the_folders_hold_adapters_and_no_copy_of_the_base(work: Path) -> None:
    for name in ("baseline", "retro"):
        files = {file for file in contents(work / "models" / name) if not file.startswith("tokenizer/")}
        assert files == {"adapters.safetensors", "artifact.json", "config.json", "MLmodel"}
        facts = Artifact.open(f"models/{name}", "model").facts
        assert facts["base"]["name"] == "tiny/base" and len(facts["base"]["sha256"]) == 64
        assert str(work) not in (work / "models" / name / "config.json").read_text()
    with safe_open("models/retro/adapters.safetensors", "pt") as saved:
        sizes = {size for key in saved.keys() for size in saved.get_slice(key).get_shape()}  # noqa: SIM118
    assert sizes and not sizes & {300, 301}, "the base's vocabulary, with padding"


def test_its_own_tokenizer_is_the_default(work: Path) -> None:
    tokenizer = Artifact.open("data/tokenizer", "tokenizer")
    assert tokenizer.facts["name"] == "base"
    assert tokenizer.facts["pad_id"] == json.loads(Path("tiny/base/config.json").read_text())["vocab_size"]


def test_the_command_writes_with_neighbors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "Some words, " * 9, "--max-new-tokens", "20", "--device", "cpu"]
    assert cli.main(["generate", *prompt, "--show-neighbors"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Some words, ") and "retrieved with chunk 1 of this text" in shown
    Path("params.yaml").unlink()
    named = ["--encoder", "tiny/encoder"]
    assert cli.main(["generate", *prompt, *named, "--show-neighbors"]) == 0  # by the name recorded in the model
    assert capsys.readouterr().out == shown
    assert cli.main(["generate", *prompt, *named, "--model", "models/baseline"]) == 0
    save_base(work / "tiny" / "other", seed=1)
    assert cli.main(["generate", *prompt, *named, "--base", "tiny/other"]) == 1
    line = capsys.readouterr().err
    assert "adapters for tiny/base" in line and "load the base that they were trained with" in line


def test_a_training_that_was_killed_goes_on_bit_for_bit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any step; the checkpoint has no weight of the base."""
    before = contents(work / "models/retro"), Path("plots/train.csv").read_bytes()
    from retro_model.training import run as runs
    from retro_model.training.trainer import Trainer

    step = Trainer.step

    def killed(trainer: Trainer, data: Any) -> Any:
        if trainer.state.step == 3:
            trainer.save()
            raise KeyboardInterrupt
        return step(trainer, data)

    shutil.rmtree("models/retro")
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "step", killed)
        with pytest.raises(SystemExit):
            run("train")
    (weights,) = Path(".retro", "work", "train").rglob("checkpoint-00000003/weights.safetensors")
    with safe_open(weights, "pt") as saved:
        assert all(key.startswith("adapters.") for key in saved.keys())  # noqa: SIM118
    run("train")
    assert (contents(work / "models/retro"), Path("plots/train.csv").read_bytes()) == before


def test_two_processes_train_what_one_does(work: Path) -> None:
    before = metrics("train")
    shutil.rmtree("models/retro")
    write_params(work, **BASE, train__processes=2)
    run("train")
    assert metrics("train") == pytest.approx(before, rel=2e-3)


def test_training_goes_on_from_saved_adapters(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("models/retro", "models/before")
    write_params(work, **BASE, retrofit__init_from="models/before")
    shutil.rmtree("models/retro")
    run("train")
    assert (
        Artifact.open("models/retro", "model").facts["init_from"] == Artifact.open("models/before", "model").fingerprint
    )
    write_params(work, **BASE, retrofit__init_from="models/before", retrofit__enc_dim=32)
    assert "adapters with enc_dim 64, expected 32; set retrofit.enc_dim to 64" in refuse("train", capsys)


def test_the_base_can_be_trained_too(work: Path) -> None:
    """Then it lies beside the adapters, and `off` is no longer the base as it was."""
    write_params(work, **BASE, retrofit__freeze="nothing")
    for stage in ("train", "evaluate"):
        shutil.rmtree(OUTS[stage])
        run(stage)
    assert Path("models/retro/base/model.safetensors").is_file()
    assert metrics("evaluate")["test_bpb_off"] != metrics("evaluate")["test_bpb_baseline"]


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")


def of_kind(**config: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(config)) and None


def narrow_embeddings(folder: Path) -> None:
    tiny_base("opt", word_embed_proj_dim=16).save_pretrained(folder)


def another(folder: Path) -> None:
    shutil.rmtree(folder)
    save_base(folder, seed=1)


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def unchanged(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("stage", "change", "params", "message"),
    [
        ("tokenizer", nothing, {}, "base: tiny/base cannot be loaded (no such folder, and not on the hub)"),
        (
            "tokenizer",
            no_weights,
            {},
            "found none of model.safetensors and model.safetensors.index.json; name a causal",
        ),
        (
            "tokenizer",
            of_kind(model_type="t5"),
            {},
            "tokenizer: base: t5 has an encoder and a decoder, expected a decoder alone",
        ),
        ("tokenizer", of_kind(model_type="bert"), {}, "base: BertLMHeadModel keeps its decoder layers in an unknown"),
        (
            "tokenizer",
            of_kind(model_type="mpt"),
            {},
            "base: MptForCausalLM keeps its decoder layers in an unknown place",
        ),
        ("tokenizer", of_kind(model_type="vit"), {}, "tiny/base cannot be loaded (folder tiny/base): Unrecognized con"),
        ("tokenizer", of_kind(model_type="none"), {}, "tiny/base cannot be loaded (folder tiny/base): The checkpoint"),
        ("tokenizer", narrow_embeddings, {}, "base: OPTForCausalLM has embeddings of width 16, expected its hidden"),
        ("baseline", no_weights, {}, "its weights as safetensors (no pickle)"),
        ("baseline", unchanged, {"seq_len": 256}, "seq_len: found 256, expected at most 128, the longest text that"),
        (
            "baseline",
            unchanged,
            {"train__compile": True},
            "train.compile: found true, expected false with retrofit.base",
        ),
        (
            "train",
            unchanged,
            {"retrofit__cross_attn_layers": [9]},
            "retrofit.cross_attn_layers: found [9], expected one",
        ),
        ("train", another, {}, "models/baseline: made with the base tiny/base (sha256"),
        ("evaluate", another, {}, "load the base that they were trained with"),
        ("train", unchanged, {"retrofit__base": ""}, "models/baseline: found adapters, but retrofit.base is ''"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    change: Callable[[Path], None],
    params: dict[str, object],
    message: str,
) -> None:
    change(work / "tiny" / "base")
    write_params(work, **{**BASE, **params})
    assert message in refuse(stage, capsys)


def test_chunks_of_another_size_than_the_adapters_are_refused_by_name(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(work, **BASE, chunk_size=32)
    for stage in ("chunk", "embed", "index", "knn"):
        shutil.rmtree(OUTS[stage])
        run(stage)
    chunks = Artifact.open("data/chunks/train", "chunks").fingerprint
    for name in ("baseline", "retro"):  # as if they were trained on these chunks: only their size does not fit
        change_fact(work / "models" / name, "chunks", chunks)
    assert "made for chunk_size 16, expected 32; run `dvc repro`" in refuse("evaluate", capsys)
    for command in (["generate", "--prompt", "Some words"], ["serve", "--port", "0"]):
        assert cli.main([*command, "--device", "cpu"]) == 1
        line = capsys.readouterr().err
        assert "models/retro: made for chunk_size 16, expected 32; run `dvc repro`" in line
    # ... and by the adapters' own config, if the artifact says that they fit
    change_fact(work / "models/retro", "chunk_size", 32)
    assert cli.main(["generate", "--prompt", "Some words", "--device", "cpu"]) == 1
    assert "models/retro: adapters for chunks of 16 tokens, expected 32" in capsys.readouterr().err


def test_the_base_is_checked_before_any_work_and_without_its_weights(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in work.glob("tiny/base/*.safetensors"):
        file.write_bytes(b"")
    before = contents(work / "data/tokenizer")
    shutil.rmtree("data/tokenizer")
    run("tokenizer")
    assert contents(work / "data/tokenizer") == before
    (work / "tiny/base/model.safetensors").unlink()
    monkeypatch.setattr("stages.tokenizer.make_tokenizer", lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises(SystemExit):
        run("tokenizer")


def test_a_tokenizer_without_begin_and_end_is_refused_until_they_are_named(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("tiny/base")
    save_base(work / "tiny" / "base", named=False)

    def again(*stages: str) -> None:
        for stage in stages:
            shutil.rmtree(OUTS[stage])
            run(stage)

    again("tokenizer", "chunk")
    line = refuse("baseline", capsys)
    assert "tokenizer.name: token ids up to" in line and "tokenizer.begin and tokenizer.end" in line
    write_params(work, **BASE, tokenizer__begin="<s>", tokenizer__end="<|none|>")
    assert "tokenizer.end: found '<|none|>', expected a token of tiny/base, or null" in refuse("tokenizer", capsys)
    write_params(work, **BASE, tokenizer__begin="<s>", tokenizer__end="</s>")
    again("tokenizer", "chunk", "baseline")
