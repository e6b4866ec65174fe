"""Known configurations by the names that their users know.

    name                        where                 what                                              starts as the identity
    seq_bn, pfeiffer            feed-forward          y + f(norm(y + r)); Pfeiffer et al. 2021                  no
    double_seq_bn, houlsby      both                  y + f(y); Houlsby et al. 2019                             no
    seq_bn_inv, pfeiffer+inv    and embeddings        seq_bn and an invertible adapter; MAD-X, Pfeiffer et al. 2020     no
    double_seq_bn_inv,          and embeddings        double_seq_bn and an invertible adapter                       no
    houlsby+inv
    par_bn, parallel            feed-forward          y + 4 f(r); He et al. 2022                                yes
    scaled_par_bn               feed-forward          y + s f(r), s learned                                     yes
    compacter                   both                  y + f(y) of Kronecker products; Mahabadi et al. 2021      no
    compacterpp, compacter++    feed-forward          y + f(norm(y + r)) of Kronecker products                  no
    adapter_plus                feed-forward          for ViT; Steitz and Roth 2024                             no
    low_rank                    both                  y + f(y) of rank 1; MindPet, OpenDelta                    no
    mindpet_adapter             both                  y + f(y), bottleneck 64; MindPet                          no
    gated_lora                  target_modules        y + g B A x: UniPELT's LoRA, g a gate; Mao et al. 2022    yes

The values are those of AdapterHub (low_rank, mindpet_adapter: MindPet's), whose "bert" and "houlsby" values are small but not
zero, so that a fresh adapter moves the model a little. ``init_weights="mam_adapter"`` makes any of them start as the identity.
"""

from __future__ import annotations

import difflib
from typing import Any

_HOULSBY = {"placement": "both", "reduction_factor": 16, "non_linearity": "swish", "init_weights": "bert"}
_PFEIFFER = {
    "placement": "feedforward", "reduction_factor": 16, "non_linearity": "relu", "init_weights": "bert",
    "original_ln_before": True,
}  # fmt: skip
_PARALLEL = {"placement": "feedforward", "parallel": True, "reduction_factor": 2, "scaling": 4.0}
_KRONECKER = {"reduction_factor": 32, "non_linearity": "gelu", "phm_layer": True}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "seq_bn": _PFEIFFER,
    "double_seq_bn": _HOULSBY,
    "seq_bn_inv": _PFEIFFER | _INVERTIBLE,
    "double_seq_bn_inv": _HOULSBY | _INVERTIBLE,
    "par_bn": _PARALLEL,
    "scaled_par_bn": _PARALLEL | {"scaling": "learned"},
    "compacter": _HOULSBY | _KRONECKER,
    "compacterpp": _PFEIFFER | _KRONECKER,
    "adapter_plus": _PFEIFFER | {
        "reduction_factor": 96, "non_linearity": "gelu", "scaling": "channel", "init_weights": "houlsby",
        "stochastic_depth": 0.1, "original_ln_after": False, "residual_before_ln": False,
    },
    "low_rank": {"placement": "both", "reduction_factor": 32, "low_rank": 1, "non_linearity": "gelu_new", "init_weights": "bert"},
    "mindpet_adapter": {"placement": "both", "bottleneck_size": 64, "non_linearity": "gelu", "init_weights": "houlsby"},
    "gated_lora": {"parallel": True, "bottleneck_size": 8, "non_linearity": "linear", "use_gating": True},
}  # fmt: skip
ALIASES = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "compacter++": "compacterpp",
}


def preset_fields(name: str) -> dict[str, Any]:
    """Return the fields of a preset.

    Raises:
        ValueError: there is no such preset.
    """
    known = ALIASES.get(name, name)
    if known not in PRESETS:
        near = difflib.get_close_matches(str(name), [*PRESETS, *ALIASES], n=1)
        raise ValueError(
            f"unknown preset {name!r}{f'; did you mean {near[0]!r}?' if near else ''} "
            f"(known: {', '.join(sorted([*PRESETS, *ALIASES]))})"
        )
    return dict(PRESETS[known])
