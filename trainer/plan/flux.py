"""Play a FLUX transformer on a tape, operation by operation as diffusers' FluxTransformer2DModel computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.plan.layers import (
    activation,
    add,
    attention,
    cast,
    chunk,
    concat,
    contiguous,
    layer_norm,
    linear,
    multiply,
    part,
    plus_number,
    rms_norm,
    split,
    times_number,
)
from trainer.plan.tape import FLOAT32_BYTES, Array, Tape

_TIME_CHANNELS = 256  # of the sinusoids of timestep and guidance; diffusers fixes it
_MLP_RATIO = 4  # likewise


@dataclass(frozen=True, slots=True)
class FluxConfig:
    """What transformer/config.json says of the sizes."""

    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    num_heads: int
    head_channels: int
    text_channels: int
    pooled_channels: int
    has_guidance: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Read diffusers' config; what it leaves out has diffusers' default."""
        in_channels = config.get("in_channels", 64)
        return cls(
            in_channels,
            config.get("out_channels") or in_channels,
            config.get("num_layers", 19),
            config.get("num_single_layers", 38),
            config.get("num_attention_heads", 24),
            config.get("attention_head_dim", 128),
            config.get("joint_attention_dim", 4096),
            config.get("pooled_projection_dim", 768),
            config.get("guidance_embeds", False),
        )

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_channels


@dataclass(frozen=True, slots=True)
class Rotary:
    """The two float32 tables of rotary positions, which all blocks share."""

    cos: Array
    sin: Array


def play_flux(
    tape: Tape, config: FluxConfig, batch: int, num_image: int, num_text: int, itemsize: int, checkpointing: int = 0
) -> Array:
    """Play one forward and return the velocity, (batch, num_image, out_channels).

    checkpointing: every how many-th block keeps its inputs only and is played again in the backward; 0: none.
    """
    inner = config.inner
    x = linear(tape, "x_embedder", tape.new((batch, num_image, config.in_channels), itemsize), inner)
    time = _embed_time(tape, config, batch, itemsize)
    text = linear(tape, "context_embedder", tape.new((batch, num_text, config.text_channels), itemsize), inner)
    table = (num_text + num_image, config.head_channels)
    rotary = Rotary(tape.new(table, FLOAT32_BYTES), tape.new(table, FLOAT32_BYTES))
    for index in range(config.num_layers):
        run = partial(_double_block, tape, config, rotary, f"transformer_blocks.{index}")
        text, x = _played(tape, run, index, checkpointing, x, text, time)
    for index in range(config.num_single_layers):
        run = partial(_single_block, tape, config, rotary, f"single_transformer_blocks.{index}")
        text, x = _played(tape, run, config.num_layers + index, checkpointing, x, text, time)
    del text
    shifts = linear(tape, "norm_out.linear", activation(tape, time), 2 * inner)
    scale, shift = chunk(tape, shifts, 2, 1)
    x = _modulated(tape, x, scale, shift)
    return linear(tape, "proj_out", x, config.out_channels)


def _played(tape: Tape, run: Any, index: int, checkpointing: int, *inputs: Array) -> tuple[Array, ...]:
    if checkpointing and index % checkpointing == 0:
        return tape.checkpoint(run, *inputs)
    return tuple(run(*inputs))


def _embed_time(tape: Tape, config: FluxConfig, batch: int, itemsize: int) -> Array:
    inner = config.inner

    def embedded(name: str, channels: int) -> Array:
        x = linear(tape, f"{name}.linear_1", tape.new((batch, channels), itemsize), inner)
        return linear(tape, f"{name}.linear_2", activation(tape, x), inner)

    with tape.scope("time_text_embed"):
        time = embedded("timestep_embedder", _TIME_CHANNELS)
        if config.has_guidance:
            time = add(tape, time, embedded("guidance_embedder", _TIME_CHANNELS))
        return add(tape, time, embedded("text_embedder", config.pooled_channels))


def _modulated(tape: Tape, x: Array, scale: Array, shift: Array) -> Array:
    """norm(x) · (1 + scale) + shift"""
    return add(tape, multiply(tape, layer_norm(tape, x), plus_number(tape, scale)), shift)


