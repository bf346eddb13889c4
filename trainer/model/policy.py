"""Hold the model being trained with all that is needed to draw with it: a Policy is FLUX through diffusers.

The transformer sees packed latents, (batch, tokens, channels): see packing.py. Every constant comes from the
checkpoint's configs.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from trainer.flow import dynamic_shift
from trainer.model.forward import Forward
from trainer.model.loading import INDEX, ModelError, load_pipeline, model_folder, require_finite
from trainer.model.packing import PATCH, image_ids, pack, text_ids, unpack
from trainer.model.text_encoders import Conditioning, TextEncoders

if TYPE_CHECKING:
    from diffusers import FluxPipeline


class Policy:
    """A FLUX checkpoint: its transformer, its VAE and text encoders (frozen), and the arithmetic between them."""

    def __init__(self, pipeline: FluxPipeline, source: Path | None = None) -> None:
        self.transformer: nn.Module = pipeline.transformer
        self.vae = pipeline.vae
        self.text = TextEncoders(pipeline)
        self.source = source
        network = pipeline.vae if pipeline.transformer is None else pipeline.transformer
        self.dtype: torch.dtype = network.dtype
        self.device: torch.device = network.device
        self._pipeline = pipeline
        self._forward = None if pipeline.transformer is None else Forward(pipeline.transformer)
        self._computes_in: torch.dtype | None = None
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
        vae_dtype: torch.dtype | None = None,
        text_encoder_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        text_encoders: bool = True,
    ) -> Policy:
        """Load a folder or a hub id; weights of any dtype on disk become `dtype`, those of VAE and text encoders their
        own if it is given.

        Raise ModelError if it cannot be loaded or has weights that are not finite. With gradient_checkpointing the
        transformer's blocks and the VAE's decoder are recomputed in the backward. Without text_encoders the policy
        cannot encode prompts, but counts their tokens.
        """
        source = model_folder(path)
        without = {} if text_encoders else {"text_encoder": None, "text_encoder_2": None}
        dtypes = {"transformer": dtype, "vae": vae_dtype or dtype, "default": text_encoder_dtype or dtype}
        pipeline = load_pipeline(source, dtypes, device, **without)
        if gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        return cls(pipeline, source)

    @classmethod
    def load_vae(cls, path: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Policy:
        """Load only what encodes and decodes images: no transformer and no text encoders. Otherwise like `load`."""
        absent = dict.fromkeys(("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        source = model_folder(path)
        return cls(load_pipeline(source, dtype, device, **absent), source)

    def calling(self, transformer: nn.Module) -> Policy:
        """Return the same policy with `transformer` called in place of its own, as training wraps it."""
        wrapped = copy.copy(self)
        wrapped.transformer = transformer
        return wrapped

    def computing_in(self, dtype: torch.dtype) -> Policy:
        """Return the same policy with the transformer's forward in `dtype`: its own, or bfloat16 for a float32 one.

        Raise ValueError for another: weights of bfloat16 have no more digits to give.
        """
        if dtype != self.dtype and (self.dtype, dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(f"a transformer of {self.dtype} cannot compute in {dtype}")
        computing = copy.copy(self)
        computing._computes_in = None if dtype == self.dtype else dtype
        return computing

    @property
    def max_sequence_length(self) -> int:
        """Return the number of T5 tokens a prompt that the checkpoint was made for."""
        return int(self._pipeline.tokenizer_2.model_max_length)

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Return the Conditioning of prompts: see TextEncoders.encode_prompts."""
        return self.text.encode_prompts(prompts, max_sequence_length)

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory once all prompts are encoded; save_pipeline copies them from the source."""
        self.text.drop()

    def resolve_shift(self, shift: float | Literal["dynamic"], height_px: int, width_px: int) -> float:
        """Return the sigma schedule's shift as a number; "dynamic" is the checkpoint's own, by resolution.

        Raise ModelError for sizes that the model cannot make.
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
        """Draw packed start noise (batch, tokens, channels) float32, with one CPU generator an image.

        It is drawn unpacked on the CPU, one image at a time. So it is the same on every device and in every batch, and
        the same as FluxPipeline's for these generators.
        """
        rows, columns = self._token_grid(height_px, width_px)
        num_channels = self._pipeline.transformer.config.in_channels // PATCH**2
        shape = (1, num_channels, rows * PATCH, columns * PATCH)
        return pack(torch.cat([torch.randn(shape, generator=each) for each in generators])).to(self.device)

    def predict_velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        height_px: int,
        width_px: int,
        *,
        truncate_timestep: bool = False,
    ) -> Tensor:
        """Return the velocity at packed `latents` (batch, tokens, channels), in their dtype; sigma is 0-d or (batch,).

        guidance_scale is an input of the distilled model, not a second forward; models without that input ignore it.
        truncate_timestep cuts 1000·sigma to an integer, as the published SRPO code does.
        """
        batch, device = len(latents), latents.device
        timesteps = sigma.expand(batch).float() * 1000
        timesteps = timesteps.trunc() if truncate_timestep else timesteps
        has_guidance = self._pipeline.transformer.config.guidance_embeds
        guidance = torch.full((batch,), guidance_scale, device=device) if has_guidance else None
        thousandfold = None if guidance is None else guidance * 1000
        assert self._forward is not None  # a policy without a transformer encodes and decodes images
        with self._forward.given(timesteps, thousandfold, self._computes_in, device.type):
            (velocity,) = self.transformer(
                hidden_states=latents.to(self.dtype),
                timestep=timesteps / 1000,  # the model multiplies by 1000 and rounds to its dtype, which forward undoes
                guidance=guidance,
                pooled_projections=conditioning.pooled.to(self.dtype),
                encoder_hidden_states=conditioning.prompt_embeds.to(self.dtype),
                txt_ids=text_ids(conditioning.prompt_embeds.shape[1], device),
                img_ids=image_ids(*self._token_grid(height_px, width_px), device),
                return_dict=False,
            )
        return velocity.to(latents.dtype)

    def decode_image(self, latents: Tensor, height_px: int, width_px: int) -> Tensor:
        """Decode packed latents to images (batch, 3, height_px, width_px) float32 in [0, 1], with gradient."""
        config = self.vae.config
        unpacked = unpack(latents, *self._token_grid(height_px, width_px)) / config.scaling_factor + config.shift_factor
        (decoded,) = self.vae.decode(unpacked.to(self.vae.dtype), return_dict=False)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (batch, 3, height_px, width_px) in [0, 1] to packed latents float32, on the policy's device.

        They are the mean of the VAE's posterior, not a sample: an image always has the same latents. The posterior's
        spread is far below what the VAE loses.
        """
        self._token_grid(*images.shape[2:])
        config = self.vae.config
        encoded = self.vae.encode((images * 2 - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return pack((encoded.float() - config.shift_factor) * config.scaling_factor)

    def load_transformer(self, folder: Path) -> None:
        """Load the weights of another folder's transformer of the same architecture. Raise ModelError."""
        try:
            other = type(self.transformer).from_pretrained(folder, subfolder="transformer", torch_dtype=self.dtype)  # type: ignore[attr-defined]  # diffusers' ModelMixin
            self.transformer.load_state_dict(other.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the transformer of {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        require_finite(self.transformer, f"{folder}: transformer")

    def source_weights(self) -> dict[str, Tensor]:
        """Read the transformer's own weights, as they are on disk. Raise ModelError for a policy from no folder."""
        if self.source is None:
            raise ModelError("a model that was not loaded from a folder has no weights to go back to")
        network = getattr(self.transformer, "module", self.transformer)  # which may be wrapped for training
        loaded = type(network).from_pretrained(self.source, subfolder="transformer", torch_dtype=torch.float32)  # type: ignore[union-attr]  # diffusers' ModelMixin
        return dict(loaded.state_dict())

    def restore_transformer(self) -> None:
        """Load the checkpoint's own weights again. Raise ModelError for a policy that came from no folder."""
        if self.source is None:
            raise ModelError("a model that was not loaded from a folder has no weights to go back to")
        self.load_transformer(self.source)

    def save_pipeline(self, transformer: nn.Module, out_dir: Path) -> None:
        """Write a folder that FluxPipeline.from_pretrained loads: this transformer, all else as in the source.

        `transformer` must be the plain module with whole weights (under ZeRO stage 3: gathered).
        """
        if self.source is None:
            raise ModelError("a model that was not loaded from a folder has no other components to save")
        out_dir.mkdir(parents=True, exist_ok=True)
        index = json.loads((self.source / INDEX).read_text(encoding="utf-8"))
        for name in index.keys() - {"transformer"}:
            if (self.source / name).is_dir():
                shutil.copytree(self.source / name, out_dir / name, dirs_exist_ok=True)
        for config in out_dir.glob("text_encoder*/config.json"):
            _load_in_float32(config)
        transformer.save_pretrained(out_dir / "transformer")  # type: ignore[operator]  # diffusers' ModelMixin
        shutil.copy(self.source / INDEX, out_dir / INDEX)

    def save_adapter(self, weights: Mapping[str, Tensor], settings: Mapping[str, Any], out_dir: Path) -> None:
        """Write a transformer's adapter (lora.adapter) as a folder that FluxPipeline.load_lora_weights loads."""
        type(self._pipeline).save_lora_weights(
            out_dir, transformer_lora_layers=dict(weights), transformer_lora_adapter_metadata=dict(settings)
        )

    def _token_grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return rows and columns of tokens. Raise ModelError for sizes that the model cannot make."""
        token_px = self._pipeline.vae_scale_factor * PATCH
        if height_px % token_px or width_px % token_px:
            raise ModelError(
                f"model.height_px and model.width_px must be multiples of {token_px}, not {height_px} and {width_px} "
                "(a size of model.sizes likewise)"
            )
        return height_px // token_px, width_px // token_px


def _load_in_float32(config: Path) -> None:
    """Let transformers load a text encoder in float32, as diffusers loads the transformer without a dtype.

    transformers follows the dtype in the config, which is that of the stored weights; mixed dtypes fail when drawing.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key != "torch_dtype"} | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
