"""TrainingWrapper: from a folder of text to a model that writes, over a tiny BERT that is made here."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import tiny_corpus, tiny_encoder

import retro_model.memmaps.wrapper
import retro_model.retrieval
from retro_model import RETRO, TrainingWrapper
from retro_model.core.errors import ConfigError, DocumentError
from retro_model.inference.generation import generate
from retro_model.inference.sampling import top_p
from retro_model.retrieval import tokenize

CHUNK, SEQ_LEN = 8, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and an encoder, and all that a first wrapper makes."""
    folder = tmp_path_factory.mktemp("made")
    tiny_corpus(folder / "texts", num_documents=12)
    tiny_encoder(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RETRO_BERT", str(folder / "bert"))
        wrap()
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("RETRO_BERT", str(made / "bert"))
    monkeypatch.delenv("REPROCESS", raising=False)
    return tmp_path / "copy"


def small_retro(**changes: Any) -> RETRO:
    vocabulary = len(Path(os.environ["RETRO_BERT"], "vocab.txt").read_text().splitlines())
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_tokens": vocabulary, "chunk_size": CHUNK, "max_seq_len": SEQ_LEN, "enc_dim": 16, "enc_depth": 1,
        "dec_dim": 16, "dec_depth": 2, "dec_cross_attn_layers": (2,), "heads": 2, "dim_head": 8,
    }  # fmt: skip
    return RETRO(**{**arguments, **changes})


def wrap(**changes: Any) -> TrainingWrapper:
    retro = changes.pop("retro", None) or small_retro()
    arguments: dict[str, Any] = {"knn": 2, "chunk_size": CHUNK, "documents_path": "./texts"}
    return TrainingWrapper(retro=retro, **{**arguments, **changes})


def written(folder: Path) -> dict[str, int]:
    """When each file that a wrapper makes was written."""
    files = [path for path in folder.iterdir() if path.name.startswith(("train.", "other.", "processed", "knn"))]
    return {path.name: path.stat().st_mtime_ns for path in files}


def rewritten(folder: Path, before: dict[str, int]) -> set[str]:
    return {name for name, time in written(folder).items() if before.get(name) != time and not name.endswith(".json")}


CHUNKS = {"train.chunks.dat", "train.seq.dat", "train.doc_ids.dat"}
VECTORS, INDEX, NEIGHBORS = "train.chunks.embeddings.dat", "train.chunks.knn.index", "train.chunks.knn.dat"
EVERYTHING = {*CHUNKS, VECTORS, INDEX, NEIGHBORS}


