"""The page at ``/``: whole, alone, and alive in a real browser, over a fake engine."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.unit.browser import CHROMIUM, Tab, tab
from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import Running, running, until
from tests.unit.serving import served
from tests.unit.test_page import read
from tests.unit.thinking import MODELS
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Output

PAGE = files("tpctl.serve").joinpath("page.html").read_text(encoding="utf-8")
ANSWERED = "the('stop').hidden && !answering && document.querySelectorAll('.assistant').length === "
EVIL = (
    '<img src="x" onerror="window.hit = 1"><script>window.hit = 2</script> **bold** `a<b`\n```py\nx = "<b>"\n```\nend'
)

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_the_page_is_whole_and_alone() -> None:
    reader = read(PAGE)
    assert reader.links == ["data:,"] and not re.search(r"https?:|url\(|@import|innerHTML|outerHTML|eval\(", PAGE)
    assert len(PAGE) < 20_000
    for name in re.findall(r'<(?:input|textarea|select|meter)[^>]* id="([\w-]+)"', PAGE):  # nothing without a name
        assert f'for="{name}"' in PAGE or re.search(rf'<label[^>]*>[^<]*<\w+ id="{name}"', PAGE), name


def test_it_needs_no_key_and_may_load_nothing(tokenizer: Tokenizer) -> None:
    with served(tokenizer, api_keys=("k",)) as (client, _):
        response = client.get("/")
        assert client.get("/v1/models").status_code == 401 and client.post("/").status_code == 405
        assert 'tpctl_http_requests_total{path="/",status="200"} 1.0' in client.get("/metrics").text
    assert response.status_code == 200 and response.text == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = response.headers["content-security-policy"]
    assert rules.startswith("default-src 'none'; ") and rules.count("'sha256-") == 2 and "unsafe" not in rules


def ask(page: Tab, text: str, answers: int) -> None:
    """Write a message as a person does, and wait for so many answers to be there."""
    page.value("the('text').focus()")
    page.write(text)
    page.press("Enter", 13, "\r")
    page.until(f"{ANSWERED}{answers}")


def opened(page: Tab, server: Running) -> None:
    page.complaints.clear()
    page.open(f"{server.url}/")
    page.until("the('model').value === 'demo'")


def texts(page: Tab) -> list[str]:
    return page.value("[...document.querySelectorAll('.text')].map((one) => one.textContent)")


@pytest.mark.slow
@in_browser
def test_a_conversation(page: Tab, tokenizer: Tokenizer) -> None:
    """Settings and what was said before are sent with each message; figures and the cache's use are shown."""
    engine = FakeEngine(tokenizer)
    engine.pace = 0.002  # else all of an answer but its first token may come at once
    with running(tokenizer, engine) as server:
        opened(page, server)
        page.until("the('kv-share').textContent === '60%' && the('requests').textContent === '0 running, 0 waiting'")
        ask(page, "Hi", 1)
        assert texts(page) == ["Hi", "<[u]Hi[a]>"]
        figures = page.value("document.querySelector('.figures').textContent")
        assert re.fullmatch(r"first token after \d+\.\d\d s · \d+\.\d tokens/s · 11 tokens", figures), figures
        page.value("the('system').value = 'Be kind'; the('temperature').value = '0.5'; the('most').value = '7'; 0")
        page.write("two")
        page.press("Enter", 13, "\r", modifiers=8)  # with Shift
        ask(page, "lines", 2)
        assert texts(page)[2:] == ["two\nlines", "<[s]Be "]
        assert "ended by the limit of tokens" in page.value("document.querySelectorAll('.figures')[1].textContent")
        first, second = server.engine.requests
        assert (first.sampling.temperature, first.sampling.max_tokens) == (1.0, 512 - len("[u]Hi[a]"))
        assert (second.sampling.temperature, second.sampling.max_tokens) == (0.5, 7)
        conversation = "[s]Be kind[u]Hi[a]<[u]Hi[a]>[u]two\nlines[a]"
        assert tokenizer.decode(second.token_ids, skip_special=False) == conversation
        page.value("the('temperature').value = '9'; 0")
        page.value("the('text').value = 'x'; the('ask').requestSubmit()")
        assert page.value("the('settings').open") and len(server.engine.requests) == 2
        page.click("new")
        assert texts(page) == [] and page.value("messages.length") == 0 and page.complaints == []


@pytest.mark.slow
@in_browser
def test_what_a_model_says_is_text(page: Tab, tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer, say=lambda tokenizer, request: EVIL)) as server:
        opened(page, server)
        ask(page, EVIL, 1)
        asked, said = texts(page)
        assert asked == EVIL and said.startswith('<img src="x" onerror="window.hit = 1"><script>')
        assert page.value("[...document.querySelectorAll('.assistant .text *')].map((one) => one.tagName)") == [
            *("STRONG", "CODE", "PRE", "CODE")
        ]
        assert page.value("document.querySelector('pre').textContent") == 'x = "<b>"'
        assert page.value("document.images.length === 0 && window.hit === undefined") and page.complaints == []
        page.value(
            "const node = make('div', document.body); node.setAttribute('onclick', 'window.hit = 3'); node.click()"
        )
        assert page.value("window.hit === undefined") and "Content Security Policy" in page.complaints[0]


