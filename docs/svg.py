"""A small writer of SVG pictures: shapes and text on a white card, legible on light and dark pages."""

from __future__ import annotations

from html import escape

INK, GREY, LINE = "#1f2430", "#697080", "#d9dce3"
FONT = "-apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


class Picture:
    """Shapes, in the order in which they are drawn. Coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, radius: float = 3, stroke: str = "none"
    ) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 13,
        fill: str = INK,
        anchor: str = "start",
        weight: str = "normal",
    ) -> None:
        """`y` is the baseline."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>'
        )

    def line(self, points: list[tuple[float, float]], stroke: str = GREY, arrow: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="1.5"{end}/>')

    def __str__(self) -> str:
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{GREY}"/></marker></defs>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="{FONT}" role="img">',
                f"<title>{escape(self.title)}</title>",
                arrow,
                f'<rect width="{self.width}" height="{self.height}" rx="8" fill="#ffffff" stroke="{LINE}"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )
