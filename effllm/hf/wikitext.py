"""Plain text out of a MediaWiki XML dump: paragraphs and headings, without templates, tables, links, lists and references."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

_PAGE = re.compile(r"<page>.*?</page>", re.S)
_TITLE = re.compile(r"<title>(.*?)</title>")
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_ELEMENT = re.compile(r"<(ref|math|gallery|timeline|nowiki|code|pre|source|imagemap)\b[^>/]*>.*?</\1>", re.S | re.I)
_TAG = re.compile(r"<[^>]+>")
_SIDE_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)*):[^\[\]]*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_MEDIA = re.compile(r"\[\[(?:File|Image):.*?\]\]", re.S | re.I)
_NAMED_URL = re.compile(r"\[https?://\S+\s+([^\]]*)\]")
_URL = re.compile(r"\[?https?://\S+\]?")
_APPENDIX = re.compile(r"\n==+\s*(?:See also|References|External links|Notes|Further reading|Bibliography|Footnotes|Sources)\s*==+", re.I)
_LISTS = ("*", "#", ":", ";", "|", "!", "{", "}")
_SENTENCE = 60  # characters; shorter lines are captions and debris


def articles(xml: str) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every page of the main namespace that is not a redirect."""
    for page in _PAGE.findall(xml):
        title, text = _TITLE.search(page), _TEXT.search(page)
        if title is None or text is None or "<redirect" in page or ":" in title[1]:
            continue
        if not text[1].lstrip().lower().startswith("#redirect"):
            yield html.unescape(title[1]), plain(html.unescape(text[1]))


def plain(markup: str) -> str:
    """The readable paragraphs and headings of one page's wiki markup."""
    t = _COMMENT.sub("", html.unescape(markup))
    t = _ELEMENT.sub("", t)
    t = without_nested(without_nested(t, "{{", "}}"), "{|", "|}")
    t = _TAG.sub("", t)
    for _ in range(3):  # links nest in captions, innermost first
        t = _LINK.sub(r"\1", _SIDE_LINK.sub("", t))
    t = _URL.sub("", _NAMED_URL.sub(r"\1", _MEDIA.sub("", t)))
    t = t.replace("'''", "").replace("''", "").replace("\u00a0", " ")
    lines = (line.strip() for line in _APPENDIX.split(t)[0].split("\n"))
    return "\n".join(x for x in lines if x and not x.startswith(_LISTS) and (x.startswith("==") or len(x) > _SENTENCE))


def without_nested(text: str, start: str, end: str) -> str:
    """The text outside all balanced `start` ... `end` pairs; an `end` without its `start` stays."""
    kept, depth, last = [], 0, 0
    for mark in re.finditer(f"{re.escape(start)}|{re.escape(end)}", text):
        if mark[0] == start:
            if depth == 0:
                kept.append(text[last : mark.start()])
            depth += 1
        elif depth:
            depth -= 1
            last = mark.end()
    return "".join(kept) + (text[last:] if depth == 0 else "")
