"""Play a reward's image tower on a tape: a vision transformer, as CLIP and HPS v2.1 have it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.layers import concat, layer_norm, linear, part
from trainer.plan.tape import Array, Tape
from trainer.plan.text import play_clip_layers
from trainer.plan.training import Training


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """The sizes of a vision transformer."""

    image_px: int
    patch_px: int
    width: int
    num_layers: int
    num_heads: int
    intermediate: int
    embed_channels: int


VIT_H_14 = TowerConfig(224, 14, 1280, 32, 16, 5120, 1024)  # open_clip's ViT-H-14
TOWERS = {"hpsv2": VIT_H_14, "hpsv2.1": VIT_H_14, "pickscore": VIT_H_14}  # by the reward's name


def play_tower(tape: Tape, config: TowerConfig, pixels: Array) -> Array:
    """Play prepared pixels (batch, 3, image_px, image_px) into embeddings."""
    batch, channels, height, width_px = pixels.shape
    rows, columns = height // config.patch_px, width_px // config.patch_px
    with tape.scope("vision_model"):
        patches = pixels.view(batch, rows * columns, channels * config.patch_px**2)
        x = linear(tape, "embeddings.patch_embedding", patches, config.width, bias=False)
        tape.parameter("embeddings.class_embedding", (config.width,))
        tape.parameter("embeddings.position_embedding.weight", (rows * columns + 1, config.width))
        x = concat(tape, [tape.new((batch, 1, config.width), x.itemsize), x], 1)
        x = layer_norm(tape, x, "pre_layrnorm")
        x = play_clip_layers(tape, x, config.num_layers, config.num_heads, config.intermediate)
        first = part(tape, x, 1, 1).view(batch, config.width)
        first = layer_norm(tape, first, "post_layernorm")
    return linear(tape, "visual_projection", first, config.embed_channels, bias=False)


def tower_flops(config: TowerConfig, batch: int) -> int:
    """Count the FLOPs of a reward and its gradient with respect to the image."""
    tape = Tape(Training.frozen())
    pixels = tape.leaf(tape.new((batch, 3, config.image_px, config.image_px), 1))
    tape.backward(play_tower(tape, config, pixels))
    return tape.flops
