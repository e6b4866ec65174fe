"""Prefixes that train, set into attention as the documentation says, and none of the faults of MindPet's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from inlay import freeze_delta
from inlay.mindpet import PrefixEncoder, PrefixLayer

P, HEADS, WIDTH, T, BATCH = 4, 2, 6, 5, 3


def prefix_layer(dropout: float = 0.0, **settings: bool) -> PrefixLayer:
    layer = PrefixLayer(P, 1, HEADS, WIDTH, 5, 7, dropout, **settings)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def prefix_encoder(projection: bool = True, dropout: float = 0.0) -> PrefixEncoder:
    encoder = PrefixEncoder(P, 3, HEADS, WIDTH // HEADS, projection, 5, dropout)
    for p in encoder.parameters():
        nn.init.normal_(p)
    return encoder


def attention(qkv: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
    """Causal attention with a prefix, word for word as in ``inlay/mindpet/prefix.py``."""
    query, key, value = qkv
    mask = torch.ones(len(query), 1, T, T, dtype=torch.bool).tril()
    key = torch.cat([past_key, key], dim=2)  # [batch, heads, P + T, head_dim]
    value = torch.cat([past_value, value], dim=2)
    mask = torch.cat([mask.new_ones(*mask.shape[:-1], P), mask], dim=-1)
    return nn.functional.scaled_dot_product_attention(query, key, value, mask)


def drawn(batch: int = BATCH) -> Tensor:
    return torch.randn(3, batch, HEADS, T, WIDTH // HEADS)


def by_hand(qkv: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same one query at a time: prefix[P, width] first, then the positions up to its own."""
    head_dim = WIDTH // HEADS
    y = torch.empty_like(qkv[0])
    for example in range(qkv.shape[1]):
        for head in range(HEADS):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            for t in range(T):
                keys = torch.cat([key[:, columns], qkv[1, example, head, : t + 1]])
                values = torch.cat([value[:, columns], qkv[2, example, head, : t + 1]])
                scores = keys @ qkv[0, example, head, t] / math.sqrt(head_dim)
                y[example, head, t] = scores.softmax(0) @ values
    return y


@pytest.mark.parametrize("key_is_value", [True, False])
def test_attention_with_a_prefix(key_is_value: bool) -> None:
    layer = prefix_layer(key_is_value=key_is_value)
    qkv = drawn()
    key, value = layer()
    assert torch.equal(key, value) is key_is_value
    torch.testing.assert_close(attention(qkv, *layer.for_attention(BATCH)), by_hand(qkv, key, value))


def test_examples_do_not_mix_and_no_query_sees_what_comes_after_it() -> None:
    layer, qkv = prefix_layer(), drawn()
    y = attention(qkv, *layer.for_attention(BATCH))
    other = qkv.clone()
    other[:, 1] = torch.randn_like(other[:, 1])
    changed = attention(other, *layer.for_attention(BATCH))
    assert torch.equal(changed[[0, 2]], y[[0, 2]]) and not torch.equal(changed[1], y[1])
    later = qkv.clone()
    later[1:, :, :, 3:] = torch.randn_like(later[1:, :, :, 3:])
    changed = attention(later, *layer.for_attention(BATCH))
    assert torch.equal(changed[:, :, :3], y[:, :, :3])  # in every head
    assert not torch.allclose(changed[:, :, 3:], y[:, :, 3:])


