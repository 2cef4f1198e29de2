"""Which modules a format leaves as they are, by lists such as ``modules_to_not_convert``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tpctl.errors import CheckpointError, shown

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_STACK = re.compile(r"\.experts\.[^.\d][^.]*$")
_STACKED = re.compile(r"(.*\.experts)\.[^.]+(?:\..*)?")


@dataclass(frozen=True)
class Skipped:
    """Modules by the end of their name, or by a pattern that matches its start up to the end of a part
    (transformers 5, ``quantizers/quantizers_utils.py``: ``should_convert_module``). There, the experts of a layer are
    one module.
    """

    names: tuple[str, ...]

    def __contains__(self, module: str) -> bool:
        return self._matches(module) or ((experts := _STACKED.fullmatch(module)) is not None and experts[1] in self)

    def any_of(self, names: Sequence[str]) -> bool:
        """Whether a module that goes by ``names`` is one of them."""
        return any(name in self for name in names)

    def check(self, key: str) -> Skipped:
        """This one. Raises ``CheckpointError``, which names field ``key``, for a name that is no pattern."""
        for name in self.names:
            try:
                re.compile(f"(?:{name}){_BOUNDARY}")
            except re.error as error:
                raise CheckpointError(f"config.json: {key} has {shown(name)}, which is no pattern: {error}") from None
        return self

    def _matches(self, module: str) -> bool:
        return module.endswith(self.names) or any(pattern.match(module) for pattern in self._patterns)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        # One pattern of all that have no groups of their own: lists may have hundreds of names.
        plain = [name for name in self.names if re.fullmatch(r"[\w.*-]*", name)]
        others = [f"(?:{name}){_BOUNDARY}" for name in self.names if name not in plain]
        joined = [f"(?:{'|'.join(plain)}){_BOUNDARY}"] if plain else []
        return tuple(re.compile(pattern) for pattern in (*joined, *others))


def is_stack(module: str) -> bool:
    """Whether ``module`` is what a checkpoint names experts that it stacks."""
    return _STACK.search(module) is not None
