"""Triton's interpreter, without work that it does again and again.

For every call of a jitted function by another it looks through the members of ``triton.language`` for builtins to
replace, though they are replaced while a kernel runs: a quarter of the time that kernels take there.
"""

from __future__ import annotations

from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

_look = interpreter._patch_lang


def _look_once(function: FunctionType) -> interpreter._LangPatchScope:
    """What is to be taken back after ``function``: nothing, where all that it sees of the language is replaced."""
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if seen and not any(tl.core.is_builtin(lang.load) for lang in seen):
        return interpreter._LangPatchScope()
    return _look(function)


def hasten() -> None:
    interpreter._patch_lang = _look_once
