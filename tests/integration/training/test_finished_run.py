"""Trainings that run to their end: what they leave, what the exported model draws, and that every layout agrees.

Six steps are trained on two workers, and again on one worker with another micro-batch and ZeRO stage and with prompts
that were encoded before. Both must be the same training.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from services.config.run import RunConfig, load_run_config
from tests.integration.training.stack import HELD_OUT, NUM_STEPS, Run, TrainingStack, changed
from tests.pictures import photo
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.data.captioned_images import DatasetError
from trainer.data.conditioning import manifest_of
from trainer.data.prompt_embeddings import prepare, write_shard
from trainer.draws import evaluation_generator
from trainer.evaluation.drawing import Evaluation, to_uint8
from trainer.jobs.encode_images import encode, images_of
from trainer.model.loading import load_text_encoders

pytestmark = pytest.mark.slow


def test_a_run_leaves_numbers_pictures_and_files(undisturbed: Run) -> None:
    summary = json.loads((undisturbed.folder / "evaluation.json").read_text())
    numbers = {"eval/style_share_3D", "eval/style_share_Flat", "eval/frechet_3D", "eval/frechet_Flat"}
    numbers |= {"eval/subject_top5", "eval/reward"}
    assert numbers <= set(summary["base"]) == set(summary["aligned"])
    assert summary["base"]["eval/base_pixel_distance"] == 0 < summary["aligned"]["eval/base_pixel_distance"]
    assert summary["num_images"] == len(HELD_OUT)
    assert {"load", "base_evaluation", "steps", "aligned_evaluation", "export"} <= set(summary["seconds"])
    assert undisturbed.record.info.status == "FINISHED"
    assert [step for step, _ in undisturbed.history("eval/reward")] == [0, NUM_STEPS]
    metrics = {"loss", "grad_norm", "reward_denoise", "reward_invert", "seconds_rollout", "seconds_reward"}
    metrics |= {
        "steering_version",
        "discount_denoise",
        "tiny/preference_scale_denoise",
        "recovery_weight_invert",
    }  # λ, k and w
    for metric in metrics:
        assert [step for step, _ in undisturbed.history(metric)] == list(range(1, NUM_STEPS + 1))
    assert undisturbed.record.data.params["engine.zero_stage"] == "2"
    assert {"undisturbed.yaml", "evaluation.json", "before_after.png", "model"} <= undisturbed.artifacts()
    grids = {re.split(r"\W", path)[3] for path in undisturbed.artifacts("images") if "samples" in path}
    assert grids == {"0", "4", str(NUM_STEPS)}
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in undisturbed.output


def test_the_exported_model_draws_what_the_trainer_drew(undisturbed: Run) -> None:
    pipeline = FluxPipeline.from_pretrained(undisturbed.folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(HELD_OUT),
        generator=[evaluation_generator(0, index) for index in range(len(HELD_OUT))],
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=3,
        guidance_scale=3.5,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="pt",
    ).images
    aligned = Evaluation.load(undisturbed.folder / "aligned.safetensors").images
    base = Evaluation.load(undisturbed.folder / "base.safetensors").images
    assert (to_uint8(drawn).int() - aligned.int()).abs().max() <= 1
    assert not torch.equal(base, aligned)


def test_one_worker_with_other_micro_batches_and_stage_and_prompts_from_disk_is_the_same_training(
    stack: TrainingStack, undisturbed: Run
) -> None:
    run_file = stack.write_run("alone", num_workers=1, micro_batch=2, zero_stage=3)
    changed(run_file, "prompts", embeddings_path="embeddings", shard_prompts=3)
    kept = begin_embeddings(run_file, stack.folder)
    written = kept.stat().st_mtime_ns
    output = stack.finish(run_file, "trainer.jobs.encode_prompts")
    assert f"{len(PROMPTS)} prompts, 2 of them encoded before" in output
    assert f"encoded {len(PROMPTS) - 2}/{len(PROMPTS) - 2} prompts" in output, "in shards of three"
    assert kept.stat().st_mtime_ns == written, "an existing shard is not made again"
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".json"] + 3 * [".safetensors"]
    alone = stack.train(run_file)
    for metric in ("loss", "grad_norm", "reward_denoise", "reward_invert"):
        assert alone.last_values(metric) == pytest.approx(undisturbed.last_values(metric), abs=1e-5)
    torch.testing.assert_close(alone.weights(), undisturbed.weights(), rtol=0, atol=1e-4)


def begin_embeddings(run_file: Path, folder: Path) -> Path:
    """Leave what a killed job leaves: a shard of two prompts, and a part of another. Return the shard."""
    run, embeddings = load_run_config(run_file), folder / "embeddings"
    prepare(embeddings, manifest_of(run, folder / "flux"))
    text = load_text_encoders(str(folder / "flux"), torch.float32)
    shard = write_shard(embeddings, PROMPTS[:2], text.encode_prompts(PROMPTS[:2], MAX_SEQUENCE_LENGTH))
    (embeddings / "0.safetensors.partial").write_bytes(shard.read_bytes()[:100])
    return shard


def test_a_run_on_real_images_reads_their_latents(stack: TrainingStack, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Data encodes the images once: what exists is left alone, and a bad image is named."""
    images, latents = stack.folder / "images", stack.folder / "latents"
    write_images(images)
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "sizes": [[HEIGHT_PX, WIDTH_PX], [WIDTH_PX, HEIGHT_PX]]}
    offline = {
        "num_steps": 2,
        "model": {"path": str(stack.folder / "flux"), **size, "max_sequence_length": MAX_SEQUENCE_LENGTH},
        "prompts": None,
        "dataset": {"path": str(images), "latents_path": str(latents)},
    }
    run_file = stack.write_run("offline", sections=offline, num_workers=1)
    config = load_run_config(run_file)
    encode(config, images_of(config))
    written = {file: file.stat().st_mtime_ns for file in latents.glob("*.safetensors")}
    assert len(written) == 2

    spoil_and_restore_an_image(images, config)
    (images / "0.txt").write_text("another caption", encoding="utf-8")
    assert "another caption" in encode(config, images_of(config)).read_text(encoding="utf-8")
    assert {file: file.stat().st_mtime_ns for file in latents.glob("*.safetensors")} == written
    assert "all images are encoded already" in capsys.readouterr().out

    run = stack.train(run_file)
    assert [step for step, _ in run.history("loss")] == [1, 2]
    assert run.record.data.params["dataset.path"] == str(images)
    assert [step for step, _ in run.history("eval/reward")] == [0, 2]


def write_images(folder: Path) -> None:
    """Write one image with caption for each prompt, in two sizes."""
    folder.mkdir()
    for index, caption in enumerate(PROMPTS):
        height, width = (HEIGHT_PX, WIDTH_PX) if index % 2 else (WIDTH_PX + 9, HEIGHT_PX)
        photo(height, width).rotate(index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def spoil_and_restore_an_image(images: Path, config: RunConfig) -> None:
    whole = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"1 of 8 images are bad: .*0\.png is damaged"):
        encode(config, images_of(config))
    (images / "0.png").write_bytes(whole)
