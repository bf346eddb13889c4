"""A step's batch follows from seed and step alone: one size, drawn by its number of images, none left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.config.run import RunConfig
from tests.encoded import write_latents
from tests.tiny_flux import PROMPTS
from trainer.data.batches import Batch, ImageBatches, open_batches
from trainer.data.buckets import Size
from trainer.data.captioned_images import DatasetError
from trainer.data.latents import Latents, require_unchanged

COUNTS = {(32, 48): 12, (48, 32): 5, (32, 32): 7}


def latents_of(size: Size, count: int) -> torch.Tensor:
    """Every image's latents are its number."""
    tokens = size[0] * size[1] // 256
    return torch.arange(count, dtype=torch.float32)[:, None, None].expand(count, tokens, 64)


def said(size: Size, index: int) -> str:
    return f"{size[0]}x{size[1]} number {index}"


@pytest.fixture(scope="module")
def folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    buckets = {size: (latents_of(size, n), [said(size, i) for i in range(n)]) for size, n in COUNTS.items()}
    write_latents(folder / "latents", flux_folder, folder, buckets)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def run(folder: Path, source: str = "dataset", **changed: Any) -> RunConfig:
    sources = {
        "prompts": {"path": folder / "prompts.txt"},
        "dataset": {"path": folder, "latents_path": folder / "latents"},
    }
    tree: dict[str, Any] = {
        "name": "run",
        "num_steps": 40,
        "model": {"path": "flux", "height_px": 32, "width_px": 48, "sizes": list(COUNTS)},
        source: sources[source],
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rewards": [{"name": "tiny"}],
        "optimizer": {"learning_rate": 1e-3},
        "engine": {"global_batch": 4},
        "evaluation": {"prompts_path": folder / "prompts.txt"},
    }
    return RunConfig.model_validate(tree | changed)


def images_of(batch: Batch) -> list[int]:
    assert batch.clean is not None
    return [int(latents[0, 0]) for latents in batch.clean(range(len(batch.prompts)))]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 39), parts=st.permutations(range(4)))
def test_a_sample_is_the_same_whoever_reads_it_and_beside_whichever_others(
    folder: Path, seed: int, step: int, parts: list[int]
) -> None:
    batch, again = (open_batches(run(folder, seed=seed)).batch(step) for _ in range(2))
    assert (batch.size, batch.prompts) == (again.size, again.prompts)
    assert batch.clean is not None
    assert again.clean is not None
    together = batch.clean(range(4))
    assert together.shape == (4, batch.size[0] * batch.size[1] // 256, 64)
    assert again.clean(parts[:2]).equal(together[parts[:2]])
    assert [said(batch.size, number) for number in images_of(batch)] == list(batch.prompts)


def test_every_image_of_a_bucket_comes_once_an_epoch(folder: Path) -> None:
    drawn: dict[Size, list[int]] = {size: [] for size in COUNTS}
    batches = open_batches(run(folder))
    for step in range(40):
        batch = batches.batch(step)
        drawn[batch.size] += images_of(batch)
    for size, count in COUNTS.items():
        epochs = [drawn[size][start : start + count] for start in range(0, len(drawn[size]) - count + 1, count)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("source", "shares"), [("dataset", COUNTS), ("prompts", dict.fromkeys(COUNTS, 1))])
def test_a_size_is_drawn_by_its_number_of_images_and_for_prompts_as_often_as_any_other(
    folder: Path, source: str, shares: dict[Size, int]
) -> None:
    num_steps = 2000
    batches = open_batches(run(folder, source, num_steps=num_steps))
    drawn = Counter(batches.batch(step).size for step in range(num_steps))
    for size, share in shares.items():
        expected = share / sum(shares.values())
        assert drawn[size] / num_steps == pytest.approx(expected, abs=4 * (expected / num_steps) ** 0.5)


def test_prompts_do_not_depend_on_sizes(folder: Path) -> None:
    several = open_batches(run(folder, "prompts"))
    one = open_batches(run(folder, "prompts", model={"path": "flux", "height_px": 32, "width_px": 48}))
    for step in range(5):
        assert several.batch(step).prompts == one.batch(step).prompts
        assert one.batch(step).size == (32, 48)
        assert several.batch(step).clean is None


def test_latents_of_the_same_vae_are_taken_and_of_another_refused(folder: Path, flux_folder: Path) -> None:
    assert isinstance(open_batches(run(folder), flux_folder), ImageBatches)
    other = folder / "other"
    (other / "vae").mkdir(parents=True)
    (other / "vae" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DatasetError, match=re.escape(f"by the VAE of {flux_folder}, which is not that of model.path")):
        Latents.open(run(folder), other)


def test_latents_are_in_the_dtype_of_the_vae_not_of_the_policy(folder: Path) -> None:
    model = {"path": "flux", "height_px": 32, "width_px": 48, "sizes": list(COUNTS), "dtype": "bfloat16"}
    assert open_batches(run(folder, model=model | {"vae_dtype": "float32"})).batch(0).prompts
    with pytest.raises(DatasetError, match=r"was encoded in float32, and the VAE's dtype .* is bfloat16"):
        open_batches(run(folder, model=model))


def without_a_shard(folder: Path) -> None:
    (folder / "48x32-3.safetensors").unlink()


def without_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"model": "flux"}), encoding="utf-8")


