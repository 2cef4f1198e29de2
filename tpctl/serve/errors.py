"""What is said to a client that cannot be answered, in OpenAI's form."""

from __future__ import annotations

import msgspec

from tpctl.client.openai_answers import error
from tpctl.client.openai_fields import param_of
from tpctl.errors import BusyError, CheckpointError, RequestError, TpctlError, printable, shorten

LONGEST = 1000
"""Characters of a message, whatever it repeats of a request."""


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP's.
        param: the field of the body that it is about; ``code``: what programs go by.
        retry_after: seconds after which another try may do better.
        allow: methods that the path has.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(printable(message), LONGEST)
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.allow = allow

    @classmethod
    def of(cls, reason: TpctlError) -> ApiError:
        """What the world's fault is to a client: its own where the request is wrong."""
        said = str(reason)
        if isinstance(reason, RequestError):
            return cls(400, said, param=param_of(reason))
        if isinstance(reason, CheckpointError):  # of a model that has no chat template, or one that does not compile
            return cls(400, said)
        if isinstance(reason, BusyError):
            return cls(503, said, code="busy", retry_after=1)
        return cls(500, said)

    def body(self) -> bytes:
        """JSON."""
        said = error(self.message, self.status, param=self.param, code=self.code)
        return msgspec.json.encode(said)

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            found.append((b"retry-after", b"%d" % self.retry_after))
        if self.allow is not None:
            found.append((b"allow", self.allow.encode()))
        if self.status == 415:
            found.append((b"accept-encoding", b"identity"))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found
