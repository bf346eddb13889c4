"""`make tiny`: run every stage in order; skip a finished stage, and continue an interrupted one if it can.

Name stages to run only those. Weights replace those in deploy/tiny/, stage by stage; everything else is written to
deploy/tiny/build/. Delete that folder to train all anew, or STAGE.done in it to make one stage again (and the stages
that build on it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from deploy.tiny.recipe import data, flux, judge, measure, reward, subjects, vae, views
from deploy.tiny.recipe.stages import Stage, run

FOLDER = Path(__file__).parents[1]
BUILD = FOLDER / "build"
DATA, VIEWS, VAE = BUILD / "data.safetensors", BUILD / "views.safetensors", FOLDER / "flux/vae"
JUDGE = FOLDER / "judge"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_THREADS = 1  # `make tiny` runs stages that do not need each other side by side


def make_data(out: Path) -> None:
    data.fetch(BUILD / "npm")
    data.render(BUILD / "npm", out)


def make_vae(out: Path) -> None:
    vae.train(data.load(DATA), out, BUILD / "vae.pt", DEVICE)


def make_views(out: Path) -> None:
    save_file({"views": views.make_views(data.load(DATA), _vae().to(DEVICE), DEVICE)}, out)


def make_reward(out: Path) -> None:
    reward.train(data.load(DATA), _views(), out, BUILD / "reward.pt")


def make_style(out: Path) -> None:
    judge.train_style(data.load(DATA), _views(), out, BUILD / "style.pt")


def make_subject(out: Path) -> None:
    judge.train_subject(data.load(DATA), _views(), out, BUILD / "subject.pt")


def make_reference(out: Path) -> None:
    judge.write_reference(*measure.load_judges(JUDGE), data.load(DATA), out)


def make_flux(out: Path) -> None:
    flux.train(data.load(DATA), _vae(), out, BUILD / "flux.pt", DEVICE)


def make_prompts(out: Path) -> None:
    subjects.write_prompts(data.load(DATA), out)


def make_truth(out: Path) -> None:
    subjects.write_drawings(data.load(DATA), out)


def make_measure(_: Path) -> None:
    print(json.dumps(measure.measure(data.load(DATA), _views().cpu(), FOLDER), indent=1))


STAGES = {
    "data": Stage(make_data, DATA),
    "vae": Stage(make_vae, VAE),
    "views": Stage(make_views, VIEWS),
    "reward": Stage(make_reward, FOLDER / "reward"),
    "style": Stage(make_style, JUDGE / "style"),
    "subject": Stage(make_subject, JUDGE / "subject"),
    "reference": Stage(make_reference, JUDGE / "reference.safetensors"),
    "flux": Stage(make_flux, FOLDER / "flux"),
    "prompts": Stage(make_prompts, FOLDER / "prompts"),
    "truth": Stage(make_truth, FOLDER / "truth"),
    "measure": Stage(make_measure),
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise SystemExit(f"unknown stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    torch.set_num_threads(NUM_THREADS)
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's one takes three times as long in bfloat16 on few tokens
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on this model (PyTorch 2.11, H200)
    try:
        run({name: STAGES[name] for name in names or STAGES}, BUILD)
    except data.RecipeError as error:
        raise SystemExit(f"make tiny: {error}") from error


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # or the generator's folder would tell where it was trained
    return vae


def _views() -> torch.Tensor:
    return load_file(VIEWS, device=str(DEVICE))["views"]


if __name__ == "__main__":
    main(sys.argv[1:])
