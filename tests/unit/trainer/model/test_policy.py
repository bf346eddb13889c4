"""The FLUX adapter against diffusers' own pipeline, and against FLUX.1-dev's real shapes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.pictures import tensor_of
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX, make_tiny_flux
from trainer.data.prompt_embeddings import fingerprint
from trainer.model.loading import ModelError, check_model_path
from trainer.model.packing import pack, unpack
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

ROOT = Path(__file__).resolve().parents[4]
SIZE = HEIGHT_PX, WIDTH_PX


def test_packing_equals_diffusers_and_unpack_inverts_it(flux: Policy) -> None:
    latents = torch.randn(2, 16, HEIGHT_PX // 8, WIDTH_PX // 8)
    packed = pack(latents)
    assert packed.equal(FluxPipeline._pack_latents(latents, 2, 16, HEIGHT_PX // 8, WIDTH_PX // 8))
    assert unpack(packed, HEIGHT_PX // 16, WIDTH_PX // 16).equal(latents)


def test_noise_of_an_image_does_not_depend_on_its_batch(flux: Policy) -> None:
    def noise(*seeds: int) -> torch.Tensor:
        return flux.draw_noise([torch.Generator().manual_seed(seed) for seed in seeds], *SIZE)

    assert noise(1, 2, 3)[1].equal(noise(2)[0])
    assert noise(1, 2).shape == (2, 6, 64)


def test_conditioning_of_a_prompt_does_not_depend_on_its_batch(flux: Policy) -> None:
    together = flux.encode_prompts(PROMPTS[:3], MAX_SEQUENCE_LENGTH)
    alone = flux.encode_prompts(PROMPTS[1:2], MAX_SEQUENCE_LENGTH)
    for chosen in (together[1:2], together[[1]], together[torch.tensor([1])]):
        torch.testing.assert_close(chosen.prompt_embeds, alone.prompt_embeds)
        torch.testing.assert_close(chosen.pooled, alone.pooled)
    assert not together.prompt_embeds.requires_grad


def test_decoded_images_lie_in_zero_to_one_and_carry_gradient_to_the_latents_only(flux: Policy) -> None:
    latents = torch.randn(2, 6, 64, requires_grad=True)
    images = flux.decode_image(latents, *SIZE)
    assert images.shape == (2, 3, *SIZE)
    assert images.min() >= 0
    assert images.max() <= 1
    images.sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in flux.vae.parameters())


def test_an_encoded_image_is_the_mean_that_diffusers_finds_and_does_not_depend_on_its_batch(flux: Policy) -> None:
    images = torch.rand(3, 3, *SIZE)
    latents = flux.encode_image(images)
    mean = flux.vae.encode(images * 2 - 1).latent_dist.mean
    expected = (mean - flux.vae.config.shift_factor) * flux.vae.config.scaling_factor
    assert unpack(latents, HEIGHT_PX // 16, WIDTH_PX // 16).equal(expected)
    torch.testing.assert_close(flux.encode_image(images[1:2]), latents[1:2], rtol=0, atol=1e-5)
    assert not latents.requires_grad
    with pytest.raises(ModelError, match=r"multiples of 16, not 40 and 48 \(a size of model.sizes likewise\)"):
        flux.encode_image(torch.rand(1, 3, 40, 48))


def test_a_real_vae_alone_gives_a_picture_back() -> None:
    vae = Policy.load_vae(str(ROOT / "deploy/tiny/flux"), torch.float32)
    with Image.open(ROOT / "deploy/runs/results/before_after.png") as grid:
        tile = grid.convert("RGB").crop((0, 0, 128, 128)).resize((64, 64), Image.Resampling.BOX)
    picture = tensor_of(tile)
    given_back = vae.decode_image(vae.encode_image(picture), 64, 64)
    assert (given_back - picture).square().mean().sqrt() < 0.1 * picture.std()


def test_gradient_checkpointing_saves_less_and_changes_no_gradient(flux: Policy, flux_folder: Path) -> None:
    """Of the transformer and of the VAE's decoder, each by itself."""
    checkpointing = Policy.load(str(flux_folder), torch.float32, gradient_checkpointing=True)
    conditioning = flux.encode_prompts(PROMPTS[:1], MAX_SEQUENCE_LENGTH)
    noise = flux.draw_noise([torch.Generator().manual_seed(0)], *SIZE)
    results = []
    for model in (flux, checkpointing):
        with saved_numbers() as of_transformer:
            velocity = model.predict_velocity(noise, torch.tensor(0.8), conditioning, 3.5, *SIZE)
        with saved_numbers() as of_decoder:
            images = model.decode_image(velocity, *SIZE)
        gradients = torch.autograd.grad(images.sum(), list(model.transformer.parameters()))
        results.append((gradients, sum(of_transformer), sum(of_decoder)))
    (plain, *all_saved), (recomputed, *few_saved) = results
    largest = max(float(gradient.abs().max()) for gradient in plain)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-5 * largest)  # both round
    for few, everything in zip(few_saved, all_saved, strict=True):
        assert few < 0.5 * everything


