"""What every page of a report must be: well formed, self-contained, inert but for its script, in its own colours."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser


class NotDrawn(dict[str, str]):
    """In place of `draw._drawn`: every picture is there already, and is nearly nothing. For tests of words."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return "<svg></svg>"


STYLE_OR_SCRIPT = re.compile(r"<(style|script)>.*?</\1>", flags=re.DOTALL)


def words(page: str) -> str:
    """The page's text as a person reads it, on one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", STYLE_OR_SCRIPT.sub(" ", page))))


class Balance(HTMLParser):
    """Complains about tags that are not closed in order, and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def assert_sound(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    tags = [tag for tag, _ in parser.seen]
    assert tags.count("script") == tags.count("style") == 1
    for tag, attributes in parser.seen:
        assert tag not in ("img", "link", "iframe", "object", "image", "foreignobject", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset"), (tag, name)
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or "").replace("url(#", ""), (tag, value)
    [script] = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in parser.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parser.seen:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0] if ids else None) in (*ids, None), attributes
        assert (attributes.get("href") or "#")[1:] in (*ids, ""), attributes
    for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        assert not set(re.findall(r"#[0-9a-f]{6}\b", " ".join(re.findall(r'style="[^"]*"', svg))))
        assert "var(--" in svg
        assert "DejaVu" not in svg
        assert "<title>" in svg
        assert 'role="img"' in svg
