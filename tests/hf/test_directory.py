"""compress(directory): the same model as in memory, with a bounded peak, and damaged directories refused."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from effllm.compression import compress
from effllm.errors import CheckpointError, WeightError
from effllm.hf import directory
from effllm.runtime.packed import PackedWeight
from tests.hf.tiny import tiny_dir, tiny_llama

IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("recipe", ["w8", "w4", "bipolar(bits=3, group=16, offset=none)"])
def test_same_as_in_memory(tmp_path: Path, tied: bool, shard: str, recipe: str) -> None:
    tiny_llama(tied=tied).save_pretrained(tmp_path, max_shard_size=shard)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "40KB")
    wanted = compress(model, recipe)
    packed, report = compress(str(tmp_path), recipe)
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, model(IDS).logits)
    assert {(d.module, d.code, d.bytes_before, d.bytes_after) for d in report.decisions} == {
        (d.module, d.code, d.bytes_before, d.bytes_after) for d in wanted.decisions
    }
    assert not any(t.is_meta for t in (*packed.parameters(), *packed.buffers()))
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) == tied


def test_calibrated_directory(tmp_path: Path) -> None:
    windows = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    model = LlamaForCausalLM.from_pretrained(tiny_dir(tmp_path)).eval()
    compress(model, "w3", windows)
    packed, _ = compress(tmp_path, "w3", windows)
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, model(IDS).logits)


def test_at_most_two_dense_weights_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    matrices = [p.numel() * p.element_size() for p in model.parameters() if p.dim() == 2]
    alive: dict[int, int] = {}
    peak = 0
    read = directory.DenseReader.read

    def counting(self: directory.DenseReader, name: str) -> Tensor:
        nonlocal peak
        tensor = read(self, name)
        if tensor.dim() == 2:
            key = id(tensor)
            alive[key] = tensor.numel() * tensor.element_size()
            weakref.finalize(tensor, alive.pop, key, None)
            peak = max(peak, sum(alive.values()))
        return tensor

    monkeypatch.setattr(directory.DenseReader, "read", counting)
    compress(tmp_path, "w4")
    assert 0 < peak <= 2 * max(matrices) < sum(matrices)
    assert not alive


PEAK = """
import gc, json, resource, sys, torch
from effllm.compression import compress
from effllm.runtime.packed import packed_weights
torch.set_num_threads(1)
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
compress(sys.argv[1], "w4"); gc.collect()
before = rss()
model, _ = compress(sys.argv[2], "w4")
print(json.dumps({"grown": rss() - before, "packed": sum(w.nbytes for w in packed_weights(model).values())}))
"""


@pytest.mark.slow
def test_peak_memory_of_the_process(tmp_path: Path) -> None:
    tiny_dir(tmp_path / "warm")
    config = tiny_llama().config
    for key, value in {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 4096, "tie_word_embeddings": False}.items():
        setattr(config, key, value)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 4, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float32)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = max(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "big", max_shard_size="100MB")
    del model
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "warm"), str(tmp_path / "big")], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    slack = 48 * 2**20  # the allocator's own, and cache-sized temporaries of the search
    assert found["grown"] <= found["packed"] + 2 * layer + slack
    assert found["packed"] + 2 * layer + slack < dense / 2


def test_nan_in_a_shard_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightError) as caught:
        compress(tmp_path, "w4")
    assert caught.value.code == "E-WGT-NAN" and "layers.1.mlp.down_proj" in caught.value.cause


def test_damaged_directories(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    no_weights = tiny_dir(tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    cut = tiny_dir(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    lost = tmp_path / "lost"
    tiny_llama().save_pretrained(lost, max_shard_size="40KB")
    next(lost.glob("model-00002-*.safetensors")).unlink()
    cases = {tmp_path / "none": "NONE", empty: "NONE", no_weights: "NONE", cut: "TRUNCATED", lost: "TRUNCATED"}
    for folder, code in cases.items():
        with pytest.raises(CheckpointError) as caught:
            compress(folder, "w4")
        assert caught.value.code == f"E-CKP-{code}", folder
        assert caught.value.next_step


def test_packed_weights_only(tmp_path: Path) -> None:
    packed, _ = compress(tiny_dir(tmp_path), "w4")
    assert {n.rsplit(".", 2)[-2] for n, _ in packed.named_parameters()} <= {"input_layernorm", "post_attention_layernorm", "norm"}
    assert sum(isinstance(m, PackedWeight) for m in packed.modules()) == 15
