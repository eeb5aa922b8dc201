"""What `retro serve` answers, without HTTP: generation, neighbors, scores and live documents of one model in memory.

    service = Service(model, LiveDatabase(Retriever.open("data")), 2, Worker(8, 60, 300), WatchedFiles(artifacts))
    async with aclosing(service.generate("Return the", Sampling(seed=1), knn=2)) as events:
        async for event in events: ...

Everything that reads the model or the database runs in one thread (retro_model.serving.worker), so an answer is that of
a lone caller. Results are dataclasses of plain values, which become JSON as they are.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from retro_model.core.arrays import IntArray
from retro_model.core.devices import fast_float32_products
from retro_model.core.errors import ConfigError
from retro_model.evaluation.overlap import longest_shared_run
from retro_model.evaluation.passages import token_texts
from retro_model.inference.generation import Retrieve
from retro_model.inference.text import Sampling, encode_prompt, write_text
from retro_model.network.language_model import LanguageModel
from retro_model.serving.live import LiveDatabase, LiveDocument, Neighbor, cut_text
from retro_model.serving.watched import WatchedFiles
from retro_model.serving.worker import Worker

Result = TypeVar("Result")


# ---- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedRun:
    """The longest run of tokens that a neighbor shares with its query: `length` tokens, where it starts in both."""

    length: int
    query: int
    neighbor: int


@dataclass(frozen=True)
class Found:
    """A neighbor: its place, its squared distance, the text of each of its tokens, and the shared run.

    `live` is the id of its live document, null for a document of the pipeline. The tokens from `continuation_at` on are
    those of the chunk after it.
    """

    document: str
    live: int | None
    distance: float
    tokens: list[str]
    continuation_at: int
    run: SharedRun


@dataclass(frozen=True)
class Start:
    """The first event: the texts of the prompt's tokens, chunk by chunk (the begin token's is empty)."""

    prompt: list[list[str]]
    event: Literal["start"] = "start"


@dataclass(frozen=True)
class Retrieved:
    """Chunk number `chunk` (from 0) is finished, and these are its neighbors; the model reads them in the next one."""

    chunk: int
    neighbors: list[Found]
    event: Literal["neighbors"] = "neighbors"


@dataclass(frozen=True)
class Token:
    """A generated token of chunk `chunk`. The text of a character comes with the last of its tokens."""

    chunk: int
    token: int
    text: str
    event: Literal["token"] = "token"


@dataclass(frozen=True)
class End:
    """The last event: the prompt with all that was written after it, and why it ends.

    document: the model ended it; tokens: as many as asked for; length: as long as the model was trained for.
    """

    text: str
    reason: Literal["document", "tokens", "length"]
    event: Literal["end"] = "end"


Event = Start | Retrieved | Token | End


@dataclass(frozen=True)
class Neighbors:
    """The texts of a query's tokens, and its neighbors, nearest first."""

    query: list[str]
    neighbors: list[Found]


@dataclass(frozen=True)
class ScoredToken:
    """A token and its loss in nats, with retrieval on and off. The end of the text is a token too, with no text."""

    token: int
    text: str
    on: float
    off: float


@dataclass(frozen=True)
class Scores:
    """The losses of a text's tokens, and their means."""

    tokens: list[ScoredToken]
    on: float
    off: float


@dataclass(frozen=True)
class Health:
    """What is served: sizes and settings of the model, of the database and of the queue."""

    status: Literal["ok"]
    knn: int
    chunk_size: int
    most_tokens: int
    database_chunks: int
    live_documents: int
    busy: bool
    waiting: int


# ---- the service -----------------------------------------------------------------------------------


