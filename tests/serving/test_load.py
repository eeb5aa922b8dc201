"""Many clients at once: each gets the answer of a lone one, or is told to come back."""

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from index_builders import committed_params
from served import open_service, running, served_run
from test_http import Client, serving, until

CLIENTS = 32
ASKED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/generate", {"prompt": "Gaba fuco dilem norpa", "seed": seed, "max_new_tokens": 20, "knn": seed % 3})
        for seed in range(6)
    ),
    ("/neighbors", {"text": "Gaba fuco", "knn": 3}),
    ("/score", {"text": "Gaba fuco dilem norpa que ri"}),
]


def ask_again_and_again(client: Client, number: int, lone: list[Any], seconds: float) -> Counter[int]:
    """A client that asks for other things each time, waits when told, and sometimes leaves without its answer."""
    generator, statuses, end = random.Random(number), Counter[int](), time.monotonic() + seconds
    while time.monotonic() < end:
        which = generator.randrange(len(ASKED))
        path, asked = ASKED[which]
        stream = path == "/generate" and generator.random() < 0.5
        if stream and generator.random() < 0.3:
            client.open("POST", path, {**asked, "stream": True}).close()
            continue
        answer = client("POST", path, {**asked, "stream": True} if stream else asked)
        statuses[answer.status] += 1
        if answer.status == 429:
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.2)
        elif answer.status == 200 and stream:
            start, *events, end_event = map(json.loads, answer.body.splitlines())
            expected = lone[which]
            assert (start["prompt"], events, end_event["text"]) == tuple(
                expected[n] for n in ("prompt", "events", "text")
            )
        elif answer.status == 200:
            assert answer.json == lone[which]
    return statuses


@pytest.mark.slow
def test_every_answer_is_that_of_a_lone_client(tmp_path: Path) -> None:
    with serving(open_service(served_run(tmp_path), most_waiting=6)) as client:
        lone = [client("POST", path, asked).json for path, asked in ASKED]
        with ThreadPoolExecutor(CLIENTS) as pool:
            counts = pool.map(lambda number: ask_again_and_again(client, number, lone, 8), range(CLIENTS))
            statuses = sum(counts, Counter[int]())
        print(f"{CLIENTS} clients, 8 seconds: {dict(statuses)}")
        assert set(statuses) <= {200, 429, 503} and statuses[200] >= len(ASKED) and statuses[429] > 0
        until(lambda: not client.service.worker.busy and client.service.worker.num_waiting == 0)
        assert [client("POST", path, asked).json for path, asked in ASKED] == lone


@pytest.mark.slow
@pytest.mark.torture
def test_a_minute_on_the_default_model_takes_no_more_memory_at_its_end(tmp_path: Path) -> None:
    """`retro serve` in a process of its own, a model of the default sizes, and 32 clients."""
    sizes = committed_params()["model"]
    with running(served_run(tmp_path, **sizes)) as server:
        client = Client(server.port)
        lone = [client("POST", path, asked).json for path, asked in ASKED]
        with ThreadPoolExecutor(CLIENTS) as pool:
            counts = [pool.submit(ask_again_and_again, client, number, lone, 60) for number in range(CLIENTS)]
            time.sleep(10)
            early = server.rss()
            statuses = sum((count.result() for count in counts), Counter[int]())
        late = server.rss()
        print(f"{CLIENTS} clients, 60 seconds: {dict(statuses)}; {early} KiB after 10 seconds, {late} at the end")
        assert set(statuses) <= {200, 429, 503} and statuses[200] >= len(ASKED) and statuses[429] > 0
        assert late < early * 1.05
        assert [client("POST", path, asked).json for path, asked in ASKED] == lone
