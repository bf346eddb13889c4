"""An adapter computes what its merged model and diffusers' own pipeline compute, trains alike in every ZeRO stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import EmaConfig, FinetuneConfig
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from tests.workers import in_workers
from trainer.model.fragments import checkpoint_weights
from trainer.model.lora import adapter, add_adapter, whole, whole_weights
from trainer.model.policy import Policy

NUM_WORKERS = 2
SIZE = HEIGHT_PX, WIDTH_PX
LORA = FinetuneConfig(kind="lora", rank=2, alpha=6.0)
# AdamW with so large an epsilon moves a weight by lr times its gradient
OPTIMIZER = OptimizerConfig(learning_rate=1e4, epsilon=1e3, weight_decay=0, max_grad_norm=1e6)


def adapted(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    flux = Policy.load(str(folder), dtype)
    add_adapter(flux.transformer, LORA, seed)
    return flux


def velocity(flux: Policy, transformer: nn.Module, index: int) -> Tensor:
    noise = flux.draw_noise([torch.Generator().manual_seed(index)], *SIZE)
    conditioning = flux.encode_prompts(PROMPTS[index : index + 1], MAX_SEQUENCE_LENGTH)
    return flux.calling(transformer).predict_velocity(noise, torch.tensor(0.8), conditioning, 3.5, *SIZE)


def trained_at_random(flux: Policy) -> None:
    with torch.no_grad():
        for parameter in flux.transformer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))


def drawn(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": HEIGHT_PX, "width": WIDTH_PX, "num_inference_steps": 2, "output_type": "pt"}
    generator = [torch.Generator().manual_seed(0)]
    images: Tensor = pipeline(
        PROMPTS[0], generator=generator, max_sequence_length=MAX_SEQUENCE_LENGTH, **settings
    ).images
    return images


def test_an_untrained_adapter_changes_nothing_and_only_it_is_trained(flux: Policy, flux_folder: Path) -> None:
    ours = adapted(flux_folder)
    expected = velocity(flux, flux.transformer, 0)
    torch.testing.assert_close(velocity(ours, ours.transformer, 0), expected, rtol=0, atol=1e-6)
    trained = {name for name, parameter in ours.transformer.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    again, other = adapter(adapted(flux_folder).transformer)[0], adapter(adapted(flux_folder, seed=1).transformer)[0]
    down = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert adapter(ours.transformer)[0][down].equal(again[down])
    assert not again[down].equal(other[down])


def test_the_default_adapts_every_linear_layer_of_the_blocks_but_the_modulation() -> None:
    """Of FLUX.1-dev's width, with two blocks of each kind: peft shortens a list of so many names."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    of_blocks = {name for name in linear if re.match(r"(single_)?transformer_blocks\.", name)}
    modulation = {name for name in of_blocks if re.search(r"\.norm\w*\.linear$", name)}
    assert len(of_blocks - modulation) == 2 * (12 + 5)
    assert {name.partition(".")[0] for name in linear - of_blocks} == {
        *("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
    }
    with torch.device("meta"):
        add_adapter(transformer, FinetuneConfig(kind="lora", rank=2), seed=0)
    adapted = {name.removesuffix(".lora_A.default") for name, _ in transformer.named_modules() if "lora_A.d" in name}
    assert adapted == of_blocks - modulation


def test_adapter_in_diffusers_pipeline_draws_what_the_merged_model_draws(flux_folder: Path, tmp_path: Path) -> None:
    ours = adapted(flux_folder)
    trained_at_random(ours)
    merged = whole(ours.transformer, LORA)
    torch.testing.assert_close(velocity(ours, merged, 0), velocity(ours, ours.transformer, 0), rtol=0, atol=1e-4)
    ours.save_adapter(*adapter(ours.transformer), tmp_path / "adapter")
    ours.save_pipeline(merged, tmp_path / "model")
    pipeline = FluxPipeline.from_pretrained(flux_folder)
    base = drawn(pipeline)
    pipeline.load_lora_weights(tmp_path / "adapter")
    images = drawn(pipeline)
    torch.testing.assert_close(images, drawn(FluxPipeline.from_pretrained(tmp_path / "model")), rtol=0, atol=1e-4)
    assert (images - base).abs().max() > 1e-2


def test_a_target_that_is_no_layer_is_named_with_those_that_are(flux_folder: Path) -> None:
    flux = Policy.load(str(flux_folder), torch.float32)
    wrong = FinetuneConfig(kind="lora", target_modules=("attn.to_q", "attn.to_z"))
    with pytest.raises(
        ValueError, match=r"finetune.target_modules 'attn.to_z' is no linear .* attn.add_k_proj.*proj_out"
    ):
        add_adapter(flux.transformer, wrong, seed=0)


def test_an_adapter_of_another_run_is_refused(flux_folder: Path) -> None:
    weights = adapted(flux_folder).transformer.state_dict()
    for other, told in ((FinetuneConfig(), "kind full"), (FinetuneConfig(kind="lora", rank=3), "rank 3")):
        with pytest.raises(ValueError, match=rf"an adapter of rank 2; the run file says finetune.{told}"):
            whole_weights(weights, other)


def check_stages(rank: int, flux_folder: Path, folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        check_stage(rank, stage, torch.float32, flux_folder, folder / "float32")
    for stage in (1, 2, 3):
        check_stage(rank, stage, torch.bfloat16, flux_folder, folder / "bfloat16")


def check_stage(rank: int, stage: int, dtype: torch.dtype, flux_folder: Path, folder: Path) -> None:
    """Two steps, a checkpoint, and a third step by an engine that resumed; its whole weights, and the checkpoints'."""
    from trainer.model.engine import Engine, init_distributed

    init_distributed(use_gpu=False)
    config = EngineConfig(zero_stage=stage, num_workers=NUM_WORKERS, global_batch=NUM_WORKERS)  # type: ignore[arg-type]

    def start() -> tuple[Policy, Engine]:
        flux = adapted(flux_folder, dtype=dtype)
        return flux, Engine.create(flux.transformer, OPTIMIZER, config, 1, dtype, EmaConfig(decay=0.5))

    def step(flux: Policy, engine: Engine) -> None:
        engine.backward(velocity(flux, engine.transformer, rank).square().mean())
        engine.step()

    def save(engine: Engine, num_steps: int) -> list[Path]:
        place = folder / f"{stage}-{num_steps}"
        engine.snapshot().save(place / f"{rank}.safetensors")
        engine.export(lambda policy: torch.save(whole(policy, LORA).state_dict(), f"{place}.pt"))
        return sorted(place.glob("*.safetensors"))

    flux, engine = start()
    for _ in range(2):
        step(flux, engine)
    files = save(engine, 2)
    flux, engine = start()
    engine.load(files)
    step(flux, engine)
    save(engine, 3)


@pytest.fixture(scope="module")
def trained(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    in_workers(NUM_WORKERS, check_stages, flux_folder, folder)
    return folder


def of_checkpoint(folder: Path, flux_folder: Path) -> dict[str, Tensor]:
    weights = checkpoint_weights(sorted(folder.glob("*.safetensors")))
    assert all(".lora_" in name for name in weights), "the adapter alone"
    return whole_weights(Policy.load(str(flux_folder), torch.float32).transformer.state_dict() | weights, LORA)


def test_an_adapter_trains_alike_in_every_stage_through_resume_and_export(flux_folder: Path, trained: Path) -> None:
    folder = trained / "float32"
    start = Policy.load(str(flux_folder), torch.float32).transformer.state_dict()
    expected = {step: torch.load(folder / f"0-{step}.pt") for step in (2, 3)}
    moved = [max((expected[step][name] - start[name]).abs().max() for name in start) for step in (2, 3)]
    assert moved[1] > moved[0] > 1e-3, "the steps show"
    for stage in (0, 1, 2, 3):
        for step in (2, 3):
            torch.testing.assert_close(torch.load(folder / f"{stage}-{step}.pt"), expected[step], rtol=0, atol=1e-5)
        saved = of_checkpoint(folder / f"{stage}-2", flux_folder)
        torch.testing.assert_close(saved, dict(expected[2]), rtol=0, atol=1e-5)


def test_an_adapter_in_bfloat16_goes_where_it_goes_in_float32(flux_folder: Path, trained: Path) -> None:
    start = Policy.load(str(flux_folder), torch.float32).transformer.state_dict()

    def changes(dtype: str, stage: int, step: int) -> Tensor:
        whole = of_checkpoint(trained / dtype / f"{stage}-{step}", flux_folder)
        if dtype == "bfloat16":
            exported = torch.load(trained / dtype / f"{stage}-{step}.pt")
            assert {each.dtype for each in exported.values()} == {torch.bfloat16}
            rounded = {name: each.float() for name, each in exported.items()}
            torch.testing.assert_close(rounded, whole, rtol=2**-6, atol=1e-3)
        return torch.cat([(whole[name] - start[name]).flatten() for name in start])

    for step in (2, 3):  # the third one after a resume
        expected, in_stage_1 = changes("float32", 0, step), changes("bfloat16", 1, step)
        for stage in (1, 2, 3):
            ours = changes("bfloat16", stage, step)
            assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.99
            assert (ours - in_stage_1).norm() < 5e-3 * expected.norm()
