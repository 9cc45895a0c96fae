"""Writes docs/how-a-linear-is-rewritten.md: real dumps of one gated MLP on its way through the backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from effllm import backend

PAGE = Path(__file__).with_name("how-a-linear-is-rewritten.md")


class Mlp(nn.Module):
    """The gated MLP of a llama block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., 64) to (..., 64)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def render(recipe: str = "w4a8") -> str:
    """The page's text."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found["before"] = _code(gm)
        done = backend.rewrite(gm, backend.Options.parse({"recipe": recipe, "kernel": "reference"}, None))
        found["after"], found["report"] = _code(done.gm), done.report
        return gm.forward

    with torch.no_grad():
        torch.compile(Mlp(), backend=look, fullgraph=True)(torch.randn(1, 64))
    for p in found["report"].passes:
        p.seconds = 0.0
    report = "\n".join(line.replace(" in 0.00 s", "") for line in str(found["report"]).splitlines())
    return f"""# How a linear is rewritten

Made by `make docs`; every dump is real. The model is the gated MLP of a llama block, the recipe `{recipe}`, the kernel the
reference, so that the page is the same on every machine.

## 1. What Dynamo hands over

A linear is one node, and its weight is an input of the graph.

```
{found["before"]}
```

## 2. After the passes

The incoming graph stays as it is; this is a rewritten copy. The dense weights are no inputs any more. In their place come packed
tensors, which are looked up at each call by the identity and version of the original parameters. The activation is quantized once
for all linears that read it, in plain torch ops that Inductor fuses into the op before.

```
{found["after"]}
```

## 3. What the report says

```
{report}
```

The rest is Inductor's: it sees ordinary ops and one call per packed linear.
"""


def _code(gm: fx.GraphModule) -> str:
    return str(gm.code).strip()


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
