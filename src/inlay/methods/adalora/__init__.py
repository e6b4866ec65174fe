"""AdaLoRA: LoRA whose rank is spent where it matters. Zhang et al. 2023, https://arxiv.org/abs/2303.10512.

    W' = W + s B diag(E) A        W[out, in], A[r, in], E[r, 1], B[out, r], s = lora_alpha / (init_r + 1e-5)

Every matrix starts with rank init_r. A penalty keeps A and B near orthogonal, so that E is like the singular values of the
update; step by step the ranks that matter least over the whole model (``budget.py``) get E = 0, until target_r is left
on average. After the last of these steps their rows and columns are gone, from memory and from the optimizer.
E starts at zero, so the adapted layer starts as the layer itself. s stays what it is when ranks go.
Convolutions are adapted as their matrix W[out, in/groups * prod(k)], as in PEFT's files; a bank of experts has its own A, E
and B for each expert, which lose a rank together.
Authors' code: https://github.com/QingruZhang/AdaLoRA
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...injection.targets import model_config
from ...kernels.lora_linear import lora_linear
from ...kernels.orthogonality import orthogonality
from ...kinds import Experts, LayerKind, Norm
from ...method import Column, Method, Slot
from ...training.optimizer_state import watch_optimizers
from ..lora import dropout_now, fused_inputs
from .budget import Batch, RankBudget, affordable, batches
from .config import AdaLoraConfig, warn
from .pruning import FACTORS, resize, set_to_zero, take_out, taken

FORGOTTEN = 6
"""So many changes of E without a call of ``update_and_allocate`` are no accident."""

_TARGETS = {
    "t5": "q k v o wi wo", "mt5": "q k v o wi_0 wi_1 wo", "bart": "q_proj k_proj v_proj out_proj fc1 fc2",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2", "roberta": "query key value dense",
    "deberta-v2": "query_proj key_proj value_proj dense",
}  # fmt: skip
"""Model types for which AdaLoRA adapts other modules than LoRA where the user names none."""


class AdaLora(Method, name="ADALORA"):
    """W' = W + s B diag(E) A; see the top of this file."""

    config = AdaLoraConfig
    additive = True

    def __init__(self) -> None:
        self.budget = RankBudget()
        self.masked: dict[str, Tensor] = {}  # kept ranks by path, where the others could not be taken out
        self.seen, self.unstepped = -1, 0  # version of E, and how often it changed without a step

    def default_targets(self, config: Any, model: nn.Module, required: bool) -> Collection[str] | str | None:
        names = _TARGETS.get(model_config(model).get("model_type", ""))
        return set(names.split()) if names else super().default_targets(config, model, required)

    def build(self, kind: LayerKind, config: AdaLoraConfig, path: str) -> dict[str, Column]:
        if isinstance(kind, Norm):
            kind.factors(config.init_r)  # refuses in its own words
        if config.lora_dropout and not kind.direct:
            raise ValueError(
                f"lora_dropout={config.lora_dropout} is not possible on {path}, whose {kind.param} "
                "is adapted through merged weights; set it to 0"
            )
        watch_optimizers()
        r, where = rank_of(config, path), {"device": kind.device, "dtype": kind.dtype}
        experts = (kind.experts,) if isinstance(kind, Experts) else ()
        shapes = {"lora_A": (r, kind.in_features), "lora_E": (r, 1), "lora_B": (kind.out_features, r)}
        columns: dict[str, Column] = {
            name: nn.Parameter(torch.empty(*experts, *shape, **where)) for name, shape in shapes.items()
        }
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        columns |= {
            "lora_dropout": dropout,
            "ranknum": torch.full((1,), float(config.init_r), device=kind.device),
        }
        return columns | {"r": r, "lora_alpha": config.lora_alpha, "scaling": scale_of(config)}

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        identity = bool(slot.config.init_lora_weights)  # type: ignore[attr-defined]
        for column in FACTORS:
            nn.init.normal_(slot[column], std=0.02 if identity else 1.0)
        if identity:
            nn.init.zeros_(slot["lora_E"])
        if (padding := getattr(slot.kind, "lookup", {}).get("padding_idx")) is not None:
            slot["lora_A"][..., padding] = 0  # a padding token keeps the row it has

    # ------------------------------------------------------------------ what the layer computes

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        if not slot["r"]:
            return y
        down, up = factors(slot, y.dtype)
        if x.is_floating_point():
            x = slot["lora_dropout"](x.to(y.dtype))
        return torch.add(y, slot.kind.through_matrices(x, down, up).to(y.dtype), alpha=slot["scaling"])

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        ready = fused_inputs(slot, x) if slot["r"] else None
        if ready is None:
            return None
        down, up = folded(slot)
        return lora_linear(x, *ready, down, up, slot["scaling"], dropout_now(slot))

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = factors(slot, w.dtype)
        if w.dim() == 2 and w.shape[1] == down.shape[1]:
            return torch.addmm(w, up, down, alpha=slot["scaling"]), b
        product = up @ down
        if product.shape != w.shape:  # an adapter before this one has made a grouped convolution dense
            product = slot.kind.widen(product)
        return torch.add(w, product, alpha=slot["scaling"]), b

    def delta(self, slot: Slot) -> Tensor:
        down, up = factors(slot, torch.promote_types(slot.kind.dtype, torch.float32))
        scale: float = slot["scaling"]
        return scale * (up @ down)

    def unit_scale(self, slot: Slot) -> float:
        config: Any = slot.config
        return scale_of(config)

    def beyond_merge(self, slot: Slot) -> str | None:
        return "lora_dropout" if dropout_now(slot) else None

    # ------------------------------------------------------------------ what training does

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        """Return orth_reg_weight times the mean of ||A A' - 1|| and ||B' B - 1|| (Frobenius) over all matrices."""
        config: Any = slots[0].config
        self._notice_changes(slots[0])
        if not config.orth_reg_weight or not slots[0]["lora_A"].requires_grad:
            return None
        found = batches(slots)
        groups = [group for batch in found for group in (batch.a, batch.b)]
        return orthogonality(config.orth_reg_weight, groups, [False, True] * len(found))

    def _notice_changes(self, slot: Slot) -> None:
        """Warn once where an optimizer trains E and nobody ever prunes."""
        config: Any = slot.config
        if config.rank_pattern is not None or self.unstepped >= FORGOTTEN or torch.compiler.is_compiling():
            return
        version = slot["lora_E"]._version
        if self.seen not in (-1, version):
            self.unstepped += 1
        self.seen = version
        if self.unstepped == FORGOTTEN:
            warn(
                "AdaLoRA is being trained and never prunes: call model.update_and_allocate(step) after each optimizer.step() "
                "and before zero_grad() (a transformers Trainer does)"
            )

    @torch.no_grad()
    def step(self, slots: Sequence[Slot], step: int) -> None:
        """Take in the step's gradients and, where the schedule says so, set the E of the least important ranks to zero.

        Raises:
            ValueError: there are no gradients, or ranks are to go of which nothing is known.
        """
        config: Any = slots[0].config
        self.unstepped = 0
        if config.rank_pattern is not None:
            for batch in batches(slots) if self.masked else ():
                set_to_zero([batch], [torch.stack([self.masked[path] for path in batch.paths])])
            return
        found, final = batches(slots), step >= config.last_allocation
        if step < config.total_step - config.tfinal:
            self.budget.observe(found, config.beta1, config.beta2)
        if not final and (step <= config.tinit or step % config.deltaT):
            return
        initial, budget = sum(slot["r"] for slot in slots), config.target_r * len(slots)
        if not final:
            budget = affordable(step, initial, budget, config.tinit, config.total_step - config.tfinal)
        kept = self.budget.keep(found, initial - budget)
        if final:
            self._finish(slots, found, kept)
        else:
            set_to_zero(found, kept)

    def _finish(self, slots: Sequence[Slot], found: Sequence[Batch], kept: Sequence[Tensor]) -> None:
        """Take the pruned ranks out of layers and optimizers, or, where that cannot be, keep them at zero."""
        config: Any = slots[0].config
        by_path = {
            p: k
            for batch, keep in zip(found, kept, strict=True)
            for p, k in zip(batch.paths, keep, strict=True)
        }
        self.budget = RankBudget()
        if (reason := take_out(slots, by_path)) is not None:
            self.masked = by_path
            set_to_zero(found, kept)
            if not torch.distributed.is_initialized():
                warn(f"pruned ranks stay in memory as zeros, and go when the adapter is saved: {reason}")
        config.rank_pattern = {f"{slot.path}.lora_E": by_path[slot.path].tolist() for slot in slots}

    # ------------------------------------------------------------------ files

    def state(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return self.budget.state(batches(slots))

    def load_state(self, slots: Sequence[Slot], state: Mapping[str, Tensor]) -> None:
        self.budget.load_state(batches(slots), state)
        self.masked = {}

    def pack(self, slot: Slot, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = self.masked.get(slot.path)
        return tensors if keep is None else {c: taken(t, c, keep) for c, t in tensors.items()}

    def fit(self, slot: Slot, config: AdaLoraConfig) -> None:
        own: Any = slot.config
        own.rank_pattern = config.rank_pattern
        resize(slot, rank_of(config, slot.path))


def folded(slot: Slot) -> tuple[Tensor, Tensor]:
    """Return ``diag(E) A`` and B, or A and ``B diag(E)``: E goes to the smaller of the two."""
    a, e, b = (slot[column] for column in FACTORS)
    return (a * e, b) if a.numel() <= b.numel() else (a, b * e.reshape(*e.shape[:-2], 1, -1))


def factors(slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``down[..., r, in]`` and ``up[..., out, r]``, whose product is B diag(E) A, in the dtype of a computation."""
    down, up = folded(slot)
    return down.to(dtype), up.to(dtype)


def scale_of(config: AdaLoraConfig) -> float:
    """Return s; as in PEFT, a lora_alpha of 0 or less stands for the rank itself."""
    return (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)


def rank_of(config: AdaLoraConfig, path: str) -> int:
    """Return the rank of a layer: init_r, or what training kept of it."""
    kept = (config.rank_pattern or {}).get(f"{path}.lora_E")
    return config.init_r if kept is None else sum(kept)
