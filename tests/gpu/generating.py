"""Answers of an engine's client."""

from __future__ import annotations

from tpctl.client.engine_client import EngineClient
from tpctl.wire.messages import Request


def generate(client: EngineClient, requests: list[Request]) -> dict[str, list[int]]:
    client.submit(requests)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    left = len(requests)
    while left:
        for output in client.outputs(timeout=120):
            found[output.id] += output.token_ids
            left -= output.finish_reason is not None
    return found
