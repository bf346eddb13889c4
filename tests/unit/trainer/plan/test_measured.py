"""The planner beside torch: what is alive, FLOPs and parameters of the real modules, at tiny sizes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from deploy.plan_errors import CPU_ATTENTION, FINETUNES, SIZES, Tiny, compare, peak_bytes
from services.config.finetune import FinetuneConfig
from trainer.model.lora import add_adapter
from trainer.plan.checkpoint_configs import CheckpointConfigs
from trainer.plan.flux import FluxConfig, play_flux
from trainer.plan.reward import TowerConfig, play_tower
from trainer.plan.tape import Shape, Tape
from trainer.plan.text import play_clip_text, play_t5
from trainer.plan.training import Training
from trainer.plan.vae import VaeConfig, vae_parameters

FULL, LORA = FINETUNES
MEMORY, FLOPS = 0.1, 0.02  # how far the planner may be off: the promise of deploy/runs/README.md
CASES = [*zip(SIZES, (FULL, LORA, FULL, LORA), (0, 1, 1, 0), strict=True)]


@pytest.mark.parametrize(("tiny", "finetune", "checkpointing"), CASES)
def test_a_whole_branch_takes_what_is_planned(tiny: Tiny, finetune: FinetuneConfig, checkpointing: int) -> None:
    memory, flops = compare(tiny, finetune, bool(checkpointing))
    assert abs(memory.error) < MEMORY
    assert abs(flops.error) < FLOPS


@pytest.mark.parametrize("tiny", SIZES, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_the_transformer_alone_takes_what_is_planned(tiny: Tiny, checkpointing: int) -> None:
    """Which in a whole branch may hide behind the decoder. Adapters are trained where blocks are not kept."""
    batch, tokens, finetune = tiny.batch, 6 * tiny.num_heads**2, LORA if checkpointing == 0 else FULL
    transformer = FluxTransformer2DModel(**tiny.transformer_config)
    if finetune is LORA:
        add_adapter(transformer, finetune, seed=0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()

    def run() -> None:
        (velocity,) = transformer(
            hidden_states=torch.zeros(batch, tokens, 64),
            timestep=torch.zeros(batch),
            guidance=torch.zeros(batch),
            pooled_projections=torch.zeros(batch, 24),
            encoder_hidden_states=torch.zeros(batch, tiny.num_text, tiny.text_channels),
            txt_ids=torch.zeros(tiny.num_text, 3),
            img_ids=torch.zeros(tokens, 3),
            return_dict=False,
        )
        velocity.backward(torch.ones_like(velocity))

    tape = Tape(Training.adapter(finetune.rank, finetune.target_modules) if finetune is LORA else Training.full())
    config = FluxConfig.of(tiny.transformer_config)
    tape.backward(play_flux(tape, config, batch, tokens, tiny.num_text, 4, checkpointing))
    assert tape.peak_bytes == pytest.approx(peak_bytes(run), rel=MEMORY)
    trained = {name: tuple(each.shape) for name, each in transformer.named_parameters() if each.requires_grad}
    assert tape.trained == trained
    assert tape.parameters == {name: tuple(each.shape) for name, each in transformer.named_parameters()}


def shapes_of(model: torch.nn.Module) -> Mapping[str, Shape]:
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


def test_flux_1_dev_has_its_published_sizes() -> None:
    configs = CheckpointConfigs.find("black-forest-labs/FLUX.1-dev")
    with torch.device("meta"):
        config = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1-dev's otherwise
        assert configs.transformer_shapes == shapes_of(FluxTransformer2DModel(**config))
        t5 = sum(each.numel() for each in T5EncoderModel(T5Config(**configs.t5)).parameters())
        clip = sum(each.numel() for each in CLIPTextModel(CLIPTextConfig(**configs.clip)).parameters())
    assert sum(torch.Size(shape).numel() for shape in configs.transformer_shapes.values()) == 11_901_408_320
    assert configs.num_text_parameters == t5 + clip == 4_885_371_136
    assert configs.num_vae_parameters == 83_819_683


def test_a_vae_has_as_many_numbers_as_diffusers_gives_it() -> None:
    config = {**SIZES[2].vae_config, "use_quant_conv": True, "use_post_quant_conv": True, "layers_per_block": 2}
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    assert vae_parameters(VaeConfig.of(config)) == sum(each.numel() for each in vae.parameters())


def test_flops_of_a_reward_and_of_text_encoders_are_torchs() -> None:
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                              image_size=56, patch_size=14, projection_dim=32)  # fmt: skip
    t5 = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    clip = CLIPTextConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                          num_attention_heads=4, bos_token_id=0, eos_token_id=1)  # fmt: skip
    tape = Tape(Training.frozen())
    tape.backward(play_tower(tape, TowerConfig(56, 14, 64, 2, 4, 128, 32), tape.leaf(tape.new((2, 3, 56, 56), 4))))
    with tape.no_grad():
        play_t5(tape, t5.to_dict(), 32, 4)
        play_clip_text(tape, clip.to_dict(), 4)
    tower = CLIPVisionModelWithProjection(vision).requires_grad_(False)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        tower(torch.zeros(2, 3, 56, 56, requires_grad=True)).image_embeds.sum().backward()
        with torch.no_grad():
            T5EncoderModel(t5).eval()(torch.zeros(1, 32, dtype=torch.long))
            CLIPTextModel(clip).eval()(torch.zeros(1, 77, dtype=torch.long))
    assert tape.flops == pytest.approx(counter.get_total_flops(), rel=FLOPS)
