"""The environment that huggingface_hub and its HTTP library read: what they would fail on is said by its name.

Several of these they read when they are imported, and all of them end in exceptions that name no variable.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tpctl.errors import SourceError, shorten

TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def check_settings(token: str | None = None, **options: str | None) -> None:
    """Look at the Hub's variables, and at ``token`` (of ``--token``), before anything else reads them.

    Args:
        options: the values of other options that are sent to the Hub, by their names.

    Raises:
        SourceError: one cannot be used; the message names it.
    """
    check_importable()
    given = [("--token", token), *((name, os.environ.get(name)) for name in TOKENS)]
    for name, value in given:
        if value is not None:
            check_token(name, value)
    for name, value in options.items():
        if value is not None:
            _check_text(f"--{name}", value)
    for name in (*PROXIES, *map(str.lower, PROXIES)):
        if value := os.environ.get(name):
            _check_proxy(name, value)
    for name in CERTIFICATES:
        if (value := os.environ.get(name)) and not Path(value).exists():
            raise SourceError(f"{name} is {shorten(value, 200)}, which is not there; set it to a file or unset it")


def check_importable() -> None:
    """What of ``check_settings`` huggingface_hub cannot even be imported with."""
    for name in TIMEOUTS:
        if (value := os.environ.get(name)) is not None:
            _check_timeout(name, value)
    if (endpoint := os.environ.get("HF_ENDPOINT")) is not None:
        _check_endpoint(endpoint)


def check_token(name: str, value: str) -> None:
    """Raise unless ``value``, which ``name`` gives, can be sent as a token. The message does not repeat it."""
    for character in value.strip():
        if not "!" <= character <= "~":
            shown = "a space or a line's end" if character.isspace() else f"{character!r} (U+{ord(character):04X})"
            raise SourceError(f"{name} holds {shown}, which no Hub token has; copy the token again")


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{name} holds {value[error.start]!r}, which is no text in UTF-8; write it again") from None


def _check_timeout(name: str, value: str) -> None:
    try:
        seconds = int(value)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= 100_000:
        raise SourceError(
            f"{name} is {shorten(value)!r}, but must be whole seconds, 1 to 100000; unset it, or set it so"
        )


def _check_endpoint(value: str) -> None:
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port, that are none
        sound = False
    if not sound or not all("!" <= character <= "~" for character in value):
        said = f"is {shorten(value, 200)!r}" if value else "is empty"
        raise SourceError(
            f"HF_ENDPOINT {said}, which is no address like https://huggingface.co; set it so, or unset it"
        )


def _check_proxy(name: str, value: str) -> None:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        sound = parts.scheme.lower() in PROXY_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise SourceError(
            f"{name} is {shorten(value, 200)!r}, which is no proxy like http://host:port; set it so, or unset it"
        )
    if parts.scheme.lower().startswith("socks") and find_spec("socksio") is None:
        raise SourceError(
            f"{name} names a SOCKS proxy, for which the package socksio is missing; install it, or unset it"
        )
