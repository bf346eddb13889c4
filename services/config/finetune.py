"""The sections `finetune` and `ema` of a run file: which weights are trained, and their moving average."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.fields import Frozen, Positive, PositiveFloat, Word

# Every linear layer of FLUX's blocks but those of the modulation. The model's last layer is called proj_out too.
_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
)


class FinetuneConfig(Frozen):
    """Which weights of the transformer are trained: all, or those of a LoRA adapter (Hu et al., arXiv 2106.09685).

    LoRA leaves the weights W as they are and trains two thin matrices A, B beside each target: W + alpha / rank · B·A.
    A starts random by the run's seed, B at 0. A run with `lora` writes the adapter as OUTPUT/adapter, which
    `FluxPipeline.load_lora_weights` loads, beside the whole merged model, OUTPUT/model. Its checkpoints hold the
    adapter alone. An adapter needs a learning rate some ten times higher.
    """

    kind: Literal["full", "lora"] = "full"
    """`full`: every weight of the transformer. `lora`: an adapter; the keys below are for it alone."""

    rank: Positive = 16
    """The rank of the adapter's matrices."""

    alpha: PositiveFloat | None = None
    """The numerator of the adapter's factor alpha / rank. null: rank, so that the factor is 1."""

    target_modules: Annotated[tuple[Word, ...], Field(min_length=1)] = _TARGETS
    """The linear layers that get an adapter, by the ends of their names, in which * stands for anything. The default is
    every linear layer of FLUX's blocks but those of the modulation."""

    @model_validator(mode="after")
    def _adapter_keys_have_an_adapter(self) -> FinetuneConfig:
        for name, field in type(self).model_fields.items():
            if self.kind == "full" and (value := getattr(self, name)) != field.default:
                raise ValueError(f"{name} {value}: of no use to kind full, give kind lora")
        return self

    def adapted_layers(self, layers: Sequence[str]) -> list[str]:
        """Return those of a model's linear layers, by their whole names, that get an adapter.

        Raise ValueError for a target that is none of them, with the names that there are.
        """
        for target in self.target_modules:
            if not any(ends_in(target, layer) for layer in layers):
                there = sorted({re.sub(r"^\w+\.\d+\.", "", layer) for layer in layers})
                raise ValueError(
                    f"finetune.target_modules {target!r} is no linear layer of the model; there are: {', '.join(there)}"
                )
        return [layer for layer in layers if any(ends_in(target, layer) for target in self.target_modules)]

    @property
    def scaling(self) -> float:
        """The factor on B·A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def ends_in(target: str, layer: str) -> bool:
    """Return whether a layer's whole name ends as a target of `target_modules` says: "attn.to_q", "*.*.proj_out"."""
    return fnmatchcase(f".{layer}", f"*.{target}")


class EmaConfig(Frozen):
    """A moving average of the trained weights, in float32, from the base model's weights on. After every optimizer
    step: average ← decay · average + (1 − decay) · weights.

    A run with this section uses the average for evaluation, guard, samples and the exported model; the trained weights
    only go on training. The average looks back over 1 / (1 − decay) steps: 0.999, usual elsewhere, would hardly leave
    the base model in 20 steps.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]
    """How much of the average is kept at each step."""
