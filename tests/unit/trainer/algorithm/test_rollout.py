"""Our sampler draws what FluxPipeline draws from the same noise, prompt and guidance, at static and dynamic shift."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from services.contract import PromptPair
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX, make_tiny_flux
from trainer.algorithm.rollout import Rollout, Sampling, roll_out, sample
from trainer.model.policy import Policy


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (7, 8)]


def draw(policy: Policy, shift: float, guidance_scale: float) -> torch.Tensor:
    conditioning = policy.encode_prompts(PROMPTS[:2], MAX_SEQUENCE_LENGTH)
    noise = policy.draw_noise(generators(), HEIGHT_PX, WIDTH_PX)
    return sample(policy, conditioning, noise, Sampling(6, guidance_scale, shift, HEIGHT_PX, WIDTH_PX))


@pytest.mark.parametrize("shift", [3.0, "dynamic"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_sampler_equals_flux_pipeline(tmp_path: Path, shift: float | str, guidance_scale: float) -> None:
    folder = make_tiny_flux(tmp_path, use_dynamic_shifting=shift == "dynamic")
    policy = Policy.load(str(folder), torch.float32)
    latents = draw(policy, policy.resolve_shift(shift, HEIGHT_PX, WIDTH_PX), guidance_scale)  # type: ignore[arg-type]
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = {
        kind: pipeline(
            prompt=list(PROMPTS[:2]),
            height=HEIGHT_PX,
            width=WIDTH_PX,
            num_inference_steps=6,
            guidance_scale=guidance_scale,
            generator=generators(),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type=kind,
        ).images
        for kind in ("latent", "pt")
    }
    torch.testing.assert_close(latents, theirs["latent"], rtol=0, atol=1e-5)
    images = policy.decode_image(latents, HEIGHT_PX, WIDTH_PX)
    torch.testing.assert_close(images, theirs["pt"], rtol=0, atol=1e-5)


def test_guidance_reaches_the_model(flux: Policy) -> None:
    assert not draw(flux, 3.0, 1.0).equal(draw(flux, 3.0, 3.5))


def test_rollout_keeps_both_ends_and_no_graph(flux: Policy) -> None:
    rollout = rolled_out(flux, PROMPTS[:2])
    assert rollout.clean.shape == rollout.noise.shape == (2, 6, 64)
    assert not rollout.clean.requires_grad


def test_batch_of_two_equals_two_batches_of_one(flux: Policy) -> None:
    together = rolled_out(flux, PROMPTS[:2]).clean
    torch.testing.assert_close(together[:1], rolled_out(flux, PROMPTS[:1]).clean, rtol=0, atol=1e-5)


def test_rollout_of_unequal_counts_is_refused(flux: Policy) -> None:
    with pytest.raises(ValueError, match="one for each image, not 2, 2 and 1"):
        rolled_out(flux, PROMPTS[:2], num_pairs=1)


def rolled_out(policy: Policy, prompts: tuple[str, ...], num_pairs: int = 2) -> Rollout:
    return roll_out(
        policy,
        conditioning=policy.encode_prompts(prompts, MAX_SEQUENCE_LENGTH),
        noise=policy.draw_noise(generators()[: len(prompts)], HEIGHT_PX, WIDTH_PX),
        pairs=tuple(PromptPair(prompt, "3D", "Flat") for prompt in prompts[:num_pairs]),
        sampling=Sampling(4, 1.0, 3.0, HEIGHT_PX, WIDTH_PX),
    )
