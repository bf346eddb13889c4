"""The models to measure, as the configs of their checkpoints: FLUX.1-dev with HPS v2.1, or the same classes tiny."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DType = str  # a name in torch: "bfloat16"


@dataclass(frozen=True, slots=True)
class Size:
    """Configs, sizes of inputs, and how much is measured.

    architecture: the reward's, a name of open_clip or its config. depths: shares of the transformer's blocks for the
    full fine-tuning step, largest first; the first two that fit are measured. kernel_blocks: double and single blocks
    of the transformer by which kernels are compared. num_adam_parameters: of the comparison of optimizers.
    """

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    architecture: str | dict[str, Any]
    height_px: int
    width_px: int
    num_text_tokens: int
    num_rollout_steps: int
    depths: tuple[float, ...]
    reward_batches: tuple[int, ...]
    kernel_blocks: tuple[int, int]
    attention_backends: tuple[str, ...]
    compile_backend: str
    num_adam_parameters: int
    num_warm_ups: int
    num_calls: int


_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

FULL = Size(
    name="full",
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae=_VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    architecture="ViT-H-14",
    height_px=720,
    width_px=720,
    num_text_tokens=512,
    num_rollout_steps=25,
    depths=(1 / 2, 1 / 4, 1 / 8),
    reward_batches=(1, 8, 32),
    kernel_blocks=(2, 4),
    attention_backends=(
        *("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math", "flex"),
        *("flash", "flash_varlen", "_flash_3", "sage", "xformers"),  # where they are installed
    ),
    compile_backend="inductor",
    num_adam_parameters=500_000_000,
    num_warm_ups=2,
    num_calls=5,
)

TINY = Size(
    name="tiny",
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=_VAE | {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4},
    architecture={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    height_px=32,
    width_px=48,
    num_text_tokens=8,
    num_rollout_steps=2,
    depths=(1, 1 / 2),
    reward_batches=(1, 2),
    kernel_blocks=(1, 1),
    attention_backends=("native", "_native_math", "_native_cudnn"),  # the last has no CPU kernel: an error to note
    compile_backend="eager",
    num_adam_parameters=1000,
    num_warm_ups=0,
    num_calls=1,
)

SIZES = {size.name: size for size in (FULL, TINY)}
