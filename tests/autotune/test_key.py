"""Keys, buckets, and the hash of the implementing sources: what changes it and what must not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effllm.autotune import normal, source
from effllm.autotune.key import BUCKETS, Key, align_class, bucket, provider_source, source_hash
from effllm.errors import TuneError
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem
from tests.autotune.made import key

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem("bipolar_linear", 576, 1536, 4, 32, True, dtype=torch.bfloat16)


@given(st.integers(0, 1 << 20))
def test_a_bucket_is_the_smallest_that_holds_the_rows(m):
    found = bucket(m)
    assert found in BUCKETS and (m <= found or found == 2048)
    assert all(b < m for b in BUCKETS if b < found)


def test_negative_rows_are_an_error():
    with pytest.raises(TuneError, match="E-TUN-KEY"):
        bucket(-1)


def test_the_class_of_an_alignment():
    assert [align_class(v) for v in (0, 16, 48, 24, 4, 6, 7)] == [16, 16, 16, 8, 4, 2, 1]
    assert align_class(64, 8, 32) == 8


def test_the_key_of_a_problem_holds_all_it_is():
    made = Key.of(PROBLEM, "cpu-avx2", 3, source="s", align=8, bias=True)
    assert (made.op, made.m_bucket, made.align, made.device) == ("bipolar_linear", 4, 8, "cpu")
    assert made.problem["dtype"] == "bfloat16" and made.problem["bias"] is True and "m" not in made.problem and "op" not in made.problem
    assert set(made.problem) >= {"n", "k", "bits", "group", "affine", "act", "dtype", "scale_dtype", "device"}
    with pytest.raises(TuneError, match="dynamic"):
        Key.of(PROBLEM, "cpu-avx2", source="s")


def test_keys_are_equal_by_value_whatever_the_order():
    a, b = key(), Key("bipolar_linear", "cpu-avx512", "aaaa", dict(reversed(key().problem.items())), 1)
    assert a == b and hash(a) == hash(b)
    others = [key(2), key(source="b"), key(provider="cpu-avx2"), key(align=4), key(op="other"), key(n=577), key(affine=1), key(extra=None)]
    assert len({a, *others}) == 1 + len(others)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1], torch.float32, b"x"])
def test_what_has_no_json_form_is_refused(value):
    with pytest.raises(TuneError, match="E-TUN-KEY"):
        key(n=value)


@pytest.mark.parametrize("wrong", [{"m_bucket": 0}, {"m_bucket": True}, {"align": "16"}, {"align": None}, {"problem": {"source": "x"}}])
def test_a_key_that_could_not_be_read_back_is_refused(wrong):
    with pytest.raises(TuneError, match="E-TUN-KEY"):
        Key(**{"op": "o", "provider": "p", "source": "s", "problem": {}, "m_bucket": 1, "align": 16} | wrong)


@pytest.mark.parametrize("op", ["../../etc/passwd", "a/b", "", "a.b"])
def test_an_op_that_is_no_word_is_refused(op):
    with pytest.raises(TuneError, match="E-TUN-KEY"):
        key(op=op)


MAIN = '''"""Doc."""
from pkg.kernels.helper import scale
def run(x: int) -> int:
    """Doc."""
    return scale(x) + 1
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "main.py": MAIN,
        "helper.py": "from pkg.kernels.deep import base\ndef scale(x):\n    return base(x) * 2\n",
        "deep/__init__.py": "from pkg.kernels.deep.leaf import base\n",
        "deep/leaf.py": "def base(x):\n    return x\n",
        "other.py": "y = 1\n",
        "__init__.py": "import pkg.kernels.other\n",
        "named.py": "import importlib\nm = importlib.import_module('pkg.kernels.other')\n",
        "relative.py": "from .helper import scale\nfrom . import other\n",
        "unit.cpp": '#include "a.h"\nint f() { return A; }\n',
        "a.h": '#pragma once\n#include "b.h"\n#define A (B + 1)\n',
        "b.h": "#define B 2\n",
    }
    for name, text in files.items():
        path = tmp_path / "pkg" / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def hashed(tree: Path, *names: str, **more: object) -> str:
    return source_hash([tree / "pkg/kernels" / n for n in names], within=("pkg.kernels",), root=tree, **more)


def reached(tree: Path, *names: str) -> set[str]:
    found = source.reachable([tree / "pkg/kernels" / n for n in names], within=("pkg.kernels",), root=tree)
    return {str(p.relative_to(tree / "pkg/kernels")) for p in found}


def edit(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / "pkg/kernels" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Doc."""\nfrom', '"""Another text."""\nfrom'),
        ('    """Doc."""\n', ""),
        ("    return", "    # why\n\n    return"),
        ("scale(x) + 1", "(scale( x )\n            + 1)"),
        ("scale(x) + 1", "scale(x) + 0x1"),
    ],
)
def test_formatting_does_not_matter(tree, old, new):
    before = hashed(tree, "main.py")
    edit(tree, "main.py", old, new)
    assert hashed(tree, "main.py") == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("main.py", "+ 1", "+ 2"),
        ("main.py", "+ 1", "+ 1.0"),
        ("main.py", "+ 1", "+ True"),
        ("main.py", "+ 1", "- 1"),
        ("main.py", "x: int", "x: float"),
        ("helper.py", "* 2", "* 3"),
        ("deep/__init__.py", "import base", "import base as base, extra"),
        ("deep/leaf.py", "return x", "return -x"),
    ],
)
def test_a_changed_helper_changes_the_hash(tree, name, old, new):
    before = hashed(tree, "main.py")
    edit(tree, name, old, new)
    assert hashed(tree, "main.py") != before


