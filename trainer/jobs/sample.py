"""`srpo sample MODEL --prompt TEXT -o FILE`: draw pictures with a model as training draws them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from torchvision.utils import save_image

from trainer.algorithm.rollout import Sampling, sample
from trainer.data.prompt_files import LocatedPrompt
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.draws import evaluation_generator
from trainer.model.loading import ModelError
from trainer.model.policy import Policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 with a line on stderr for a model, size or file that cannot be used."""
    args = _parser().parse_args(arguments)
    if not args.out.absolute().parent.is_dir():
        print(f"srpo sample: no folder {args.out.parent} to write to: make it first", file=sys.stderr)
        return 1
    if args.out.suffix.lower() not in PIL.Image.registered_extensions():
        print(f"srpo sample: {args.out} does not say its format: end it in .png or .jpg", file=sys.stderr)
        return 1
    try:
        draw(args)
    except ModelError as error:
        print(f"srpo sample: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


def draw(args: argparse.Namespace) -> None:
    """Write one picture a prompt, side by side; picture i depends on seed and i alone. Raise ModelError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(args.model, getattr(torch, args.dtype), device)
    size = args.height_px or policy.vae.config.sample_size, args.width_px or policy.vae.config.sample_size
    sampling = Sampling(args.num_steps, args.guidance_scale, policy.resolve_shift(args.shift, *size), *size)
    max_length = args.max_sequence_length or policy.max_sequence_length
    if cut := describe_cut_prompts(
        policy.text, [LocatedPrompt(each, f"--prompt {each!r}") for each in args.prompt], max_length
    ):
        print(f"warning: {cut}", file=sys.stderr)
    images: list[torch.Tensor] = []
    for start in range(0, len(args.prompt), args.batch):
        prompts = args.prompt[start : start + args.batch]
        noise = policy.draw_noise([evaluation_generator(args.seed, start + i) for i in range(len(prompts))], *size)
        with torch.no_grad():
            clean = sample(policy, policy.encode_prompts(prompts, max_length), noise, sampling)
            images += policy.decode_image(clean, *size).cpu()
    save_image(images, args.out, nrow=len(images), padding=0)


def _shift(text: str) -> float | str:
    return text if text == "dynamic" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("srpo sample", description="Draw pictures with a FLUX-type model.")
    parser.add_argument("model", metavar="MODEL", help="a folder in diffusers' format, or a hub id")
    parser.add_argument("--prompt", action="append", required=True, help="repeat it for several pictures side by side")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG or JPEG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at once (%(default)s)")
    parser.add_argument("--num-steps", type=int, default=50, help="Euler steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.5, help="(%(default)s)")
    parser.add_argument("--shift", type=_shift, default=3.0, help='of the sigma schedule, or "dynamic" (%(default)s)')
    parser.add_argument("--height-px", type=int, help="the model's own size unless given")
    parser.add_argument("--width-px", type=int, help="the model's own size unless given")
    parser.add_argument("--max-sequence-length", type=int, help="T5 tokens a prompt; the model's own unless given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
