"""Sessions for effllm.hf.lifecycle: key-value pairs, prefix to rest, variable tracking, many-shot labels, the largest number.

`token_sessions` is made of bare tokens, for effllm.hf.induction; `text_sessions` of plain English for a model that reads it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.hf.induction import BOS, FIRST, MAX
from effllm.hf.lifecycle import Session

TASKS = ("kv", "prefix-suffix", "variables", "many-shot", "max")
SEP, IS, ARROW, SPARE = 0, 1, 2, 8  # words with a meaning; words from SPARE on are free


def token_sessions(task: str, length: int, count: int, turns: int = 4, *, words: int = 448, numbers: int = 64, seed: int = 0) -> list[Session]:
    """`count` sessions of about `length` tokens for an induction model of that vocabulary. Every question has one answer, found at one place."""
    build = {"kv": _kv, "prefix-suffix": _prefix, "variables": _variables, "many-shot": _shots, "max": _max}[task]
    made = []
    for n in range(count):
        rng = random.Random(f"{seed} {task} {n}")
        word = FIRST + numbers
        context, asked = build(rng, length, turns, words, numbers, word)
        made.append(Session(task, _ids([BOS, *context]), tuple((_ids(q), _ids(a)) for q, a in asked)))
    return made


def _ids(x: list[int]) -> Tensor:
    return torch.tensor(x, dtype=torch.long)


_Asked = list[tuple[list[int], list[int]]]


def _kv(rng: random.Random, length: int, turns: int, words: int, numbers: int, word: int) -> tuple[list[int], _Asked]:
    """SEP key IS value value: keys and first halves of values are distinct."""
    count = min(length // 5, words - SPARE)
    keys, values = (rng.sample(range(word + SPARE, word + words), count) for _ in range(2))
    pairs = [(k, [v, rng.randrange(word + SPARE, word + words)]) for k, v in zip(keys, values, strict=True)]
    context = [t for k, v in pairs for t in (word + SEP, k, word + IS, *v)]
    filler = max(0, length - len(context))
    at = rng.randrange(0, len(pairs)) * 5
    context[at:at] = _filler(rng, filler, word)
    return context, [([word + SEP, k, word + IS], v) for k, v in rng.sample(pairs, turns)]


def _filler(rng: random.Random, count: int, word: int) -> list[int]:
    return [word + rng.randrange(ARROW + 1, SPARE) for _ in range(count)]


def _prefix(rng: random.Random, length: int, turns: int, words: int, numbers: int, word: int) -> tuple[list[int], _Asked]:
    """SEP and a string of six: many begin alike, no two tokens in a row come twice."""
    used: set[tuple[int, int]] = set()
    strings: list[list[int]] = []
    heads = [word + SPARE + i for i in range(16)]
    while 7 * len(strings) < length:
        s = [rng.choice(heads), *(rng.randrange(word + SPARE, word + words) for _ in range(5))]
        pairs = list(itertools.pairwise(s))
        if used.isdisjoint(pairs) and len(set(pairs)) == len(pairs):
            used.update(pairs)
            strings.append(s)
    context = [t for s in strings for t in (word + SEP, *s)]
    return context, [([word + SEP, *s[:2]], s[2:]) for s in rng.sample(strings, turns)]


def _variables(rng: random.Random, length: int, turns: int, words: int, numbers: int, word: int) -> tuple[list[int], _Asked]:
    """SEP x IS y, in random order: one chain is followed link by link, each turn one link, the last link is a number."""
    names = rng.sample(range(word + SPARE, word + words), min(length // 5, words - SPARE))
    chains = [names[i : i + turns] for i in range(0, len(names) - turns + 1, turns)]
    chains = [[*c, FIRST + rng.randrange(numbers)] for c in chains]
    links = [(a, b) for c in chains for a, b in itertools.pairwise(c)]
    rng.shuffle(links)
    gap = max(1, length // len(links) - 4)
    context = [t for a, b in links for t in (word + SEP, a, word + IS, b, *_filler(rng, gap, word))]
    chain = rng.choice(chains)
    return context, [([word + SEP, a, word + IS], [b]) for a, b in itertools.pairwise(chain)]


def _shots(rng: random.Random, length: int, turns: int, words: int, numbers: int, word: int) -> tuple[list[int], _Asked]:
    """SEP input ARROW label, from 40 inputs and four labels, many times over."""
    inputs = rng.sample(range(word + SPARE, word + words - 4), 40)
    label = {x: word + words - 1 - rng.randrange(4) for x in inputs}
    context = [t for _ in range(length // 4) for x in (rng.choice(inputs),) for t in (word + SEP, x, word + ARROW, label[x])]
    seen = [x for x in inputs if x in context]
    return context, [([word + SEP, x, word + ARROW], [label[x]]) for x in rng.sample(seen, turns)]


def _max(rng: random.Random, length: int, turns: int, words: int, numbers: int, word: int) -> tuple[list[int], _Asked]:
    """Numbers between words. One question: an answer would be the largest number of later turns too."""
    top = rng.randrange(numbers // 2, numbers)
    values = [rng.randrange(top) for _ in range(length // 4)]
    values[rng.randrange(len(values))] = top
    context = [t for v in values for t in (FIRST + v, *_filler(rng, 3, word))]
    return context, [([word + SEP, MAX], [FIRST + top])]


NAMES = """
apple river stone cloud tiger piano garden window copper candle bridge forest rocket silver basket camera desert engine falcon guitar hammer island
jacket kitten ladder magnet needle orange pencil rabbit saddle temple violin walnut anchor button castle dragon feather glacier harbor lantern
meadow mirror nickel parrot pepper planet pocket ribbon shadow spider statue summer ticket tunnel turtle valley velvet whistle winter zebra
""".split()  # noqa: SIM905


def text_sessions(tokenizer: Any, task: str, length: int, count: int, turns: int = 4, seed: int = 0) -> list[Session]:
    """`count` sessions of about `length` tokens in plain English."""
    build: dict[str, Callable[[random.Random, int, int], tuple[list[str], list[str], list[tuple[str, str]]]]] = {
        "kv": _text_kv, "prefix-suffix": _text_prefix, "variables": _text_variables, "many-shot": _text_shots, "max": _text_max,
    }  # fmt: skip

    def ids(text: str) -> Tensor:
        return _ids(tokenizer(text, add_special_tokens=False)["input_ids"])

    made = []
    for n in range(count):
        rng = random.Random(f"{seed} {task} {n}")
        head, lines, asked = build[task](rng, length, turns)
        own = ids("\n".join([*head, *lines]) + "\n")
        made.append(Session(task, own[:length] if task == "many-shot" else own, tuple((ids(q), ids(a)) for q, a in asked)))
    return made


def _text_kv(rng: random.Random, length: int, turns: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    keys = [f"{a} {b}" for a, b in (rng.sample(NAMES, 2) for _ in range(max(turns, length // 16)))]
    code = {k: "".join(rng.choice("0123456789") for _ in range(4)) for k in dict.fromkeys(keys)}
    return ["Here is a list of codes."], [f"The code of {k} is {v}." for k, v in code.items()], [
        (f"The code of {k} is", f" {code[k]}") for k in rng.sample(list(code), turns)
    ]  # fmt: skip


def _text_prefix(rng: random.Random, length: int, turns: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    lines = [[rng.choice(NAMES) for _ in range(6)] for _ in range(max(turns, length // 9))]
    return ["Here is a list of lines."], [" ".join(s) for s in lines], [(" ".join(s[:3]), " " + " ".join(s[3:])) for s in rng.sample(lines, turns)]


def _text_variables(rng: random.Random, length: int, turns: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    names = [f"{a}_{b}" for a in rng.sample(NAMES, min(len(NAMES), max(turns + 1, length // 60))) for b in rng.sample("abcdefgh", 4)]
    rng.shuffle(names)
    chains = [[*names[i : i + turns], str(rng.randrange(10, 100))] for i in range(0, len(names) - turns + 1, turns)]
    links = [(a, b) for c in chains for a, b in itertools.pairwise(c)]
    rng.shuffle(links)
    chain = rng.choice(chains)
    return ["Variables are set as follows."], [f"{a} = {b};" for a, b in links], [(f"{a} =", f" {b}") for a, b in itertools.pairwise(chain)]


def _text_shots(rng: random.Random, length: int, turns: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    inputs = rng.sample(NAMES, 24)
    label = {x: rng.choice(["red", "green", "blue", "black"]) for x in inputs}
    shots = [x for _ in range(max(1, length // (6 * len(inputs)) + 1)) for x in rng.sample(inputs, len(inputs))]
    return ["Every word has a colour."], [f"{x}: {label[x]}" for x in shots], [(f"\n{x}:", f" {label[x]}") for x in rng.sample(inputs, turns)]


def _text_max(rng: random.Random, length: int, turns: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    top = rng.randrange(500, 1000)
    values = [rng.randrange(100, top) for _ in range(max(4, length // 6))]
    values[rng.randrange(len(values))] = top
    return ["Here is a list of numbers."], [", ".join(map(str, values))], [("The largest number of the list is", f" {top}")]
