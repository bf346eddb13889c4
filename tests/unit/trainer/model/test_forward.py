"""A network sees sigma, guidance and positions unrounded in any dtype, and a float32 one may compute in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.model.packing import image_ids
from trainer.model.policy import Policy

SIZE = HEIGHT_PX, WIDTH_PX
SIGMAS = torch.tensor([0.8601, 0.8612])  # bfloat16 has 0.8594 and 0.8633 there


@pytest.fixture(scope="module")
def rounded(flux_folder: Path) -> Policy:
    return Policy.load(str(flux_folder), torch.bfloat16)


def velocity(policy: Policy, sigma: Tensor = SIGMAS, **settings: Any) -> Tensor:
    noise = policy.draw_noise([torch.Generator().manual_seed(0)], *SIZE)
    conditioning = policy.encode_prompts(PROMPTS[:1], MAX_SEQUENCE_LENGTH)[[0] * len(sigma)]
    return policy.predict_velocity(noise.expand(len(sigma), -1, -1), sigma, conditioning, 3.5, *SIZE, **settings)


@contextmanager
def seen_by(policy: Policy, layer: str) -> Iterator[list[Tensor]]:
    """What a layer is given, and what it gives back, in turn."""
    seen: list[Tensor] = []
    hook = policy.transformer.get_submodule(layer).register_forward_hook(
        lambda _, given, out: seen.extend((*given, out))
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_sigma_and_guidance_are_embedded_as_they_are(flux: Policy, rounded: Policy, dtype: str) -> None:
    policy = flux if dtype == "float32" else rounded
    with seen_by(policy, "time_text_embed.time_proj") as seen:
        exact = velocity(policy)
        velocity(policy, truncate_timestep=True)
    expected = [(SIGMAS * 1000).tolist(), [3500, 3500], [860, 861], [3500, 3500]]
    for given, numbers in zip(seen[::2], expected, strict=True):
        assert given.dtype == torch.float32
        assert given.tolist() == numbers
    assert not exact[0].equal(exact[1]), "two sigmas between which bfloat16 cannot tell"


@torch.no_grad()
def test_a_bfloat16_network_comes_nearer_to_float32_than_with_rounded_numbers() -> None:
    """The embedded default, which is trained: its velocity depends on them as it should."""
    exact, rounded = (Policy.load("deploy/tiny/flux", dtype) for dtype in (torch.float32, torch.bfloat16))
    expected, ours = velocity(exact), velocity(rounded)
    rounded.transformer.get_submodule("time_text_embed")._forward_pre_hooks.clear()
    errors = [float((each - expected).norm() / expected.norm()) for each in (ours, velocity(rounded))]
    assert errors[0] < 0.02
    assert errors[1] > 1.3 * errors[0]


def test_every_position_is_exact_beyond_256() -> None:
    positions = image_ids(2, 300, torch.device("cpu"))
    assert positions[:300, 2].tolist() == list(range(300))
    assert positions[300:, 1].tolist() == [1] * 300


@torch.no_grad()
def test_a_float32_transformer_computes_in_bfloat16_only_when_told(flux: Policy) -> None:
    rolling = flux.computing_in(torch.bfloat16)
    expected = velocity(flux)
    with seen_by(flux, "single_transformer_blocks.0.proj_mlp") as seen:
        rolled = velocity(rolling)
        assert velocity(flux).equal(expected)
    assert [each.dtype for each in seen] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert rolled.dtype == torch.float32
    assert not rolled.equal(expected)
    assert (rolled - expected).norm() < 0.02 * expected.norm()
    assert {each.dtype for each in flux.transformer.parameters()} == {torch.float32}
    assert velocity(flux.computing_in(torch.float32)).equal(expected)


@torch.no_grad()
def test_what_a_call_is_given_ends_with_it_even_if_it_fails(flux: Policy) -> None:
    expected, entered = velocity(flux), []
    noise, conditioning = torch.zeros(1, 6, 64), flux.encode_prompts(PROMPTS[:1], MAX_SEQUENCE_LENGTH)
    too_narrow = replace(conditioning, prompt_embeds=conditioning.prompt_embeds[..., :5])
    hook = flux.transformer.get_submodule("x_embedder").register_forward_hook(
        lambda *_: entered.append(torch.is_autocast_enabled("cpu"))
    )
    with pytest.raises(RuntimeError, match="shapes"):
        flux.computing_in(torch.bfloat16).predict_velocity(noise, torch.tensor(0.5), too_narrow, 3.5, *SIZE)
    hook.remove()
    assert entered == [True]
    assert not torch.is_autocast_enabled("cpu")
    assert velocity(flux).equal(expected)


def test_bfloat16_weights_cannot_compute_in_float32(rounded: Policy) -> None:
    with pytest.raises(ValueError, match=r"a transformer of torch.bfloat16 cannot compute in torch.float32"):
        rounded.computing_in(torch.float32)


@torch.no_grad()
def test_vae_and_text_encoders_have_dtypes_of_their_own(flux: Policy, flux_folder: Path) -> None:
    mixed = Policy.load(str(flux_folder), torch.bfloat16, vae_dtype=torch.float32, text_encoder_dtype=torch.float32)
    assert {each.dtype for each in mixed.transformer.parameters()} == {torch.bfloat16} == {mixed.dtype}
    expected, ours = (each.encode_prompts(PROMPTS[:1], MAX_SEQUENCE_LENGTH) for each in (flux, mixed))
    assert ours.prompt_embeds.equal(expected.prompt_embeds)
    assert ours.pooled.equal(expected.pooled)
    latents = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    images = mixed.decode_image(latents, *SIZE)
    assert images.equal(flux.decode_image(latents, *SIZE))
    assert mixed.encode_image(images).equal(flux.encode_image(images))
    assert (velocity(mixed) - velocity(flux)).norm() < 0.02 * velocity(flux).norm()
