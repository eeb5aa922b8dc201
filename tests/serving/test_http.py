"""`retro serve` over a real socket: what it answers, what it refuses, and how it ends."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from paths import ROOT
from served import KNN, open_service, served_run

from retro_model.cli import main
from retro_model.core.printable import printable
from retro_model.serving.guard import MOST_BYTES
from retro_model.serving.server import Server, listen
from retro_model.serving.service import Service

PROMPT = "Gaba fuco dilem norpa que ri"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client(NamedTuple):
    """A client of the server at a port of this machine."""

    port: int
    service: Any = None

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, sent)
        return connection

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = self.open(method, path, body, **headers)
        response = connection.getresponse()
        lowered = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, lowered, response.read())
        connection.close()
        return answer


@contextmanager
def serving(service: Service, host: str = "127.0.0.1", allowed: tuple[str, ...] = ()) -> Iterator[Client]:
    """The server in a thread of this process."""
    with listen("127.0.0.1", 0) as listening:
        server = Server(service, host, allowed)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Client(listening.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join(60)
            service.worker.close()
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    with serving(open_service(run)) as client:
        yield client


# ---- what it answers -------------------------------------------------------------------------------


def test_streamed_and_whole_are_what_retro_generate_prints(
    run: Path, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"prompt": PROMPT, "seed": 3, "max_new_tokens": 40, "knn": 2}
    whole = client("POST", "/generate", asked)
    streamed = client("POST", "/generate", {**asked, "stream": True})
    assert (whole.status, streamed.status) == (200, 200)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    start, *events, end = map(json.loads, streamed.body.splitlines())
    assert (start["event"], end["event"]) == ("start", "end")
    rest = {"text": end["text"], "reason": end["reason"], "prompt": start["prompt"]}
    assert whole.json == {**rest, "events": events}
    monkeypatch.chdir(run)
    assert main(["generate", "--prompt", PROMPT, "--seed", "3", "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == printable(end["text"]) + "\n"


def test_a_stream_comes_while_it_is_written(client: Client) -> None:
    with held(client.service):
        connection = client.open("POST", "/generate", {"prompt": PROMPT, "max_new_tokens": 5, "stream": True})
        response = connection.getresponse()
        assert json.loads(response.readline())["event"] == "start"
        assert client("GET", "/health").json["busy"]
    assert json.loads(response.read().splitlines()[-1])["event"] == "end"
    connection.close()


def test_neighbors_and_scores(client: Client) -> None:
    found = client("POST", "/neighbors", {"text": PROMPT, "knn": 3})
    assert found.status == 200 and len(found.json["neighbors"]) == 3
    first = found.json["neighbors"][0]
    assert set(first) == {"document", "live", "distance", "tokens", "continuation_at", "run"}
    scores = client("POST", "/score", {"text": PROMPT}).json
    assert "".join(token["text"] for token in scores["tokens"]) == PROMPT
    assert scores["on"] == pytest.approx(sum(token["on"] for token in scores["tokens"]) / len(scores["tokens"]))


def test_documents_come_and_go(client: Client) -> None:
    added = client("POST", "/documents", {"name": "<b>notes</b>", "text": "Gaba"})
    assert added.status == 201 and client("GET", "/documents").json == [added.json]
    nearest = client("POST", "/neighbors", {"text": "Gaba", "knn": 1}).json["neighbors"][0]
    assert nearest["live"] == added.json["id"] and nearest["document"].startswith("<b>notes</b>, chunk ")
    assert client("GET", "/health").json["live_documents"] == 1
    path = f"/documents/{added.json['id']}"
    assert client("DELETE", path).json == added.json
    assert client("DELETE", path).status == 404 and client("GET", "/documents").json == []


def test_health_says_what_is_served(client: Client) -> None:
    expected = {"status": "ok", "knn": KNN, "chunk_size": 8, "most_tokens": 512}
    assert client("GET", "/health").json.items() >= expected.items()


def test_the_api_describes_itself_and_loads_nothing_from_elsewhere(client: Client) -> None:
    schema = client("GET", "/openapi.json").json
    called = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert called == {
        *(("post", path) for path in ("/generate", "/neighbors", "/score", "/documents")),
        *(("get", path) for path in ("/health", "/documents")),
        ("delete", "/documents/{document_id}"),
    }
    docs = client("GET", "/docs")
    assert docs.headers["content-type"].startswith("text/plain")
    text = docs.body.decode()
    assert all(f"{method.upper()} {path}\n" in text for method, path in called) and "temperature: default 0.8" in text
    page = "".join(client("GET", path).body.decode() for path in ("/", "/style.css", "/script.js", "/docs"))
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page
    )


def test_every_answer_has_a_strict_policy(client: Client) -> None:
    for answer in (client("GET", "/"), client("GET", "/nothing"), client("GET", "/", Host="evil.example")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_part_of_the_package() -> None:
    files = [path.name for path in (ROOT / "retro_model/serving").iterdir() if path.is_file() and path.suffix != ".py"]
    packaged = re.search(r'^"retro_model\.serving" = \[(.*)\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert packaged is not None and len(files) == 3
    assert all(any(fnmatch(file, pattern) for pattern in re.findall(r'"([^"]*)"', packaged[1])) for file in files)


# ---- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.7:8000", 403),
        ("localhost@evil.example", 403),
        ("evil@localhost", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_is_refused(client: Client, host: str, status: int) -> None:
    assert client("GET", "/health", Host=host).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:PORT", 200),
        ("http://localhost:PORT", 403),  # of another name: Host says 127.0.0.1
        ("http://127.0.0.1:1", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("http://[", 403),
    ],
)
def test_a_foreign_origin_is_refused(client: Client, origin: str, status: int) -> None:
    origin = origin.replace("PORT", str(client.port))
    assert client("POST", "/neighbors", {"text": "a"}, Origin=origin).status == status


def test_a_server_for_the_network_takes_addresses_and_the_names_it_was_told(run: Path) -> None:
    with serving(open_service(run), "0.0.0.0", ("Name.example",)) as client:
        for host, status in (("192.168.1.5:8000", 200), ("name.example", 200), ("evil.example", 403)):
            assert client("GET", "/health", Host=host).status == status


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/generate", {}, 422, "prompt: Field required"),
        ("/generate", {"prompt": "word " * 2000}, 422, "expected fewer than the 512"),
        ("/generate", {"prompt": "a", "temperature": float("nan")}, 422, "temperature: "),
        ("/generate", {"prompt": "a", "temperature": -1}, 422, "temperature: "),
        ("/generate", {"prompt": "a", "top_p": 0}, 422, "top_p: "),
        ("/generate", {"prompt": "a", "top_p": 0.5, "top_k": 2}, 422, "found both, expected one"),
        ("/generate", {"prompt": "a", "knn": 65}, 422, "knn: "),
        ("/generate", {"prompt": "a", "seed": 1 << 64}, 422, "seed: "),
        ("/generate", {"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens: "),
        ("/generate", {"prompt": "a", "tempreature": 1}, 422, "tempreature: "),
        ("/generate", b'{"prompt": "\\ud800"}', 422, "prompt: "),
        ("/generate", b"no json", 422, "JSON"),
        ("/neighbors", {"text": "", "knn": 1}, 422, "found no text"),
        ("/neighbors", {"text": "a", "knn": 0}, 422, "knn: "),
        ("/score", {"text": "a" * 300_000}, 422, "text: "),
        ("/documents", {"name": "long", "text": "word " * 30_000}, 413, "expected at most 3 with 500"),
        ("/documents", {"name": "", "text": "a"}, 422, "name: "),
        ("/documents", b"[" * MOST_BYTES + b"1", 413, "expected at most"),
    ],
)
def test_unfit_input_is_refused_with_a_line(client: Client, path: str, body: Any, status: int, detail: str) -> None:
    answer = client("POST", path, body)
    assert answer.status == status and set(answer.json) == {"detail"}, answer
    assert detail in answer.json["detail"] and "\n" not in answer.json["detail"]


def test_a_body_of_unknown_length_is_cut_at_the_limit(client: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=120)
    parts = (b" " * (1 << 16) for _ in range(MOST_BYTES // (1 << 16) + 1))
    connection.request("POST", "/score", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


# ---- the queue -------------------------------------------------------------------------------------


@contextmanager
def held(service: Service) -> Iterator[None]:
    """The worker's thread is busy in this block: a generation stops at its first retrieval."""
    go_on, before = threading.Event(), service.database.retrieve

    def wait(*arguments: Any) -> Any:
        go_on.wait(120)
        return before(*arguments)

    service.database.retrieve = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        go_on.set()
        service.database.retrieve = before  # type: ignore[method-assign]


