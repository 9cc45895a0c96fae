"""Recipe: what to do to which module. Ordered rules, first match wins.

A recipe is written as a short name ("w8", "w4", "w4a8", "w3", ...), as a one-line form
`name(key=value, ...)` with parts joined by `+`, as a dict, or as a TOML or JSON file. `Recipe.parse` takes any of them.

    effllm.compress(model, "w4")
    effllm.compress(model, "bipolar(bits=3, group=64, offset=none, head_bits=6)")
    Recipe.parse({"rules": [{"match": "*.down_proj", "method": "bipolar", "bits": 6}, {"match": "*", "method": "bipolar", "bits": 4}]})
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from effllm.errors import RecipeError, nearest
from effllm.runtime.formats.bipolar import CHANNEL, GROUPS

OFFSETS = ("auto", "none", "integer", "affine")
SOLVERS = ("auto", "search", "gptq")
ACTS = ("a16", "a8")
KINDS = ("linear", "embedding", "any")
_SHORT = re.compile(r"w([1-8])(a8|a16)?")
_PLANNED = {
    "": ("svd", "fwsvd", "asvd", "whitened", "afm", "welore", "monarch", "sltrain", "lost", "nm", "armor"),
    "act": ("chess", "rsparse", "teal", "cats"),
    "kv": ("kivi", "gear", "mustafar", "matryoshka", "ems", "bfp"),
}
HEAD_NAMES = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "proj_out", "output_projection", "*.output_projection")


@dataclass(frozen=True)
class Bipolar:
    """Parameters of the bipolar method.

    bits 1..8; group 16/32/64/128 or 0 (per channel, also written "channel"); offset: "none" (symmetric mid-rise grid),
    "integer" (two's-complement grid), "affine" (own offset per group) or "auto" (affine only where it pays for its bytes);
    act "a16" or "a8"; solver "search" (data-free), "gptq" (needs calibration) or "auto" (gptq when there is calibration);
    pad: whether K that is no multiple of the group may be padded.
    """

    bits: int = 4
    group: int = 32
    offset: str = "auto"
    act: str = "a16"
    solver: str = "auto"
    pad: bool = True


@dataclass(frozen=True)
class Rule:
    """`match` is a glob over module names, or a regex after "re:"; `kind` and the size bounds narrow it further.

    `method` is "bipolar" with `params`, or "dense" to leave the module alone.
    """

    match: str = "*"
    method: str = "bipolar"
    params: Bipolar = field(default_factory=Bipolar)
    kind: str = "linear"
    min_in: int = 0
    max_in: int = 2**31
    min_out: int = 0
    max_out: int = 2**31

    def hits(self, module: str, kind: str, shape: tuple[int, int]) -> bool:
        """Whether the rule covers a module of this kind with an (out, in) weight."""
        if self.kind not in ("any", kind):
            return False
        n, k = shape
        if not (self.min_in <= k <= self.max_in and self.min_out <= n <= self.max_out):
            return False
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], module) is not None
        return fnmatch.fnmatchcase(module, self.match)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first that hits a module decides. `name` is what the user wrote."""

    rules: tuple[Rule, ...]
    name: str = "custom"

    def rule_for(self, module: str, kind: str, shape: tuple[int, int]) -> Rule | None:
        """The first rule that hits, or None."""
        return next((r for r in self.rules if r.hits(module, kind, shape)), None)

    @staticmethod
    def parse(source: Recipe | str | dict[str, Any] | Path) -> Recipe:
        """Read a recipe from any of its forms; raises RecipeError with the nearest valid name."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, dict):
            return _from_dict(source)
        if isinstance(source, Path) or str(source).endswith((".toml", ".json")):
            return _from_file(Path(source))
        if isinstance(source, str):
            return _from_line(source)
        raise RecipeError("E-RCP-TYPE", f"a recipe cannot be a {type(source).__name__}", "pass a string, a dict, a path or a Recipe")

    def to_dict(self) -> dict[str, Any]:
        """The dict form; `Recipe.parse(recipe.to_dict())` is equal to the recipe."""
        rules = []
        for r in self.rules:
            flat = {k: v for k, v in asdict(r).items() if k != "params"}
            rules.append(flat | (asdict(r.params) if r.method == "bipolar" else {}))
        return {"name": self.name, "rules": rules}

    def preview(self, model: Any) -> list[dict[str, Any]]:
        """Which rule hits which Linear, Conv1D or Embedding module, and which none do; touches nothing."""
        from effllm.runtime.dense import kind_of, matrix

        rows = []
        for name, module in model.named_modules():
            kind = kind_of(module)
            if not kind:
                continue
            n, k = matrix(module).shape
            rule = self.rule_for(name, kind, (n, k))
            index = None if rule is None else self.rules.index(rule)
            what = "no rule" if rule is None else ("dense" if rule.method == "dense" else f"{rule.params.bits}-bit {rule.params.act}")
            rows.append({"module": name, "kind": kind, "shape": (n, k), "rule": index, "method": what})
        return rows


def _from_file(path: Path) -> Recipe:
    try:
        text = path.read_text()
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError("E-RCP-FILE", f"cannot read the recipe {path}: {error}", "give an existing TOML or JSON file") from error
    return _from_dict(data)


def _from_dict(data: dict[str, Any]) -> Recipe:
    _known(data, {"name", "rules"}, "recipe")
    rules = []
    if not isinstance(data.get("rules"), list) or not data["rules"]:
        raise RecipeError("E-RCP-EMPTY", "the recipe has no rules", 'give "rules": [{"match": "*", "method": "bipolar", "bits": 4}]')
    for raw in data["rules"]:
        own = set(Rule.__dataclass_fields__) - {"params"}
        params = set(Bipolar.__dataclass_fields__)
        _known(raw, own | params, "rule")
        method = raw.get("method", "bipolar")
        _method(method, "")
        kind = raw.get("kind", "linear")
        if kind not in KINDS:
            raise RecipeError("E-RCP-VALUE", f"kind {kind!r}", nearest(str(kind), KINDS))
        bipolar = _bipolar({k: v for k, v in raw.items() if k in params}) if method == "bipolar" else Bipolar()
        if raw.get("match", "*").startswith("re:"):
            try:
                re.compile(raw["match"][3:])
            except re.error as error:
                raise RecipeError("E-RCP-REGEX", f"{raw['match']!r} is no regular expression: {error}", "correct the pattern") from error
        rules.append(Rule(params=bipolar, **{k: v for k, v in raw.items() if k in own}))
    return Recipe(tuple(rules), str(data.get("name", "custom")))


def _from_line(line: str) -> Recipe:
    parts = [p.strip() for p in _split(line, "+")]
    if not all(parts):
        raise RecipeError("E-RCP-EMPTY", f"empty part in recipe {line!r}", "write for example 'w4' or 'bipolar(bits=4)'")
    rules: list[Rule] = []
    for part in parts:
        found = re.fullmatch(r"(?:(\w+):)?(\w+)(?:\((.*)\))?", part, re.S)
        if found is None:
            raise RecipeError("E-RCP-FORM", f"cannot read recipe part {part!r}", "the form is [scope:]name(key=value, ...)")
        scope, name, inside = found.groups(default="")
        short = _SHORT.fullmatch(name)
        if scope or not short:
            _method(name, scope)
        values = _arguments(inside)
        if short:
            bits = int(short[1])
            preset = {"bits": bits, "act": short[2] or "a16"}
            values = preset | values
        rules += _whole_model(values) if name != "dense" else [Rule(method="dense", kind="any")]
    return Recipe(tuple(rules), line)


def _whole_model(values: dict[str, Any]) -> list[Rule]:
    """The rules of a one-line bipolar recipe: head and embedding at their own bits, everything else as asked."""
    head = values.pop("head_bits", 8)
    embed = values.pop("embed_bits", head)
    body = _bipolar(values)
    top = replace(body, offset="auto" if body.offset == "affine" else body.offset, solver="search")
    rules = [Rule(match=m, params=_bipolar(asdict(replace(top, bits=head)))) for m in HEAD_NAMES]
    rules.append(Rule(kind="embedding", params=_bipolar(asdict(replace(top, bits=embed)))))
    return [*rules, Rule(params=body)]


def _bipolar(values: dict[str, Any]) -> Bipolar:
    _known(values, set(Bipolar.__dataclass_fields__), "bipolar")
    if values.get("group") == "channel":
        values = values | {"group": CHANNEL}
    made = Bipolar(**values)
    if not isinstance(made.bits, int) or isinstance(made.bits, bool) or not 1 <= made.bits <= 8:
        raise RecipeError("E-RCP-BITS", f"bits={made.bits!r}", "bits is a whole number from 1 to 8")
    if made.group not in (CHANNEL, *GROUPS):
        raise RecipeError("E-RCP-GROUP", f"group={made.group!r}", f"group is one of {GROUPS}, or 'channel'")
    for key, valid in (("offset", OFFSETS), ("solver", SOLVERS), ("act", ACTS)):
        if getattr(made, key) not in valid:
            raise RecipeError("E-RCP-VALUE", f"{key}={getattr(made, key)!r}", nearest(str(getattr(made, key)), valid))
    if not isinstance(made.pad, bool):
        raise RecipeError("E-RCP-VALUE", f"pad={made.pad!r}", "pad is true or false")
    return made


def _method(name: str, scope: str) -> None:
    if scope not in _PLANNED:
        raise RecipeError("E-RCP-SCOPE", f"unknown scope {scope!r}", "scopes are act and kv; weights need none")
    if scope == "" and name in ("bipolar", "dense"):
        return
    if name in _PLANNED[scope]:
        raise RecipeError("E-RCP-PLANNED", f"method {name!r} is not in this version of effllm", "use bipolar, or a later version")
    valid = [*_PLANNED[scope], *(("bipolar", "dense", "w4", "w8", "w4a8", "w3") if not scope else ())]
    raise RecipeError("E-RCP-METHOD", f"unknown method {name!r}", nearest(name, valid))


def _known(given: dict[str, Any], valid: set[str], what: str) -> None:
    for key in given:
        if key not in valid:
            raise RecipeError("E-RCP-KEY", f"unknown {what} key {key!r}", nearest(str(key), valid))


def _split(text: str, at: str) -> list[str]:
    """Split at a separator outside parentheses."""
    out, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == at and depth == 0:
            out.append(text[last:i])
            last = i + 1
    return [*out, text[last:]]


def _arguments(inside: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in filter(None, (p.strip() for p in _split(inside, ","))):
        key, eq, raw = (s.strip() for s in item.partition("="))
        if not eq:
            raise RecipeError("E-RCP-FORM", f"cannot read {item!r}", "arguments are key=value")
        if key in values:
            raise RecipeError("E-RCP-FORM", f"{key!r} is given twice", "give it once")
        lowered = raw.lower()
        if re.fullmatch(r"-?\d+", raw):
            values[key] = int(raw)
        else:
            values[key] = {"true": True, "false": False}.get(lowered, raw.strip("'\""))
    valid = set(Bipolar.__dataclass_fields__) | {"head_bits", "embed_bits"}
    _known(values, valid, "bipolar")
    for key in ("head_bits", "embed_bits"):
        if key in values and (not isinstance(values[key], int) or not 1 <= values[key] <= 8):
            raise RecipeError("E-RCP-BITS", f"{key}={values[key]!r}", "bits is a whole number from 1 to 8")
    return values
