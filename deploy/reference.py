"""`make reference FILES="a.safetensors b.safetensors"`: compare our numbers with those of the published algorithm.

A file of vectors has a JSON of the same name beside it with sizes, schedule, sigmas, k, words and number of branches.
Our numbers come from the functions that training uses; the largest relative error of each quantity is printed. The
reward is the files' own stand-in: features of a pooled image against text vectors.

    rel = max |ours − theirs| / max |theirs|, and of a parameter's gradient |ours − theirs| / |theirs| in the 2-norm
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from services.config.fields import Schedule
from services.config.objective import ObjectiveConfig
from services.config.rewards import RewardConfig
from services.contract import Float32, PromptPair, RewardResponse
from trainer.algorithm.direct_align import branch_loss, recover_anchor
from trainer.algorithm.rollout import Injection, Sampling, roll_out
from trainer.flow import Branch, branches
from trainer.model.packing import pack
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
GRADIENTS, GRADIENT_NORM = "parameter gradients", "gradient norm"
_SIGMAS = ("sigma_start", "sigma_end")
_NO_GRADIENT = 1e-6  # a parameter's gradient of this norm is rounding: it is compared with this in place of itself
_POOLED_PX = 8
_SMALLEST = 1e-12  # so that 0 beside 0 is no error


class VectorsError(ValueError):
    """A file that cannot be compared; the text names it."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One file of vectors with its description."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Reference:
        """Read PATH.safetensors and PATH.json; PATH may have either ending or none. Raise VectorsError.

        Our numbers are computed on the device to which the file's tensors go.
        """
        stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
        files = stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")
        for file in files:
            if not file.is_file():
                raise VectorsError(f"{path}: there is no {file}")
        return cls(load_file(files[0], device), json.loads(files[1].read_text(encoding="utf-8")))

    def flux(self) -> Policy:
        """Return the policy: transformer and VAE with the file's weights."""
        with self.tensors["in.noise"].device:
            transformer = FluxTransformer2DModel(**self.facts["transformer_config"])
            vae = AutoencoderKL(**self.facts["vae_config"])
        for prefix, module in (("transformer.", transformer), ("vae.", vae)):
            weights = {key.removeprefix(prefix): each for key, each in self.tensors.items() if key.startswith(prefix)}
            module.load_state_dict(weights)
        absent = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return Policy(FluxPipeline(transformer=transformer, vae=vae, **absent))

    def objective(self) -> ObjectiveConfig:
        facts, num_levels = self.facts, self.facts["num_levels"]
        num_delta_levels = int((1 - facts["known_share"]) * num_levels) + 1
        return ObjectiveConfig(
            truncate_timestep=True,
            level_range=(1, num_levels - 1),
            num_delta_levels=min(num_delta_levels, num_levels - 1),
            **{key: facts[key] for key in ("num_levels", "num_grid_steps", "grid_index_range", "train_guidance_scale")},
        )

    def reward(self) -> RewardConfig:
        denoise, invert = (self.facts[f"preference_scale_{branch}"] for branch in ("denoise", "invert"))
        return RewardConfig(
            name="reference",
            preference_scale_denoise=Schedule(start=denoise[0], end=denoise[1]),
            preference_scale_invert=Schedule(start=invert[0], end=invert[1]),
            margin=self.facts["margin"],
        )

    def injection(self, flux: Policy) -> Injection:
        """Make the file's rollout with our code and inject its noise again."""
        tensors, facts = self.tensors, self.facts
        first, after_word = facts["branches"][0], f". {facts['caption']}"
        words = [first[f"{side}_text"].removesuffix(after_word) for side in ("positive", "negative")]
        noise = pack(tensors["in.noise"])
        rollout = roll_out(
            flux,
            conditioning=Conditioning(tensors["in.prompt_embeds"], tensors["in.pooled"]),
            noise=noise,
            pairs=(PromptPair(facts["caption"], words[0], words[1]),) * len(noise),
            sampling=Sampling(
                num_steps=facts["num_rollout_steps"],
                guidance_scale=facts["rollout_guidance_scale"],
                shift=facts["shift"],
                height_px=facts["height_px"],
                width_px=facts["width_px"],
                truncate_timestep=True,
            ),
        )
        return Injection(rollout, noise, torch.tensor([facts["level"]] * len(noise)))

    def branches(self, injection: Injection) -> list[Branch]:
        """Return the file's branches: they alternate, denoise first."""
        both = branches(injection.levels, self.objective(), self.facts["shift"])
        return list(islice(cycle(both), self.facts["num_branches"]))

    def score(
        self, _: str, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...], with_gradient: bool
    ) -> RewardResponse:
        """Return the stand-in reward with its gradient, as the service would answer."""
        assert with_gradient
        device = self.tensors["reward.W"].device
        leaf = torch.tensor(images, requires_grad=True, device=device)
        pooled = adaptive_avg_pool2d(leaf, _POOLED_PX).flatten(1)
        features = normalize(pooled @ self.tensors["reward.W"].T, dim=-1)
        positive = self._similarities(features, [pair.positive_text for pair in pairs])
        negative = self._similarities(features, [pair.negative_text for pair in pairs])
        rewards = (1 + torch.tensor(scales, device=device)) * positive - negative
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
        values = [value.detach().cpu().numpy() for value in (rewards, positive, negative)]
        return RewardResponse(values[0], values[1][None], values[2][None], gradient.cpu().numpy(), ("reference",), "0")

    def _similarities(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        return (features * torch.stack([self.tensors[f"reward.text.{text}"].view(-1) for text in texts])).sum(dim=-1)


def compare(reference: Reference) -> dict[str, float]:
    """Return the largest relative error of each quantity over the file's branches, in the order of computation."""
    flux, tensors, facts = reference.flux(), reference.tensors, reference.facts
    injection = reference.injection(flux)
    errors = {"rollout": _relative(injection.rollout.clean, tensors["rollout_latents"])}
    for number, branch in enumerate(reference.branches(injection)):
        forward = _forward_errors(reference, flux, injection, branch, number)
        outcome = branch_loss(branch, injection, flux, reference.score, reference.objective(), (reference.reward(),))
        loss = outcome.loss / facts["num_branches"]
        loss.backward()
        scale = torch.tensor(facts["branches"][number]["preference_scale"])
        forward |= {
            "preference_scale": _relative(outcome.preference_scales[0, 0], scale),
            "reward": _relative(outcome.rewards[0], tensors[f"branch{number}.reward"].view(-1)),
        }
        errors |= {name: _largest([error, errors.get(name, 0.0)]) for name, error in forward.items()}
    errors["loss of the last branch"] = _relative(loss, torch.tensor(facts["loss_last_branch"]))
    return errors | _gradient_errors(flux.transformer, reference)


def _forward_errors(
    reference: Reference, flux: Policy, injection: Injection, branch: Branch, number: int
) -> dict[str, float]:
    """Return the errors of sigmas and of all quantities from the injected noise to the decoded image."""
    sampling, objective, facts = injection.rollout.sampling, reference.objective(), reference.facts["branches"][number]
    if branch.name != facts["branch"]:
        raise VectorsError(f"branch {number} of the file is {facts['branch']!r}, ours is {branch.name!r}")
    size = sampling.height_px, sampling.width_px
    with torch.no_grad():
        ours = recover_anchor(branch, injection, flux, objective)
        image = flux.decode_image(ours.recovered, *size)
    latents = {"noisy": ours.noisy, "pred": ours.velocity, "recovered": ours.recovered, "image": image}
    sigmas = {name: _relative(getattr(branch, name), torch.tensor(facts[name])) for name in _SIGMAS}
    return sigmas | {
        name: _relative(each, reference.tensors[f"branch{number}.{name}"]) for name, each in latents.items()
    }


def _gradient_errors(transformer: nn.Module, reference: Reference) -> dict[str, float]:
    parameters, prefix = dict(transformer.named_parameters()), "grad."
    theirs = {key.removeprefix(prefix): each for key, each in reference.tensors.items() if key.startswith(prefix)}
    if theirs.keys() != parameters.keys():
        raise VectorsError(f"the file's gradients are not our parameters': {sorted(theirs.keys() ^ parameters.keys())}")
    ours = {
        name: torch.zeros_like(each) if (grad := parameters[name].grad) is None else grad
        for name, each in theirs.items()
    }
    errors = [float((ours[name] - each).norm() / (each.norm() + _NO_GRADIENT)) for name, each in theirs.items()]
    norm = torch.nn.utils.get_total_norm(ours.values())
    return {GRADIENTS: _largest(errors), GRADIENT_NORM: _relative(norm, torch.tensor(reference.facts["grad_norm"]))}


def _largest(errors: Sequence[float]) -> float:
    """Return the largest number, or NaN if there is one, which max would not."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if ours.numel() != theirs.numel():
        raise VectorsError(f"ours is {tuple(ours.shape)}, the file's is {tuple(theirs.shape)}")
    ours, theirs = ours.detach().cpu().flatten().double(), theirs.cpu().flatten().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=_SMALLEST))


def tolerance(name: str) -> float:
    return GRADIENT_TOLERANCE if name in (GRADIENTS, GRADIENT_NORM) else TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 0 if every error is within its tolerance, 1 if not or if a file cannot be compared."""
    parser = argparse.ArgumentParser("deploy.reference", description="Compare with files of reference vectors.")
    parser.add_argument("files", nargs="+", type=Path, help="NAME.safetensors with NAME.json beside it")
    is_within = True
    try:
        for path in parser.parse_args(arguments).files:
            print(f"{path}: largest relative error")
            for name, error in compare(Reference.load(path)).items():
                is_close = error <= tolerance(name)
                is_within &= is_close
                print(f"  {name:24}{error:9.1e}{'' if is_close else f'  over {tolerance(name):.0e}'}")
    except (VectorsError, KeyError, OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        print(f"make reference: {path}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
