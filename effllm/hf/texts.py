"""Text for calibration and evaluation: English Wikipedia articles that ship inside the gensim wheel.

Even-numbered articles calibrate, odd-numbered ones evaluate. The text is CC BY-SA 3.0 / GFDL and is read at run time, never
stored in the project. Where gensim is not at hand, Python source of networkx (always installed with torch) stands in; the
returned `Corpus` says which text it is, because perplexities on the two do not compare.
"""

from __future__ import annotations

import bz2
import importlib.util
import sys
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.hf.wikitext import articles

MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
GET = "python -m pip download --no-deps gensim==4.4.0, and pass the path of the wheel"
SHORTEST = 2000  # characters


@dataclass(frozen=True)
class Corpus:
    """A text, the name under which figures on it are reported, and its licence."""

    name: str
    text: str
    licence: str


def prose(wheel_or_dir: str | Path | None = None) -> list[tuple[str, str]]:
    """(title, text) of 89 Wikipedia articles, 2.6 million characters.

    `wheel_or_dir` is a gensim wheel or a folder that has one; without it the installed gensim and `sys.prefix`/texts are
    searched. CalibrationError (E-CAL-TEXT) where none is found.
    """
    for place in _places(wheel_or_dir):
        if place.suffix == ".bz2" or zipfile.is_zipfile(place):
            return list(_read(place))
    raise CalibrationError("E-CAL-TEXT", f"no gensim wheel with the Wikipedia articles in {wheel_or_dir or 'this environment'}", GET)


def calibration_text(wheel_or_dir: str | Path | None = None) -> Corpus:
    """The even-numbered articles ("wiki-even"), or the even-numbered networkx files where there is no gensim."""
    return _half(wheel_or_dir, 0)


def evaluation_text(wheel_or_dir: str | Path | None = None) -> Corpus:
    """The odd-numbered articles ("wiki-odd"), or the odd-numbered networkx files where there is no gensim."""
    return _half(wheel_or_dir, 1)


def windows(tokenizer: Any, text: str, length: int = 512, count: int | None = None) -> Tensor:
    """The first `count` (default: all) whole windows of `length` tokens, int64 (count, length), no special tokens added.

    CalibrationError (E-CAL-SHORT) when the text has fewer tokens than that.
    """
    if length < 1 or (count is not None and count < 1):
        raise CalibrationError("E-CAL-WINDOW", f"{count} windows of {length} tokens", "ask for at least one window of one token")
    need = length * (count or 1)
    # 16 characters per token is far above any text's mean: the cut falls behind the tokens that are used
    ids = _encode(tokenizer, text[: 16 * need]) if count else []
    if len(ids) < need:
        ids = _encode(tokenizer, text)
    if len(ids) < need:
        raise CalibrationError("E-CAL-SHORT", f"the text has {len(ids)} tokens, {need} are needed", "give a longer text, or fewer or shorter windows")
    use = count or len(ids) // length
    return torch.tensor(ids[: use * length], dtype=torch.long).view(use, length)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _half(wheel_or_dir: str | Path | None, odd: int) -> Corpus:
    side = ("even", "odd")[odd]
    try:
        pages = prose(wheel_or_dir)
    except CalibrationError:
        if wheel_or_dir is not None:
            raise
        return Corpus(f"networkx-source-{side}", "\n\n".join(t for _, t in _networkx()[odd::2]), "BSD-3-Clause")
    return Corpus(f"wiki-{side}", "\n\n".join(f"{title}\n{text}" for title, text in pages[odd::2]), "CC BY-SA 3.0 / GFDL")


def _places(given: str | Path | None) -> list[Path]:
    if given is not None:
        path = Path(given)
        return sorted(path.glob("gensim-*.whl")) if path.is_dir() else [path]
    spec = importlib.util.find_spec("gensim")  # does not import it
    own = [Path(p).parent / MEMBER for p in (spec.submodule_search_locations or [])] if spec else []
    return [p for p in own if p.is_file()] + sorted(Path(sys.prefix, "texts").glob("gensim-*.whl"))


@lru_cache(maxsize=2)
def _read(place: Path) -> tuple[tuple[str, str], ...]:
    try:
        if place.suffix == ".bz2":
            raw = place.read_bytes()
        else:
            with zipfile.ZipFile(place) as wheel:
                raw = wheel.read(MEMBER)
        xml = bz2.decompress(raw).decode()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError("E-CAL-TEXT", f"{place} does not hold the Wikipedia articles: {error}", GET) from error
    return tuple((title, text) for title, text in articles(xml) if len(text) > SHORTEST)


def _networkx() -> list[tuple[str, str]]:
    spec = importlib.util.find_spec("networkx")
    if spec is None or spec.origin is None:
        raise CalibrationError("E-CAL-TEXT", "neither gensim's articles nor networkx is installed", GET)
    root = Path(spec.origin).parent
    files = sorted(p for p in root.rglob("*.py") if "tests" not in p.parts)
    texts = [(str(p.relative_to(root)), p.read_text()) for p in files]
    return [(name, text) for name, text in texts if len(text) > SHORTEST]
