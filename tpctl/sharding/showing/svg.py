"""SVG, as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape


def hue(rank: int) -> int:
    """A rank's colour: the golden angle keeps neighbours apart."""
    return round(205 + rank * 137.5) % 360


@dataclass
class Svg:
    """SVG elements, and how far they reach."""

    items: list[str] = field(default_factory=list)
    width: float = 0
    height: float = 0

    def rect(self, x: float, y: float, w: float, h: float, kind: str, rank: int | None = None, tip: str = "") -> None:
        self._reach(x + w, y + h)
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.items.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" class="{kind}"{_rank(rank)}>{title}</rect>'
        )

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", rank: int | None = None
    ) -> None:
        self._reach(x + (len(text) * 7 if anchor == "start" else 0), y + 4)
        name = f' class="{kind}"' if kind else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.items.append(f'<text x="{x:.1f}" y="{y:.1f}"{name}{place}{_rank(rank)}>{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "arrow") -> None:
        self._reach(max(x1, x2), max(y1, y2))
        self.items.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def render(self, label: str) -> str:
        width, height = self.width + 4, self.height + 4
        return (
            f'<svg role="img" aria-label="{escape(label)}" viewBox="-2 -2 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}">{"".join(self.items)}</svg>'
        )

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)


def _rank(rank: int | None) -> str:
    return "" if rank is None else f' data-r="{rank}" style="--h:{hue(rank)}"'