class Slow(FakeEngine):
    """Answers for minutes."""

    def _next(self, id: str) -> Output:
        time.sleep(0.005)
        return super()._next(id)


@pytest.mark.slow
@in_browser
def test_an_answer_is_stopped(page: Tab, tokenizer: Tokenizer) -> None:
    """By the button or by Escape: the engine gives it up, and what has come stays, for the next message, too."""
    engine = Slow(tokenizer, say=lambda tokenizer, request: "abc" * 10000, max_model_len=1 << 16)
    with running(tokenizer, engine) as server:
        opened(page, server)
        for count, stop in ((1, lambda: page.click("stop")), (2, lambda: page.press("Escape", 27))):
            page.value("the('text').value = 'Go on'; the('ask').requestSubmit()")
            page.until(f"document.querySelectorAll('.assistant .text')[{count - 1}]?.textContent.length > 3")
            assert page.value("the('send').disabled && the('requests').textContent.endsWith('0 waiting')")
            stop()
            page.until(f"{ANSWERED}{count}")
            until(lambda count=count: len(engine.aborted) == count and not engine.open)
            assert page.value(f"document.querySelectorAll('.figures')[{count - 1}].textContent").endswith(" · stopped")
        asked = tokenizer.decode(engine.requests[1].token_ids, skip_special=False)
        assert re.fullmatch(r"\[u\]Go on\[a\]abc\w*\[u\]Go on\[a\]", asked) and page.complaints == []


@pytest.mark.slow
@in_browser
def test_a_key_is_asked_for_and_kept_with_the_tab(page: Tab, tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer), api_keys=("k",)) as server:
        page.open(f"{server.url}/")
        page.until("!the('key-form').hidden && document.activeElement === the('key')")
        for key, said in (("wrong", "is none that this server"), ("k", "")):
            page.write(key)
            page.press("Enter", 13, "\r")
            page.until(f"the('wrong').textContent.includes({said!r}) && the('key').value === ''")
        page.until("the('model').value === 'demo' && the('key-form').hidden")
        ask(page, "Hi", 1)
        page.open(f"{server.url}/?again")
        page.until("the('model').value === 'demo' && the('key-form').hidden")
        assert page.value("sessionStorage.length === 1 && localStorage.length === 0 && document.cookie === ''")


@pytest.mark.slow
@in_browser
def test_errors_are_told_and_the_message_is_kept(page: Tab, tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        opened(page, server)
        ask(page, "x" * 600, 0)
        assert "but prompt and answer together may have 512" in page.value("the('wrong').textContent")
        assert page.value("the('text').value") == "x" * 600 and texts(page) == []
        page.value("the('text').value = ''")
        ask(page, "Hi", 1)
        assert page.value("the('wrong').textContent") == ""
    page.value("the('text').value = ''")
    ask(page, "Hello?", 1)
    assert page.value("the('wrong').textContent") == "The server cannot be reached, or hung up."
    assert page.value("the('text').value") == "Hello?"


@pytest.mark.slow
@in_browser
def test_a_server_that_is_not_ready_is_waited_for(page: Tab, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, loading=True)
    with running(tokenizer, engine) as server:
        page.complaints.clear()
        page.open(f"{server.url}/")
        page.until("the('wrong').textContent === 'This server takes no messages: loading.'")
        engine.ready.set()
        page.until("the('wrong').textContent === '' && the('model').value === 'demo'")
        assert server.notes == ["compiling 113 kernels"]
        server.notes.clear()


@pytest.mark.slow
@in_browser
def test_thoughts_are_apart_and_closed(page: Tab, tmp_path: Path) -> None:
    thinking = MODELS["qwen3"].tokenizer(tmp_path)
    engine = FakeEngine(thinking, say=lambda tokenizer, request: "<think>\nWell, <b>\n</think>\n\nYes.")
    with running(thinking, engine) as server:
        opened(page, server)
        ask(page, "So?", 1)
        assert texts(page)[1].strip() == "Yes."
        thoughts = page.value(
            "[the('log').querySelector('details').open, the('log').querySelector('details').textContent]"
        )
        assert thoughts[0] is False and "Well, <b>" in thoughts[1]
        ask(page, "And?", 2)
        assert "Well" not in thinking.decode(engine.requests[1].token_ids, skip_special=False)
        assert page.complaints == []


@pytest.mark.slow
@in_browser
def test_it_is_dark_or_light_as_is_wished(page: Tab, tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        opened(page, server)
        for scheme, ground in (("dark", "rgb(21, 24, 28)"), ("light", "rgb(251, 250, 247)")):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert page.value("getComputedStyle(document.body).backgroundColor") == ground
