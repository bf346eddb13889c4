"""Say what part of a card each reward of a Serve configuration needs (num_gpus), by arithmetic, without a GPU.

    python -m deploy.reward_memory --card-gib 80 --images 64 --image-px 720

Weights are counted in the loaded model; what one image more keeps until its backward is counted in a real forward on
the CPU, in the reward's own dtype. A card also holds images, gradients and CUDA's own share for each process, and a
reserve for what lives only within a layer and for gaps between tensors.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor, nn

from deploy.settings import ROOT
from reward_server.metrics import ignore
from reward_server.models import AnyArgs, RewardArgs
from reward_server.scoring.device_share import CONTEXT_GIB
from reward_server.scoring.loaded_reward import LoadedReward
from reward_server.scoring.srp import value_for_gradient
from services.contract import PromptPair

_GIB = 2**30
_RESERVE = 1.15  # of weights and images: an assumption, which `max_batch_images: auto` replaces by a measurement
_PAIR = PromptPair("a photo", "sharp", "blurred")


@dataclass(frozen=True, slots=True)
class Need:
    """What one reward needs of a card."""

    weight_bytes: int
    bytes_per_image: int

    def gib(self, num_images: int) -> float:
        return CONTEXT_GIB + _RESERVE * (self.weight_bytes + num_images * self.bytes_per_image) / _GIB

    def num_gpus(self, num_images: int, card_gib: float) -> float:
        """Return the part of a card, rounded up to hundredths; above 1 the reward does not fit."""
        return math.ceil(100 * self.gib(num_images) / card_gib) / 100


def need_of(args: AnyArgs, image_px: int) -> Need:
    """Load a reward on the CPU and count. Raise WeightsError if it cannot be loaded."""
    reward = LoadedReward("reward", args.model_copy(update={"device": "cpu"}), 8, ignore)
    weights = _weights(reward.model)
    one, three = (_kept_bytes(reward, weights, image_px, num_images) for num_images in (1, 3))
    image_and_gradient = 2 * 3 * image_px**2 * torch.float32.itemsize
    return Need(sum(weights.values()), (three - one) // 2 + image_and_gradient)


def _weights(model: object) -> dict[int, int]:
    """Return the address and bytes of each weight of a reward's networks, which may share some."""
    parts = list(vars(model).values())
    parts += [getattr(part, "model", None) for part in parts]  # of the package of HPS v3
    networks = [part for part in parts if isinstance(part, nn.Module)]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _kept_bytes(reward: LoadedReward, weights: dict[int, int], image_px: int, num_images: int) -> int:
    """Return the bytes that a forward keeps for its backward."""
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too, or its address would be given to another

    def keep(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    images = torch.rand(num_images, 3, image_px, image_px)
    similarities = reward.similarities(reward.prepare([_PAIR] * num_images))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value_for_gradient(similarities, images, torch.zeros(num_images))
    return sum(num_bytes for num_bytes, _ in kept.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each reward."""
    parser = argparse.ArgumentParser("deploy.reward_memory", description="Which part of a card each reward needs.")
    parser.add_argument("--card-gib", type=float, default=80.0, help="memory of a card (%(default)s)")
    parser.add_argument("--images", type=int, default=64, help="images in one forward, max_batch_images (%(default)s)")
    parser.add_argument("--image-px", type=int, default=720, help="the side of an image (%(default)s)")
    parser.add_argument("--serve-config", type=Path, default=ROOT / "deploy" / "serve.yaml")
    args = parser.parse_args(arguments)
    config = yaml.safe_load(args.serve_config.read_text(encoding="utf-8"))
    print(
        f"{'reward':20} {'weights':>9} {'an image':>9} {f'{args.images} images':>11}  num_gpus of {args.card_gib:g} GiB"
    )
    for application in config["applications"]:
        for name, reward in application["args"]["rewards"].items():
            need = need_of(TypeAdapter[AnyArgs](RewardArgs).validate_python(reward), args.image_px)
            per_image = f"{need.bytes_per_image / 2**20:.0f} MiB"
            share = need.num_gpus(args.images, args.card_gib)
            verdict = f"{share:.2f}" if share <= 1 else f"{share:.2f}: does not fit, lower --images"
            weights, all_of_it = need.weight_bytes / _GIB, need.gib(args.images)
            print(f"{name:20} {weights:5.2f} GiB {per_image:>9} {all_of_it:7.2f} GiB  {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
