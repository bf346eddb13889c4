"""What a run trains of the model, as keys of its file: all weights or an adapter, and their average over the steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.objective import Frozen, Positive, PositiveFloat, Word

# every linear layer of a FLUX block but those of the modulation, as in diffusers' own training of FLUX adapters
_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)


class FinetuneConfig(Frozen):
    """full trains every weight of the transformer; lora (Hu et al., arXiv 2106.09685) leaves them as they are and
    trains two thin matrices A, B beside each target: W + alpha / rank · B·A. A starts random by the run's seed, B at 0.

    A run with lora writes the adapter as OUTPUT/adapter, which FluxPipeline.load_lora_weights loads, beside the whole
    model. Its checkpoints hold the adapter alone. An adapter wants a learning rate some ten times higher.
    """

    kind: Literal["full", "lora"] = "full"
    rank: Positive = 16
    alpha: PositiveFloat | None = None  # None: rank
    target_modules: Annotated[tuple[Word, ...], Field(min_length=1)] = _TARGETS  # ends of the names of linear layers

    @model_validator(mode="after")
    def _adapter_keys_have_an_adapter(self) -> FinetuneConfig:
        for name, field in type(self).model_fields.items():
            if self.kind == "full" and (value := getattr(self, name)) != field.default:
                raise ValueError(f"{name} {value}: of no use to kind full, give kind lora")
        return self

    @property
    def scaling(self) -> float:
        """The factor on B·A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class EmaConfig(Frozen):
    """A moving average of the trained weights, average ← decay · average + (1 − decay) · weights after every optimiser
    step, in float32, from the base model's on. Where a run has one, its weights are the run's: evaluation, guard,
    samples and the exported model use them, and the trained weights only go on training.

    It looks back over 1 / (1 − decay) steps: 0.999, usual elsewhere, would hardly leave the base model in 20 steps.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]