@contextmanager
def saved_numbers() -> Iterator[list[int]]:
    """How many numbers autograd keeps for the backward, a tensor at a time."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_not_finite_are_named(flux_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = math.nan if part == "transformer" else -math.inf
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"model.path {folder}: {part}/.*{name.split('.')[-2]}.* holds NaN or infinite"
    ):
        Policy.load(str(folder), torch.bfloat16)


def test_dynamic_shift_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    flux = Policy.load(str(make_tiny_flux(tmp_path, use_dynamic_shifting=True)), torch.float32)
    assert flux.resolve_shift("dynamic", 256, 256) == pytest.approx(math.exp(0.5))
    assert flux.resolve_shift("dynamic", 1024, 1024) == pytest.approx(math.exp(1.15))
    assert flux.resolve_shift(3.0, 256, 256) == 3.0


def test_saved_pipeline_is_the_source_with_the_given_transformer(flux_folder: Path, tmp_path: Path) -> None:
    flux = Policy.load(str(flux_folder), torch.float32)
    with torch.no_grad():
        next(flux.transformer.parameters()).add_(1)
    flux.save_pipeline(flux.transformer, tmp_path / "model")
    saved = FluxPipeline.from_pretrained(tmp_path / "model")
    trained, kept = flux.transformer.state_dict(), flux.vae.state_dict()
    assert all(value.equal(trained[name]) for name, value in saved.transformer.state_dict().items())
    assert all(value.equal(kept[name]) for name, value in saved.vae.state_dict().items())
    assert saved.tokenizer_2(PROMPTS[0]).input_ids
    assert Policy.load(str(tmp_path / "model"), torch.bfloat16).transformer.dtype == torch.bfloat16


def test_sizes_that_the_model_cannot_make_are_refused(flux: Policy) -> None:
    with pytest.raises(ModelError, match=r"model.height_px and model.width_px must be multiples of 16, not 40 and 48"):
        flux.draw_noise([torch.Generator()], 40, 48)


def test_unusable_model_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    problems = {"missing": "no such folder", "empty": "has no model_index.json", "other": "StableDiffusionPipeline"}
    for name, problem in problems.items():
        with pytest.raises(ModelError, match=problem) as caught:
            Policy.load(str(tmp_path / name), torch.float32)
        assert str(tmp_path / name) in str(caught.value)
    check_model_path("black-forest-labs/FLUX.1-dev")  # a hub id is not a missing folder


def test_flux_1_dev_shapes_at_1024_px_on_the_meta_device() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(  # black-forest-labs/FLUX.1-dev, transformer/config.json
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ).to(torch.bfloat16)
        conditioning = Conditioning(torch.empty(2, 512, 4096).bfloat16(), torch.empty(2, 768).bfloat16())
        latents, sigma = torch.empty(2, 64 * 64, 64), torch.empty(2)
    flux = Policy(
        FluxPipeline(
            transformer=transformer, vae=None, scheduler=None, text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None,
        )
    )  # fmt: skip
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
    velocity = flux.predict_velocity(latents, sigma, conditioning, 3.5, 1024, 1024)
    assert velocity.shape == latents.shape
    assert velocity.dtype == torch.float32


def test_the_embedded_default_draws_without_a_dtype() -> None:
    FluxPipeline.from_pretrained("deploy/tiny/flux")("red heart", height=64, width=64, num_inference_steps=1)


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_an_exported_model_draws_without_a_dtype_and_its_embeddings_are_the_sources(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    source, exported = tmp_path / "source", tmp_path / "exported"
    FluxPipeline.from_pretrained(make_tiny_flux(tmp_path / "flux")).to(stored).save_pretrained(source)
    assert json.loads((source / "text_encoder/config.json").read_text("utf-8"))["dtype"] in str(stored)
    policy = Policy.load(str(source), dtype)
    policy.save_pipeline(policy.transformer, exported)
    assert {each.dtype for each in load_file(next((exported / "transformer").glob("*.safetensors"))).values()} == {
        dtype
    }
    pipeline = FluxPipeline.from_pretrained(exported)
    pipeline(PROMPTS[0], height=HEIGHT_PX, width=WIDTH_PX, num_inference_steps=1)
    weights = policy.transformer.state_dict()
    assert all(each.equal(weights[name].float()) for name, each in pipeline.transformer.state_dict().items())
    assert fingerprint(exported) == fingerprint(source)
