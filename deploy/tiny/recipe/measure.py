"""The finished model -> the model card's numbers and pictures, through the loaders that users call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, CLIPModel, CLIPTokenizer

from deploy.tiny.recipe import judge, reward, vae
from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji
from deploy.tiny.recipe.flux import MAX_LENGTH

GUIDANCE, NUM_ROLLOUT_STEPS, NUM_MEASURED = 3.5, 25, 400
GRID_ROWS, GRID_COLUMNS, CAPTION_PX = 6, 10, 14


def measure(emoji: Emoji, views: Tensor, folder: Path) -> dict[str, float]:
    """Compute every number of the model card; write numbers.json and samples.png to `folder`."""
    pipeline = FluxPipeline.from_pretrained(folder / "flux", torch_dtype=torch.float32)
    style, subject = load_judges(folder / "judge")
    clip = CLIPModel.from_pretrained(folder / "reward", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "reward")
    numbers: dict[str, float] = {"vae_psnr_db": round(_psnr(folder, emoji), 2)}
    numbers |= {f"reward_{k}": v for k, v in reward.measure(clip, tokenizer, emoji).items()}
    numbers |= {f"judge_{k}": v for k, v in judge.measure(style, subject, emoji, views).items()}
    training = (~emoji.heldout).nonzero().flatten()
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[:NUM_MEASURED]
    known = judge.reference_embeddings(folder / "judge/reference.safetensors")
    for name, subjects in (("training", training[order]), ("heldout", emoji.heldout.nonzero().flatten())):
        images = sample(pipeline, [emoji.labels[i] for i in subjects.tolist()])
        numbers |= _judge(images, subjects, style, subject, known, name)
        if name == "training":
            shown = GRID_ROWS * GRID_COLUMNS
            _grid(images[:shown], [emoji.labels[i] for i in subjects[:shown].tolist()]).save(folder / "samples.png")
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def load_judges(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the style classifier and the subject embedder, float32 and in eval mode."""
    style = AutoModelForImageClassification.from_pretrained(folder / "style", dtype=torch.float32)
    subject = AutoModel.from_pretrained(folder / "subject", dtype=torch.float32)
    return style.eval(), subject.eval()


def sample(pipeline: FluxPipeline, prompts: list[str], seed: int = 0) -> Tensor:
    """Draw the prompts with FluxPipeline at guidance 3.5: (prompts, 3, 64, 64) in [0, 1]."""
    generator, images = torch.Generator().manual_seed(seed), []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), 50):
        images.append(
            pipeline(
                prompts[start : start + 50],
                height=SIZE_PX,
                width=SIZE_PX,
                num_inference_steps=NUM_ROLLOUT_STEPS,
                guidance_scale=GUIDANCE,
                max_sequence_length=MAX_LENGTH,
                generator=generator,
                output_type="pt",
            ).images
        )
        print(f"sampled {start + len(images[-1])}/{len(prompts)}", flush=True)
    return torch.cat(images).float()


def _psnr(folder: Path, emoji: Emoji) -> float:
    return vae.psnr(AutoencoderKL.from_pretrained(folder / "flux/vae", torch_dtype=torch.float32), emoji)


@torch.no_grad()
def _judge(
    images: Tensor, subjects: Tensor, style: torch.nn.Module, subject: torch.nn.Module, known: Tensor, name: str
) -> dict[str, float]:
    seen = style(images * 2 - 1).logits.argmax(-1)
    nearest = (judge.embed(subject, images * 2 - 1) @ known.T).topk(5).indices
    numbers = {f"{name}_share_{s}": float((seen == i).float().mean()) for i, s in enumerate(STYLES)}
    numbers[f"{name}_subject_top5_of_all"] = float((nearest == subjects[:, None]).any(-1).float().mean())
    return {key: round(value, 4) for key, value in numbers.items()}


def _grid(images: Tensor, captions: list[str]) -> Image.Image:
    """Enlarge twice for the eye."""
    size = 2 * SIZE_PX
    canvas = Image.new("RGB", (GRID_COLUMNS * size, GRID_ROWS * (size + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(canvas)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for index, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = index % GRID_COLUMNS * size, index // GRID_COLUMNS * (size + CAPTION_PX)
        canvas.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC), (x, y))
        draw.text((x + 2, y + size), caption[:22], fill="black")
    return canvas
