"""Put an adapter (LoRA) beside a policy's linear layers, and compute the whole weights of both. The only peft.

Source: Hu et al., arXiv 2106.09685: W + alpha / rank · B·A, of which A and B are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from services.config.finetune import FinetuneConfig

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names them in a module it was put into
_BASE = ".base_layer."


def add_adapter(transformer: Any, finetune: FinetuneConfig, seed: int) -> None:
    """Freeze a diffusers transformer and add an adapter to it, in place; its output is the same until it is trained.

    Raise ValueError for a target that is no linear layer's name, with the names that there are.
    """
    from peft import LoraConfig  # on use: a full fine-tuning does without

    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    settings = LoraConfig(
        r=finetune.rank,
        lora_alpha=finetune.scaling * finetune.rank,
        target_modules=finetune.adapted_layers(linear),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(settings)  # and freezes all else


def adapter(transformer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the adapter's weights by peft's names, and peft's settings, for Policy.save_adapter."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer), transformer.peft_config["default"].to_dict()


def whole(transformer: nn.Module, finetune: FinetuneConfig) -> nn.Module:
    """Return a plain transformer that computes what policy and adapter do; in full fine-tuning the policy itself.

    It shares every weight that has no adapter with the policy, which must be whole (under ZeRO stage 3: gathered).
    """
    if finetune.kind == "full":
        return transformer
    with torch.device("meta"):
        plain: nn.Module = type(transformer).from_config(transformer.config)  # type: ignore[attr-defined]  # diffusers' ModelMixin
    plain.load_state_dict(whole_weights(transformer.state_dict(), finetune), assign=True)
    return plain


def whole_weights(weights: Mapping[str, Tensor], finetune: FinetuneConfig) -> dict[str, Tensor]:
    """Return a plain transformer's weights from its own and an adapter's: W + scaling · B·A, summed in float32.

    `weights` holds both: the adapter by peft's names, the transformer's own by these or by plain ones. Raise ValueError
    for an adapter of another rank than the run's, whose alpha is unknown.
    """
    plain = {name.replace(_BASE, "."): tensor for name, tensor in weights.items() if not name.endswith((_A, _B))}
    for name, down in weights.items():
        if not name.endswith(_A):
            continue
        layer = name.removesuffix(_A)
        if finetune.kind == "full" or len(down) != finetune.rank:
            expected = "finetune.kind full" if finetune.kind == "full" else f"finetune.rank {finetune.rank}"
            raise ValueError(f"these weights hold an adapter of rank {len(down)}; the run file says {expected}")
        own = plain[f"{layer}.weight"]
        change = finetune.scaling * weights[layer + _B].float() @ down.float()
        plain[f"{layer}.weight"] = (own.float() + change.to(own.device)).to(own.dtype)
    return plain
