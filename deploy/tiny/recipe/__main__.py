"""`make tiny`: every stage of the recipe in order; a finished stage is skipped, an interrupted one starts where it can.

Name stages to run only those; delete a stage's output to have it made again. Weights land in deploy/tiny/,
everything else in deploy/tiny/build/.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from deploy.tiny.recipe import data, flux, judge, measure, reward, vae, views

FOLDER = Path(__file__).parents[1]
BUILD = FOLDER / "build"
DATA, VIEWS, VAE = BUILD / "data.safetensors", BUILD / "views.safetensors", FOLDER / "flux/vae"
JUDGE = FOLDER / "judge"
NUM_THREADS = 1  # `make tiny` runs stages that do not need each other side by side


def make_data() -> None:
    data.fetch(BUILD / "npm")
    data.render(BUILD / "npm", DATA)


def make_vae() -> None:
    vae.train(data.load(DATA), VAE)


def make_views() -> None:
    save_file({"views": views.make_views(data.load(DATA), _vae(), seed=50)}, VIEWS)


def make_reward() -> None:
    reward.train(data.load(DATA), _views(), FOLDER / "reward")


def make_style() -> None:
    judge.train_style(data.load(DATA), _views(), JUDGE / "style")


def make_subject() -> None:
    judge.train_subject(data.load(DATA), _views(), JUDGE / "subject")


def make_reference() -> None:
    style, subject = measure.load_judges(JUDGE)
    judge.write_reference(style, subject, data.load(DATA), JUDGE / "reference.safetensors")


def make_flux() -> None:
    flux.train(data.load(DATA), _vae(), BUILD / "flux.pt", FOLDER / "flux")


def make_prompts() -> None:
    emoji = data.load(DATA)
    (FOLDER / "prompts").mkdir(exist_ok=True)
    training, held_out = (chosen.nonzero().flatten().tolist() for chosen in (~emoji.heldout, emoji.heldout))
    for name, subjects in (("train", training), ("validation", held_out[::2]), ("test", held_out[1::2])):
        labels = [emoji.labels[subject] for subject in subjects]
        (FOLDER / f"prompts/{name}.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def make_measure() -> None:
    print(json.dumps(measure.measure(data.load(DATA), _views(), FOLDER), indent=1))


STAGES: dict[str, tuple[Callable[[], None], Path]] = {  # stage -> what makes it, the last file it writes
    "data": (make_data, DATA),
    "vae": (make_vae, VAE / "diffusion_pytorch_model.safetensors"),
    "views": (make_views, VIEWS),
    "reward": (make_reward, FOLDER / "reward/preprocessor_config.json"),
    "style": (make_style, JUDGE / "style/model.safetensors"),
    "subject": (make_subject, JUDGE / "subject/model.safetensors"),
    "reference": (make_reference, JUDGE / "reference.safetensors"),
    "flux": (make_flux, FOLDER / "flux/model_index.json"),
    "prompts": (make_prompts, FOLDER / "prompts/test.txt"),
    "measure": (make_measure, FOLDER / "numbers.json"),
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise SystemExit(f"unknown stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    torch.set_num_threads(NUM_THREADS)
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's one takes three times as long in bfloat16 on few tokens
    BUILD.mkdir(exist_ok=True)
    for name in names or STAGES:
        make, output = STAGES[name]
        if output.exists():
            print(f"{name}: done before ({output})", flush=True)
            continue
        started = time.monotonic()
        make()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # or the generator's folder would tell where it was trained
    return vae


def _views() -> torch.Tensor:
    return load_file(VIEWS)["views"]


if __name__ == "__main__":
    main(sys.argv[1:])