def _double_block(
    tape: Tape, config: FluxConfig, rotary: Rotary, name: str, x: Array, text: Array, time: Array
) -> tuple[Array, Array]:
    inner = config.inner
    with tape.scope(name):
        shifts = chunk(tape, linear(tape, "norm1.linear", activation(tape, time), 6 * inner), 6, 1)
        normed = _modulated(tape, x, shifts[1], shifts[0])
        of_text = chunk(tape, linear(tape, "norm1_context.linear", activation(tape, time), 6 * inner), 6, 1)
        normed_text = _modulated(tape, text, of_text[1], of_text[0])
        attended, attended_text = _joint_attention(tape, config, rotary, normed, normed_text)
        attended = multiply(tape, attended, shifts[2])
        x = add(tape, x, attended)
        normed = _modulated(tape, x, shifts[4], shifts[3])
        out = _feed_forward(tape, "ff", normed, inner)
        out = multiply(tape, out, shifts[5])
        x = add(tape, x, out)
        attended_text = multiply(tape, attended_text, of_text[2])
        text = add(tape, text, attended_text)
        normed_text = _modulated(tape, text, of_text[4], of_text[3])
        out_text = _feed_forward(tape, "ff_context", normed_text, inner)
        return add(tape, text, multiply(tape, out_text, of_text[5])), x


def _feed_forward(tape: Tape, name: str, x: Array, inner: int) -> Array:
    x = activation(tape, linear(tape, f"{name}.net.0.proj", x, _MLP_RATIO * inner))
    return linear(tape, f"{name}.net.2", x, inner)


def _heads(tape: Tape, config: FluxConfig, name: str, x: Array) -> Array:
    batch, tokens, _ = x.shape
    return linear(tape, name, x, config.inner).view(batch, tokens, config.num_heads, config.head_channels)


def _joint_attention(tape: Tape, config: FluxConfig, rotary: Rotary, x: Array, text: Array) -> tuple[Array, Array]:
    batch, num_text = text.shape[:2]
    with tape.scope("attn"):
        query, key, value = (_heads(tape, config, f"to_{each}", x) for each in "qkv")
        text_query, text_key, text_value = (_heads(tape, config, f"add_{each}_proj", text) for each in "qkv")
        query, key = rms_norm(tape, "norm_q", query), rms_norm(tape, "norm_k", key)
        text_query = rms_norm(tape, "norm_added_q", text_query)
        text_key = rms_norm(tape, "norm_added_k", text_key)
        query = concat(tape, [text_query, query], 1)
        key = concat(tape, [text_key, key], 1)
        value = concat(tape, [text_value, value], 1)
        out = _rotated_attention(tape, rotary, query, key, value)
        del query, key, value
        of_text, of_image = split(tape, out, [num_text, x.shape[1]], 1)
        is_whole = batch == 1
        of_image = linear(tape, "to_out.0", contiguous(tape, of_image, is_already=is_whole), config.inner)
        return of_image, linear(tape, "to_add_out", contiguous(tape, of_text, is_already=is_whole), config.inner)


def _rotated_attention(tape: Tape, rotary: Rotary, query: Array, key: Array, value: Array) -> Array:
    batch, tokens, heads, channels = query.shape
    query = _rotated(tape, query, rotary)
    key = _rotated(tape, key, rotary)
    return attention(tape, query, key, value).view(batch, tokens, heads * channels)


def _rotated(tape: Tape, x: Array, rotary: Rotary) -> Array:
    """(x · cos + turned(x) · sin), in float32, where turned swaps pairs of channels and negates one of each."""
    batch, tokens, heads, channels = x.shape
    real, imaginary = chunk(tape, x, 2, 3)
    pair = [times_number(tape, imaginary), real]
    turned = concat(tape, pair, 3)
    wide = cast(tape, x, FLOAT32_BYTES)
    straight = multiply(tape, wide, rotary.cos)
    wide_turned = cast(tape, turned, FLOAT32_BYTES)
    crossed = multiply(tape, wide_turned, rotary.sin)
    out = add(tape, straight, crossed)
    return cast(tape, out, x.itemsize).view(batch, tokens, heads, channels)


def _single_block(
    tape: Tape, config: FluxConfig, rotary: Rotary, name: str, x: Array, text: Array, time: Array
) -> tuple[Array, Array]:
    inner, num_text = config.inner, text.shape[1]
    with tape.scope(name):
        joined = concat(tape, [text, x], 1)
        shift, scale, gate = chunk(tape, linear(tape, "norm.linear", activation(tape, time), 3 * inner), 3, 1)
        normed = _modulated(tape, joined, scale, shift)
        hidden = activation(tape, linear(tape, "proj_mlp", normed, _MLP_RATIO * inner))
        with tape.scope("attn"):
            query, key, value = (_heads(tape, config, f"to_{each}", normed) for each in "qkv")
            query, key = rms_norm(tape, "norm_q", query), rms_norm(tape, "norm_k", key)
            out = _rotated_attention(tape, rotary, query, key, value)
            del query, key, value
        both = concat(tape, [out, hidden], 2)
        both = multiply(tape, linear(tape, "proj_out", both, inner), gate)
        both = add(tape, joined, both)
        return part(tape, both, num_text, 1), part(tape, both, x.shape[1], 1)
