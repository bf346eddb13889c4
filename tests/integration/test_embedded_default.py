"""The shipped models: small enough, and what FluxPipeline draws with them is what the trainer draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from services.config import RunConfig, load_run_config
from trainer.evaluate import Judges
from trainer.flux import FluxModel
from trainer.prompt_files import load_prompts
from trainer.rollout import Sampling, sample

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 25_000_000


@pytest.fixture(scope="module", params=["tiny_srpo", "tiny_srpo_reversed"])
def run(request: pytest.FixtureRequest) -> RunConfig:
    return load_run_config(ROOT / f"deploy/runs/{request.param}.yaml")


def test_weights_stay_small() -> None:
    files = [each for each in (ROOT / "deploy/tiny").rglob("*.safetensors") if "build" not in each.parts]
    assert len(files) == 8
    assert sum(each.stat().st_size for each in files) <= MAX_BYTES


def test_no_held_out_prompt_is_trained_on(run: RunConfig) -> None:
    paths = run.prompts.path, run.evaluation.prompts_path
    training, held_out = (load_prompts(ROOT / path, "prompt") for path in paths if isinstance(path, Path))
    assert not set(training) & set(held_out)


def test_trainer_draws_what_the_pipeline_draws_and_judges_know_the_subjects(run: RunConfig) -> None:
    model, prompts = run.model, list(load_prompts(ROOT / run.evaluation.prompts_path, "prompt")[:2])
    flux = FluxModel.load(str(ROOT / model.path), torch.float32)
    size = model.height_px, model.width_px
    noise = flux.draw_noise([torch.Generator().manual_seed(seed) for seed in range(2)], *size)
    conditioning = flux.encode_prompts(prompts, model.max_sequence_length)
    shift = flux.resolve_shift(run.rollout.shift, *size)
    clean = sample(flux.transformer, flux, conditioning, noise, Sampling(4, 3.5, shift, *size))
    ours = flux.decode_image(clean, *size)
    pipeline = FluxPipeline.from_pretrained(ROOT / model.path, dtype=torch.float32)
    theirs = pipeline(
        prompts,
        height=model.height_px,
        width=model.width_px,
        num_inference_steps=4,
        guidance_scale=3.5,
        latents=noise,
        max_sequence_length=model.max_sequence_length,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert run.evaluation.judge_path is not None
    judges = Judges.load(ROOT / run.evaluation.judge_path, torch.device("cpu"))
    numbers = judges.numbers((ours * 255).round().to(torch.uint8), prompts, batch=2)
    shares = [value for name, value in numbers.items() if name.startswith("eval/style_share")]
    assert sum(shares) == pytest.approx(1)
