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

from effllm.errors import CacheError, RecipeError, nearest
from effllm.methods import METHODS, Activation, Bipolar, Method, base
from effllm.runtime.caches import base as caches

KINDS = ("linear", "embedding", "any")
_SHORT = re.compile(r"w([1-8])(a8|a16)?")
_SCOPES = ("act", "kv")
_PLANNED = {
    "kv": ("kivi", "gear", "mustafar", "matryoshka", "ems", "bfp"),
}
HEAD_NAMES = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "proj_out", "output_projection", "*.output_projection")


@dataclass(frozen=True)
class Rule:
    """`match` is a glob over module names, or a regex after "re:"; `kind` and the size bounds narrow it further.

    `params` say what is done (see effllm.methods); `method` is their name, or "dense" to leave the module alone.
    """

    match: str = "*"
    method: str = "bipolar"
    params: Method = field(default_factory=Bipolar)
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
    """Ordered rules; the first that hits a module decides. `name` is what the user wrote, `act` which activations are skipped.

    `kv` is the format of key-value caches as text (see runtime/caches/base.py), None for dense ones: `hf.generate` and the command line
    make such a cache. The backend fuses whatever cache a model is called with.
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    act: Activation | None = None
    kv: str | None = None

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
            rules.append(flat | ({} if r.method == "dense" else r.params.to_dict()))
        act = {} if self.act is None else {"act": self.act.to_dict()}
        return {"name": self.name, "rules": rules} | act | ({} if self.kv is None else {"kv": self.kv})

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
            what = "no rule" if rule is None else ("dense" if rule.method == "dense" else rule.params.label)
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
    _known(data, {"name", "rules", "act", "kv"}, "recipe")
    rules = []
    act = _act_of(data["act"]) if "act" in data else None
    if not isinstance(data.get("rules"), list) or not data["rules"]:
        raise RecipeError("E-RCP-EMPTY", "the recipe has no rules", 'give "rules": [{"match": "*", "method": "bipolar", "bits": 4}]')
    for raw in data["rules"]:
        method = raw.get("method", "bipolar")
        _method(method, "")
        own = set(Rule.__dataclass_fields__) - {"params"}
        params = set() if method == "dense" else set(METHODS[method].settings())
        _known(raw, own | params, "rule")
        kind = raw.get("kind", "linear")
        if kind not in KINDS:
            raise RecipeError("E-RCP-VALUE", f"kind {kind!r}", nearest(str(kind), KINDS))
        if raw.get("match", "*").startswith("re:"):
            try:
                re.compile(raw["match"][3:])
            except re.error as error:
                raise RecipeError("E-RCP-REGEX", f"{raw['match']!r} is no regular expression: {error}", "correct the pattern") from error
        made = Bipolar() if method == "dense" else METHODS[method].of(method, {k: v for k, v in raw.items() if k in params})
        _fits(method, kind)
        rules.append(Rule(params=made, **{k: v for k, v in raw.items() if k in own}))
    kv = None if data.get("kv") is None else _cache_text(str(data["kv"]))
    return Recipe(tuple(rules), str(data.get("name", "custom")), act, kv)


def _act_of(raw: Any) -> Activation:
    if not isinstance(raw, dict):
        raise RecipeError("E-RCP-VALUE", f"act={raw!r}", 'act is a table such as {"method": "chess", "sparsity": 0.5}')
    return Activation.from_dict(raw)


def _from_line(line: str) -> Recipe:
    parts = [p.strip() for p in _split(line, "+")]
    if not all(parts):
        raise RecipeError("E-RCP-EMPTY", f"empty part in recipe {line!r}", "write for example 'w4' or 'bipolar(bits=4)'")
    rules: list[Rule] = []
    act: Activation | None = None
    kv: str | None = None
    for part in parts:
        found = re.fullmatch(r"(?:(\w+):)?(\w+)(?:\((.*)\))?", part, re.S)
        if found is None:
            raise RecipeError("E-RCP-FORM", f"cannot read recipe part {part!r}", "the form is [scope:]name(key=value, ...)")
        scope, name, inside = found.groups(default="")
        short = _SHORT.fullmatch(name)
        if scope == "act":
            if act is not None:
                raise RecipeError("E-RCP-FORM", f"{part!r} is a second act part", "give one")
            act = Activation.of(name, _arguments(inside))
            continue
        if scope or not short:
            _method(name, scope)
        values = _arguments(inside)
        if scope == "kv":
            if kv is not None:
                raise RecipeError("E-RCP-FORM", f"two kv parts in {line!r}", "give one cache format")
            kv = _cache(name, values)
            continue
        if short and not scope:
            name, values = "bipolar", {"bits": int(short[1]), "act": short[2] or "a16"} | values
        rules += [Rule(method="dense", kind="any")] if name == "dense" else _whole_model(name, values)
    return Recipe(tuple(rules) or (Rule(method="dense", kind="any"),), line, act, kv)


def _cache(name: str, values: dict[str, Any]) -> str:
    """The text of a cache format."""
    try:
        return caches.make(name, values).spec
    except CacheError as error:
        raise RecipeError(error.code.replace("KVC", "RCP"), f"kv: {error.cause}", error.next_step) from error


def _cache_text(text: str) -> str:
    try:
        return caches.parse(text).spec
    except CacheError as error:
        raise RecipeError(error.code.replace("KVC", "RCP"), f"kv: {error.cause}", error.next_step) from error


def _whole_model(name: str, values: dict[str, Any]) -> list[Rule]:
    """The rules of a one-line recipe: head and embedding at their own bits, everything else as asked.

    Methods other than bipolar leave head and embedding dense unless `head_bits` or `embed_bits` is given.
    """
    head = values.pop("head_bits", 8 if name == "bipolar" else None)
    embed = values.pop("embed_bits", head)
    body = METHODS[name].of(name, values)
    top = Bipolar()
    if isinstance(body, Bipolar):
        top = replace(body, offset="auto" if body.offset == "affine" else body.offset, solver="search")
    heads = Rule(method="dense") if head is None else Rule(params=_checked(replace(top, bits=head), "head_bits"))
    table = Rule(method="dense") if embed is None else Rule(params=_checked(replace(top, bits=embed), "embed_bits"))
    return [*(replace(heads, match=m) for m in HEAD_NAMES), replace(table, kind="embedding"), Rule(method=name, params=body)]


def _checked(params: Bipolar, key: str) -> Bipolar:
    base.bits(params.bits, key)
    return params


def _fits(method: str, kind: str) -> None:
    if kind != "linear" and method not in ("bipolar", "dense"):
        raise RecipeError("E-RCP-VALUE", f"{method} for kind {kind!r}", "only bipolar packs embeddings; write a rule of its own for them")


def _method(name: str, scope: str) -> None:
    if scope and scope not in _SCOPES:
        raise RecipeError("E-RCP-SCOPE", f"unknown scope {scope!r}", "scopes are act and kv; weights need none")
    if not scope and (name == "dense" or name in METHODS):
        return
    if scope == "kv" and name in caches.formats():
        return
    if name in _PLANNED.get(scope, ()):
        raise RecipeError("E-RCP-PLANNED", f"method {name!r} is not in this version of effllm", "use a weight method alone, or a later version")
    valid = sorted({*_PLANNED[scope], *(caches.formats() if scope == "kv" else ())}) if scope else (*METHODS, "dense", "w4", "w8", "w4a8", "w3")
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
        elif re.fullmatch(r"-?(\d+\.\d*|\.\d+|\d+e-?\d+)", lowered):
            values[key] = float(raw)
        else:
            values[key] = {"true": True, "false": False}.get(lowered, raw.strip("'\""))
    return values
