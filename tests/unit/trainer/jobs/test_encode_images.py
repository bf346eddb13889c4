"""What goes into which shard: names follow from content, so that only what changed is encoded anew."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.config.run import RunConfig
from tests.pictures import photo
from tests.tiny_flux import HEIGHT_PX, WIDTH_PX
from trainer.data.captioned_images import CaptionedImage, DatasetError
from trainer.jobs.encode_images import (
    PlannedShard,
    Scanned,
    image_encoder,
    images_of,
    plan,
    require_readable,
    warn_of_enlarged,
)
from trainer.model.policy import Policy

WIDE, TALL = (HEIGHT_PX, WIDTH_PX), (WIDTH_PX, HEIGHT_PX)


def run(source: str = "dataset", global_batch: int = 4, latents: Path = Path("latents")) -> RunConfig:
    sources = {"prompts": {"path": "x.txt"}, "dataset": {"path": "images", "latents_path": latents}}
    tree = {
        "name": "run",
        "num_steps": 1,
        "model": {"path": "flux", "height_px": HEIGHT_PX, "width_px": WIDTH_PX, "sizes": [WIDE, TALL]},
        source: sources[source],
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rewards": [{"name": "tiny"}],
        "optimizer": {"learning_rate": 1e-3},
        "engine": {"micro_batch": 2 - global_batch % 2, "global_batch": global_batch},
        "evaluation": {"prompts_path": "x.txt"},
    }
    return RunConfig.model_validate(tree)


def scanned(count: int) -> list[Scanned]:
    """Two wide images for each tall one."""
    sizes = [(64, 90), (40, 64), (100, 60)]
    return [Scanned(CaptionedImage(f"{i}.png", f"number {i}"), sizes[i % 3], digest=f"bytes {i}") for i in range(count)]


def names(shards: list[PlannedShard]) -> set[str]:
    return {shard.file for shard in shards}


def test_every_image_has_a_place_in_a_shard_of_its_shape() -> None:
    images = scanned(300)
    shards = plan(run(), "vae", images)
    assert [len(shard.images) for shard in shards] == [64, 64, 64, 8, 64, 36]
    for size in (WIDE, TALL):
        placed = [image for shard in shards if shard.size == size for image in shard.images]
        expected = [each.image for each in images if (each.size[0] < each.size[1]) == (size == WIDE)]
        assert placed == expected


def test_only_what_changed_gets_another_shard() -> None:
    images = scanned(300)
    shards = names(plan(run(), "vae", images))
    assert names(plan(run(), "vae", images)) == shards
    renamed = [replace(each, image=replace(each.image, caption="x", path="y.png")) for each in images]
    assert names(plan(run(), "vae", renamed)) == shards, "neither captions nor names are encoded"
    other = [replace(images[0], digest="other bytes"), *images[1:]]
    assert len(names(plan(run(), "vae", other)) & shards) == len(shards) - 1
    more = images + scanned(303)[300:]
    assert len(names(plan(run(), "vae", more)) & shards) == len(shards) - 2, "the last shard of each size"
    assert not names(plan(run(), "another vae", images)) & shards


def test_a_bucket_too_empty_for_a_step_is_named_with_its_count() -> None:
    with pytest.raises(
        DatasetError, match=r"bucket 48 × 32 has 4 images, fewer than engine\.global_batch 5 .*32 × 48: 8"
    ):
        plan(run(global_batch=5), "vae", scanned(12))
    with pytest.raises(DatasetError, match="bucket 48 × 32 has no images"):
        plan(run(), "vae", [each for each in scanned(12) if each.size[0] < each.size[1]])


def test_bad_images_are_named_together() -> None:
    images = [replace(each, problem=f"{each.image.name} is damaged") for each in scanned(7)]
    config = run().dataset
    assert config is not None
    with pytest.raises(DatasetError, match=r"images: 7 of 8 images are bad: 0\.png is damaged; .*4\.png is damaged; …"):
        require_readable(config, images + scanned(1))


def test_enlarging_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    small = Scanned(CaptionedImage("small.png", "x"), (20, 30))
    warn_of_enlarged(run(), [*scanned(6), small])
    assert "1 of 7 images" in (said := capsys.readouterr().out)
    assert "small.png: 20 × 30 to 32 × 48" in said


def test_a_run_without_a_dataset_has_nothing_to_encode() -> None:
    with pytest.raises(DatasetError, match="no dataset"):
        images_of(run("prompts"))


def test_a_shard_holds_the_latents_of_its_images(flux: Policy, flux_folder: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(pictures):
        photo(*WIDE).rotate(10 * index).save(path)
    images = tuple(CaptionedImage(str(path), "x") for path in pictures)
    config, shard = run(latents=tmp_path), PlannedShard("shard.safetensors", WIDE, images)
    assert image_encoder(config, flux_folder)(json.loads(json.dumps(asdict(shard)))) == 3
    pixels = torch.stack([torch.from_numpy(each.read_pixels(each.read_bytes())) for each in images]) / 255
    latents = load_file(tmp_path / "shard.safetensors")["latents"]
    torch.testing.assert_close(latents, flux.encode_image(pixels), rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.glob("*.partial")] == []
