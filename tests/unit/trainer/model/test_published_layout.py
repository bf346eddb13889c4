"""FLUX.1-dev loads from the files that its authors publish: shards with an index, their names, configs and dtype."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from tests.published_flux import scheduler, write_published_flux
from trainer.algorithm.rollout import Sampling, sample
from trainer.model.loading import ModelError
from trainer.model.policy import Policy

# and tokenizer_2/spiece.model, from which tokenizer.json was made
PUBLISHED_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
PROMPT, SIZE = "a red fox", (32, 48)
CLIP_IDS = [54, 26, 17, 4, 29, 53, 55]  # start, a, r, e, d, fox, end
T5_IDS = [3, 5, 3, 22, 9, 8, 4, 1]  # ▁ a ▁ r e d ▁fox end


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    folder = tmp_path_factory.mktemp("published") / "FLUX.1-dev"
    return folder, write_published_flux(folder)


@pytest.fixture
def folder(networks: tuple[Path, dict[str, nn.Module]]) -> Path:
    return networks[0]


def test_the_folder_has_the_published_files(folder: Path) -> None:
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == PUBLISHED_FILES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_weight_is_read_and_the_model_draws_what_its_networks_draw(
    networks: tuple[Path, dict[str, nn.Module]], dtype: torch.dtype
) -> None:
    folder, originals = networks
    policy = Policy.load(str(folder), dtype)
    parts = {"transformer": policy.transformer, "vae": policy.vae}
    parts |= {name: getattr(policy.text._pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    for name, loaded in parts.items():
        weights = dict(originals[name].named_parameters())
        assert {key for key, _ in loaded.named_parameters()} == set(weights)
        for key, each in loaded.named_parameters():
            assert each.dtype == dtype, f"{name}/{key}"
            assert each.equal(weights[key].to(dtype)), f"{name}/{key}"
    assert policy.text.num_clip_tokens([PROMPT]) == [len(CLIP_IDS)]
    assert policy.text.num_t5_tokens([PROMPT]) == [len(T5_IDS)]
    assert policy.max_sequence_length == 512


@torch.no_grad()
def test_it_encodes_and_draws_what_the_published_networks_do(networks: tuple[Path, dict[str, nn.Module]]) -> None:
    folder, originals = networks
    policy = Policy.load(str(folder), torch.float32)
    tokenizers = {name: getattr(policy.text._pipeline, name) for name in ("tokenizer", "tokenizer_2")}
    assert tokenizers["tokenizer"](PROMPT).input_ids == CLIP_IDS
    assert tokenizers["tokenizer_2"](PROMPT).input_ids == T5_IDS
    whole = {name: copy.deepcopy(each).float() for name, each in originals.items()}
    conditioning = policy.encode_prompts([PROMPT], 16)
    padded = [CLIP_IDS + [55] * (77 - len(CLIP_IDS))]
    hidden = whole["text_encoder"](torch.tensor(padded)).last_hidden_state
    assert conditioning.pooled.equal(hidden[:, len(CLIP_IDS) - 1]), "at the first end, which is the highest token"
    expected = whole["text_encoder_2"](torch.tensor([T5_IDS + [0] * (16 - len(T5_IDS))]))[0]
    torch.testing.assert_close(conditioning.prompt_embeds, expected)

    pipeline = FluxPipeline(scheduler=scheduler(), **whole, **tokenizers)
    pipeline.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(0) for _ in range(2)]
    theirs = pipeline(
        PROMPT,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=3.5,
        generator=random[0],
        max_sequence_length=16,
        output_type="pt",
    ).images
    sampling = Sampling(4, 3.5, policy.resolve_shift("dynamic", *SIZE), *SIZE)
    latents = sample(policy, conditioning, policy.draw_noise(random[1:], *SIZE), sampling)
    torch.testing.assert_close(policy.decode_image(latents, *SIZE), theirs, rtol=0, atol=1e-5)
    assert policy.resolve_shift("dynamic", 256, 256) == pytest.approx(math.exp(0.5))
    assert policy.resolve_shift("dynamic", 1024, 1024) == pytest.approx(math.exp(1.15))


def test_what_is_exported_from_it_draws_without_a_dtype(folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(str(folder), torch.bfloat16)
    policy.save_pipeline(policy.transformer, tmp_path / "model")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "model")
    assert {each.dtype for each in (pipeline.transformer, pipeline.text_encoder_2)} == {torch.float32}
    pipeline(PROMPT, height=SIZE[0], width=SIZE[1], num_inference_steps=1, max_sequence_length=16)


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("transformer", "diffusion_pytorch_model-00002-of-00003.safetensors"),
        ("text_encoder_2", "model-00002-of-00002.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_file_that_was_not_fetched_is_named(folder: Path, tmp_path: Path, part: str, missing: str) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / part / missing).unlink()
    with pytest.raises(ModelError, match=rf"model.path {copied} cannot be loaded.*{missing}"):
        Policy.load(str(copied), torch.bfloat16)


def test_a_weight_that_no_file_has_is_named(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    for part, stem, weight in (
        ("transformer", "diffusion_pytorch_model", "single_transformer_blocks.1.proj_mlp.weight"),
        ("text_encoder_2", "model", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"),
    ):
        index = copied / part / f"{stem}.safetensors.index.json"
        places = json.loads(index.read_text(encoding="utf-8"))
        file = copied / part / places["weight_map"].pop(weight)
        kept = {name: each for name, each in load_file(file).items() if name != weight}
        index.write_text(json.dumps(places), encoding="utf-8")
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{part}.*{weight}"):
            Policy.load(str(copied), torch.float32)
        shutil.copytree(folder / part, copied / part, dirs_exist_ok=True)
