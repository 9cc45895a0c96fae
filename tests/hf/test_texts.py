"""Evaluation texts and windows."""

from __future__ import annotations

import bz2
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from effllm.errors import CalibrationError
from effllm.hf import texts
from effllm.hf.wikitext import articles, plain, without_nested


class Words:
    """A tokenizer of one id per word."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(w) for w in text.split()]}


def test_windows_are_the_first_tokens_in_order() -> None:
    text = " ".join("x" * (i % 7 + 1) for i in range(1000))
    want = torch.tensor([i % 7 + 1 for i in range(1000)])
    assert torch.equal(texts.windows(Words(), text, 64, 3), want[:192].view(3, 64))
    full = texts.windows(Words(), text, 64)
    assert full.dtype == torch.long and torch.equal(full, want[:960].view(15, 64))
    assert texts.windows(Words(), text, 1000, 1).shape == (1, 1000)


@pytest.mark.parametrize(("length", "count"), [(1001, None), (100, 11), (1001, 1)])
def test_too_short_a_text_is_an_error(length: int, count: int | None) -> None:
    with pytest.raises(CalibrationError) as caught:
        texts.windows(Words(), "word " * 1000, length, count)
    assert caught.value.code == "E-CAL-SHORT" and "1000" in caught.value.cause


def test_no_window_is_an_error() -> None:
    for length, count in ((0, 1), (8, 0)):
        with pytest.raises(CalibrationError) as caught:
            texts.windows(Words(), "word " * 10, length, count)
        assert caught.value.code == "E-CAL-WINDOW"


def test_markup_is_removed() -> None:
    sentence = "This sentence is long enough to be kept as a line of running prose."
    markup = f"""{{{{Infobox|a={{{{b}}}}}}}}'''Anna''' is a [[Thing (kind)|thing]] of [[wood]].<ref name="x">source</ref> {sentence}
{{| class="table"
| cell
|}}
* {sentence}
== History ==
{sentence} See [http://example.org the page] &amp; more.<!-- hidden -->
short
[[File:Anna.jpg|thumb|A [[wood]]en thing]]
== See also ==
{sentence}"""
    assert plain(markup).split("\n") == [f"Anna is a thing of wood. {sentence}", "== History ==", f"{sentence} See the page & more."]


def test_nested_marks() -> None:
    assert without_nested("a{{b{{c}}d}}e}}f{{g", "{{", "}}") == "ae}}f"
    assert without_nested("", "{{", "}}") == ""


def page(title: str, text: str) -> str:
    return f"<page>\n<title>{title}</title>\n<text xml:space='preserve'>{text}</text>\n</page>\n"


def wheel(folder: Path, count: int = 4) -> Path:
    body = "A sentence that is certainly longer than sixty characters, and says nothing else. " * 40
    xml = "".join(page(f"Article {i}", f"{body}{i}") for i in range(count)) + page("Talk:No", body) + page("Old", "#REDIRECT [[Article 1]]") + page("Stub", "x")
    path = folder / "gensim-4.4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(texts.MEMBER, bz2.compress(xml.encode()))
    return path


def test_articles_come_out_of_a_wheel_and_split_in_halves(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    assert [t for t, _ in texts.prose(path)] == [f"Article {i}" for i in range(4)]
    assert texts.prose(tmp_path) == texts.prose(str(path))
    even, odd = texts.calibration_text(path), texts.evaluation_text(path)
    assert (even.name, odd.name) == ("wiki-even", "wiki-odd") and "CC BY-SA" in odd.licence
    assert even.text.startswith("Article 0\n") and "\n\nArticle 2\n" in even.text and "Article 1" not in even.text
    assert odd.text.startswith("Article 1\n") and "Article 2" not in odd.text


def test_the_environment_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    wheel(tmp_path / "texts", 2)
    monkeypatch.setattr(texts.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    assert len(texts.prose()) == 2
    assert texts.evaluation_text().name == "wiki-odd"


def test_the_stand_in_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_places", lambda given: [])
    with pytest.raises(CalibrationError) as caught:
        texts.prose()
    assert caught.value.code == "E-CAL-TEXT" and "gensim" in caught.value.next_step
    even, odd = texts.calibration_text(), texts.evaluation_text()
    assert (even.name, odd.name, odd.licence) == ("networkx-source-even", "networkx-source-odd", "BSD-3-Clause")
    assert len(odd.text) > 1e6 and even.text[:2000] != odd.text[:2000]
    with pytest.raises(CalibrationError):
        texts.evaluation_text(tmp_path)  # a place that was named must hold the text


def test_files_that_are_not_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "broken.bz2").write_bytes(b"not bzip2")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("broken.bz2", "other.whl", "absent.whl"):
        with pytest.raises(CalibrationError) as caught:
            texts.prose(tmp_path / name)
        assert caught.value.code == "E-CAL-TEXT"


def test_the_real_articles() -> None:
    try:
        pages = texts.prose()
    except CalibrationError as error:
        pytest.skip(error.cause)
    assert len(pages) == 89 and pages[0][0] == "Anarchism"
    joined = "\n\n".join(text for _, text in pages)
    assert hashlib.sha256(joined.encode()).hexdigest().startswith("4ec2323e")


def test_pages_of_other_namespaces_are_left_out() -> None:
    xml = page("A &amp; B", "text") + page("Help:X", "text") + "<page><title>R</title><redirect title='A'/><text>t</text></page>"
    assert [t for t, _ in articles(xml)] == ["A & B"]
