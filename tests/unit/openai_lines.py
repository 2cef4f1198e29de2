"""Lines of a batch file as OpenAI has them, and their answers."""

from __future__ import annotations

from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.shared.error_object import ErrorObject

from tpctl.client.openai_fields import CHAT


def chat(text: str, **more: Any) -> ChatParams:
    params: Any = {**ChatParams(model="gpt", messages=[{"role": "user", "content": text}]), **more}
    return params


def line(custom_id: Any, body: Any, url: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": dict(body), **more}


def answers(rows: list[Any]) -> dict[str, Any]:
    """The bodies by custom id, read by the client's own types."""
    found: dict[str, Any] = {}
    for row in rows:
        assert row.keys() == {"id", "custom_id", "response", "error"} and row["error"] is None
        response = row["response"]
        body = response["body"]
        if response["status_code"] == 200:
            kind = ChatCompletion if body["object"] == "chat.completion" else Completion
            found[row["custom_id"]] = kind.model_validate(body, strict=True)
            assert kind.model_validate(body).model_dump(exclude_unset=True) == body
        else:
            found[row["custom_id"]] = ErrorObject.model_validate(body["error"], strict=True)
    return found