def test_what_is_not_reached_does_not_matter(tree):
    before = hashed(tree, "main.py")
    edit(tree, "other.py", "1", "2")
    assert hashed(tree, "main.py") == before
    assert reached(tree, "main.py") == {"main.py", "helper.py", "deep/__init__.py", "deep/leaf.py"}


def test_edges_by_string_and_by_relative_import(tree):
    assert reached(tree, "named.py") == {"named.py", "other.py"}
    assert reached(tree, "relative.py") == {"relative.py", "other.py"} | reached(tree, "helper.py")


def test_a_module_left_out_is_not_followed(tree):
    before = hashed(tree, "main.py", without=["pkg.kernels.helper"])
    edit(tree, "helper.py", "* 2", "* 3")
    assert hashed(tree, "main.py", without=["pkg.kernels.helper"]) == before


def test_two_files_that_swap_their_contents_are_other_sources(tree):
    before = hashed(tree, "other.py", "named.py")
    a, b = (tree / "pkg/kernels" / n for n in ("other.py", "named.py"))
    text = a.read_text()
    a.write_text(b.read_text())
    b.write_text(text)
    assert hashed(tree, "other.py", "named.py") != before


@pytest.mark.parametrize(
    ("name", "old", "new", "same"),
    [
        ("unit.cpp", "int f", "/* a\n comment */ int  f", True),
        ("unit.cpp", "return A;", "return A; /* } */", True),
        ("unit.cpp", "return A", "return -A", False),
        ("a.h", "B + 1", "B + 2", False),
        ("b.h", "B 2", "B 3", False),
        ("b.h", "#define B 2", "// two\n\n#define B   2", True),
    ],
)
def test_headers_belong_to_a_unit_and_comments_do_not(tree, name, old, new, same):
    before = hashed(tree, "unit.cpp")
    edit(tree, name, old, new)
    assert (hashed(tree, "unit.cpp") == before) == same


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('s = "// no comment";  // one', 's = "// no comment";'),
        ('s = "a  b";', 's = "a  b";'),
        ("c = '\"'; /* x */ d", "c = '\"'; d"),
        ('r = R"x(// "quoted" /* )x"; // y', 'r = R"x(// "quoted" /* )x";'),
        ("n = 1'000; // it's", "n = 1'000;"),
        ("#define A \\\n  1\nint b;", "#define A 1\nint b;"),
        ("// a \\\n still the comment\nx", "x"),
        ("a / b", "a / b"),
    ],
)
def test_cpp_is_reduced_to_what_counts(text, plain):
    assert normal.cpp(text) == plain


