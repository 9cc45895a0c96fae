"""The runner with static caches gives what plain forwards give, again and again, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from effllm.hf.static import StaticRunner
from tests.hf.tiny import tiny_llama


@pytest.mark.parametrize("compiled", [False, True])
def test_runner_equals_plain_forwards(compiled):
    model = tiny_llama(torch.float32)
    wrap = (lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend="eager")) if compiled else None
    runner = StaticRunner(model, wrap, length=32, prefill_length=24)
    ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second pass would show what the first left in the caches
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        assert torch.allclose(runner.prefill(ids)[0], whole, atol=1e-4)
        tokens, outs = runner.decode(runner.start(ids[:, :9]), 9, 7)
        with torch.no_grad():
            teacher = torch.cat([ids[:, :9], torch.tensor([tokens])], 1)
            want = model(input_ids=teacher, use_cache=False).logits[0]
        assert torch.allclose(torch.cat(outs), want[9:], atol=1e-4)
        assert tokens == want[8:-1].argmax(-1).tolist()


def test_runners_do_not_share_compiled_graphs():
    seen = []

    def wrap(step):
        return torch.compile(step, fullgraph=True, dynamic=False, backend=lambda gm, _: seen.append(1) or gm.forward)

    for _ in range(2):
        runner = StaticRunner(tiny_llama(), wrap, length=32, prefill_length=8)
        ids = torch.full((1, 8), 5)
        runner.prefill(ids)
        runner.decode(runner.start(ids), 8, 4)
    assert len(seen) == 4  # prefill and decode of each, none recompiled over four steps
