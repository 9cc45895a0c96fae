"""A line editor for a code file that keeps the model's cache in step: each change costs a few tokens, not the whole file.

    python examples/editor.py FILE [--model DIRECTORY]      (the demo model without --model)

Commands: `i N TEXT` inserts a line before line N, `c N TEXT` changes line N, `d N` deletes it, `s` suggests the next line at the end, `p` prints
the file, `r` reads it all again (and says how long that takes), `w` writes it back, `q` leaves. After each change it prints the
update's time beside the time that reading the whole file took.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import effllm
from effllm.errors import EditError
from effllm.hf import models


class Editor:
    """A file as an edit session. `do(command)` returns what is to be shown."""

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        self.session = effllm.EditSession(model, text, tokenizer=tokenizer)
        start = time.perf_counter()
        self.session.recompute()
        self.full_s = time.perf_counter() - start
        self.tokenizer = tokenizer

    def do(self, command: str) -> str:
        """Run one command line."""
        kind, _, rest = command.strip().partition(" ")
        if kind == "p":
            return "".join(f"{n:4} {line}\n" for n, line in enumerate(self.session.text.splitlines(), start=1))
        if kind == "s":
            return f"next line: {self._suggest()!r}"
        if kind == "r":
            start = time.perf_counter()
            self.session.recompute()
            self.full_s = time.perf_counter() - start
            return f"read {len(self.session)} tokens in {1000 * self.full_s:.0f} ms"
        if kind in ("i", "c", "d"):
            number, _, text = rest.partition(" ")
            return self._change(kind, number, text)
        return "commands: i N TEXT, c N TEXT, d N, s, p, r, w, q"

    def _change(self, kind: str, number: str, text: str) -> str:
        lines = self.session.text.splitlines(keepends=True)
        if not number.isdigit() or not 1 <= int(number) <= len(lines) + (kind == "i"):
            return f"no line {number!r}: the file has {len(lines)}"
        n = int(number) - 1
        at = sum(len(line) for line in lines[:n])
        gone = 0 if kind == "i" else len(lines[n])
        if n and n == len(lines) and not lines[-1].endswith("\n"):
            text = "\n" + text
        start = time.perf_counter()
        try:
            done = self.session.edit_text([(at, at + gone, "" if kind == "d" else text + "\n")])
        except EditError as error:
            return str(error)
        seconds = time.perf_counter() - start
        share = 100 * seconds / self.full_s
        return f"{done.encoded} of {done.tokens} tokens in {1000 * seconds:.0f} ms; reading everything took {1000 * self.full_s:.0f} ms ({share:.0f} %)"

    def _suggest(self) -> str:
        new: list[int] = []
        for token in self.session.generate(32):
            new.append(token)
            if "\n" in str(self.tokenizer.decode([token])).lstrip("\n" if len(new) == 1 else ""):
                break
        return str(self.tokenizer.decode(new)).strip("\n")


def run(editor: Editor, path: Path, commands: Iterable[str], out: TextIO) -> None:
    """Commands until `q`; `w` writes the file."""
    for command in commands:
        if command.strip() == "q":
            return
        if command.strip() == "w":
            path.write_text(editor.session.text)
            print(f"wrote {path}", file=out, flush=True)
        elif command.strip():
            print(editor.do(command), file=out, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Read commands from the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="demo")
    a = parser.parse_args(arguments)
    model, tokenizer = models.resolve(a.model)
    editor = Editor(model, models.need_tokenizer(tokenizer, a.model), a.file.read_text())
    print(f"{len(editor.session)} tokens read in {1000 * editor.full_s:.0f} ms; {editor.do('')}", flush=True)
    run(editor, a.file, sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