def test_an_edge_that_leads_nowhere_is_an_error(tree):
    edit(tree, "a.h", "b.h", "gone.h")
    with pytest.raises(TuneError, match=r"gone\.h"):
        hashed(tree, "unit.cpp")
    edit(tree, "main.py", "kernels.helper", "kernels.gone")
    with pytest.raises(TuneError, match=r"kernels\.gone"):
        hashed(tree, "main.py")
    edit(tree, "helper.py", "def scale", "def def scale")
    with pytest.raises(TuneError, match="cannot parse"):
        hashed(tree, "helper.py")
    with pytest.raises(TuneError, match="cannot read"):
        hashed(tree, "missing.py")


def test_the_kernels_of_this_package():
    def names(*files: str, without: Iterable[str] = ()) -> set[str]:
        return {p.name for p in source.reachable([source.KERNELS / f for f in files], without=without)}

    compiled = {p.name for p in (source.KERNELS / "triton").glob("*.py") if "@triton.jit" in p.read_text()}
    providers.load("cpu")
    chosen_by = [f"effllm.kernels.triton.{m}" for m in ("choose", "cost", "kv_cost", "rotated_cost", "space", "lowrank_cost", "monarch_choose")]
    reached = {op: names(f"triton/{source.launcher(op)}", without=chosen_by) for op in OPS}
    triton, monarch = reached["bipolar_linear"], reached["monarch_linear"]
    assert compiled <= set().union(*reached.values()), "a Triton kernel that no op's hash covers"
    assert {"nm.py"} <= reached["nm_linear"] and {"nm.py"} <= reached["armor_linear"] and "skip.py" in reached["sparse_up_bipolar_linear"]
    assert {"monarch_gemv.py", "monarch_gemm.py"} <= monarch and not {"monarch_choose.py", "cost.py", "choose.py", "gemv.py"} & monarch
    assert provider_source("triton", "monarch_linear") != provider_source("triton", "bipolar_linear")
    assert {"monarch.cpp", "monarch.h", "monarch_codes.h", "bipolar.h", "gemv.h", "phases.h"} <= names("cpu/monarch.cpp")
    assert "config.py" in triton and not {"choose.py", "cost.py", "space.py"} & triton
    assert provider_source("triton", "bipolar_linear") == source_hash([source.KERNELS / "triton" / "launch.py"], without=chosen_by)
    assert {"bipolar.cpp", "bipolar.h", "vector.h"} <= names("cpu/bipolar.cpp") and "attention.cpp" not in names("cpu/bipolar.cpp")
    assert provider_source("triton", "lowrank_linear") == source_hash([source.KERNELS / "triton" / "lowrank_launch.py"], without=chosen_by)
    hashes = [provider_source(p, o) for p, o in (("triton", "bipolar_linear"), ("cpu-avx2", "bipolar_linear_a8"), ("cpu-avx2", "decode_attention"))]
    assert len(set(hashes)) == 3 and all(len(h) == 16 for h in hashes)


def test_every_registered_kernel_has_a_source_hash():
    providers.load("cpu")
    for op in OPS.values():
        for provider in op.providers.values():
            if provider.device == "cpu":
                assert provider_source(provider.name, op.name)


def test_a_provider_without_sources_is_an_error():
    with pytest.raises(TuneError, match="did you mean 'triton'"):
        provider_source("tritn", "bipolar_linear")


def test_hashing_triton_kernels_imports_no_triton():
    code = "import sys; from effllm.autotune.key import provider_source; provider_source('triton', 'bipolar_linear'); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
