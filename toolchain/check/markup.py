"""HTML that cannot be injected into: whatever is not markup by its type is escaped when it gets into an element."""

from __future__ import annotations

from html import escape

VOID = ("img", "input", "link", "meta")


class Html(str):
    """A string that is markup already."""


def element(tag: str, *children: str, **attributes: object) -> Html:
    """An element. Attributes: `class_` is class, `stroke_width` is stroke-width; None leaves one out."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    texts = "".join(f' {name}="{escape(str(value))}"' for name, value in given.items())
    return Html(f"<{tag}{texts}>" + ("" if tag in VOID else f"{join(*children)}</{tag}>"))


def join(*parts: str) -> Html:
    """Parts one after the other: markup as it is, text escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(head: list[str], rows: list[list[str]], *, numbers: tuple[int, ...] = ()) -> Html:
    """A table in a box of its own, which scrolls where the screen is narrower; `numbers` are columns set right."""

    def row(tag: str, cells: list[str]) -> Html:
        set_ = enumerate(cells)
        return element("tr", *(element(tag, cell, class_="number" if i in numbers else None) for i, cell in set_))

    body = element("tbody", *(row("td", cells) for cells in rows))
    return element("div", element("table", element("thead", row("th", head)), body), class_="scroll", tabindex=0)
