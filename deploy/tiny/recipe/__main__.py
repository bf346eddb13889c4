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

from deploy.tiny.recipe import data, flux, judge, measure, reward, vae, views
from deploy.tiny.recipe.stages import Stage, run

FOLDER = Path(__file__).parents[1]
BUILD = FOLDER / "build"
DATA, VIEWS, VAE = BUILD / "data.safetensors", BUILD / "views.safetensors", FOLDER / "flux/vae"
JUDGE = FOLDER / "judge"
NUM_THREADS = 1  # `make tiny` runs stages that do not need each other side by side


def make_data(out: Path) -> None:
    data.fetch(BUILD / "npm")
    data.render(BUILD / "npm", out)


def make_vae(out: Path) -> None:
    vae.train(data.load(DATA), out)


def make_views(out: Path) -> None:
    save_file({"views": views.make_views(data.load(DATA), _vae(), seed=50)}, out)


def make_reward(out: Path) -> None:
    reward.train(data.load(DATA), _views(), out)


def make_style(out: Path) -> None:
    judge.train_style(data.load(DATA), _views(), out)


def make_subject(out: Path) -> None:
    judge.train_subject(data.load(DATA), _views(), out)


def make_reference(out: Path) -> None:
    style, subject = measure.load_judges(JUDGE)
    judge.write_reference(style, subject, data.load(DATA), out)


def make_flux(out: Path) -> None:
    flux.train(data.load(DATA), _vae(), BUILD / "flux.pt", out)
    (BUILD / "flux.pt").unlink()  # or training anew would go on at its end


def make_prompts(out: Path) -> None:
    emoji = data.load(DATA)
    out.mkdir()
    training, held_out = (chosen.nonzero().flatten().tolist() for chosen in (~emoji.heldout, emoji.heldout))
    for name, subjects in (("train", training), ("validation", held_out[::2]), ("test", held_out[1::2])):
        labels = [emoji.labels[subject] for subject in subjects]
        (out / f"{name}.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def make_measure(_: Path) -> None:
    print(json.dumps(measure.measure(data.load(DATA), _views(), FOLDER), indent=1))


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
    "measure": Stage(make_measure),
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise SystemExit(f"unknown stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    torch.set_num_threads(NUM_THREADS)
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's one takes three times as long in bfloat16 on few tokens
    try:
        run({name: STAGES[name] for name in names or STAGES}, BUILD)
    except data.RecipeError as error:
        raise SystemExit(f"make tiny: {error}") from error


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # or the generator's folder would tell where it was trained
    return vae


def _views() -> torch.Tensor:
    return load_file(VIEWS)["views"]


if __name__ == "__main__":
    main(sys.argv[1:])
