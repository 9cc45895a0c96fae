"""Training of the acceptance head of SpecDec++ (arXiv:2405.19715) for a pair of models.

    head = train_acceptance(model, draft, windows)                       # windows (B, T): text as the model writes it
    effllm.generate(model, prompts, draft=draft, speculative=Speculation("chain", tokens=8, stop=0.3, head=head))

For tokens X of a window the draft proposes Y_i at every position, given X before it, and the label is min(1, q(Y_i) / p(Y_i)). While drafting, the
head sees hidden states of a draft that reads its own tokens; so the draft reads Z, which has Y_i, and with a probability of
`mixing` X_i instead, and the loss is taken where Z_i = Y_i was drafted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.errors import OptionError
from effllm.hf.arena_cache import device_of
from effllm.hf.draft import draft_of
from effllm.runtime.speculation.head import REJECTION_WEIGHT, AcceptanceHead, labels, loss

MIXING = 0.15  # the paper's ratio of target tokens among drafted ones


def train_acceptance(
    model: Any, draft: Any, windows: Tensor, *, temperature: float = 1.0, layers: int = 3, epochs: int = 3, mixing: float = MIXING,
    rejection_weight: float = REJECTION_WEIGHT, lr: float = 1e-3, batch: int = 64, seed: int = 0,
) -> AcceptanceHead:  # fmt: skip
    """A head for `draft` (what effllm.generate takes as draft=) as the draft of `model`, from windows of token ids (B, T), T >= 2.

    temperature 0 trains for greedy decoding: labels are 1 where both models choose the same token. Raises OptionError (E-OPT-VALUE, E-OPT-DRAFT).
    """
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise OptionError("E-OPT-VALUE", f"windows of shape {tuple(windows.shape)}", "give token ids (B, T) with T of 2 or more")
    inner = getattr(model, "_orig_mod", model)
    small = draft_of(inner, draft)
    stream = torch.Generator().manual_seed(seed)
    found = [examples(inner, small, window, temperature, mixing, stream) for window in windows]
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AcceptanceHead(x.shape[1], layers).to(x.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=stream).split(batch):
                optimizer.zero_grad()
                loss(head.logits(x[rows]), y[rows], rejection_weight).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def examples(model: Any, draft: Any, window: Tensor, temperature: float, mixing: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states (n, H), fp32, of the draft at drafted tokens, and their labels (n,)."""
    ids = window.to(device_of(model))
    q = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    p = draft(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    if temperature:
        q, p = (z.div(temperature).softmax(-1) for z in (q, p))
        proposed = torch.multinomial(p.cpu(), 1, generator=stream)[:, 0].to(ids.device)
        accepted = labels(q, p, proposed)
    else:
        proposed = p.argmax(-1)
        accepted = (q.argmax(-1) == proposed).float()
    taken = (torch.rand(len(proposed), generator=stream) >= mixing).to(ids.device)
    read = torch.cat([ids[:1], torch.where(taken, proposed, ids[1:])])
    hidden = draft.base_model(input_ids=read[None], use_cache=False).last_hidden_state[0, 1:].float()
    return hidden[taken].clone(), accepted[taken]