def test_a_few_lines_train_from_a_folder_of_text(place: Path) -> None:
    """The loop that scripts of this field have: the loss falls, then the model writes."""
    retro = small_retro(dec_attn_dropout=0.1, use_deepnet=True)
    wrapper = wrap(retro=retro, max_seqs=1000, max_chunks=10_000, knn_extra_neighbors=50,
                   max_index_memory_usage="100m", current_memory_available="1G")  # fmt: skip
    loader = wrapper.get_dataloader(batch_size=4, shuffle=True)
    optimizer = wrapper.get_optimizer(lr=3e-3, wd=0.01)
    losses = []
    for _ in range(4):
        for seq, retrieved in loader:
            loss = retro(seq, retrieved, return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    sampled = wrapper.generate(filter_thres=0.9, temperature=1.0)
    assert isinstance(sampled, torch.Tensor) and sampled.shape[0] == 1 and sampled.shape[1] <= SEQ_LEN
    prompted = wrapper.generate(tokenize(["ba co di fu ga lem mi nor pa que"], add_special_tokens=False))
    assert isinstance(prompted, torch.Tensor) and prompted.shape[0] == 1
    assert retro.training, "generate leaves the model as it was"


def test_of_two_processes_that_start_at_once_the_second_finds_what_the_first_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for them, which hold a lock against each other as processes do."""
    expected = {name: (place / name).read_bytes() for name in EVERYTHING}
    for name in written(place):
        (place / name).unlink()
    calls = []

    def slow(module: Any, name: str) -> None:
        function = getattr(module, name)

        def called(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            time.sleep(1)  # for the other to come
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, called)

    slow(retro_model.memmaps.wrapper, "text_folder_to_chunks_")
    for name in ("_write_vectors", "_build_index", "_write_neighbors"):
        slow(retro_model.memmaps.search, name)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda retro: wrap(retro=retro), [small_retro(), small_retro()])
    assert calls == ["text_folder_to_chunks_", "_write_vectors", "_build_index", "_write_neighbors"]
    assert {name: (place / name).read_bytes() for name in EVERYTHING} == expected
    assert first.stats == second.stats and not list(place.glob("*.lock"))


def test_what_it_holds_fits_together(place: Path) -> None:
    wrapper = wrap()
    assert wrapper.stats.keys() == {"chunks", "docs", "seqs"} and wrapper.stats["docs"] == 12
    seq, retrieved = next(iter(wrapper.get_dataloader(batch_size=3)))
    assert (seq.shape, seq.dtype) == ((3, SEQ_LEN + 1), torch.int64)
    assert (retrieved.shape, retrieved.dtype) == ((3, SEQ_LEN // CHUNK, 2, 2 * CHUNK), torch.int64)
    assert len(wrapper.dataset) == wrapper.stats["seqs"]
    assert wrapper.faiss_index.ntotal == wrapper.stats["chunks"]
    groups = wrapper.get_optimizer(lr=1e-3, wd=0.2).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.2), (1e-3, 0.0)]
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])
    default = wrapper.get_optimizer().param_groups
    assert (default[0]["lr"], default[0]["weight_decay"]) == (3e-4, 0.1)


def test_a_stored_chunk_finds_itself_then_its_stored_neighbors(place: Path) -> None:
    wrapper = wrap()
    chunks = np.memmap("train.chunks.dat", np.int32, "r").reshape(-1, CHUNK + 1)
    row = 5
    found = wrapper.retrieve(torch.from_numpy(chunks[row : row + 1, :-1].astype(np.int64)), knn=3)
    assert found.shape == (1, 3, 2 * CHUNK)
    assert found[0, 0, :CHUNK].tolist() == chunks[row, :-1].tolist()


# ---- reuse ---------------------------------------------------------------------------------------------


def test_the_same_again_makes_nothing(place: Path) -> None:
    before = written(place)
    assert before.keys() >= EVERYTHING
    wrap()
    wrap(max_chunks=5000, max_seqs=4000, knn_extra_neighbors=3)  # limits and speed change nothing that is written
    assert written(place) == before


def edit_text(place: Path) -> None:
    file = place / "texts" / "document-001.txt"
    file.write_text(file.read_text() + "ba co di fu ga lem mi nor pa que ri sto tu ver wa zen " * 3)


def rename_text(place: Path) -> None:
    (place / "texts" / "document-001.txt").rename(place / "texts" / "document-999.txt")


def other_encoder(place: Path) -> None:
    os.environ["RETRO_BERT"] = str(tiny_encoder(place / "other-bert", seed=1))


CHANGES: list[tuple[dict[str, Any], Callable[[Path], object] | None, set[str]]] = [
    ({"knn": 1}, None, {NEIGHBORS}),
    ({"index_key": "IVF4,Flat"}, None, {INDEX, NEIGHBORS}),
    ({"use_cls_repr": True}, None, {VECTORS, INDEX, NEIGHBORS}),
    ({"glob": "*.txt"}, None, EVERYTHING),
    ({}, edit_text, EVERYTHING),
    ({}, rename_text, EVERYTHING),
    ({}, other_encoder, {VECTORS, INDEX, NEIGHBORS}),  # its tokenizer is the same
]


@pytest.mark.parametrize(("arguments", "change", "expected"), CHANGES)
def test_a_change_makes_what_depends_on_it_again(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    change: Callable[[Path], object] | None,
    expected: set[str],
) -> None:
    monkeypatch.setenv("RETRO_BERT", os.environ["RETRO_BERT"])  # put back whatever `change` does to it
    if change is not None:
        change(place)
    before = written(place)
    wrap(**arguments)
    assert rewritten(place, before) == expected


def test_another_length_of_sequences_makes_other_sequences(place: Path) -> None:
    assert len(wrap(retro=small_retro(max_seq_len=16)).dataset) > len(wrap().dataset)


def test_another_chunk_size_makes_everything_again(place: Path) -> None:
    wrapper = wrap(retro=small_retro(chunk_size=16), chunk_size=16)
    assert wrapper.dataset[0][1].shape == (2, 2, 32)


def test_the_environment_asks_for_everything_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, bytes_before = written(place), {name: (place / name).read_bytes() for name in EVERYTHING}
    monkeypatch.setenv("REPROCESS", "1")
    wrap()
    assert rewritten(place, before) == EVERYTHING
    assert {name: (place / name).read_bytes() for name in EVERYTHING} == bytes_before
    before = written(place)
    monkeypatch.setenv("REPROCESS", "0")
    wrap()
    assert written(place) == before
    monkeypatch.setenv("REPROCESS", "maybe")
    with pytest.raises(ConfigError, match="REPROCESS in the environment: found 'maybe', expected 1 or 0"):
        wrap()


@pytest.mark.parametrize("name", ["train.chunks.dat", "train.doc_ids.dat", NEIGHBORS, VECTORS])
def test_a_damaged_file_is_made_again(place: Path, name: str) -> None:
    whole = (place / name).read_bytes()
    (place / name).write_bytes(whole[:-4] + b"\x01\x00\x00\x00")
    wrap()
    assert (place / name).read_bytes() == whole


def test_a_kill_before_the_counts_are_written_makes_the_chunks_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    edit_text(place)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(retro_model.memmaps.wrapper, "write_json", killed)
        wrap()
    wrapper = wrap()
    assert len(wrapper.dataset) == wrapper.stats["seqs"]
    assert (place / "train.chunks.dat").stat().st_size == wrapper.stats["chunks"] * (CHUNK + 1) * 4


def test_two_wrappers_in_one_folder_leave_each_other_alone(place: Path) -> None:
    tiny_corpus(place / "more", num_documents=4, seed=3)
    before = written(place)
    other: dict[str, Any] = {
        "documents_path": "./more",
        "chunks_memmap_path": "./other.chunks.dat",
        "seqs_memmap_path": "./other.seq.dat",
        "doc_ids_memmap_path": "./other.doc_ids.dat",
        "processed_stats_json_path": "./other-stats.json",
    }
    second = wrap(**other)
    first = wrap()
    assert {name: time for name, time in written(place).items() if name in before} == before
    assert (first.stats["docs"], second.stats["docs"]) == (12, 4)
    assert (place / "other.chunks.knn.index").is_file() and first.faiss_index.ntotal != second.faiss_index.ntotal


# ---- writing -------------------------------------------------------------------------------------------


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def test_it_writes_as_generate_does_with_a_search_at_every_boundary(place: Path) -> None:
    wrapper = wrap()
    prompt = prompts(2, CHUNK + 3)
    ids, neighbors = wrapper.generate(prompt, temperature=0.0, return_neighbors=True)
    assert ids.shape[0] == 2 and CHUNK + 3 < ids.shape[1] <= SEQ_LEN
    expected = generate(
        wrapper.retro, prompt, retrieve=wrapper.retrieve, temperature=0.0, eos_id=wrapper.tokenizer.end_id
    )
    assert isinstance(expected, torch.Tensor) and ids.equal(expected)
    for row, found in enumerate(neighbors):
        for number, retrieved in found.items():
            chunk = ids[row : row + 1, number * CHUNK : (number + 1) * CHUNK]
            assert retrieved.equal(wrapper.retrieve(chunk)[0])
    assert all(0 in found for found in neighbors), "the prompt's whole chunk was searched for"
    assert max(map(len, neighbors)) >= 2, "and what was written after it"


def test_a_text_ends_with_the_end_token_and_is_never_too_long(place: Path) -> None:
    wrapper = wrap()
    lengths = set()
    for seed in range(6):
        ids = wrapper.generate(seed=seed, filter_thres=0.0)
        assert isinstance(ids, torch.Tensor) and ids.shape[0] == 1 and ids.shape[1] <= SEQ_LEN
        assert ids[0, 0] == wrapper.tokenizer.begin_id
        ended = (ids[0] == wrapper.tokenizer.end_id).nonzero().flatten().tolist()
        assert ended in ([], [ids.shape[1] - 1]), "nothing follows the end"
        lengths.add(ids.shape[1])
    with torch.no_grad():  # a model that always ends
        wrapper.retro.unembedding.weight.zero_()
        wrapper.retro.unembedding.weight[wrapper.tokenizer.end_id] = 0
    always = wrapper.generate(filter_fn=lambda logits, _: torch.where(
        torch.arange(logits.shape[-1]) == wrapper.tokenizer.end_id, 0.0, -torch.inf).expand_as(logits))  # fmt: skip
    assert isinstance(always, torch.Tensor)
    assert always.tolist() == [[wrapper.tokenizer.begin_id, wrapper.tokenizer.end_id]]


def test_choices_of_how_to_write(place: Path) -> None:
    wrapper = wrap()
    prompt = prompts(1, 5)
    short = wrapper.generate(prompt, max_new_tokens=4, seed=1)
    assert isinstance(short, torch.Tensor) and short.shape == (1, 9)
    one, same, other = (wrapper.generate(prompt, max_new_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert isinstance(one, torch.Tensor) and one.equal(same) and not one.equal(other)
    nucleus = wrapper.generate(prompt, filter_fn=top_p, filter_thres=0.5, seed=1, max_new_tokens=3)
    assert isinstance(nucleus, torch.Tensor) and nucleus.shape == (1, 8)
    _, four = wrapper.generate(prompts(1, CHUNK), knn=4, max_new_tokens=1, return_neighbors=True)
    assert four[0][0].shape == (4, 2 * CHUNK)
    _, none = wrapper.generate(prompts(1, CHUNK), knn=0, max_new_tokens=CHUNK, return_neighbors=True)
    assert none == [{}]


def test_a_model_with_more_tokens_than_the_tokenizer_writes_none_of_them(place: Path) -> None:
    vocabulary = wrap().tokenizer.vocab_size
    wrapper = wrap(retro=small_retro(num_tokens=20 * vocabulary))
    ids = wrapper.generate(prompts(1, CHUNK), seed=1, filter_thres=0.0)
    assert isinstance(ids, torch.Tensor) and ids.max() < vocabulary
    greedy = wrapper.generate(prompts(1, CHUNK), temperature=0.0)  # an untrained one may take what is no text
    assert isinstance(greedy, torch.Tensor)


def test_given_neighbors_stand_for_the_prompt_s_own(place: Path) -> None:
    wrapper = wrap()
    prompt = prompts(2, 2 * CHUNK)
    given = torch.randint(5, 60, (2, 2, 1, 2 * CHUNK), generator=torch.Generator().manual_seed(2))
    _, used = wrapper.generate(prompt, given, max_new_tokens=CHUNK + 1, temperature=0.0, return_neighbors=True)
    for row in range(2):
        assert all(used[row][number].equal(given[row, number]) for number in range(2))
        assert used[row][2].shape == (2, 2 * CHUNK), "what is written is searched for"
    _, one_each = wrapper.generate(prompt, given[:, :, 0], knn=0, max_new_tokens=CHUNK + 1, return_neighbors=True)
    assert one_each[1][1].equal(given[1, 1])
    assert (one_each[1][2] == wrapper.tokenizer.pad_id).all(), "nothing is searched for with knn=0"
    with pytest.raises(ConfigError, match=r"retrieved: found \(2, 1, 1, 16\), expected \(2, 2, neighbors, tokens\)"):
        wrapper.generate(prompt, given[:, :1])
    with pytest.raises(ConfigError, match="knn: found -1"):
        wrapper.generate(prompt, knn=-1)


# ---- what cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({}, {"chunk_size": 16}, "chunk_size: found 16, expected 8, the model's"),
        ({"num_tokens": 20}, {}, "retro: found num_tokens=20, expected >= "),
        ({"pad_id": 3}, {}, "retro: found pad_id=3, expected 0"),
        ({"max_seq_len": 30}, {}, "seq_len: found 30, expected a multiple of chunk_size 8"),
        ({}, {"knn": 0}, "knn: found 0"),
        ({}, {"max_chunks": 10}, "max_chunks: found 10, expected >= "),
        ({}, {"max_seqs": 3}, "max_seqs: found 3, expected >= "),
        ({}, {"index_kex": "Flat"}, "index_kex: unknown argument"),
    ],
)
def test_arguments_that_cannot_work_say_so(
    place: Path, model: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(retro=small_retro(**model), **arguments)


def test_a_folder_that_is_not_there(place: Path) -> None:
    with pytest.raises(DocumentError, match="nowhere: no such folder"):
        wrap(documents_path="./nowhere")
