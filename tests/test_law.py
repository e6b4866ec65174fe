"""The law: whatever path an adapted layer takes, it computes what the layer with the merged weight computes.

Outputs and gradients of every method on every kind of layer in every dtype are held to a float64 reference that the test
writes down itself (``law_cases``). What happens to an adapter in its life is in ``test_law_life``, several adapters are in
``test_law_several``, and compilers, autocast, checkpointing and threads in ``test_law_runtime``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay import AdaptedLayer, PeftModel, get_peft_model
from inlay.method import METHODS as REGISTERED
from inlay.method import Method, load_built_in
from law_cases import DTYPES, KINDS, METHODS, ON_OUTPUTS, PAIR_IDS, PAIRS, REFUSED, KindCase, MethodCase
from law_checks import assert_close, assert_unchanged, snapshot
from law_reference import adapted, exact_copy, parameters_of, reference

each_pair = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=PAIR_IDS)
PATHS = ["fastest", "activations", "merged_on_the_fly", "merged_in_place"]


def short(value: object) -> str:
    return value.name if isinstance(value, (MethodCase, KindCase)) else str(value).removeprefix("torch.")


def worth_a_test(method: MethodCase, kind: KindCase, dtype: torch.dtype, path: str) -> bool:
    """Leave out what cannot differ from its neighbours."""
    if path == "activations" and not kind.name.startswith(
        ("linear", "gpt2", "encoder_layer")
    ):  # nothing is fused there
        return False
    return dtype != torch.float16 or path in ("fastest", "merged_in_place")


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make adapted layers compute by one of their paths."""
    load_built_in()
    if path == "activations":
        for cls in (c for c in REGISTERED.values() if issubclass(c, Method)):
            monkeypatch.setattr(cls, "fused", lambda self, slot, x: None)
    elif path == "merged_on_the_fly":
        monkeypatch.setattr(AdaptedLayer, "_run", AdaptedLayer._run_merged)


def run_or_skip(kind: KindCase, dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    """Return the bare model and an input; skip what PyTorch itself cannot compute in this dtype on this machine."""
    bare, x = kind.build(dtype), kind.inputs(dtype)
    try:
        bare(x)
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        pytest.skip(f"PyTorch has no {kind.name} in {dtype} on this device: {error}")
    return bare, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
@each_pair
def test_an_adapter_starts_as_the_identity(method: MethodCase, kind: KindCase, dtype: torch.dtype) -> None:
    bare, x = run_or_skip(kind, dtype)
    model = adapted(method, kind, dtype, trained=False)
    assert_close(model(x), bare(x), dtype)
    assert model(x).dtype == bare(x).dtype


@pytest.mark.parametrize(
    ("method", "kind", "dtype", "path"),
    [
        (*pair, dtype, path)
        for pair in PAIRS
        for dtype in DTYPES
        for path in PATHS
        if worth_a_test(*pair, dtype, path)
    ],
    ids=short,
)
def test_every_path_is_the_merged_layer(
    method: MethodCase, kind: KindCase, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(path, monkeypatch)
    _, x = run_or_skip(kind, dtype)
    model = adapted(method, kind, dtype)
    parameters = [parameters_of(model, spot) for spot in kind.spots]
    assert all(parameters), "the adapter is not where the case says it is"
    exact, exact_x = [exact_copy(p) for p in parameters], _leaf(x.double() if x.is_floating_point() else x)
    wanted = reference(kind, [(method, exact)], exact_x, dtype)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted * weights).sum().backward()

    if path == "merged_in_place":
        model.merge_adapter()
    x = _leaf(x)
    got = model(x)
    assert_close(got, wanted, dtype)
    with torch.inference_mode():
        assert_close(model(x.detach()), wanted, dtype, "output in inference mode")
    if path == "merged_in_place" and not x.is_floating_point():
        return
    (got.double() * weights).sum().backward()
    if x.is_floating_point():
        assert_close(x.grad, exact_x.grad, dtype, "gradient of the input")
    if path == "merged_in_place":
        return
    for spot, mine, theirs in zip(kind.spots, parameters, exact, strict=True):
        for name, p in mine.items():
            assert_close(p.grad, theirs[name].grad, dtype, f"gradient of {spot.path} {name}")


@each_pair
def test_only_the_adapter_is_trained(method: MethodCase, kind: KindCase) -> None:
    model = adapted(method, kind)
    mine = {id(p) for spot in kind.spots for p in parameters_of(model, spot).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    model.train()
    model(kind.inputs()).sum().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == mine


@pytest.mark.parametrize(("method", "kind"), REFUSED, ids=[f"{m.name}-{k.name}" for m, k in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_and_leaves_the_model(
    method: MethodCase, kind: KindCase
) -> None:
    bare = kind.build()
    before = snapshot(bare)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        get_peft_model(bare, method.on(kind))
    assert_unchanged(before, bare)


def test_every_registered_method_is_held_to_the_law() -> None:
    load_built_in()
    cases = METHODS + ON_OUTPUTS
    covered = {case.on(kind).method_name() for case in cases for kind in KINDS[:1]}
    on_layers = {name: cls for name, cls in REGISTERED.items() if issubclass(cls, Method) and not cls.mixes}
    assert all(on_layers[case.on(KINDS[0]).method_name()].mergeable == case.mergeable for case in cases)
    assert {name for name, cls in on_layers.items() if cls.__module__.startswith("inlay.")} <= covered


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_plain_linear_layer_takes_the_fused_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, kind = next(m for m in METHODS if m.name == name), KINDS[0]
    model = adapted(method, kind)
    monkeypatch.setattr(REGISTERED[name.upper()], "after", _refuse)
    model(kind.inputs()).sum().backward()


def _refuse(*args: object) -> None:
    raise AssertionError("the slow path was taken")


@pytest.mark.parametrize("training", [False, True])
def test_paths_agree_on_an_input_of_another_dtype(training: bool) -> None:
    """Under a half-precision base, the adapter is kept in float32 and the output has the base's dtype."""
    for method in METHODS[:4]:
        model: PeftModel = adapted(method, KINDS[0], torch.bfloat16).train(training)
        y = model(KINDS[0].inputs(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", [k for k in KINDS if k.sub_batches], ids=short)
@pytest.mark.parametrize("method", [m for m in METHODS if m.name in ("lora", "lora_bias", "dora")], ids=short)
def test_dropout_drops_in_training_only_and_keeps_the_mean(method: MethodCase, kind: KindCase) -> None:
    if not method.fits(kind):
        pytest.skip(f"{method.name} does not adapt {kind.name}")
    model, plain = adapted(method, kind, lora_dropout=0.5), adapted(method, kind)
    x = kind.inputs()
    assert torch.equal(model(x), plain(x))
    model.train()
    same = torch.equal(model(x), plain(x))
    assert same == (not x.is_floating_point()), "dropout acts on numbers, not on tokens"
    mean = model(x.repeat_interleave(1000, 0)).detach().unflatten(0, (len(x), 1000)).mean(1)
    wanted = plain(x).detach()
    assert float((mean - wanted).abs().max() / wanted.abs().max()) < 0.15


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x