def encoded_elsewhere(folder: Path) -> None:
    set_in_manifest(folder, "source", "/another/dataset")


def encoded_in_another_dtype(folder: Path) -> None:
    set_in_manifest(folder, "dtype", "bfloat16")


def set_in_manifest(folder: Path, key: str, value: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "changed", "named"),
    [
        (without_a_shard, {}, ["lacks 48x32-3.safetensors", "srpo encode-images"]),
        (without_a_manifest, {}, ["has no manifest.json", "srpo encode-images"]),
        (other_manifest, {}, ["manifest.json (vae_checksum: Field required)", "srpo encode-images"]),
        (encoded_elsewhere, {}, ["was encoded from /another/dataset, and dataset.path is", "srpo encode-images"]),
        (
            encoded_in_another_dtype,
            {},
            ["encoded in bfloat16, and the VAE's dtype (model.vae_dtype) is float32", "srpo encode-images"],
        ),
        (
            None,
            {"model": {"path": "f", "height_px": 32, "width_px": 48}},
            ["32 × 48, 48 × 32, 32 × 32", "srpo encode-images"],
        ),
        (None, {"engine": {"global_batch": 6}}, ["bucket 48 × 32 has 5 images", "global_batch 6", "32 × 48: 12"]),
    ],
)
def test_latents_that_the_run_cannot_use_are_named_with_the_cure(
    flux_folder: Path, tmp_path: Path, spoil: Callable[[Path], None] | None, changed: dict[str, Any], named: list[str]
) -> None:
    buckets = {size: (latents_of(size, n), [said(size, i) for i in range(n)]) for size, n in COUNTS.items()}
    write_latents(tmp_path / "latents", flux_folder, tmp_path, buckets)
    if spoil is not None:
        spoil(tmp_path / "latents")
    with pytest.raises(DatasetError) as caught:
        open_batches(run(tmp_path, **changed))
    for part in ["dataset", *named]:
        assert part in str(caught.value)


def test_a_damaged_shard_is_named_where_it_is_read(flux_folder: Path, tmp_path: Path) -> None:
    buckets = {size: (latents_of(size, n), [said(size, i) for i in range(n)]) for size, n in COUNTS.items()}
    write_latents(tmp_path / "latents", flux_folder, tmp_path, buckets, per_shard=12)
    batch = open_batches(run(tmp_path)).batch(0)
    assert batch.clean is not None
    file = tmp_path / "latents" / f"{batch.size[0]}x{batch.size[1]}-0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=f"cannot read {re.escape(str(file))}"):
        batch.clean([0])


def another_caption(images: Path) -> None:
    (images / "key.txt").write_text("an old key", encoding="utf-8")


def one_more(images: Path) -> None:
    (images / "tulip.png").touch()
    (images / "tulip.txt").write_text("tulip", encoding="utf-8")


def one_less(images: Path) -> None:
    (images / "key.png").unlink()
    (images / "key.txt").unlink()


@pytest.mark.parametrize(
    ("change", "first"), [(another_caption, "key.png"), (one_more, "tulip.png"), (one_less, "key.png")]
)
def test_a_dataset_that_has_changed_since_it_was_encoded_is_refused_where_it_can_be_seen(
    flux_folder: Path, tmp_path: Path, change: Callable[[Path], None], first: str
) -> None:
    images, size, captions = tmp_path / "images", (32, 48), ["key", "fox", "moon", "cake"]
    images.mkdir()
    for caption in captions:
        (images / f"{caption}.png").touch()  # listing opens no image
        (images / f"{caption}.txt").write_text(caption, encoding="utf-8")
    buckets = {size: (latents_of(size, 4), captions)}
    write_latents(tmp_path / "latents", flux_folder, images, buckets, name=lambda each: str(images / f"{each}.png"))
    config = run(
        tmp_path,
        dataset={"path": images, "latents_path": tmp_path / "latents"},
        model={"path": "flux", "height_px": 32, "width_px": 48},
    )
    require_unchanged(config)
    change(images)
    text = rf"1 image\(s\) came, .* first is {re.escape(str(images / first))}: run `srpo encode-images"
    with pytest.raises(DatasetError, match=text):
        require_unchanged(config)
    images.rename(tmp_path / "elsewhere")
    require_unchanged(config)
