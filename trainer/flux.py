"""FLUX through diffusers: load, encode prompts, predict the velocity, decode the image, save. The only diffusers.

Packed latents are what the transformer sees: (batch, tokens, channels), a token being a 2×2 patch of the VAE's
latents. Every constant comes from the checkpoint's configs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trainer.flow import dynamic_shift

if TYPE_CHECKING:
    from diffusers import FluxPipeline

_PATCH = 2  # FLUX packs 2×2 latents into a token; diffusers' pipeline fixes it, no config holds it
_INDEX = "model_index.json"
_ENCODE_BATCH = 32


class ModelError(ValueError):
    """The model cannot be used; the text names model.path and the cure."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Encoded prompts: `prompt_embeds` (batch, text_tokens, channels) from T5, `pooled` (batch, channels) from CLIP.

    >>> conditioning = flux.encode_prompts(["grinning face", "red heart"], max_sequence_length=16)
    >>> len(conditioning[[0, 0, 1]])
    3
    """

    prompt_embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, which: slice | Sequence[int] | Tensor) -> Conditioning:
        """A batch of some of the prompts, by slice or by indices (which may repeat)."""
        index = which if isinstance(which, slice | Tensor) else list(which)
        return Conditioning(self.prompt_embeds[index], self.pooled[index])


def check_model_path(path: str) -> None:
    """Raise ModelError, before anything heavy is read, if `path` is neither a FLUX folder nor possibly a hub id."""
    index = Path(path) / _INDEX
    if index.is_file():
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if kind != "FluxPipeline":
            raise ModelError(f"model.path {path} holds a {kind}, not a FluxPipeline: give a FLUX model")
    elif Path(path).is_dir():
        raise ModelError(f"model.path {path} has no {_INDEX}: give the folder that FluxPipeline.save_pretrained wrote")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or Path(path).parent.is_dir():
        raise ModelError(f"model.path {path}: no such folder; give a FLUX folder in diffusers' format, or a hub id")


class FluxModel:
    """A FLUX checkpoint around its transformer: VAE and text encoders, frozen, and the arithmetic between them.

    `transformer` is the checkpoint's; methods take the one to call as an argument, because training wraps it.
    """

    def __init__(self, pipeline: FluxPipeline, source: Path | None = None) -> None:
        self.transformer: nn.Module = pipeline.transformer
        self.vae = pipeline.vae
        self.source = source
        network = pipeline.vae if pipeline.transformer is None else pipeline.transformer
        self.dtype: torch.dtype = network.dtype
        self.device: torch.device = network.device
        self._pipeline = pipeline
        for frozen in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            if frozen is not None:
                frozen.requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        gradient_checkpointing: bool = False,
    ) -> FluxModel:
        """Load a folder or a hub id; weights of any dtype on disk become `dtype`. Raises ModelError.

        With gradient_checkpointing the transformer's blocks and the VAE's decoder are recomputed in the backward.
        """
        pipeline, source = _load_pipeline(path, dtype, device)
        if gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        return cls(pipeline, source)

    @classmethod
    def load_vae(cls, path: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> FluxModel:
        """As `load`, but only what encodes and decodes images: no transformer and no text encoders in memory."""
        absent = dict.fromkeys(("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return cls(*_load_pipeline(path, dtype, device, **absent))

    @property
    def max_sequence_length(self) -> int:
        """The T5 tokens a prompt that the checkpoint was made for."""
        return int(self._pipeline.tokenizer_2.model_max_length)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Text to Conditioning with max_sequence_length T5 tokens a prompt; longer prompts are cut, as FLUX does."""
        prompt_embeds, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=max_sequence_length
        )
        return Conditioning(prompt_embeds.to(self.dtype), pooled.to(self.dtype))

    def drop_text_encoders(self) -> None:
        """Free their memory once all prompts are encoded; save_pipeline copies them from the source."""
        self._pipeline.text_encoder = self._pipeline.text_encoder_2 = None

    def resolve_shift(self, shift: float | Literal["dynamic"], height_px: int, width_px: int) -> float:
        """The sigma schedule's shift as a number; "dynamic" is the checkpoint's own, by resolution.

        Raises ModelError for sizes that the model cannot make.
        """
        rows, columns = self._token_grid(height_px, width_px)
        if shift != "dynamic":
            return shift
        config = self._pipeline.scheduler.config
        return dynamic_shift(
            rows * columns,
            base_num_tokens=config.base_image_seq_len,
            max_num_tokens=config.max_image_seq_len,
            base_shift=config.base_shift,
            max_shift=config.max_shift,
        )

    def draw_noise(self, generators: Sequence[torch.Generator], height_px: int, width_px: int) -> Tensor:
        """Packed start noise (batch, tokens, channels) float32, one CPU generator an image.

        Drawn on the CPU and unpacked, one image at a time: the same on every device and in every batch, and the same
        as FluxPipeline's for these generators.
        """
        rows, columns = self._token_grid(height_px, width_px)
        num_channels = self._pipeline.transformer.config.in_channels // _PATCH**2
        shape = (1, num_channels, rows * _PATCH, columns * _PATCH)
        return self.pack(torch.cat([torch.randn(shape, generator=each) for each in generators])).to(self.device)

    def predict_velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        height_px: int,
        width_px: int,
        *,
        truncate_timestep: bool = False,
    ) -> Tensor:
        """The velocity at packed `latents` (batch, tokens, channels), in their dtype; sigma 0-d or (batch,).

        guidance_scale is an input of the distilled model, not a second forward; models without one ignore it.
        truncate_timestep cuts 1000·sigma to an integer, as the published SRPO code does.
        """
        batch, device = len(latents), latents.device
        has_guidance = self._pipeline.transformer.config.guidance_embeds
        sigma = sigma.expand(batch)
        timestep = (sigma * 1000).trunc() / 1000 if truncate_timestep else sigma
        (velocity,) = transformer(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.to(self.dtype),  # the model itself multiplies by 1000
            guidance=torch.full((batch,), guidance_scale, device=device) if has_guidance else None,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=_text_ids(conditioning.prompt_embeds.shape[1], device, self.dtype),
            img_ids=_image_ids(*self._token_grid(height_px, width_px), device, self.dtype),
            return_dict=False,
        )
        return velocity.to(latents.dtype)

    def decode_image(self, latents: Tensor, height_px: int, width_px: int) -> Tensor:
        """Packed latents to images (batch, 3, height_px, width_px) float32, clamped to [0, 1]. Carries gradient."""
        config = self.vae.config
        unpacked = self.unpack(latents, height_px, width_px) / config.scaling_factor + config.shift_factor
        (decoded,) = self.vae.decode(unpacked.to(self.vae.dtype), return_dict=False)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height_px, width_px) in [0, 1] to packed latents, float32: decode_image's inverse, nearly.

        The mean of the VAE's posterior, not a sample: its spread is far below what the VAE loses, and the mean needs
        no noise, so that an image has the same latents whenever and beside whichever others it is encoded.
        """
        self._token_grid(*images.shape[2:])
        config = self.vae.config
        encoded = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return self.pack((encoded.float() - config.shift_factor) * config.scaling_factor)

    def pack(self, latents: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, tokens, 4·channels)."""
        patches = latents.unfold(2, _PATCH, _PATCH).unfold(3, _PATCH, _PATCH)  # batch, channels, rows, columns, 2, 2
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpack(self, latents: Tensor, height_px: int, width_px: int) -> Tensor:
        """The inverse of `pack`."""
        rows, columns = self._token_grid(height_px, width_px)
        patches = latents.unflatten(1, (rows, columns)).unflatten(3, (-1, _PATCH, _PATCH))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def load_transformer(self, folder: Path) -> None:
        """Take the weights of another folder's transformer, of the same architecture. Raises ModelError."""
        try:
            other = type(self.transformer).from_pretrained(folder, subfolder="transformer", torch_dtype=self.dtype)  # type: ignore[attr-defined]  # diffusers' ModelMixin
            self.transformer.load_state_dict(other.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the transformer of {folder} cannot be loaded: {str(error).splitlines()[0]}") from error

    def save_pipeline(self, transformer: nn.Module, out_dir: Path) -> None:
        """Write a folder that FluxPipeline.from_pretrained loads: this transformer, all else as in the source.

        `transformer` must be the plain module with whole weights (under ZeRO stage 3: gathered).
        """
        if self.source is None:
            raise ModelError("a model that was not loaded from a folder has no other components to save")
        out_dir.mkdir(parents=True, exist_ok=True)
        index = json.loads((self.source / _INDEX).read_text(encoding="utf-8"))
        for name in index.keys() - {"transformer"}:
            if (self.source / name).is_dir():
                shutil.copytree(self.source / name, out_dir / name, dirs_exist_ok=True)
        shutil.copy(self.source / _INDEX, out_dir / _INDEX)
        transformer.save_pretrained(out_dir / "transformer")  # type: ignore[operator]  # diffusers' ModelMixin

    def _token_grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Rows and columns of tokens. Raises ModelError for sizes that the model cannot make."""
        token_px = self._pipeline.vae_scale_factor * _PATCH
        if height_px % token_px or width_px % token_px:
            raise ModelError(
                f"model.height_px and model.width_px must be multiples of {token_px}, not {height_px} and {width_px} "
                "(a size of model.sizes likewise)"
            )
        return height_px // token_px, width_px // token_px


def model_folder(path: str) -> Path:
    """The folder of a model that may be a hub id, and is then downloaded. Raises ModelError."""
    check_model_path(path)
    from diffusers import FluxPipeline  # on use: 5 s that launch.py, which only checks the path, need not wait for

    try:
        return Path(path) if Path(path).is_dir() else Path(FluxPipeline.download(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} cannot be loaded: {error}") from error


def _load_pipeline(
    path: str, dtype: torch.dtype, device: torch.device | str, **absent: None
) -> tuple[FluxPipeline, Path]:
    source = model_folder(path)
    from diffusers import FluxPipeline

    try:
        return FluxPipeline.from_pretrained(source, dtype=dtype, **absent).to(device), source
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} cannot be loaded: {error}") from error


def encode_ahead(
    flux: FluxModel, prompts: Sequence[str], max_sequence_length: int
) -> Callable[[Sequence[str]], Conditioning]:
    """Encode each prompt once; returns what looks their conditioning up."""
    unique = list(dict.fromkeys(prompts))
    chunks = [unique[start : start + _ENCODE_BATCH] for start in range(0, len(unique), _ENCODE_BATCH)]
    parts = [flux.encode_prompts(chunk, max_sequence_length) for chunk in chunks]
    table = Conditioning(torch.cat([part.prompt_embeds for part in parts]), torch.cat([part.pooled for part in parts]))
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    return lambda wanted: table[[row_of[prompt] for prompt in wanted]]


@lru_cache(maxsize=8)
def _text_ids(num_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """FLUX gives text no position: zeros (num_tokens, 3)."""
    return torch.zeros(num_tokens, 3, device=device, dtype=dtype)


@lru_cache(maxsize=8)
def _image_ids(num_rows: int, num_columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions (tokens, 3) of the image tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(num_rows), torch.arange(num_columns), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(device, dtype)
