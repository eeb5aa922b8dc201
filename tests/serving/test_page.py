"""The page of `retro serve` in a real browser: typed into, clicked, and looked at."""

import asyncio
from collections.abc import Iterator

import pytest
from browser import needs_browser
from driven import Driven, driven
from served import open_service, served_run
from test_http import Client, serving

from retro_model.inference.text import Sampling
from retro_model.serving.service import End, Event, Retrieved

pytestmark = [needs_browser, pytest.mark.slow]

PROMPT = 'Gaba <img src="x" onerror="alert(1)"> fuco </p><script>alert(2)</script>'
BOTH_FINISHED = "[...document.querySelectorAll('.state')].every(state => state.textContent.startsWith('finished'))"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(open_service(served_run(tmp_path_factory.mktemp("run")))) as client:
        yield client


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with driven(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def text_of(browser: Driven, column: str) -> str:
    """The text of a column without the marks of its boundaries."""
    pieces = f"[...document.querySelectorAll('#{column} .text > span:not(.boundary)')]"
    return str(browser.value(f"{pieces}.map(piece => piece.textContent).join('')"))


def test_text_is_written_with_and_without_retrieval(client: Client, browser: Driven) -> None:
    address = f"http://127.0.0.1:{client.port}/"
    browser.open(address)
    browser.wait("document.querySelector('#facts').textContent !== ''")
    browser.click("#prompt")
    browser.value("document.querySelector('#prompt').select()")
    browser.type(PROMPT)
    for slider, key, code in (("#knn", "ArrowRight", 39), ("#length", "Home", 36)):
        browser.value(f"document.querySelector('{slider}').focus()")
        browser.press(key, code=code)
    browser.press("ArrowRight", times=3, code=39)
    assert [browser.value(f"document.querySelector('#{name}-value').value") for name in ("knn", "length")] == [
        "3",
        "40",
    ]
    browser.click("#seed")
    browser.value("document.querySelector('#seed').select()")
    browser.type("5")
    browser.click("#write")
    browser.wait(BOTH_FINISHED)

    async def answer(knn: int) -> list[Event]:
        sampling = Sampling(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=5)
        return [event async for event in client.service.generate(PROMPT, sampling, knn)]

    on, off = asyncio.run(answer(3)), asyncio.run(answer(0))
    for column, events in (("on", on), ("off", off)):
        end = events[-1]
        assert isinstance(end, End) and text_of(browser, column) == end.text
    found = [event for event in on if isinstance(event, Retrieved)]
    boundaries = browser.value("document.querySelectorAll('#on button.boundary').length")
    assert boundaries >= len(found) >= 5 and browser.value("document.querySelectorAll('#off .boundary').length") >= 5

    # The neighbors of the last chunk are shown; a click shows those of the first.
    assert browser.value("document.querySelector('#found h3').textContent") == f"of chunk {found[-1].chunk + 1}"
    browser.click("#on button.boundary")
    assert browser.value("document.querySelector('#found h3').textContent") == "of chunk 1"
    assert browser.value("document.querySelectorAll('#found article').length") == 3
    for number, neighbor in enumerate(found[0].neighbors):
        shown = f"document.querySelectorAll('#found article')[{number}]"
        assert browser.value(f"{shown}.querySelector('h3').textContent") == neighbor.document
        assert f"distance {neighbor.distance:.4f}" in browser.value(f"{shown}.textContent")
        run = neighbor.run
        shared = "".join(neighbor.tokens[run.neighbor : run.neighbor + run.length]) if run.length > 1 else ""
        marked = f"[...{shown}.querySelectorAll('.text mark')].map(mark => mark.textContent).join('')"
        assert browser.value(marked) == shared

    assert browser.value("document.querySelectorAll('img').length + document.scripts.length") == 1
    assert all(url.startswith(address) for url in browser.requested) and len(browser.requested) >= 5
    assert browser.complaints == []


def test_a_live_document_is_added_and_removed(client: Client, browser: Driven) -> None:
    browser.open(f"http://127.0.0.1:{client.port}/", width=1200)
    browser.click("summary")
    browser.click("#name")
    browser.type("<b>notes</b>")
    browser.click("#document")
    browser.type("Gaba fuco dilem")
    browser.click("#add button")
    browser.wait("document.querySelectorAll('#documents li').length === 1")
    assert browser.value("document.querySelector('#documents li').firstChild.textContent").startswith("<b>notes</b>, ")
    assert [document.name for document in client.service.documents()] == ["<b>notes</b>"]
    browser.click("#documents button")
    browser.wait("document.querySelectorAll('#documents li').length === 0")
    assert client.service.documents() == []


def test_what_the_server_refuses_is_said(client: Client, browser: Driven) -> None:
    browser.open(f"http://127.0.0.1:{client.port}/", width=1200)
    browser.wait("document.querySelector('#facts').textContent !== ''")
    browser.value("document.querySelector('#prompt').value = 'word '.repeat(2000)")
    browser.click("#write")
    browser.wait("document.querySelector('#off .state').textContent.includes('expected fewer than the 512')")
    assert browser.value("document.querySelector('#on .state').classList.contains('bad')")


def test_it_fits_a_phone_in_light_and_dark(client: Client, browser: Driven) -> None:
    colors = set()
    for dark in (False, True):
        browser.open(f"http://127.0.0.1:{client.port}/", dark=dark)
        needed, given = browser.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert needed <= given
        colors.add(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2
