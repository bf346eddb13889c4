"""Measure the finished models for the model card, through the loaders that users call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, CLIPModel, CLIPTokenizer

from deploy.tiny.recipe import judge, reward, vae
from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji
from deploy.tiny.recipe.generator import MAX_LENGTH
from deploy.tiny.recipe.subjects import choose
from trainer.evaluation.paired import paired_values

NUM_STEPS, NUM_MEASURED, BATCH = 25, 100, 50
DRAWN = {  # name in numbers.json: control word and guidance
    "base": (None, 3.5),
    "base_guidance_2": (None, 2.0),
    "told_3D": ("3D", 3.5),
    "told_Flat": ("Flat", 3.5),
}
GRID_ROWS, GRID_COLUMNS = 6, 10


def measure(emoji: Emoji, views: Tensor, folder: Path) -> dict[str, float]:
    """Compute every number of the model card; write numbers.json, samples.png and styles.png to `folder`."""
    pipeline = FluxPipeline.from_pretrained(folder / "flux", torch_dtype=torch.float32)
    style, subject = load_judges(folder / "judge")
    clip = CLIPModel.from_pretrained(folder / "reward", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "reward")
    drawn = choose(emoji).drawn
    numbers = {"vae_psnr_db": vae.psnr(_vae(folder), emoji.images[drawn][:, vae.FLUENT].flatten(0, 1))}
    numbers |= {f"reward_{name}": value for name, value in reward.measure(clip, tokenizer, emoji, views).items()}
    numbers |= {f"judge_{name}": value for name, value in judge.measure(style, subject, emoji, views).items()}
    rows = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(3))[:NUM_MEASURED]]
    real = {name: emoji.images[rows, STYLES.index(name)] for name in ("3D", "Flat")}
    numbers |= _compare(real["Flat"], real["3D"], style, subject, "real_Flat")
    strips = [real["3D"][:GRID_COLUMNS]]
    for name, (word, guidance) in DRAWN.items():
        images = sample(pipeline, [f"{word}. {label}" if word else label for label in _labels(emoji, rows)], guidance)
        strips.append(images[:GRID_COLUMNS])
        numbers |= _compare(images, real["Flat" if word == "Flat" else "3D"], style, subject, name)
        if name == "base":
            shown = images[: GRID_ROWS * GRID_COLUMNS].split(GRID_COLUMNS)
            save_grid(list(shown), folder / "samples.png")
    save_grid([*strips, real["Flat"][:GRID_COLUMNS]], folder / "styles.png")
    numbers = {name: round(value, 4) for name, value in numbers.items()}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def load_judges(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the style classifier and the subject embedder, float32 and in eval mode."""
    style = AutoModelForImageClassification.from_pretrained(folder / "style", dtype=torch.float32)
    subject = AutoModel.from_pretrained(folder / "subject", dtype=torch.float32)
    return style.eval(), subject.eval()


def sample(pipeline: FluxPipeline, prompts: list[str], guidance: float, seed: int = 0) -> Tensor:
    """Draw the prompts with FluxPipeline: (prompts, 3, 64, 64) uint8."""
    generator, images = torch.Generator().manual_seed(seed), []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), BATCH):
        drawn = pipeline(
            prompts[start : start + BATCH],
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=NUM_STEPS,
            guidance_scale=guidance,
            max_sequence_length=MAX_LENGTH,
            generator=generator,
            output_type="pt",
        ).images
        images.append((drawn.float() * 255).round().to(torch.uint8))
        print(f"sampled {start + len(drawn)}/{len(prompts)} at guidance {guidance}", flush=True)
    return torch.cat(images)


def save_grid(rows: list[Tensor], path: Path, factor: int = 2) -> None:
    """Save rows of uint8 pictures, one above the other, enlarged."""
    strip = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    picture = Image.fromarray(strip.permute(1, 2, 0).numpy())
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC).save(path)


@torch.no_grad()
def _compare(
    images: Tensor, truth: Tensor, style: torch.nn.Module, subject: torch.nn.Module, name: str
) -> dict[str, float]:
    """Return the distances of uint8 images to the real drawings, pair by pair, and the style judge's shares."""
    numbers = {f"{name}_{key}": float(value.mean()) for key, value in paired_values(images, truth).items()}
    pixels, real = (each.float() / 127.5 - 1 for each in (images, truth))
    similarity = (judge.embed(subject, pixels) * judge.embed(subject, real)).sum(dim=1).mean()
    seen = style(pixels).logits.argmax(dim=-1)
    shares = {f"{name}_share_{each}": float((seen == row).double().mean()) for row, each in enumerate(judge.CLASSES)}
    return numbers | {f"{name}_truth_subject_similarity": float(similarity)} | shares


def _labels(emoji: Emoji, rows: Tensor) -> list[str]:
    return [emoji.labels[row] for row in rows.tolist()]


def _vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "flux/vae", torch_dtype=torch.float32).eval()
