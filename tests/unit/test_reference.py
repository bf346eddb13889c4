"""Every number of the published algorithm (tiny random weights), reproduced through the functions that training uses.

The vectors lie beside the repository, in ../shared/reference; their README defines each key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from services.config import ObjectiveConfig
from services.contract import Float32, PromptPair, RewardResponse
from trainer.direct_align import branch_loss, recover_anchor
from trainer.flow import Branch, branches, interpolate
from trainer.flux import Conditioning, FluxModel
from trainer.rollout import Rollout, Sampling, roll_out

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "reference"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the reference vectors are not at {FOLDER}")


@dataclass(frozen=True)
class Reference:
    """One file of vectors, and the objects of ours that stand for its settings."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    flux: FluxModel
    objective: ObjectiveConfig
    rollout: Rollout

    def branches(self) -> tuple[Branch, Branch]:
        return branches(self.rollout.levels, self.objective, self.facts["shift"])

    def score(self, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...]) -> RewardResponse:
        """The stand-in reward, with its gradient, as a service would answer."""
        leaf = torch.tensor(images, requires_grad=True)
        features = normalize(adaptive_avg_pool2d(leaf, 8).flatten(1) @ self.tensors["reward.W"].T, dim=-1)
        positive, negative = (
            (features * torch.stack([self.tensors[f"reward.text.{text}"].view(-1) for text in texts])).sum(dim=-1)
            for texts in ([pair.positive_text for pair in pairs], [pair.negative_text for pair in pairs])
        )
        rewards = (1 + torch.tensor(scales)) * positive - negative
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
        values = [value.detach().numpy() for value in (rewards, positive, negative)]
        return RewardResponse(values[0], values[1][None], values[2][None], gradient.numpy(), ("reference",), "0")


@pytest.fixture(scope="module", params=["srpo_a", "srpo_b"])
def reference(request: pytest.FixtureRequest) -> Reference:
    tensors = load_file(FOLDER / f"{request.param}.safetensors")
    facts = json.loads((FOLDER / f"{request.param}.json").read_text(encoding="utf-8"))
    flux = _model(tensors, facts)
    first = facts["branches"][0]
    positive, negative = (first[f"{side}_text"].split(". ")[0] for side in ("positive", "negative"))
    rollout = roll_out(
        flux.transformer,
        flux,
        conditioning=Conditioning(tensors["in.prompt_embeds"], tensors["in.pooled"]),
        noise=flux.pack(tensors["in.noise"]),
        pairs=(PromptPair(facts["caption"], positive, negative),),
        levels=torch.tensor([facts["level"]]),
        sampling=Sampling(
            num_steps=facts["num_rollout_steps"],
            guidance_scale=facts["rollout_guidance_scale"],
            shift=facts["shift"],
            height_px=facts["height_px"],
            width_px=facts["width_px"],
        ),
    )
    return Reference(tensors, facts, flux, _objective(facts), rollout)


def _model(tensors: dict[str, Tensor], facts: dict[str, Any]) -> FluxModel:
    modules = {
        "transformer": FluxTransformer2DModel(**facts["transformer_config"]),
        "vae": AutoencoderKL(**facts["vae_config"]),
    }
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )
    absent = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxModel(FluxPipeline(**modules, **absent), truncates_timestep=True)


def _objective(facts: dict[str, Any]) -> ObjectiveConfig:
    num_delta_levels = int((1 - facts["known_share"]) * facts["num_levels"]) + 1
    same = ["num_levels", "num_grid_steps", "grid_index_range", "train_guidance_scale", "margin"]
    same += ["preference_scale_denoise", "preference_scale_invert"]
    return ObjectiveConfig(num_delta_levels=num_delta_levels, **{name: facts[name] for name in same})


def test_rollout_latents(reference: Reference) -> None:
    torch.testing.assert_close(reference.rollout.clean, reference.tensors["rollout_latents"], rtol=0, atol=1e-4)


def test_branch_levels(reference: Reference) -> None:
    for branch, facts in zip(reference.branches(), reference.facts["branches"], strict=True):
        assert branch.name == facts["branch"]
        for name in ("sigma_start", "sigma_end", "preference_scale"):
            assert getattr(branch, name).item() == pytest.approx(facts[name], abs=1e-6), name


def test_latents_and_images_of_both_branches(reference: Reference) -> None:
    flux, rollout, guidance_scale = reference.flux, reference.rollout, reference.objective.train_guidance_scale
    size = rollout.sampling.height_px, rollout.sampling.width_px
    for number, branch in enumerate(reference.branches()):
        noisy = interpolate(rollout.clean, rollout.noise, branch.sigma_start)
        recovered = recover_anchor(branch, rollout, flux.transformer, flux, guidance_scale)
        ours = {
            "noisy": noisy,
            "pred": flux.predict_velocity(
                flux.transformer, noisy, branch.sigma_start, rollout.conditioning, guidance_scale, *size
            ),
            "recovered": recovered,
            "image": flux.decode_image(recovered, *size),
        }
        for key, value in ours.items():
            theirs = reference.tensors[f"branch{number}.{key}"]
            torch.testing.assert_close(value.detach(), theirs, rtol=0, atol=1e-4, msg=f"branch{number}.{key}")


def test_rewards_losses_and_every_gradient(reference: Reference) -> None:
    flux, facts = reference.flux, reference.facts
    flux.transformer.zero_grad()
    for number, branch in enumerate(reference.branches()):
        outcome = branch_loss(branch, reference.rollout, flux.transformer, flux, reference.score, reference.objective)
        (outcome.loss / facts["num_branches"]).backward()
        reward = reference.tensors[f"branch{number}.reward"]
        torch.testing.assert_close(outcome.rewards, reward.view(-1), rtol=0, atol=1e-4)
    assert outcome.loss.item() / facts["num_branches"] == pytest.approx(facts["loss_last_branch"], abs=1e-4)
    _assert_gradients_equal(dict(flux.transformer.named_parameters()), reference.tensors)
    gradients = [parameter.grad for parameter in flux.transformer.parameters() if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    assert norm.item() == pytest.approx(facts["grad_norm"], rel=1e-3)


def _assert_gradients_equal(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> None:
    names = {key.removeprefix("grad.") for key in tensors if key.startswith("grad.")}
    assert names == parameters.keys()
    for name in names:
        ours, theirs = parameters[name].grad, tensors[f"grad.{name}"]
        assert ours is not None, name
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-9, name
