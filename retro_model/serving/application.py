"""The HTTP interface of a service: a page, a JSON API and its description.

    GET  /                   the page                  POST   /generate        text, streamed or whole
    GET  /health             what is served            POST   /neighbors       of a text
    GET  /openapi.json       the API, for programs     POST   /score           the loss of each token
    GET  /docs               the API, for people       POST   /documents       add a live document
    GET  /documents          the live documents        DELETE /documents/{id}  remove one

Errors are {"detail": one line}: 403 a foreign Host or Origin, 404 no such document, 413 and 422 too large or unfit
input, 429 the queue is full (Retry-After in seconds), 503 waited too long, the server ends or its files were changed,
504 ran too long.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from retro_model.core.errors import ConfigError, RetroError
from retro_model.inference.text import Sampling
from retro_model.serving.live import LiveDocument, TooLargeError, UnknownDocumentError
from retro_model.serving.service import End, Event, Health, Neighbors, Retrieved, Scores, Service, Start, Token
from retro_model.serving.watched import FilesChangedError
from retro_model.serving.worker import ClosedError, QueueFullError, RanTooLongError, WaitedTooLongError

Result = TypeVar("Result")

STATUSES: dict[type[RetroError], int] = {
    ConfigError: 422,
    TooLargeError: 413,
    UnknownDocumentError: 404,
    QueueFullError: 429,
    WaitedTooLongError: 503,
    ClosedError: 503,
    FilesChangedError: 503,
    RanTooLongError: 504,
}
FILES = {"/": ("page.html", "text/html"), "/style.css": ("style.css", "text/css")}
FILES["/script.js"] = ("script.js", "text/javascript")

MOST_NEIGHBORS = 64
Text = Annotated[str, Field(max_length=200_000, examples=["Return the indices of the largest"])]
Knn = Annotated[int, Field(ge=0, le=MOST_NEIGHBORS, description="neighbors per chunk, 0: none; null: as in training")]


# ---- requests and answers --------------------------------------------------------------------------


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerateRequest(_Request):
    """A prompt and how to continue it, as `retro generate` takes them."""

    prompt: Text
    max_new_tokens: int = Field(Sampling.max_new_tokens, ge=1, le=100_000)
    temperature: float = Field(Sampling.temperature, ge=0, le=100, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description=f"null: {Sampling.top_p}, or top_k if that is given")
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    seed: int = Field(Sampling.seed, ge=0, lt=1 << 63)
    knn: Knn | None = None
    stream: bool = Field(False, description="true: a line of JSON for each event, as it comes")

    def sampling(self) -> Sampling:
        """How tokens are chosen. Raises ConfigError if both filters are given."""
        if self.top_p is not None and self.top_k is not None:
            raise ConfigError("top_p, top_k: found both, expected one")
        top_p = Sampling.top_p if self.top_p is None else self.top_p
        return Sampling(self.max_new_tokens, self.temperature, top_p, self.top_k, self.seed)


class NeighborsRequest(_Request):
    """A text, and how many neighbors to find."""

    text: Text
    knn: int = Field(4, ge=1, le=MOST_NEIGHBORS)


class ScoreRequest(_Request):
    """A text to score."""

    text: Text
    knn: Knn | None = None


class DocumentRequest(_Request):
    """A document for the live database."""

    name: str = Field(min_length=1, max_length=200, examples=["notes.txt"])
    text: Text


@dataclass(frozen=True)
class Generated:
    """A whole answer: the text and its events but the first and the last, which `prompt`, `text` and `reason` hold."""

    text: str
    reason: str
    prompt: list[list[str]]
    events: list[Token | Retrieved]


# ---- the application -------------------------------------------------------------------------------


def create_application(service: Service) -> FastAPI:
    """The application over a service. Put `Guard` around it."""
    app = FastAPI(
        title="retro serve",
        summary="Text and neighbors of a RETRO model",
        version="1",
        docs_url=None,  # these pages load scripts from elsewhere; /docs is a page of ours
        redoc_url=None,
        exception_handlers={
            RetroError: _refuse,
            RequestValidationError: _refuse_invalid,
            ClientDisconnect: _answer_nobody,
        },
    )
    _add_files(app)
    _add_generate(app, service)
    _add_queries(app, service)
    _add_documents(app, service)
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RetroError)
    status = _status(error)
    if status is None:
        raise error  # not the client's doing
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFullError) else None
    return JSONResponse({"detail": _line(error)}, status, headers)


async def _refuse_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"][1:] if isinstance(part, str)) or "body"
    return JSONResponse({"detail": f"{place}: {found['msg']}"}, 422)  # without the input, which may be no JSON


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def _add_files(app: FastAPI) -> None:
    for path, (name, media_type) in FILES.items():
        content = (Path(__file__).parent / name).read_bytes()
        app.get(path, include_in_schema=False)(_always(Response(content, media_type=media_type)))

    async def describe() -> Response:
        return PlainTextResponse(_describe(app.openapi()))

    app.get("/docs", include_in_schema=False)(describe)


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return response

    return answer


def _add_generate(app: FastAPI, service: Service) -> None:
    async def generate(request: Request, asked: GenerateRequest) -> Response:
        """Continue a prompt; streamed as lines of JSON (start, token and neighbors, end), or whole."""
        knn = service.knn if asked.knn is None else asked.knn
        events = service.generate(asked.prompt, asked.sampling(), knn)
        if not asked.stream:
            return JSONResponse(asdict(await _unless_gone(request, _whole(events))))
        return EventLines(await _unless_gone(request, anext(events)), events)

    lines = {"application/x-ndjson": {"schema": {"type": "string"}}}
    app.post("/generate", response_model=Generated, responses={200: {"content": lines}})(generate)


def _add_queries(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        """What is served; waits for nothing."""
        return JSONResponse(asdict(service.health()))

    async def neighbors(request: Request, asked: NeighborsRequest) -> Response:
        """The nearest chunks of a text, in the database and in the live documents."""
        return JSONResponse(asdict(await _unless_gone(request, service.neighbors(asked.text, asked.knn))))

    async def score(request: Request, asked: ScoreRequest) -> Response:
        """The loss of each token of a text in nats, with retrieval on and off."""
        knn = service.knn if asked.knn is None else asked.knn
        return JSONResponse(asdict(await _unless_gone(request, service.score(asked.text, knn))))

    app.get("/health", response_model=Health)(health)
    app.post("/neighbors", response_model=Neighbors)(neighbors)
    app.post("/score", response_model=Scores)(score)


def _add_documents(app: FastAPI, service: Service) -> None:
    async def documents() -> Response:
        """The live documents: in memory only, gone when the server ends."""
        return JSONResponse([asdict(document) for document in service.documents()])

    async def add(request: Request, asked: DocumentRequest) -> Response:
        """Add a document to the live database, in memory; the files of the pipeline stay as they are."""
        return JSONResponse(asdict(await _unless_gone(request, service.add(asked.name, asked.text))), 201)

    async def remove(document_id: int) -> Response:
        """Remove a live document."""
        return JSONResponse(asdict(await service.remove(document_id)))

    app.get("/documents", response_model=list[LiveDocument])(documents)
    app.post("/documents", response_model=LiveDocument, status_code=201)(add)
    app.delete("/documents/{document_id}", response_model=LiveDocument)(remove)


# ---- answers ---------------------------------------------------------------------------------------


class EventLines(StreamingResponse):
    """A line of JSON for each event. An error after the first event is the last line: event, status and detail.

    When the client goes away, the generation stops.
    """

    def __init__(self, first: Event, events: AsyncGenerator[Event, None]) -> None:
        super().__init__(_lines(first, events), media_type="application/x-ndjson")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _lines(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    yield json.dumps(asdict(first)) + "\n"
    try:
        async for event in events:
            yield json.dumps(asdict(event)) + "\n"
    except RetroError as error:
        status = _status(error)
        if status is None:
            raise
        yield json.dumps({"event": "error", "status": status, "detail": _line(error)}) + "\n"


async def _whole(events: AsyncGenerator[Event, None]) -> Generated:
    async with aclosing(events):
        found = [event async for event in events]
    start, *between, end = found
    assert isinstance(start, Start) and isinstance(end, End)
    return Generated(
        text=end.text,
        reason=end.reason,
        prompt=start.prompt,
        events=[event for event in between if isinstance(event, (Token, Retrieved))],
    )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. If the client goes away first, cancels it and raises ClientDisconnect."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait({working, gone})


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _status(error: RetroError) -> int | None:
    """The HTTP status of an error; None for one that no client can cause."""
    return STATUSES.get(type(error))


def _line(error: RetroError) -> str:
    return " ".join(str(error).split())


def _describe(schema: dict[str, Any]) -> str:
    """The API as plain text: each call with its description and its fields. /openapi.json has all of it."""
    parts = [f"{schema['info']['title']}: {schema['info']['summary']}. All of it, for programs: /openapi.json"]
    for path, methods in schema["paths"].items():
        for method, call in methods.items():
            lines = [f"{method.upper()} {path}", call["description"]]
            body = call.get("requestBody")
            if body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                lines += _describe_fields(schema["components"]["schemas"][name])
            parts.append("\n    ".join(lines))
    return "\n\n".join(parts) + "\n"


def _describe_fields(fields: dict[str, Any]) -> Iterator[str]:
    required = fields.get("required", [])
    for name, about in fields["properties"].items():
        value = "required" if name in required else f"default {json.dumps(about.get('default'))}"
        yield ", ".join([f"{name}: {value}", *([about["description"]] if "description" in about else [])])
