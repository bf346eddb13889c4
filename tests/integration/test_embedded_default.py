"""The shipped models are small and as good as their card says; trainer and FluxPipeline draw the same with them."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from services.config.run import RunConfig, load_run_config
from trainer.algorithm.rollout import Sampling, sample
from trainer.data.prompt_files import load_prompts
from trainer.evaluation.judges import Judges
from trainer.model.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 60_000_000
STYLES = ("3D", "Flat", "Noto", "Twemoji")
PROMPT_FILES = ("train", "validation", "test")
AIMS = {  # of numbers.json: (minimum, maximum); the card names the one that is missed
    "vae_psnr_db": (33, math.inf),
    "base_share_3D": (0.35, 0.65),
    "base_share_Flat": (0.35, 0.65),
    "base_truth_subject_similarity": (0.95, 1),
    "told_3D_truth_edge_correlation": (0.95, 1),
    "told_Flat_truth_edge_correlation": (0.95, 1),
    "reward_orders_3d_flat": (0.93, 1),
    "reward_spoiling_pays": (0, 0.10),
    "judge_style_vae": (0.85, 1),
}
MEASURES = {  # of demo.json: the line of the tables, and digits
    "truth_l1": ("L1 to the real drawing", 3),
    "truth_ssim": ("structural similarity to it", 3),
    "truth_edge_correlation": ("edge correlation with it", 3),
    "truth_hue_distance": ("hue distance to it", 3),
    "truth_subject_similarity": ("subject similarity to it", 3),
    "style_share_3D": ("share judged 3D", 2),
    "style_share_Flat": ("share judged Flat", 2),
    "style_share_Spoiled": ("share judged spoiled", 2),
    "damage": ("damage (alarm above 1)", 2),
    "diversity_prompts": ("diversity", 2),
}


@pytest.fixture(scope="module", params=["tiny_srpo", "tiny_srpo_reversed"])
def run(request: pytest.FixtureRequest) -> RunConfig:
    return load_run_config(ROOT / f"deploy/runs/{request.param}.yaml")


def test_weights_stay_small() -> None:
    files = [each for each in (ROOT / "deploy/tiny").rglob("*") if each.is_file() and "build" not in each.parts]
    assert len([each for each in files if each.suffix == ".safetensors"]) == 8
    assert sum(each.stat().st_size for each in files) <= MAX_BYTES


@pytest.mark.parametrize("name", AIMS)
def test_the_model_card_reaches_its_aims(name: str) -> None:
    lowest, highest = AIMS[name]
    numbers = json.loads((ROOT / "deploy/tiny/numbers.json").read_text(encoding="utf-8"))
    assert lowest <= numbers[name] <= highest


def demo_rows() -> dict[str, str]:
    """The lines of the tables, by measure: base, aligned and oracle of both runs."""
    runs = json.loads((ROOT / "deploy/runs/results/demo.json").read_text(encoding="utf-8"))["runs"]
    columns = [runs[run][policy] for run in ("3D | Flat", "Flat | 3D") for policy in ("base", "aligned", "oracle")]
    return {
        name: f"| {' | '.join([title, *(f'{each[name]:.{digits}f}' for each in columns)])} |"
        for name, (title, digits) in MEASURES.items()
    }


def test_the_tables_have_the_demos_numbers() -> None:
    rows = set(demo_rows().values())
    assert rows <= set((ROOT / "deploy/runs/results/README.md").read_text(encoding="utf-8").splitlines())
    titles = tuple(f"| {title} |" for title, _ in MEASURES.values())
    brief = {line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(titles)}
    assert brief
    assert brief <= rows


def test_no_prompt_is_in_two_files() -> None:
    files = {name: set(load_prompts(ROOT / f"deploy/tiny/prompts/{name}.txt", "prompt")) for name in PROMPT_FILES}
    assert all(files.values())
    assert not [pair for pair in combinations(PROMPT_FILES, 2) if files[pair[0]] & files[pair[1]]]


def test_training_guard_and_report_have_prompts_of_their_own(run: RunConfig) -> None:
    assert run.guard is not None
    paths = run.prompts.path, run.guard.prompts_path, run.evaluation.prompts_path
    assert [path.stem for path in paths if isinstance(path, Path)] == list(PROMPT_FILES)


def test_the_trainer_draws_what_the_pipeline_draws_and_judges_measure_it(run: RunConfig) -> None:
    model, prompts = run.model, list(load_prompts(ROOT / run.evaluation.prompts_path, "prompt")[:2])
    policy = Policy.load(str(ROOT / model.path), torch.float32)
    size = model.height_px, model.width_px
    noise = policy.draw_noise([torch.Generator().manual_seed(seed) for seed in range(2)], *size)
    conditioning = policy.encode_prompts(prompts, model.max_sequence_length)
    shift = policy.resolve_shift(run.rollout.shift, *size)
    clean = sample(policy, conditioning, noise, Sampling(4, 3.5, shift, *size))
    ours = policy.decode_image(clean, *size)
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
    values, features = judges.judge((ours * 255).round().to(torch.uint8), prompts, batch=2)
    assert values.keys() > {f"style_share_{style}" for style in STYLES}
    assert features.isfinite().all()
