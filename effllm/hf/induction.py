"""A model with hand-set weights that only retrieves: it repeats what followed the last two tokens, and finds the largest number.

For checks of caches over a session. Every answer depends on one place of the context and on nothing that was learned, so a dense cache is always
right and a wrong answer is the cache's doing. Two layers of a Llama without feed-forward parts:

    layer 0   two heads attend to the tokens one and two before (fast rotary channels see positions), and write down which they were
    layer 1   one head looks for the place whose two tokens before are the last two here, and repeats its token (an induction head over pairs);
              another, asked by MAX, attends to the largest number token

Queries of MAX and of all other tokens are told apart by two channels of the embedding; a head that is not asked attends to the first token, BOS, which
says nothing. Vocabulary: BOS, MAX, `numbers` number tokens in rising order, then words. Codes of tokens are random unit vectors, so neighbouring scores
are near one another and a coarse cache does make mistakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS, MAX, FIRST = 0, 1, 2  # FIRST: the token of number 0
CODE, STEPS, DIM, FAST, SLOW = 32, 8, 128, 16, 30  # channels of a code, of a number; head size; rotary pairs that see positions, that do not move
_CODE, _BEFORE, _BEFORE2, _OUT, _NUMBER, _BOS, _MAX, _OTHER, _ONE = 0, 32, 64, 96, 128, 136, 137, 138, 139  # places in the residual stream
HIDDEN = 160


def slow(count: int) -> list[int]:
    """`count` channels of a head that the rotation leaves alone: half-split pairs from SLOW on."""
    pairs = range(SLOW, DIM // 2)
    return [p + half for half in (0, DIM // 2) for p in pairs][:count]


def number_features(numbers: int) -> Tensor:
    """(numbers, STEPS), each between 0 and 1: channel j rises while the number passes the j-th part of the range."""
    part = numbers / STEPS
    return ((torch.arange(numbers)[:, None] - part * torch.arange(STEPS)) / part).clamp(0, 1)


@torch.no_grad()
def induction_model(words: int = 448, numbers: int = 64, sharp: float = 60.0, longest: int = 8192, seed: int = 0) -> Any:
    """The model, in fp32: 2 layers, 4 query heads on 2 key heads of 128 channels, vocabulary 2 + numbers + words. `sharp` scales scores: the best match
    beats one with a code of cosine c by sharp * (1 - c)."""
    vocabulary = FIRST + numbers + words
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=DIM,
        max_position_embeddings=longest, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None, pad_token_id=BOS, rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e13},
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for p in model.parameters():
        p.zero_()
    codes = torch.nn.functional.normalize(torch.randn(vocabulary, CODE, generator=torch.Generator().manual_seed(seed)), dim=1)
    codes[BOS] = 0
    _embed(model, codes, numbers)
    first, second = model.model.layers
    for norm in (model.model.norm, *(n for layer in (first, second) for n in (layer.input_layernorm, layer.post_attention_layernorm))):
        norm.weight.fill_(1)
    _positions(first.self_attn)
    _retrieval(second.self_attn, sharp)
    model.lm_head.weight[:, _OUT : _OUT + CODE] = 10 * codes
    return model


def _embed(model: Any, codes: Tensor, numbers: int) -> None:
    e = model.model.embed_tokens.weight
    e[:, _CODE : _CODE + CODE] = codes
    e[FIRST : FIRST + numbers, _NUMBER : _NUMBER + STEPS] = number_features(numbers)
    e[BOS, _BOS] = 1
    e[MAX, _MAX] = 1
    e[:, _OTHER] = 1
    e[MAX, _OTHER] = 0
    e[:, _ONE] = 1
    e[:, HIDDEN - 1] = (16 - e.square().sum(1)).sqrt()  # all tokens are of length 4, so that the norm scales them alike


def _positions(attention: Any) -> None:
    """Key head 0: the same key everywhere, which the rotation turns by position. Query heads 0 and 1 look for it one and two steps back."""
    unit = 4 / HIDDEN**0.5  # undoes the norm
    rate = 1e13 ** (-torch.arange(FAST) / (DIM // 2))
    attention.k_proj.weight[:FAST, _ONE] = unit
    for head, (steps, place) in enumerate(((1, _BEFORE), (2, _BEFORE2))):
        q, scale = attention.q_proj.weight[head * DIM : (head + 1) * DIM], 40 * DIM**0.5 * unit
        q[:FAST, _ONE] = (steps * rate).cos() * scale
        q[DIM // 2 : DIM // 2 + FAST, _ONE] = -(steps * rate).sin() * scale
        _write(attention, head, place)
    _read(attention, 0, unit)


def _retrieval(attention: Any, sharp: float) -> None:
    """Key head 0: what stood before each token; query head 0 what stands here. Key head 1: the number that a token is; query head 2 wants the largest."""
    unit, still, eye = (18 / HIDDEN) ** 0.5, torch.tensor(slow(2 * CODE + 1)), torch.arange(CODE)
    q, k, scale = attention.q_proj.weight, attention.k_proj.weight, DIM**0.5 * unit
    for part, seen, here in ((0, _BEFORE, _CODE), (1, _BEFORE2, _BEFORE)):
        at = still[part * CODE : (part + 1) * CODE]
        k[at, seen + eye] = unit
        q[at, here + eye] = sharp * scale
    k[still[-1], _BOS] = unit
    q[still[-1], _MAX] = 3 * sharp * scale
    number, asked = DIM + still[:STEPS], 2 * DIM + still[:STEPS]
    k[number, _NUMBER + torch.arange(STEPS)] = unit
    q[asked, _MAX] = 80 * scale
    k[DIM + still[-1], _BOS] = unit
    q[2 * DIM + still[-1], _OTHER] = 30 * scale
    for key_head, head in ((0, 0), (1, 2)):
        _read(attention, key_head, unit)
        _write(attention, head, _OUT)


def _read(attention: Any, key_head: int, unit: float) -> None:
    attention.v_proj.weight[key_head * DIM + torch.arange(CODE), _CODE + torch.arange(CODE)] = unit


def _write(attention: Any, head: int, place: int) -> None:
    attention.o_proj.weight[place + torch.arange(CODE), head * DIM + torch.arange(CODE)] = 1
