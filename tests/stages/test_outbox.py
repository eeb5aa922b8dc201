"""What happens while MLflow cannot be reached: runtime.tracking."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from stagewise import OUTS, contents, copy_of, run, write_params

from retro_model.core.errors import RetroError
from stages.tracking import outbox
from stages.tracking.outbox import Outbox
from stages.tracking.runs import Recording, evaluation_run, training_run
from stages.tracking.store import first_reason, is_unreachable, store_name


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a tracking server that is away, in the environment; the current folder is empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


class Store:
    """Takes messages, unless it is away or refuses them."""

    def __init__(self) -> None:
        self.away = False
        self.refuses: set[str] = set()
        self.taken: list[str] = []

    def write(self, message: str) -> Callable[[], None]:
        def write() -> None:
            if self.away:
                raise ConnectionRefusedError(111, "Connection refused")
            if message in self.refuses:
                raise ValueError(f"{message} is refused")
            self.taken.append(message)

        return write


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the outbox sees, in its only item."""
    now = [100.0]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])
    return now


def test_what_was_not_taken_is_sent_again_later_and_in_order(
    nobody: str, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    store, box = Store(), Outbox("best_effort")
    box.send("the run", store.write("a"))
    store.away = True
    for message in "bc":
        box.send("metrics", store.write(message))
    went_on = "the stage goes on, and sends what it has to record later"
    assert capsys.readouterr().err == f"mlflow: {nobody}: Connection refused; {went_on}\n", "once"
    store.away = False
    box.send("metrics", store.write("d"))
    assert store.taken == ["a"], "it does not try at every message"
    clock[0] += 11
    box.send("metrics", store.write("e"))
    box.close()
    assert store.taken == ["a", "b", "c", "d", "e"]
    assert capsys.readouterr().err == ""


def test_one_line_names_what_was_lost(nobody: str, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    store, box = Store(), Outbox("best_effort")
    store.away = True
    box.send("params", store.write("a"))
    box.send("metrics", store.write("b"), since=" from step 20 on")
    box.send("metrics", store.write("c"), since=" from step 30 on")
    capsys.readouterr()
    box.close()
    assert capsys.readouterr().err == f"mlflow: {nobody}: not recorded: params, metrics from step 20 on\n"
    store.away = False
    box.close()
    assert store.taken == ["a", "b", "c"]
    assert capsys.readouterr().err == f"mlflow: {nobody}: can be reached again, and all is recorded\n"


def test_a_message_that_is_refused_does_not_hold_up_those_after_it(
    nobody: str, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    store, box = Store(), Outbox("best_effort")
    store.refuses = {"best", "last"}
    for message in ("run", "best", "last", "end"):
        box.send(message, store.write(message))
    box.close()
    assert store.taken == ["run", "end"]
    assert capsys.readouterr().err.endswith(f"mlflow: {nobody}: not recorded: best, last\n")


def test_off_calls_nothing(clock: list[float]) -> None:
    store, box = Store(), Outbox("off")
    box.send("the run", store.write("a"))
    box.close()
    assert store.taken == []


def test_a_reason_is_what_the_system_says_and_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("API request to http://host failed with\nHTTPConnectionPool") from error
    except RuntimeError as error:
        assert first_reason(error) == "Connection refused" and is_unreachable(error)
    refused = ValueError("cannot open postgresql://me:secret@host/db\nand more")
    assert first_reason(refused) == "cannot open postgresql://host/db" and not is_unreachable(refused)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    assert store_name() == "https://host"


def test_best_effort_goes_on_without_a_server_and_required_stops(
    nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with training_run("train", "key", {"knn": 2}, {"data": "abc"}, Recording("best_effort")) as tracked:
        tracked.log_step(10, {"loss": 1.0})
        tracked.log_file(Path("nothing"), "best")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"mlflow: {nobody}: Connection refused; the stage goes on")
    lost = "the run, params, inputs, metrics from step 10 on, best/nothing, the end of the run"
    assert last == f"mlflow: {nobody}: not recorded: {lost}"
    with evaluation_run("fingerprint", {}, {}, Recording("best_effort")) as (parent, child):
        for place in (parent, child):
            place.log_metrics({"test_bpb_on": 1.0})
    with pytest.raises(RetroError) as caught, training_run("train", "key", {}, {}):
        raise AssertionError("it does not begin")
    assert str(caught.value).startswith(f"{nobody}: MLflow cannot use its record of the runs (Connection refused); ")
    assert "runtime.tracking to best_effort or off" in str(caught.value)
    assert [path.name for path in Path.cwd().iterdir()] == [".retro"], "nothing went to another store"


def test_a_server_that_does_not_answer_is_left_after_a_while(
    nobody: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", int(nobody.rpartition(":")[2]))):  # listens, and says nothing
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with training_run("train", "key", {}, {}, Recording("best_effort")) as tracked:
            tracked.log_step(10, {"loss": 1.0})
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"mlflow: {nobody}: no answer in time; the stage goes on")
    assert "not recorded: the run, params, inputs, metrics from step 10 on" in last


@pytest.mark.usefixtures("nobody")
def test_off_records_nothing_and_an_error_stays_the_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    with training_run("train", "key", {"knn": 2}, {}, Recording("off", "retro", True)) as tracked:
        tracked.log_step(10, {"loss": 1.0})
        tracked.log_model(Path("nothing"), "fingerprint", {}, registered=True)
    assert capsys.readouterr().err == "" and list(Path.cwd().iterdir()) == []
    with pytest.raises(ZeroDivisionError), training_run("train", "key", {}, {}, Recording("best_effort")):
        raise ZeroDivisionError


@pytest.mark.parametrize("tracking", ["best_effort", "off"])
def test_no_output_depends_on_what_is_recorded(
    tracking: str, pipeline: Path, tmp_path: Path, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's outputs were made with tracking: required and its own store."""
    monkeypatch.chdir(copy_of(pipeline, tmp_path / "copy"))
    write_params(Path.cwd(), runtime__tracking=tracking)
    places = ("models", "metrics", "plots", "reports")
    before = {place: contents(Path(place)) for place in places}
    for stage in ("baseline", "train", "evaluate"):
        for out in (OUTS[stage], f"metrics/{stage}.json"):
            os.rename(out, tmp_path / f"{stage} {Path(out).name}")
        run(stage)
    assert {place: contents(Path(place)) for place in places} == before
