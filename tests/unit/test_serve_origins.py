"""Which web pages may use a server."""

from __future__ import annotations

import socket

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, chat
from tests.unit.test_serve_refusals import error
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import UsageError
from tpctl.serve.origins import check_origin

PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("allowed", [(PAGE,), ("https://other.example", PAGE), ("*",)])
def test_an_allowed_page_may_ask_and_read(tokenizer: Tokenizer, allowed: tuple[str, ...]) -> None:
    with served(tokenizer, origins=allowed, api_keys=("k",)) as (client, server):
        asks = {
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        before = client.options(CHAT, headers=asks)  # without the key, as browsers do
        assert (before.status_code, before.text) == (204, "")
        assert before.headers["access-control-allow-origin"] == PAGE
        assert before.headers["access-control-allow-headers"] == asks["access-control-request-headers"]
        assert "POST" in before.headers["access-control-allow-methods"]
        for stream in (False, True):
            headers = {"origin": PAGE, "authorization": "Bearer k"}
            answered = client.post(CHAT, json=chat(stream=stream), headers=headers)
            assert answered.status_code == 200 and answered.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in answered.headers["access-control-expose-headers"]
        refused = client.post(CHAT, json=chat(), headers={"origin": PAGE})
        assert error(refused, 401).code == "invalid_api_key"  # which the page may read, too
        assert refused.headers["access-control-allow-origin"] == PAGE and refused.headers["vary"] == "origin"
        assert not server.notes


def test_other_pages_are_refused_before_anything_is_computed(tokenizer: Tokenizer) -> None:
    with served(tokenizer, origins=(PAGE,)) as (client, server):
        for origin in ("https://evil.example", "null", "http://localhost:3001", "http://localhost:3000.evil.example"):
            found = client.post(CHAT, json=chat(), headers={"origin": origin, "content-type": "text/plain"})
            assert f"--allowed-origin {origin}" in error(found, 403).message
            assert "access-control-allow-origin" not in found.headers
            asks = {"origin": origin, "access-control-request-method": "POST"}
            assert error(client.options(CHAT, headers=asks), 403).code == "origin_not_allowed"
        assert "is no origin that may" in error(client.get("/v1/models", headers={"origin": "a b"}), 403).message
        assert not server.engines[0].requests


def test_its_own_page_and_programs_need_nobody_s_leave(tokenizer: Tokenizer) -> None:
    with served(tokenizer, host="testserver") as (client, _):
        host = client.get("/health").request.headers["host"]
        for headers in ({}, {"origin": f"http://{host}"}, {"origin": f"https://{host}"}):
            answered = client.post(CHAT, json=chat(), headers=headers)
            assert answered.status_code == 200 and "access-control-allow-origin" not in answered.headers
        assert "is not for OPTIONS" in error(client.options(CHAT), 405).message


ADDRESSES = ["127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "localhost:8000", "a.localhost"]
NAMES = ["GPU.example:8000", "chat.example", f"{socket.gethostname()}:8000", "chat.example."]


@pytest.mark.parametrize("host", ADDRESSES + NAMES)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_its_own_page_is_at_a_name_that_is_its_own(tokenizer: Tokenizer, scheme: str, host: str) -> None:
    with served(tokenizer, origins=("https://chat.example",), host="gpu.example") as (client, server):
        headers = {"host": host, "origin": f"{scheme}://{host.lower()}"}
        assert client.post(CHAT, json=chat(), headers=headers).status_code == 200
        assert client.get("/v1/models", headers={"host": host, "sec-fetch-site": "same-origin"}).status_code == 200
        assert len(server.engines[0].requests) == 1


FOREIGN = ["evil.example:8000", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost"]


@pytest.mark.parametrize("host", [*FOREIGN, "gpu.example.evil.example", "[evil.example]", ".", ".local"])
def test_a_page_whose_name_was_made_to_lead_here_is_refused(tokenizer: Tokenizer, host: str) -> None:
    with served(tokenizer, origins=(PAGE,), host="gpu.example") as (client, server):
        asks = {"host": host, "origin": f"http://{host}"}
        before = {**asks, "access-control-request-method": "POST"}
        for found in (
            client.post(CHAT, json=chat(), headers=asks),
            client.get("/v1/models", headers=asks),
            client.options(CHAT, headers=before),
            client.get("/metrics", headers={"host": host, "sec-fetch-site": "same-origin"}),
        ):
            told = error(found, 403)
            assert told.code == "origin_not_allowed" and "by its address or as localhost" in told.message
            assert f"//{host}" in told.message
        assert not server.engines[0].requests


def test_who_is_no_page_may_call_it_anything(tokenizer: Tokenizer) -> None:
    with served(tokenizer, origins=(PAGE,)) as (client, _):
        for headers in ({}, {"origin": PAGE}, {"sec-fetch-site": "none"}, {"sec-fetch-site": "cross-site"}):
            answered = client.post(CHAT, json=chat(), headers={"host": "proxy.example", **headers})
            assert answered.status_code == 200
    with served(tokenizer, origins=("*",)) as (client, _):
        headers = {"host": "proxy.example", "origin": "http://proxy.example"}
        assert client.post(CHAT, json=chat(), headers=headers).status_code == 200


def test_nobody_s_page_is_not_its_own(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        for origin in ("null", "http://"):
            assert error(client.get("/v1/models", headers={"host": "", "origin": origin}), 403)


@pytest.mark.parametrize("origin", ["*", "null", "https://a.example", "http://localhost:3000", "vscode-webview://x1"])
def test_what_an_origin_is(origin: str) -> None:
    assert check_origin(origin) == origin


@pytest.mark.parametrize("origin", ["", "a.example", "http://", "http://a.example/", "http://a b", "http://ä.example"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UsageError, match=r"like https://chat\.example or"):
        check_origin(origin)