def until(condition: Any) -> None:
    """Waits until something holds."""
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never became so")


def test_a_full_queue_is_429_and_late_work_is_503_or_504(run: Path) -> None:
    asked = {"prompt": PROMPT, "max_new_tokens": 5}
    service = open_service(run, most_waiting=1, wait_seconds=3, run_seconds=6)
    with serving(service) as client, held(service):
        statuses: dict[str, Answer] = {}

        def ask(name: str) -> threading.Thread:
            thread = threading.Thread(target=lambda: statuses.update({name: client("POST", "/generate", asked)}))
            thread.start()
            return thread

        first = ask("running")
        until(lambda: service.worker.busy)
        second = ask("waiting")
        until(lambda: service.worker.num_waiting == 1)
        full = client("POST", "/neighbors", {"text": "a"})
        assert full.status == 429 and int(full.headers["retry-after"]) >= 1
        assert client("GET", "/health").status == 200  # it waits for nothing
        second.join()
        first.join()
        assert statuses["waiting"].status == 503 and "waited 3 seconds" in statuses["waiting"].json["detail"]
        assert statuses["running"].status == 504 and "ran for 6 seconds" in statuses["running"].json["detail"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_generation(client: Client, stream: bool) -> None:
    with held(client.service):
        asked = {"prompt": PROMPT, "max_new_tokens": 480, "stream": stream}
        connection = client.open("POST", "/generate", asked)
        until(lambda: client.service.worker.busy)
        job = client.service.worker._running
        assert job is not None and not job.withdrawn
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        until(lambda: job.withdrawn)
    until(lambda: not client.service.worker.busy)


def test_an_error_after_the_first_event_is_the_last_line(run: Path) -> None:
    service = open_service(run, run_seconds=1)
    with serving(service) as client, held(service):
        answer = client("POST", "/generate", {"prompt": PROMPT, "stream": True})
        last = json.loads(answer.body.splitlines()[-1])
        assert answer.status == 200 and (last["event"], last["status"]) == ("error", 504)


def test_the_end_of_the_server_waits_for_nobody(run: Path) -> None:
    service = open_service(run)
    with held(service):
        with serving(service) as client:
            connection = client.open("POST", "/generate", {"prompt": PROMPT, "stream": True})
            response = connection.getresponse()
            response.readline()
        assert json.loads(response.read())["status"] == 503
        connection.close()
