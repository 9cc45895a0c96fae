"""Writes docs/support-matrix.md from the registries: which kernel takes which op, bits, group and grid.

Verdicts are about the problem, not about this machine's instruction set, so that the page is the same wherever it is made.
"""

from __future__ import annotations

from pathlib import Path

from effllm.errors import OptionError
from effllm.hf.variants import BASELINES
from effllm.lowering import providers
from effllm.lowering.op import OPS
from effllm.methods import METHODS
from effllm.methods.bipolar import ACTS, OFFSETS, SOLVERS
from effllm.runtime.formats import FORMATS
from effllm.runtime.formats.bipolar import GRIDS, GROUPS
from effllm.runtime.layouts import LAYOUTS

PAGE = Path(__file__).with_name("support-matrix.md")


def render() -> str:
    """The page's text."""
    lines = ["# Support matrix", "", "Made by `make docs` from the registries; do not edit.", ""]
    lines += ["| what | values |", "|---|---|"]
    lines.append(f"| formats | {', '.join(f'{n} v{m.version}' for n, m in FORMATS.items())} |")
    lines.append(f"| recipe methods | {', '.join(METHODS)} |")
    lines.append("| bits | 1 to 8 |")
    lines.append(f"| group | {', '.join(map(str, GROUPS))}, channel |")
    names = {"grids": GRIDS, "offset": OFFSETS, "activations": ACTS, "solvers": SOLVERS, "layouts": LAYOUTS, "bench baselines": BASELINES}
    for name, values in names.items():
        lines.append(f"| {name} | {', '.join(values)} |")
    lines += ["", "| op | kernel | device | reads layout |", "|---|---|---|---|"]
    for op in sorted(OPS):
        for provider in sorted(OPS[op].providers.values(), key=lambda p: (p.device, p.name)):
            lines.append(f"| {op} | {provider.name} | {provider.device} | {provider.layout} |")
    lines += ["", "`effllm doctor` says which of these run on a machine, and why not the others.", ""]
    return "\n".join(lines)


def main() -> None:
    """Load every provider and write the page."""
    for device in ("cpu", "cuda"):
        missing = providers.load(device)
        if missing:
            raise OptionError("E-OPT-DOCS", f"the {device} kernels are missing: {missing}", "make the page where a compiler and Triton are installed")
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