class Service:
    """One model and one database for many callers. `knn` is the default number of neighbors, as in training.

    Methods raise ConfigError for unfit input, the errors of `Worker.run`, and FilesChangedError if one of the `files`
    that model and database are read from was changed.
    """

    def __init__(
        self, model: LanguageModel, database: LiveDatabase, knn: int, worker: Worker, files: WatchedFiles
    ) -> None:
        self.model, self.database, self.knn = model, database, knn
        self.worker, self.files = worker, files
        self._tokenizer, self._chunk_size = database.tokenizer, database.retriever.chunk_size

    def health(self) -> Health:
        """What is served; waits for nothing."""
        return Health(
            status="ok",
            knn=self.knn,
            chunk_size=self._chunk_size,
            most_tokens=self.model.config.max_seq_len,
            database_chunks=self.database.retriever.chunks.rows,
            live_documents=len(self.documents()),
            busy=self.worker.busy,
            waiting=self.worker.num_waiting,
        )

    def documents(self) -> list[LiveDocument]:
        """The live documents, oldest first; waits for nothing."""
        return self.database.documents()

    def generate(self, prompt: str, sampling: Sampling, knn: int) -> AsyncGenerator[Event, None]:
        """Continue a prompt: Start, then Token and Retrieved in the order they come, then End. knn 0: no retrieval."""
        return self._run(lambda: self._generate(prompt, sampling, knn))

    async def neighbors(self, text: str, knn: int) -> Neighbors:
        """The `knn` nearest chunks of a text."""
        return await self._last(lambda: self._neighbors(text, knn))

    async def score(self, text: str, knn: int) -> Scores:
        """The loss of each token of a text, read as a document, with `knn` neighbors of each chunk and without."""
        return await self._last(lambda: self._score(text, knn))

    async def add(self, name: str, text: str) -> LiveDocument:
        """Add a live document. Raises TooLargeError above the limits."""
        document = await self._last(lambda: self.database.add(name, text))
        assert document is not None
        return document

    async def remove(self, document_id: int) -> LiveDocument:
        """Remove a live document. Raises UnknownDocumentError."""
        return await self._last(lambda: iter([self.database.remove(document_id)]))

    async def _last(self, work: Callable[[], Iterator[Result]]) -> Result:
        """The last result of the work."""
        async with aclosing(self._run(work)) as results:
            return [result async for result in results][-1]

    def _run(self, work: Callable[[], Iterator[Result]]) -> AsyncGenerator[Result, None]:
        """Run the work; nothing that was computed from changed files is handed out."""

        def checked() -> Iterator[Result]:
            self.files.check()
            for result in work():
                self.files.check()
                yield result

        return self.worker.run(checked)

    def _generate(self, prompt: str, sampling: Sampling, knn: int) -> Iterator[Event]:
        ids = encode_prompt(self.model, self._tokenizer, prompt)
        size = self._chunk_size
        texts = token_texts(self._tokenizer, ids)
        yield Start([texts[start : start + size] for start in range(0, len(ids), size)])
        retrieved: list[Retrieved] = []
        text, number, ended = prompt, 0, False
        for number, piece in enumerate(
            write_text(self.model, self._tokenizer, ids, sampling, self._retrieve_into(retrieved, knn)), start=1
        ):
            yield from retrieved
            retrieved.clear()
            text += piece.text
            yield Token((len(ids) + number - 1) // size, piece.token, piece.text)
            ended = piece.token == self._tokenizer.end_id
        yield End(text, "document" if ended else "tokens" if number == sampling.max_new_tokens else "length")

    def _retrieve_into(self, retrieved: list[Retrieved], knn: int) -> Retrieve | None:
        """The `retrieve` function for a generation; it appends what it finds to `retrieved`."""
        if not knn:
            return None
        chunks_before = 0

        def retrieve(token_chunks: Tensor) -> Tensor:
            nonlocal chunks_before
            chunks = token_chunks.cpu().numpy()
            found = self.database.retrieve(chunks, knn)
            for chunk, neighbors in zip(chunks, found, strict=True):
                retrieved.append(Retrieved(chunks_before, [self._found(chunk, each) for each in neighbors]))
                chunks_before += 1
            return torch.from_numpy(self.database.tokens(found, knn)).to(token_chunks.device)

        return retrieve

    def _found(self, query: IntArray, neighbor: Neighbor) -> Found:
        tokens = neighbor.tokens[neighbor.tokens != self._tokenizer.pad_id]
        size = self._chunk_size
        texts = [
            text for half in (tokens[:size], tokens[size:]) for text in token_texts(self._tokenizer, half.tolist())
        ]
        run = longest_shared_run(query, tokens, self._tokenizer.pad_id)
        shared = SharedRun(run.length, run.query, run.neighbor)
        return Found(neighbor.name, neighbor.live, neighbor.distance, texts, size, shared)

    def _neighbors(self, text: str, knn: int) -> Iterator[Neighbors]:
        # The limit is that of a prompt: a longer text costs more than it is worth, since the encoder reads its start.
        ids = np.array(encode_prompt(self.model, self._tokenizer, text, "text")[1:])
        if not len(ids):
            raise ConfigError("text: found no text, expected some")
        found = self.database.retrieve_text(text, knn)
        yield Neighbors(token_texts(self._tokenizer, ids.tolist()), [self._found(ids, each) for each in found])

    def _score(self, text: str, knn: int) -> Iterator[Scores]:
        rows = cut_text(self._tokenizer, text, self._chunk_size).rows.astype(np.int64)
        most = self.model.config.max_seq_len
        if rows[:, 1:].size > most:
            raise ConfigError(
                f"text: found {len(rows)} chunks of {self._chunk_size} tokens, expected at most {most} tokens, the "
                "length that the model was trained for"
            )
        labels = rows[:, 1:].reshape(-1)
        real = labels != self._tokenizer.pad_id
        off = self._losses(rows, None)[real]
        found = self.database.tokens(self.database.retrieve(rows[:, :-1], knn), knn) if knn else None
        on = off if found is None else self._losses(rows, torch.from_numpy(found))[real]
        ids = labels[real].tolist()
        texts = token_texts(self._tokenizer, ids)
        tokens = [ScoredToken(*each) for each in zip(ids, texts, on.tolist(), off.tolist(), strict=True)]
        yield Scores(tokens, float(on.mean()), float(off.mean()))

    @torch.no_grad()
    def _losses(self, rows: IntArray, retrieved_LKR: Tensor | None) -> torch.Tensor:
        """The loss of each label of one document's chunk rows, (L * M,); 0 at padding."""
        device = self.model.device
        seq, labels = (torch.from_numpy(half.reshape(1, -1)).to(device) for half in (rows[:, :-1], rows[:, 1:]))
        retrieved = None if retrieved_LKR is None else retrieved_LKR[None].to(device)
        with fast_float32_products(device):
            return self.model.token_losses(seq, retrieved, labels=labels)[0].cpu()
