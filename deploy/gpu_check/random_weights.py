"""Build models of random weights where they are used: no checkpoint, and no second copy on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from deploy.gpu_check.sizes import Size
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

_SEED = 0


def random_policy(size: Size, dtype: torch.dtype, device: torch.device, *, checkpointing: bool = True) -> Policy:
    """Return a policy without text encoders, in `dtype` on the device."""
    transformer = _in_place(FluxTransformer2DModel, size.transformer, dtype, device)
    vae = _in_place(AutoencoderKL, size.vae, dtype, device)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return Policy(FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **absent))


def random_conditioning(size: Size, dtype: torch.dtype, device: torch.device) -> Conditioning:
    """Return what the text encoders would give for one prompt."""
    channels, pooled = size.transformer["joint_attention_dim"], size.transformer["pooled_projection_dim"]
    generator = torch.Generator(device).manual_seed(_SEED)
    shapes = (1, size.num_text_tokens, channels), (1, pooled)
    return Conditioning(*(torch.randn(each, generator=generator, device=device, dtype=dtype) for each in shapes))


def at_depth(transformer: dict[str, Any], share: float) -> dict[str, Any]:
    """Return a transformer's config with a share of its blocks, of each kind."""
    return transformer | {
        name: max(1, round(transformer[name] * share)) for name in ("num_layers", "num_single_layers")
    }


def num_parameters(transformer: dict[str, Any]) -> int:
    """Count a transformer's parameters, without allocating them."""
    with torch.device("meta"):
        return sum(each.numel() for each in FluxTransformer2DModel(**transformer).parameters())


def write_reward(size: Size, folder: Path, device: torch.device) -> tuple[str, Path]:
    """Write a random checkpoint in the format of HPS v2.1's file. Return the architecture's name and the file."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    architecture = size.architecture
    if not isinstance(architecture, str):
        config = folder / "open_clip_config.json"
        config.write_text(json.dumps({"model_cfg": architecture}), encoding="utf-8")
        architecture = f"local-dir:{folder}"
    torch.manual_seed(_SEED)
    with device:  # a billion random numbers take a GPU no time
        model = open_clip.create_model(architecture, load_weights=False, device=device)
    file = folder / "HPS_random.pt"
    torch.save({"epoch": 1, "state_dict": {key: each.half().cpu() for key, each in model.state_dict().items()}}, file)
    return architecture, file


def _in_place(kind: Any, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model of diffusers whose weights were never anywhere but on the device, in `dtype`.

    Matrices and kernels are normal with variance 1 / fan-in, so that activations keep their size; norms start as they
    do in training.
    """
    with torch.device("meta"):
        model: nn.Module = nn.Module.to(kind(**config), dtype)  # diffusers' own `to` warns where nothing is wrong
    if lost := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"{kind.__name__} has buffers, which cannot be made in place: {', '.join(lost)}")
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(_SEED)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.ndim > 1:
                each.normal_(std=each[0].numel() ** -0.5, generator=generator)
            else:
                each.fill_(float(name.endswith("weight")))
    return model
