"""Two processes on the CPU: DDP and FSDP2 compute the gradients of one process, and what FSDP2 gathers is saved as ever."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import inlay
from inlay.methods.bottleneck.presets import preset_fields

WORLD = 2
TARGETS: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"]}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}
COMPACTER = preset_fields("compacter") | {"reduction_factor": 2, "phm_dim": 2}
CONFIGS: dict[str, Any] = {
    "lora": lambda: inlay.LoraConfig(**TARGETS),
    "dora": lambda: inlay.LoraConfig(use_dora=True, **TARGETS),
    "vera": lambda: inlay.VeraConfig(vera_dropout=0.0, **TARGETS),
    "shira": lambda: inlay.ShiraConfig(**TARGETS),
    "bottleneck": lambda: inlay.BottleneckConfig(**preset_fields("houlsby") | {"reduction_factor": 4}),
    "compacter": lambda: inlay.BottleneckConfig(**COMPACTER | {"shared_phm_rule": False}),
    "prompt": lambda: inlay.PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: inlay.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
    "prefix": lambda: inlay.PrefixTuningConfig(**PROMPT),
    "prefix-projection": lambda: inlay.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=8, **PROMPT
    ),
}


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    config = tf.BertConfig(
        vocab_size=40,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
        **sizes,
    )
    model = inlay.get_peft_model(tf.BertForSequenceClassification(config), CONFIGS[name]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.train()


def gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, p in model.named_parameters():
        if p.grad is not None:
            yield (
                key.removeprefix("module."),
                p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone(),
            )


def step(model: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss on some rows of a batch."""
    torch.manual_seed(1)
    ids, labels = torch.randint(3, 40, (4, 6)), torch.tensor([0, 1, 2, 1])
    model.zero_grad()
    model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), labels=labels[rows]).loss.backward()
    return dict(gradients(model))


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.get_base_model().bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def both_ways(rank: int, folder: str, names: list[str]) -> None:
    """Run in each process."""
    if sys.platform == "linux":  # elsewhere the loopback has other names
        os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    own = slice(2 * rank, 2 * rank + 2)
    for name in names:
        wanted = step(adapted(name), slice(0, 4))
        assert max(g.abs().max() for g in wanted.values()) > 1e-3
        for wrap in (DistributedDataParallel, sharded):
            model = adapted(name)
            wrapped = wrap(model)
            for _ in range(2):  # the second time, all hooks are there and buffers are filled
                got = step(wrapped, own)
            assert got.keys() == wanted.keys(), (name, wrap)
            for key, g in got.items():
                close = torch.allclose(g, wanted[key], rtol=1e-4, atol=1e-6)
                assert close, (name, wrap, key, (g - wanted[key]).abs().max())
        state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
        with pytest.raises(ValueError, match="spread over several devices; gather them"):
            model.save_pretrained(f"{folder}/spread")
        assert not Path(folder, "spread").exists()
        if rank == 0:
            model.save_pretrained(f"{folder}/{name}", state_dict=state)
    dist.destroy_process_group()


def test_ddp_and_fsdp_compute_what_one_process_computes(tmp_path: Path) -> None:
    mp.spawn(both_ways, (str(tmp_path), list(CONFIGS)), WORLD)
    for name in CONFIGS:
        adapted(name).save_pretrained(tmp_path / "alone" / name)
        got, wanted = (
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (tmp_path, tmp_path / "alone")
        )
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(got[key], value), (name, key)


def test_a_wrong_gradient_would_be_seen(tmp_path: Path) -> None:
    """Half of the batch has other gradients than all of it."""
    model = adapted("lora")
    half, whole = step(model, slice(0, 2)), step(model, slice(0, 4))
    with pytest.raises(AssertionError):
        for key, g in half.items():
            torch.testing.assert_close(g, whole[key], rtol=1e-4, atol=1e-6)
