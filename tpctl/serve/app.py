"""The server's routes, and what holds for all of them: the key, the size of bodies, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from email.utils import formatdate
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpctl.client.fields import given
from tpctl.errors import TpctlError, printable, shorten
from tpctl.serve.access import line
from tpctl.serve.answered import Answered, Encoded, Said, refused, say
from tpctl.serve.bodies import BODY_SECONDS, read_object
from tpctl.serve.endpoints import Endpoints
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Gone
from tpctl.serve.headers import header
from tpctl.serve.memory import MAX_MEMORY, Holding, Memory
from tpctl.serve.openapi import description
from tpctl.serve.origins import Headers, Origins
from tpctl.serve.page import Page
from tpctl.serve.straight import gone_out
from tpctl.serve.work import Interruptible, UnderWay, Work, new_id

OPEN = frozenset({"/", "/health", "/metrics", "/openapi.json"})
"""Paths that need no key."""

_MODELS = "/v1/models/"

_ID, _WORK = "tpctl.id", "tpctl.work"
"""Where a request's scope has what it is called, and its ``Work``."""

_NAME = b"x-request-id"

Post = Callable[[dict[str, Any], float, Holding, str], Awaitable[ASGIApp]]


class App:
    """An ASGI application. Everything but ``OPEN`` needs a key, where there are some.

    Attributes:
        pool: the engines that the endpoints have.
        memory: what requests hold.
        under_way: requests whose bodies are being answered, until the answers have gone out.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        api_keys: Sequence[str] = (),
        origins: Collection[str] = (),
        host: str = "",
        max_body: int = 16 << 20,
        max_memory: int = MAX_MEMORY,
        body_seconds: float = BODY_SECONDS,
        note: Callable[[str], object] = lambda line: None,
        access: Callable[[str], object] | None = None,
    ) -> None:
        """Set limits.

        Args:
            origins: of web pages that may use it besides its own, as ``check_origin`` gives them; ``host``: what it
                listens at, by which its own page goes.
            max_body: bytes of a request's body; ``body_seconds``: in which it has to arrive.
            max_memory: bytes that all requests may hold together (``serve.memory``).
            note: tells whoever runs the server of what should not have happened.
            access: is told a line of each request that was answered (``serve.access``).
        """
        self._endpoints = endpoints
        self.pool = endpoints.pool
        self._keys = [key.encode() for key in api_keys]
        self._origins = Origins(origins, host)
        self._max_body = max_body
        self.memory = Memory(max_memory)
        self._body_seconds = body_seconds
        self._note, self._access = note, access
        self._date = (0, b"")
        self.under_way = UnderWay()
        self._arriving: set[Interruptible] = set()
        self._ended: ApiError | None = None
        posts: dict[str, Post] = {
            "/v1/chat/completions": endpoints.chat,
            "/v1/completions": endpoints.complete,
            "/v1/responses": endpoints.respond,
            "/tokenize": endpoints.tokenize,
            "/detokenize": endpoints.detokenize,
        }
        routes = [Route(path, self._post(post), methods=["POST"]) for path, post in posts.items()]
        page, described = Page(), Said(description(keyed=bool(api_keys)))
        routes += [
            Route("/", self._get(lambda request: page), methods=["GET"]),
            Route("/v1/models", self._get(lambda request: endpoints.models()), methods=["GET"]),
            Route(_MODELS + "{name:path}", self._get(lambda one: endpoints.one_model(one.path_params["name"]))),
            Route("/tokenizer_info", self._get(lambda request: endpoints.tokenizer_info()), methods=["GET"]),
            Route("/openapi.json", self._get(lambda request: described), methods=["GET"]),
            Route("/health", self._get(lambda request: endpoints.health()), methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        self._paths = {route.path for route in routes}
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        since, status = time.monotonic(), 499  # for those who hung up
        id = scope[_ID] = new_id()
        more: Headers = []

        async def dated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], *more, (b"date", self._now())]
                if all(name != _NAME for name, _ in headers):  # an answer is called by its own
                    headers.append((_NAME, id.encode()))
                message["headers"] = headers
            await send(message)

        scope["app"] = self  # so that the router raises for what it does not know
        try:
            before = self._origins.before(scope)
            more = self._origins.headers(scope) if before is None else before
            if before is None:
                self._check_key(scope)
                await self._router(scope, receive, dated)
            else:
                await _nothing(dated)
        except Gone:
            pass
        except Exception as error:
            if status == 499:
                await self._refuse(error, scope, dated)
            else:  # where an answer has begun, its end is the connection's
                self.failed(error, scope)
        self.pool.metrics.answered(self._path(scope["path"]), status, since)
        if self._access is not None:
            work: Work | None = scope.get(_WORK)
            self._access(line(scope, status, since, id, None if work is None else work.answer))

    def _path(self, path: str) -> str:
        """What a path is counted as: the names of models are anybody's."""
        if path.startswith(_MODELS) and path != _MODELS:
            return f"{_MODELS}{{name}}"
        return path if path in self._paths else "other"

    def _post(self, endpoint: Post) -> ASGIApp:
        return _Post(self, endpoint)

    def _get(self, make: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> Any:
            return make(request)

        return answer

    async def read(self, scope: Scope, receive: Receive, holding: Holding) -> dict[str, Any]:
        """A request's body, without what is null. Raises also what ``end`` is told, which waits for none."""
        if self._ended is not None:
            raise self._ended
        with Interruptible() as arriving:
            self._arriving.add(arriving)
            try:
                return given(await read_object(scope, receive, self._max_body, holding, self._body_seconds))
            finally:
                self._arriving.remove(arriving)

    def end(self, reason: ApiError) -> None:
        """Refuse all bodies that are not there yet."""
        self._ended = self._ended or reason
        for one in list(self._arriving):
            one.interrupt(reason)

    async def _metrics(self, request: Request) -> Any:
        pool = self.pool
        body = pool.metrics.exposition(await pool.stats(), pool.under_way)
        return _Plain(body)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        said = header(scope, b"authorization") or b""
        kind, _, key = said.partition(b" ")
        known = [hmac.compare_digest(key.strip(), one) for one in self._keys]  # all, so that time says nothing
        if kind.lower() != b"bearer" or not any(known):
            what = "is none that this server was started with" if said else "is missing"
            raise ApiError(401, f"the API key {what}; send it as Authorization: Bearer KEY", code="invalid_api_key")

    async def _refuse(self, error: Exception, scope: Scope, send: Send) -> None:
        if isinstance(error, TpctlError):
            error = ApiError.of(error)
        elif isinstance(error, HTTPException):
            what = "is not known here" if error.status_code == 404 else f"is not for {scope['method']}"
            said = f"{shorten(scope['path'], 200)} {what}"
            error = ApiError(error.status_code, said, allow=(error.headers or {}).get("Allow"))
        elif not isinstance(error, ApiError):
            error = self.failed(error, scope)
        await refused(error, send)

    def tell(self, said: str, scope: Scope) -> None:
        """Tell whoever runs the server of a request."""
        self._note(f"tpctl serve: {printable(scope['path'])} {printable(said)}")

    def failed(self, error: Exception, scope: Scope) -> ApiError:
        """What a client is told of a bug; where it is, whoever runs the server is."""
        number = secrets.token_hex(4)
        trace = "".join(traceback.format_exception(error)).rstrip()
        self._note(f"tpctl serve: request {number}, to {printable(scope['path'])}, failed:\n{trace}")
        return ApiError(500, f"the server failed at this request; its log says how, of request {number}")

    def _now(self) -> bytes:
        """The date header, made once a second."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = (second, formatdate(second, usegmt=True).encode())
        return self._date[1]


class _Post:
    """An endpoint that is given a body. A class, since the router calls those as applications."""

    def __init__(self, app: App, endpoint: Post) -> None:
        self._app = app
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        since, (client, _) = time.monotonic(), scope.get("client") or ("", 0)  # none of a Unix socket
        with Holding(self._app.memory) as holding:
            body = await self._app.read(scope, receive, holding)
            with self._app.under_way.at_work(scope["path"], scope[_ID]) as work:
                scope[_WORK] = work
                with self._app.pool.preparing() as preparing:
                    watching = asyncio.ensure_future(_watch(receive, preparing))
                    try:
                        answer = await self._endpoint(body, since, holding, client)
                    finally:
                        watching.cancel()
                del body
                work.answer = answer if isinstance(answer, Answered) else None
                if isinstance(answer, Encoded):
                    holding.prompts(len(answer.body))
                await answer(scope, receive, send)
                await gone_out(scope)


async def _watch(receive: Receive, preparing: Interruptible) -> None:
    """An answer that grows has a watch of its own (``Answered``): this is for what comes before, queues included."""
    while (await receive())["type"] != "http.disconnect":
        pass
    preparing.interrupt(Gone())


class _Plain:
    """What Prometheus reads."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await say(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], self._body, send)


async def _nothing(send: Send) -> None:
    """A response without a body."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
