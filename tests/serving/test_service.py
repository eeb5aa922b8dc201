"""The service without HTTP: its answers against slow references, its queue, and its live documents."""

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import KNN, open_service, served_run

from retro_model.cli import main
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError
from retro_model.core.printable import printable
from retro_model.corpus.chunks import document_texts, read_documents
from retro_model.evaluation.scoring import Scorer, Span
from retro_model.inference.text import Sampling
from retro_model.serving.live import TooLargeError, UnknownDocumentError
from retro_model.serving.service import End, Event, Retrieved, Service, Start, Token
from retro_model.serving.worker import ClosedError, QueueFullError, RanTooLongError, WaitedTooLongError, Worker

PROMPT = "Gaba fuco dilem norpa que ri"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[Service]:
    service = open_service(run)
    yield service
    service.worker.close()


async def listed(results: AsyncGenerator[Any, None]) -> list[Any]:
    async with aclosing(results):
        return [result async for result in results]


def written(service: Service, prompt: str = PROMPT, knn: int = KNN, **sampling: Any) -> list[Event]:
    return asyncio.run(listed(service.generate(prompt, Sampling(**sampling), knn)))


# ---- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knn", "sampling"),
    [
        (2, {"seed": 3, "max_new_tokens": 40}),
        (3, {"temperature": 0.0, "max_new_tokens": 30}),
        (0, {"seed": 3, "max_new_tokens": 40, "top_p": 0.5, "temperature": 1.5}),
        (1, {"seed": 1, "max_new_tokens": 25, "top_k": 9}),
    ],
)
def test_it_writes_what_retro_generate_prints(
    run: Path,
    service: Service,
    knn: int,
    sampling: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    assert main(["generate", "--prompt", PROMPT, f"--knn={knn}", *options]) == 0
    *_, end = written(service, knn=knn, **sampling)
    assert isinstance(end, End) and printable(end.text) + "\n" == capsys.readouterr().out


def test_the_events_tell_the_text_and_what_was_found_chunk_by_chunk(service: Service) -> None:
    events = written(service, temperature=0.0, max_new_tokens=40)
    start, end = events[0], events[-1]
    assert isinstance(start, Start) and isinstance(end, End)
    tokens = [event for event in events if isinstance(event, Token)]
    assert "".join(itertools.chain(*start.prompt)) == PROMPT
    assert PROMPT + "".join(token.text for token in tokens) == end.text
    num_prompt, size = sum(map(len, start.prompt)), service.health().chunk_size
    assert [token.chunk for token in tokens] == [(num_prompt + n) // size for n in range(len(tokens))]
    found = [event for event in events if isinstance(event, Retrieved)]
    assert [event.chunk for event in found] == list(range((num_prompt + len(tokens) - 1) // size))
    for event in found:
        # It stands before the first token of the next chunk, and after those of its own.
        place = events.index(event)
        assert all(each.chunk > event.chunk for each in events[place:] if isinstance(each, Token))
        assert all(
            each.chunk <= max(event.chunk, num_prompt // size) for each in events[:place] if isinstance(each, Token)
        )


def test_the_shared_run_is_the_longest_and_stands_in_both(service: Service) -> None:
    text = "Caf\u00e9 na\u00efve: \ud55c\uad6d\uc5b4 \ubb38\uc7a5"
    answer = asyncio.run(service.neighbors(text, 4))
    assert "".join(answer.query) == text and len(answer.neighbors) == 4
    assert [each.distance for each in answer.neighbors] == sorted(each.distance for each in answer.neighbors)
    for found in answer.neighbors:
        run, tokens, query = found.run, found.tokens, answer.query
        runs = [
            (n, q, t)
            for n in range(1, len(query) + 1)
            for q in range(len(query) - n + 1)
            for t in range(len(tokens) - n + 1)
            if query[q : q + n] == tokens[t : t + n] and all(query[q : q + n])
        ]
        assert run.length >= max((n for n, *_ in runs), default=0)
        assert query[run.query : run.query + run.length][1:] == tokens[run.neighbor : run.neighbor + run.length][1:]


def test_neighbors_are_those_of_the_retriever(service: Service) -> None:
    retriever = service.database.retriever
    answer = asyncio.run(service.neighbors("Gaba fuco", 5))
    expected = retriever.retrieve_text(["Gaba fuco"], 5)
    assert [each.distance for each in answer.neighbors] == expected.distances[0].tolist()
    texts = ["".join(each.tokens[: each.continuation_at]) for each in answer.neighbors]
    assert [text.strip("\ufffd") for text in texts] == retriever.text(expected.ids[0])
    assert all(each.live is None and ".txt, chunk " in each.document for each in answer.neighbors)


# ---- scores ----------------------------------------------------------------------------------------


def test_scores_are_those_of_the_evaluation(run: Path, service: Service) -> None:
    """Of a document of the test split, with the neighbors that the pipeline stored for it."""
    chunks, database = (Artifact.open(run / f"data/chunks/{split}", "chunks") for split in ("test", "train"))
    neighbors = Artifact.open(run / "data/neighbors/test", "neighbors")
    entry = min(read_documents(chunks), key=lambda entry: int(entry["chunks"]))
    span = Span(entry["first_chunk"], entry["first_chunk"] + entry["chunks"])
    (text,) = (t.text for t in document_texts(chunks, service.database.tokenizer) if t.number == entry["document"])
    scorer = Scorer(chunks, database, [span], service.model.config.max_seq_len)
    ids = neighbors["ids"][span.first : span.stop][:, :KNN]
    scores = asyncio.run(service.score(text, KNN))
    for name, stored in (("on", ids), ("off", None)):
        expected = scorer.losses(service.model, stored)[scorer.is_label]
        np.testing.assert_allclose([getattr(token, name) for token in scores.tokens], expected, rtol=1e-4, atol=1e-5)
        assert getattr(scores, name) == pytest.approx(expected.mean(), rel=1e-4)
    assert "".join(token.text for token in scores.tokens) == text and scores.on != scores.off
    assert asyncio.run(service.score(text, 0)).on == scores.off


@pytest.mark.parametrize("text", ["", "word " * 2000])
def test_a_text_that_cannot_be_scored_is_refused(service: Service, text: str) -> None:
    with pytest.raises(ConfigError, match="text: found .*expected"):
        asyncio.run(service.score(text, KNN))


def test_a_prompt_without_room_is_refused(service: Service) -> None:
    with pytest.raises(ConfigError, match="prompt: found .* expected fewer than the 512"):
        written(service, "word " * 2000)


# ---- live documents --------------------------------------------------------------------------------


def test_a_live_document_is_found_as_the_same_document_of_the_pipeline_is(service: Service) -> None:
    """Its chunks have the distances and the continuations of their stored twins, which come first."""
    chunks, tokenizer = service.database.retriever.chunks, service.database.tokenizer
    document = next(document_texts(chunks, tokenizer))
    before = asyncio.run(service.neighbors(PROMPT, chunks.rows)).neighbors
    added = asyncio.run(service.add("twin", document.text))
    try:
        assert added.chunks == next(read_documents(chunks))["chunks"] and service.documents() == [added]
        after = asyncio.run(service.neighbors(PROMPT, chunks.rows + added.chunks)).neighbors
        twins = [each for each in after if each.live is not None]
        assert [each for each in after if each.live is None] == before and len(before) == chunks.rows
        assert len(twins) == added.chunks and {each.live for each in twins} == {added.id}
        stored = {
            each.document.partition(", ")[2]: each for each in before if each.document.startswith(document.source)
        }
        for twin in twins:
            place = twin.document.partition(", ")[2]
            assert twin.document.startswith("twin, ") and twin.distance == stored[place].distance
            assert (twin.tokens, twin.run) == (stored[place].tokens, stored[place].run)
            assert after.index(stored[place]) < after.index(twin)
    finally:
        asyncio.run(service.remove(added.id))
    assert asyncio.run(service.neighbors(PROMPT, chunks.rows)).neighbors == before and service.documents() == []


def test_a_live_document_is_read_by_generation_and_score(run: Path, service: Service) -> None:
    plain, scored = written(service, temperature=0.0), asyncio.run(service.score(PROMPT, KNN))
    files = {path: path.read_bytes() for path in (run / "data").rglob("*") if path.is_file()}
    added = asyncio.run(service.add("live", PROMPT))
    try:
        events = written(service, temperature=0.0)
        found = next(event for event in events if isinstance(event, Retrieved))
        assert found.neighbors[0].live == added.id and found.neighbors[0].distance == 0
        assert events != plain and asyncio.run(service.score(PROMPT, KNN)).on != scored.on
    finally:
        asyncio.run(service.remove(added.id))
    assert written(service, temperature=0.0) == plain
    assert files == {path: path.read_bytes() for path in (run / "data").rglob("*") if path.is_file()}


def test_live_documents_have_limits_and_ids_of_their_own(service: Service) -> None:
    with pytest.raises(TooLargeError, match="expected at most 3 with 500"):
        asyncio.run(service.add("long", "word " * 4000))
    with pytest.raises(ConfigError, match="found no text"):
        asyncio.run(service.add("empty", ""))
    added = [asyncio.run(service.add(f"number {n}", "some text")) for n in range(3)]
    with pytest.raises(TooLargeError, match="found 4 live documents"):
        asyncio.run(service.add("one more", "some text"))
    for document in added:
        assert asyncio.run(service.remove(document.id)) == document
    with pytest.raises(UnknownDocumentError, match=f"has the id {added[0].id}"):
        asyncio.run(service.remove(added[0].id))
    again = asyncio.run(service.add("later", "some text"))
    assert again.id == added[-1].id + 1  # an id never means another document
    asyncio.run(service.remove(again.id))


# ---- the queue -------------------------------------------------------------------------------------


class Held:
    """Work that yields 0, then waits for `release`, then yields 1 and notes that it did."""

    def __init__(self) -> None:
        self.release, self.steps = threading.Event(), 0

    def __call__(self) -> Iterator[int]:
        yield 0
        self.release.wait(60)
        self.steps += 1
        yield 1
        self.steps += 1


def test_one_runs_and_few_wait_and_one_more_is_refused() -> None:
    async def scenario() -> None:
        worker, held = Worker(2, 60, 60), Held()
        running = worker.run(held)
        assert await anext(running) == 0 and worker.busy
        waiting = [asyncio.ensure_future(listed(worker.run(lambda n=n: iter([n])))) for n in range(2)]  # type: ignore[misc]
        await asyncio.sleep(0)
        assert worker.num_waiting == 2
        with pytest.raises(QueueFullError) as full:
            await anext(worker.run(lambda: iter([2])))
        assert full.value.retry_after >= 1
        held.release.set()
        assert await listed(running) == [1] and await asyncio.gather(*waiting) == [[0], [1]]
        worker.close()

    asyncio.run(scenario())


def test_who_goes_away_stops_what_runs_and_leaves_the_queue() -> None:
    async def scenario() -> None:
        worker, held = Worker(1, 60, 60), Held()
        running = worker.run(held)
        await anext(running)
        never = asyncio.ensure_future(listed(worker.run(lambda: iter([pytest.fail("it ran")]))))
        await asyncio.sleep(0)
        never.cancel()
        await asyncio.wait([never])
        assert never.cancelled() and worker.num_waiting == 0
        await running.aclose()
        held.release.set()
        assert await listed(worker.run(lambda: iter([5]))) == [5]
        assert held.steps == 1  # it was at that step when its caller left
        worker.close()

    asyncio.run(scenario())


def test_waiting_and_running_have_an_end() -> None:
    async def scenario() -> None:
        worker, held = Worker(4, 0.2, 0.5), Held()
        running = worker.run(held)
        await anext(running)
        with pytest.raises(WaitedTooLongError, match="waited 0.2 seconds"):
            await anext(worker.run(lambda: iter([1])))
        with pytest.raises(RanTooLongError, match="ran for 0.5 seconds"):
            await anext(running)
        held.release.set()
        assert await listed(worker.run(lambda: iter([1]))) == [1] and held.steps == 1
        worker.close()

    asyncio.run(scenario())


def test_an_error_reaches_its_caller_and_the_next_one_is_served() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("in the thread")

    async def scenario() -> None:
        worker = Worker(4, 60, 60)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            await listed(worker.run(failing))
        assert await listed(worker.run(lambda: iter([1]))) == [1]
        worker.close()

    asyncio.run(scenario())


def test_closing_ends_what_runs_and_what_waits() -> None:
    async def scenario() -> None:
        worker, held = Worker(4, 60, 60), Held()
        running = worker.run(held)
        await anext(running)
        waiting = asyncio.ensure_future(anext(worker.run(held)))
        await asyncio.sleep(0)
        worker.stop()
        for ended in (anext(running), waiting, anext(worker.run(held))):
            with pytest.raises(ClosedError):
                await ended
        held.release.set()
        worker.close()
        assert held.steps == 1

    asyncio.run(scenario())
