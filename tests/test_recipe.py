"""Recipes in all their forms, and what is wrong with the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effllm.errors import RecipeError
from effllm.recipe import Bipolar, Recipe
from tests.models import Tied


def body(recipe: Recipe) -> Bipolar:
    return recipe.rules[-1].params


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("w8", Bipolar(8)),
        ("w4", Bipolar(4, 32, "auto", "a16")),
        ("w4a8", Bipolar(4, act="a8")),
        ("w3(group=64)", Bipolar(3, 64)),
        ("bipolar(bits=2, group=channel, offset=none, solver=gptq)", Bipolar(2, 0, "none", "a16", "gptq")),
        ("bipolar(bits=5,pad=false)", Bipolar(5, pad=False)),
    ],
)
def test_one_line_forms(line: str, want: Bipolar) -> None:
    recipe = Recipe.parse(line)
    assert body(recipe) == want and recipe.name == line


def test_head_and_embedding_keep_eight_bits_unless_told() -> None:
    recipe = Recipe.parse("w4")
    assert recipe.rule_for("lm_head", "linear", (100, 64)).params.bits == 8
    assert recipe.rule_for("model.embed_tokens", "embedding", (100, 64)).params.bits == 8
    assert recipe.rule_for("model.layers.0.mlp.up_proj", "linear", (100, 64)).params.bits == 4
    assert Recipe.parse("w4(head_bits=6)").rule_for("lm_head", "linear", (1, 1)).params.bits == 6


def test_first_match_wins_and_predicates_count() -> None:
    recipe = Recipe.parse({"rules": [{"match": "re:.*down.*", "method": "dense"}, {"match": "*", "min_in": 128, "bits": 3}, {"bits": 6}]})
    assert recipe.rule_for("a.down_proj", "linear", (8, 512)).method == "dense"
    assert recipe.rule_for("a.up_proj", "linear", (8, 512)).params.bits == 3
    assert recipe.rule_for("a.up_proj", "linear", (8, 64)).params.bits == 6
    assert recipe.rule_for("emb", "embedding", (8, 64)) is None


LINES = [
    "w3", "w4a8(group=128)", "dense", "bipolar(bits=1, offset=none)", "whitened(ratio=0.8, bits=8)", "welore(ratio=.5)", "monarch(blocks=8)",
    "nm(pattern=4:8, bits=4)",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_round_trip_through_dict_json_and_toml(line: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(line)
    assert Recipe.parse(recipe.to_dict()) == recipe
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict()))
    assert Recipe.parse(tmp_path / "r.json") == recipe == Recipe.parse(str(tmp_path / "r.json"))
    rules = "\n".join(
        "[[rules]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in rule.items()) for rule in recipe.to_dict()["rules"]
    )
    (tmp_path / "r.toml").write_text(f"name = {json.dumps(line)}\n{rules}\n")
    assert Recipe.parse(tmp_path / "r.toml") == recipe


@pytest.mark.parametrize(
    ("source", "code", "hint"),
    [
        ("bipolr(bits=4)", "E-RCP-METHOD", "bipolar"),
        ("bipolar(bit=4)", "E-RCP-KEY", "bits"),
        ("bipolar(bits=9)", "E-RCP-BITS", "1 to 8"),
        ("bipolar(bits=0)", "E-RCP-BITS", "1 to 8"),
        ("bipolar(bits=four)", "E-RCP-BITS", "1 to 8"),
        ("w4(group=48)", "E-RCP-GROUP", "32"),
        ("w4(offset=affin)", "E-RCP-VALUE", "affine"),
        ("w4(bits=3, bits=2)", "E-RCP-FORM", "once"),
        ("w4(8)", "E-RCP-FORM", "key=value"),
        ("w4(head_bits=12)", "E-RCP-BITS", "1 to 8"),
        ("monarch(ratio=1.5)", "E-RCP-VALUE", "at most 1"),
        ("monarch(blocks=0)", "E-RCP-VALUE", "whole number"),
        ("whitened(ratio=0)", "E-RCP-VALUE", "above 0"),
        ("whitened(rank=0)", "E-RCP-VALUE", "from 1"),
        ("whitened(bits=9)", "E-RCP-BITS", "16"),
        ("whitened(allocation=unifrom)", "E-RCP-VALUE", "uniform"),
        ("whitend(ratio=0.5)", "E-RCP-METHOD", "whitened"),
        ("nm(pattern=3:5)", "E-RCP-VALUE", "2:4"),
        ("nm(pattern=4:4)", "E-RCP-VALUE", "2:4"),
        ("nm(solver=wnda)", "E-RCP-VALUE", "wanda"),
        ("armor(block=1)", "E-RCP-VALUE", "whole number"),
        ("w4+act:chess(sparsity=0.5)", "E-RCP-PLANNED", "alone"),
        ("w4+kv:geer(bits=4)", "E-RCP-METHOD", "gear"),
        ("w4+kv:gear(bits=3)", "E-RCP-VALUE", "2, 4 or 8"),
        ("w4+kv:gear(bit=4)", "E-RCP-KEY", "bits"),
        ("w4+kv:gear+kv:kivi", "E-RCP-FORM", "one"),
        ("w4+act:ches", "E-RCP-METHOD", "chess"),
        ("act:chess(sparsity=1.0)", "E-RCP-VALUE", "below 1"),
        ("act:chess(sparsity=-0.1)", "E-RCP-VALUE", "below 1"),
        ("act:cats(attention=true)", "E-RCP-KEY", "sparsity"),
        ("act:teal+act:cats", "E-RCP-FORM", "one"),
        ("act:teal(rows=5)", "E-RCP-VALUE", "4"),
        ("w4+cache:gear", "E-RCP-SCOPE", "kv"),
        ("w4+", "E-RCP-EMPTY", "w4"),
        ({"rules": []}, "E-RCP-EMPTY", "rules"),
        ({"rules": [{"mach": "*"}]}, "E-RCP-KEY", "match"),
        ({"rules": [{"match": "re:("}]}, "E-RCP-REGEX", "pattern"),
        ({"rules": [{"kind": "linar"}]}, "E-RCP-VALUE", "linear"),
        ("nowhere.toml", "E-RCP-FILE", "existing"),
        (4, "E-RCP-TYPE", "string"),
    ],
)
def test_what_is_wrong_is_said(source: object, code: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(source)
    assert caught.value.code == code and hint in str(caught.value)


def test_preview_lists_every_module_and_touches_none() -> None:
    model = Tied()
    before = [id(m) for m in model.modules()]
    rows = Recipe.parse({"rules": [{"match": "blocks.0.*", "bits": 4}, {"match": "*.o", "method": "dense"}]}).preview(model)
    by_name = {r["module"]: r for r in rows}
    assert by_name["blocks.0.o"]["method"].startswith("4-bit") and by_name["blocks.1.o"]["method"] == "dense"
    assert by_name["blocks.1.q"]["rule"] is None and by_name["emb"]["method"] == "no rule"
    assert [id(m) for m in model.modules()] == before


def test_an_act_part_stands_beside_the_weights() -> None:
    recipe = Recipe.parse("w4+act:teal(sparsity=0.4, allocation=uniform)")
    assert recipe.act is not None and (recipe.act.name, recipe.act.sparsity, recipe.act.allocation) == ("teal", 0.4, "uniform")
    assert recipe.rules == Recipe.parse("w4").rules
    assert Recipe.parse(recipe.to_dict()) == recipe
    alone = Recipe.parse("act:chess")
    assert [r.method for r in alone.rules] == ["dense"] and Recipe.parse(alone.to_dict()) == alone
    with pytest.raises(RecipeError, match="E-RCP-VALUE"):
        Recipe.parse({"rules": [{"bits": 4}], "act": "chess"})
