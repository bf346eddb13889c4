"""Play the decoder of a VAE on a tape, as diffusers' AutoencoderKL computes it, and count the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.plan.layers import activation, add, attention, conv, group_norm, linear, times_number, upsample
from trainer.plan.tape import Array, Tape
from trainer.plan.training import Training

_UPSCALE = 2  # of each block but the last; diffusers fixes it


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What vae/config.json says of the sizes."""

    latent_channels: int
    image_channels: int
    channels: tuple[int, ...]  # of each block, from the image inward
    layers_per_block: int
    num_groups: int
    has_attention: bool
    has_quant_conv: bool
    has_post_quant_conv: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read diffusers' config; what it leaves out has diffusers' default."""
        return cls(
            config.get("latent_channels", 4),
            config.get("in_channels", 3),
            tuple(config.get("block_out_channels", (64,))),
            config.get("layers_per_block", 1),
            config.get("norm_num_groups", 32),
            config.get("mid_block_add_attention", True),
            config.get("use_quant_conv", True),
            config.get("use_post_quant_conv", True),
        )

    @property
    def scale(self) -> int:
        """The pixels of an image beside one of its latents."""
        return _UPSCALE ** (len(self.channels) - 1)


def play_decoder(tape: Tape, config: VaeConfig, latents: Array, *, checkpointing: bool) -> Array:
    """Play latents (batch, channels, height, width) into an image. checkpointing: its blocks are played again."""
    inner = config.channels[-1]
    with tape.scope("decoder"):
        x = conv(tape, "conv_in", latents, inner, 3)
        (x,) = _played(tape, partial(_middle, tape, config), x, checkpointing)
        for index, channels in enumerate(reversed(config.channels)):
            is_last = index == len(config.channels) - 1
            run = partial(_up_block, tape, config, index, channels, is_last)
            (x,) = _played(tape, run, x, checkpointing)
        x = group_norm(tape, "conv_norm_out", x, config.num_groups)
        x = activation(tape, x)
        return conv(tape, "conv_out", x, config.image_channels, 3)


def vae_parameters(config: VaeConfig) -> int:
    """Count the numbers of decoder and encoder."""
    tape = Tape(Training.frozen())
    with tape.no_grad():
        play_decoder(tape, config, tape.new((1, config.latent_channels, 1, 1), 1), checkpointing=False)
        _play_encoder(tape, config)
    return tape.num_parameters


def _played(tape: Tape, run: Any, x: Array, checkpointing: bool) -> tuple[Array, ...]:
    return tape.checkpoint(run, x) if checkpointing else tuple(run(x))


def _middle(tape: Tape, config: VaeConfig, x: Array) -> tuple[Array]:
    inner = config.channels[-1]
    with tape.scope("mid_block"):
        x = _resnet(tape, config, "resnets.0", x, inner)
        if config.has_attention:
            x = _attend(tape, config, x)
        return (_resnet(tape, config, "resnets.1", x, inner),)


def _attend(tape: Tape, config: VaeConfig, x: Array) -> Array:
    """Self-attention over pixels, with one head."""
    batch, channels, height, width = x.shape
    with tape.scope("attentions.0"):
        normed = group_norm(tape, "group_norm", x, config.num_groups).view(batch, height * width, channels)
        heads = batch, height * width, 1, channels
        query, key, value = (linear(tape, f"to_{each}", normed, channels).view(*heads) for each in "qkv")
        out = attention(tape, query, key, value).view(batch, height * width, channels)
        out = linear(tape, "to_out.0", out, channels)
        return times_number(tape, add(tape, out.view(*x.shape), x))


def _up_block(tape: Tape, config: VaeConfig, index: int, channels: int, is_last: bool, x: Array) -> tuple[Array]:
    with tape.scope(f"up_blocks.{index}"):
        for number in range(config.layers_per_block + 1):
            x = _resnet(tape, config, f"resnets.{number}", x, channels)
        if not is_last:
            x = conv(tape, "upsamplers.0.conv", upsample(tape, x, _UPSCALE), channels, 3)
    return (x,)


def _resnet(tape: Tape, config: VaeConfig, name: str, x: Array, channels: int) -> Array:
    with tape.scope(name):
        hidden = group_norm(tape, "norm1", x, config.num_groups)
        hidden = activation(tape, hidden)
        hidden = conv(tape, "conv1", hidden, channels, 3)
        hidden = group_norm(tape, "norm2", hidden, config.num_groups)
        hidden = activation(tape, hidden)
        hidden = conv(tape, "conv2", hidden, channels, 3)
        if x.shape[1] != channels:
            x = conv(tape, "conv_shortcut", x, channels, 1)
        return times_number(tape, add(tape, x, hidden))


def _play_encoder(tape: Tape, config: VaeConfig) -> None:
    """Note the encoder's parameters; it runs in `srpo encode-images` only."""
    both = 2 * config.latent_channels  # mean and deviation
    with tape.scope("encoder"):
        x = conv(tape, "conv_in", tape.new((1, config.image_channels, 1, 1), 1), config.channels[0], 3)
        for index, channels in enumerate(config.channels):
            with tape.scope(f"down_blocks.{index}"):
                for number in range(config.layers_per_block):
                    x = _resnet(tape, config, f"resnets.{number}", x, channels)
                if index < len(config.channels) - 1:
                    x = conv(tape, "downsamplers.0.conv", x, channels, 3)
        (x,) = _middle(tape, config, x)
        x = group_norm(tape, "conv_norm_out", x, config.num_groups)
        x = conv(tape, "conv_out", x, both, 3)
    if config.has_quant_conv:
        conv(tape, "quant_conv", x, both, 1)
    if config.has_post_quant_conv:
        conv(tape, "post_quant_conv", tape.new((1, config.latent_channels, 1, 1), 1), config.latent_channels, 1)
