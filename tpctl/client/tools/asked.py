"""What a request says of tools: which there are, and whether and how they are to be called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.client.fields import given
from tpctl.errors import RequestError, shown

MOST_TOOLS = 1024

FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
"""Of a body in OpenAI's form."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


class ToolsError(RequestError):
    """Tools cannot be had as they are asked for.

    Attributes:
        param: the field that says so.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Tools:
    """Functions that an answer may call.

    Attributes:
        offered: as chat templates take them.
        schemas: of the functions' arguments, by name.
        must: an answer is calls and nothing else; ``only``: of this function alone.
        single: one call at most.
        strict: functions whose arguments keep to their schemas, whatever the model prefers.
    """

    offered: tuple[Mapping[str, Any], ...]
    schemas: Mapping[str, Mapping[str, Any]]
    must: bool = False
    only: str | None = None
    single: bool = False
    strict: frozenset[str] = frozenset()

    @property
    def callable(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of the functions that may be called."""
        return {name: schema for name, schema in self.schemas.items() if self.only in (None, name)}


def read_tools(fields: Mapping[str, Any]) -> Tools | None:
    """The tools that a body asks for; ``None``: none, or none of them may be called.

    Args:
        fields: those of ``FIELDS`` that are given.

    Raises:
        ToolsError: one is not as OpenAI's interface has it.
    """
    offered, choice = fields.get("tools"), fields.get("tool_choice")
    parallel = fields.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise ToolsError(f"parallel_tool_calls is {shown(parallel)}, but must be true or false", FIELDS[2])
    if not offered:
        if offered not in (None, []):
            raise ToolsError(f"tools is {shown(offered)}, but must be a list of functions", "tools")
        if choice not in (None, "none", "auto"):
            raise ToolsError(f"tool_choice is {shown(choice)}, but there are no tools", "tool_choice")
        return None
    if not isinstance(offered, list) or len(offered) > MOST_TOOLS:
        many = f"has {len(offered)} functions" if isinstance(offered, list) else f"is {shown(offered)}"
        raise ToolsError(f"tools {many}, but must be a list of at most {MOST_TOOLS}", "tools")
    found = [_function(number, tool) for number, tool in enumerate(offered, start=1)]
    schemas = {function["name"]: function["parameters"] for function, _ in found}
    if len(schemas) < len(found):
        names = [function["name"] for function, _ in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise ToolsError(f"tools has two functions named {shown(twice)}; their names must differ", "tools")
    must, only = _choice(choice, schemas)
    if choice == "none":
        return None
    return Tools(
        tuple({"type": "function", "function": function} for function, _ in found),
        schemas,
        must,
        only,
        not parallel or only is not None,
        frozenset(function["name"] for function, strict in found if strict),
    )


def with_tools(variables: Mapping[str, Any], tools: Tools | None) -> dict[str, Any]:
    """What a chat template is given besides messages, with the tools.

    Raises:
        ToolsError: there are tools among ``variables``, too: the template would show those, and calls be read of these.
    """
    if tools is None:
        return dict(variables)
    if "tools" in variables:
        raise ToolsError(
            "chat_template_kwargs has tools, but the request has tools of its own; leave one of them out",
            "chat_template_kwargs",
        )
    return {**variables, "tools": tools.offered}


def _function(number: int, tool: Any) -> tuple[dict[str, Any], bool]:
    """A function as templates take it, and whether its schema is strict."""
    what = f"tool {number}"
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or kind != "function":
        said = f"has type {shown(kind)}" if isinstance(kind, str) else f"is {shown(tool)}"
        raise ToolsError(f'{what} {said}, but must be an object of type "function"', "tools")
    if unknown := given(tool).keys() - {"type", "function"}:
        raise ToolsError(f"{what}: unknown field {shown(min(unknown))} beside its function", "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise ToolsError(f"{what}: function is {shown(function)}, but must be a JSON object", "tools")
    if unknown := given(function).keys() - {"name", "description", "parameters", "strict"}:
        raise ToolsError(f"{what}: unknown field {shown(min(unknown))} in its function", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ToolsError(
            f"{what}: name is {shown(name)}, but must be up to 64 letters, digits, _, . and -",
            "tools",
        )
    found: dict[str, Any] = {"name": name}
    if (description := function.get("description")) is not None:
        if not isinstance(description, str):
            raise ToolsError(f"{what}: description is {shown(description)}, but must be a text", "tools")
        found["description"] = description
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None) or (parameters or {}).get("type", "object") != "object":
        raise ToolsError(
            f"{what}: parameters is {shown(parameters)}, but must be the JSON schema of an object", "tools"
        )
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise ToolsError(f"{what}: strict is {shown(strict)}, but must be true or false", "tools")
    found["parameters"] = {**_NO_ARGUMENTS, **(parameters or {})}
    return found, bool(strict)


def _choice(choice: Any, schemas: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether there must be calls, and of which function alone."""
    if choice in (None, "none", "auto", "required"):
        return choice == "required", None
    name = None
    if isinstance(choice, dict) and choice.keys() == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        name = function["name"] if isinstance(function, dict) and function.keys() == {"name"} else None
    if not isinstance(name, str):
        raise ToolsError(
            f'tool_choice is {shown(choice)}, but must be "none", "auto", "required" or '
            '{"type": "function", "function": {"name": "…"}}',
            "tool_choice",
        )
    if name not in schemas:
        raise ToolsError(f"tool_choice names {shown(name)}, which is none of the tools", "tool_choice")
    return True, name
