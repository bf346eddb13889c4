"""Play the text encoders on a tape without gradient: T5's encoder and CLIP's, as transformers computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.plan.layers import activation, add, attention, layer_norm, linear, multiply, rms_norm
from trainer.plan.tape import Array, Tape


def play_t5(tape: Tape, config: Mapping[str, Any], num_tokens: int, itemsize: int) -> Array:
    """Play the encoder of one prompt. config: text_encoder_2/config.json."""
    width, heads, kv = config["d_model"], config["num_heads"], config["d_kv"]
    tape.parameter("shared.weight", (config["vocab_size"], width))
    tape.parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                   (config["relative_attention_num_buckets"], heads))  # fmt: skip
    x = tape.new((1, num_tokens, width), itemsize)
    bias = tape.new((1, heads, num_tokens, num_tokens), itemsize)  # of positions, which all blocks share
    for index in range(config["num_layers"]):
        with tape.scope(f"encoder.block.{index}.layer"):
            normed = rms_norm(tape, "0.layer_norm", x)
            parts = [linear(tape, f"0.SelfAttention.{each}", normed, heads * kv, bias=False) for each in "qkv"]
            query, key, value = (each.view(1, num_tokens, heads, kv) for each in parts)
            out = attention(tape, query, key, value).view(1, num_tokens, heads * kv)
            x = add(tape, x, linear(tape, "0.SelfAttention.o", out, width, bias=False))
            del parts, query, key, value, out
            normed = rms_norm(tape, "1.layer_norm", x)
            x = add(tape, x, _t5_feed_forward(tape, config, normed))
    del bias
    return rms_norm(tape, "encoder.final_layer_norm", x)


def _t5_feed_forward(tape: Tape, config: Mapping[str, Any], x: Array) -> Array:
    hidden, width = config["d_ff"], config["d_model"]
    with tape.scope("1.DenseReluDense"):
        if config.get("is_gated_act", config.get("feed_forward_proj", "relu").startswith("gated")):
            gate = activation(tape, linear(tape, "wi_0", x, hidden, bias=False))
            inner = multiply(tape, gate, linear(tape, "wi_1", x, hidden, bias=False))
        else:
            inner = activation(tape, linear(tape, "wi", x, hidden, bias=False))
        return linear(tape, "wo", inner, width, bias=False)


def play_clip_text(tape: Tape, config: Mapping[str, Any], itemsize: int) -> Array:
    """Play CLIP's text encoder of one prompt. config: text_encoder/config.json."""
    width, num_tokens = config["hidden_size"], config["max_position_embeddings"]
    with tape.scope("text_model"):
        tape.parameter("embeddings.token_embedding.weight", (config["vocab_size"], width))
        tape.parameter("embeddings.position_embedding.weight", (num_tokens, width))
        x = tape.new((1, num_tokens, width), itemsize)
        layers = config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"]
        x = play_clip_layers(tape, x, *layers)
        return layer_norm(tape, x, "final_layer_norm")


def play_clip_layers(tape: Tape, x: Array, num_layers: int, num_heads: int, intermediate: int) -> Array:
    """Play the layers that CLIP's two towers share."""
    batch, num_tokens, width = x.shape
    for index in range(num_layers):
        with tape.scope(f"encoder.layers.{index}"):
            normed = layer_norm(tape, x, "layer_norm1")
            parts = [linear(tape, f"self_attn.{each}_proj", normed, width) for each in "qkv"]
            query, key, value = (each.view(batch, num_tokens, num_heads, width // num_heads) for each in parts)
            out = attention(tape, query, key, value).view(*x.shape)
            x = add(tape, x, linear(tape, "self_attn.out_proj", out, width))
            normed = layer_norm(tape, x, "layer_norm2")
            inner = activation(tape, linear(tape, "mlp.fc1", normed, intermediate))
            x = add(tape, x, linear(tape, "mlp.fc2", inner, width))
    return x
