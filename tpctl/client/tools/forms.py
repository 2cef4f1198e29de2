"""What a form of calls has to say of itself. Each family's is in a file of its own."""

from __future__ import annotations

from typing import Protocol

from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Reader, Reading


class ToolForm(Protocol):
    """How a family writes calls.

    Attributes:
        name: what messages and pages call it.
        marks: all marks that may be single tokens.
        opens: those that calls begin with.
        bare: at an answer's beginning calls may stand without a mark, beginning with this.
        short_ids: the template takes ids of calls of nine characters only.
    """

    @property
    def name(self) -> str: ...

    @property
    def marks(self) -> tuple[str, ...]: ...

    @property
    def opens(self) -> tuple[str, ...]: ...

    @property
    def bare(self) -> str: ...

    @property
    def short_ids(self) -> bool: ...

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        """Read the calls behind the mark ``opened``, telling them to ``reader``. Raises ``Malformed``."""
        ...

    def grammar(self, lark: Lark, *, single: bool) -> str:
        """What an answer's calls are, in Lark's language.

        Raises:
            RequestError: it cannot be said.
        """
        ...
