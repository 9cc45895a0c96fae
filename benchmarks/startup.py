"""From nothing to the first tokens, and the memory it takes: cold (packing the demo model) and warm (a saved checkpoint), each in a process of its own.

    python benchmarks/startup.py [--recipe w4] [--threads 2] [--tokens 32]

Cold starts with empty caches of Inductor; the kernels' library, built once per machine, is there. The first token comes out of the prompt, which the
eager model reads; `compiled_s` is when the first compiled step is done. Peak memory is that of the whole process, with Python, torch and the compiler.
Results go to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "startup.json"


def child(what: str, recipe: str, folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """One start; seconds since the process began, and bytes."""
    began = time.perf_counter()
    found: dict[str, Any] = {"start": what}

    def mark(name: str) -> None:
        found[name] = time.perf_counter() - began

    import torch

    import effllm
    from effllm.runtime.packed import packed_weights

    torch.set_num_threads(threads)
    mark("imported_s")
    if what == "cold":
        model, _ = effllm.load_demo()
        effllm.compress(model, recipe)
        mark("packed_s")
        effllm.save(model, folder)
    else:
        model = effllm.load(folder)
        mark("loaded_s")
    for n, event in enumerate(effllm.stream(model, [list(range(1000, 1032))], max_new_tokens=tokens, eos_token_id=-1, compile={"capacity": 256})):
        if n < 2:
            mark("first_token_s" if n == 0 else "compiled_s")
        del event
    mark("done_s")
    weights = packed_weights(model).values()
    found["packed_bytes"] = sum(w.nbytes for w in weights)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.recipe, Path(args.child[1]), args.tokens, args.threads)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for what in ("cold", "warm"):
            given = ["--recipe", args.recipe, "--threads", str(args.threads), "--tokens", str(args.tokens)]
            command = [sys.executable, __file__, *given, "--child", what, f"{folder}/packed"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            shown = (f"{k} {v / 1e6:.0f} MB" if k.endswith("bytes") else f"{k} {v:.1f}" if isinstance(v, float) else v for k, v in rows[-1].items())
            print("  ".join(shown))
    from effllm.autotune.machine import describe

    RESULTS.write_text(json.dumps({"machine": describe(), "recipe": args.recipe, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