@pytest.mark.parametrize("key_is_value", [True, False])
def test_a_prefix_learns(key_is_value: bool) -> None:
    """MindPet's never changes; here every parameter does, and the loss falls."""
    layer, qkv = prefix_layer(key_is_value=key_is_value), drawn()
    before = copy.deepcopy(layer)
    target = torch.randn(BATCH, HEADS, T, WIDTH // HEADS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (attention(qkv, *layer.for_attention(BATCH)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for (name, p), old in zip(layer.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, old), name
    assert not torch.equal(layer.past_key, before.past_key)
    assert not torch.equal(layer.past_value, before.past_value)


def test_the_value_has_its_own_half_of_the_last_weight() -> None:
    layer = prefix_layer(key_is_value=False)
    last = layer.mindpet_delta_prefixtuning_control_trans[2]
    assert last.weight.shape == (2 * WIDTH, 7)
    with torch.no_grad():
        last.weight[WIDTH:] = 0
        last.bias[WIDTH:] = 3
    key, value = layer()
    assert torch.equal(value, torch.full((P, WIDTH), 3.0)) and key.std() > 0


def test_dropout_in_training_only_and_alike_for_all_examples() -> None:
    layer = prefix_layer(0.5)
    key, value = layer.for_attention(BATCH)
    assert (key == 0).any() and torch.equal(key, value) and torch.equal(key[0], key[2])
    assert not torch.equal(layer.past_key, layer.past_key)
    layer.eval()
    assert torch.equal(layer.past_key, layer.past_value) and (layer.past_key != 0).all()


def test_a_prefix_is_not_copied_for_each_example() -> None:
    key, _ = prefix_layer().for_attention(1000)
    assert key.shape == (1000, HEADS, P, WIDTH // HEADS) and key.untyped_storage().nbytes() == 4 * P * WIDTH


# ---------------------------------------------------------------------- all layers at once


@pytest.mark.parametrize("projection", [True, False])
def test_one_pair_for_each_layer(projection: bool) -> None:
    """A row of the embedding holds for each layer the key, then the value, head by head."""
    encoder = prefix_encoder(projection)
    pasts = encoder(BATCH)
    assert isinstance(pasts, tuple) and len(pasts) == 3
    rows = encoder.mindpet_delta_ptuning2_embedding.weight
    if projection:
        rows = encoder.mindpet_delta_ptuning2_dense_out(
            torch.tanh(encoder.mindpet_delta_ptuning2_dense_in(rows))
        )
    for layer, past in enumerate(pasts):
        assert past.shape == (2, BATCH, HEADS, P, WIDTH // HEADS)
        key, value = (
            rows[:, (2 * layer + half) * WIDTH :][:, :WIDTH].view(P, HEADS, -1).transpose(0, 1)
            for half in (0, 1)
        )
        for example in range(BATCH):
            assert torch.equal(past[0, example], key) and torch.equal(past[1, example], value)
        qkv = drawn()
        flat = (part.transpose(0, 1).reshape(P, WIDTH) for part in (key, value))
        torch.testing.assert_close(attention(qkv, *past), by_hand(qkv, *flat))


def test_the_network_runs_once_whatever_the_batch() -> None:
    encoder = prefix_encoder()
    counts = []
    for batch_size in (1, 64):
        with FlopCounterMode(display=False) as counter:
            torch.stack(encoder(batch_size)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert encoder.eval()(64)[0].untyped_storage().nbytes() == 4 * P * 3 * 2 * WIDTH  # nothing is copied


def test_dropout_is_drawn_for_each_example() -> None:
    encoder = prefix_encoder(dropout=0.5)
    (past, *_) = encoder(2)
    assert (past == 0).any() and not torch.equal(past[:, 0], past[:, 1])
    kept = past[past != 0]
    encoder.eval()
    (whole, *_) = encoder(2)
    torch.testing.assert_close(kept, 2 * whole[past != 0])
    assert torch.equal(whole[:, 0], whole[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    encoder = prefix_encoder()
    assert {past.dtype for past in encoder(2, dtype)} == {dtype}
    assert {past.dtype for past in encoder(2)} == {torch.float32}
    torch.stack(encoder(2, dtype)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())


def test_axes_in_another_order_and_no_examples() -> None:
    usual = prefix_encoder()
    other = PrefixEncoder(P, 3, HEADS, WIDTH // HEADS, True, 5, 0.0, None, (2, 1, 0, 3, 4))
    other.load_state_dict(usual.state_dict())
    for mine, theirs in zip(usual(BATCH), other(BATCH), strict=True):
        assert torch.equal(mine, theirs.permute(0, 2, 3, 1, 4))
    assert [past.shape for past in usual(0)] == [(2, 0, HEADS, P, WIDTH // HEADS)] * 3


@pytest.mark.parametrize("make", [prefix_layer, prefix_encoder])
def test_compiled_copied_saved_and_moved(make: type[nn.Module]) -> None:
    torch.compiler.reset()
    module = make()
    call = (lambda m: m.for_attention(2)) if isinstance(module, PrefixLayer) else (lambda m: m(2))
    wanted = call(module)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(module)
    torch.testing.assert_close(compiled, wanted)
    fresh = make()
    fresh.load_state_dict(copy.deepcopy(module).state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(call(fresh), wanted, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(past.isfinite().all() for past in call(fresh))
    half = call(fresh.half())
    torch.testing.assert_close([past.float() for past in half], list(wanted), atol=0.05, rtol=0.05)
    with torch.device("meta"):
        assert {p.device.type for p in make().parameters()} == {"meta"}


@pytest.mark.parametrize(("make", "mode"), [(prefix_layer, "prefixtuning"), (prefix_encoder, "ptuning2")])
def test_all_parameters_are_the_methods(make: type[nn.Module], mode: str) -> None:
    module = make()
    assert freeze_delta(module, mode).count == sum(p.numel() for p in module.parameters())
