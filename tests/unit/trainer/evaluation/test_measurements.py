"""A Measurer's numbers are means and set statistics over images, for all rows and for any draw of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from services.config.dataset import CaptionedConfig
from tests.tiny_judges import make_tiny_judges
from trainer.data.captioned_images import DatasetError
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurements, Measurer, metric_names
from trainer.evaluation.real_pictures import picture_files, read_pictures, read_truth

PROMPTS = ("cat", "cat", "dog", "dog", "key", "key")
STYLES = ("3D", "Flat")


def painted(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def redness(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    red = images[:, 0].double().mean(dim=(1, 2)) / 255
    return red, 1 - red


@pytest.fixture
def measurer(tmp_path: Path) -> Measurer:
    folder = make_tiny_judges(tmp_path, STYLES, sorted(set(PROMPTS)), painted()[:3])
    return Measurer({"reward": redness}, Judges.load(folder, torch.device("cpu")), None, num_images_per_prompt=2)


def test_numbers_are_those_announced_and_the_judges_own(measurer: Measurer, tmp_path: Path) -> None:
    measurements = measurer.measure(painted(), PROMPTS)
    numbers = measurer.summarize(measurements)
    assert set(numbers) == metric_names(["reward"], tmp_path, None, num_images_per_prompt=2)
    values, features = Judges.load(tmp_path, torch.device("cpu")).judge(painted(), PROMPTS, batch=4)
    assert measurements.features.equal(features)
    assert {name: numbers[name] for name in values} == {name: float(value.mean()) for name, value in values.items()}
    assert numbers["common_mode"] == pytest.approx(0.5)
    assert numbers["reward"] == pytest.approx(2 * float(painted()[:, 0].double().mean()) / 255 - 1)


def test_parts_of_the_images_measured_apart_are_the_whole(measurer: Measurer) -> None:
    base, drawn = measurer.measure(255 - painted(), PROMPTS), painted()
    whole = measurer.measure(drawn, PROMPTS, base)
    parts, rows = [], ([1, 3, 5], [0, 2, 4])
    for part in rows:
        before = Measurements((255 - painted())[part], {}, base.features[part])
        parts.append(measurer.measure(drawn[part], [PROMPTS[row] for row in part], before, PROMPTS))
    joined = Measurements.join(parts, [row for part in rows for row in part])
    assert joined.images.equal(whole.images)
    torch.testing.assert_close(joined.features, whole.features, rtol=0, atol=1e-6)
    torch.testing.assert_close(joined.values, whole.values, rtol=0, atol=1e-6)


def test_distances_are_to_the_base_models_picture_of_the_same_row(measurer: Measurer) -> None:
    base = measurer.measure(painted(), PROMPTS)
    same, other = measurer.measure(painted(), PROMPTS, base), measurer.measure(255 - painted(), PROMPTS, base)
    assert measurer.summarize(same)["base_pixel_distance"] == measurer.summarize(same)["base_feature_distance"] == 0
    expected = float((255 - 2 * painted().double()).abs().mean() / 255)
    assert measurer.summarize(other)["base_pixel_distance"] == pytest.approx(expected)
    assert measurer.summarize(other)["base_feature_distance"] > 0


def test_the_same_picture_for_every_seed_or_prompt_has_no_diversity(measurer: Measurer) -> None:
    per_prompt = painted()[[0, 0, 1, 1, 2, 2]]
    numbers = measurer.summarize(measurer.measure(per_prompt, PROMPTS))
    assert numbers["diversity_seeds"] < 1e-6 < numbers["diversity_prompts"]
    numbers = measurer.summarize(measurer.measure(painted()[[0, 1, 0, 1, 0, 1]], PROMPTS))
    assert numbers["diversity_prompts"] < 1e-6 < numbers["diversity_seeds"]


def test_a_folder_of_real_pictures_is_a_distance_of_its_own(tmp_path: Path) -> None:
    for index, image in enumerate(painted()):
        to_pil_image(image).save(tmp_path / f"{index}.png")
    measurer = Measurer({}, None, tmp_path, num_images_per_prompt=1)
    near, far = (measurer.summarize(measurer.measure(images, PROMPTS)) for images in (painted(), painted() // 2))
    assert near["frechet_reference"] == pytest.approx(0, abs=1e-6)
    assert far["frechet_reference"] > 0.1
    assert torch.equal(read_pictures(picture_files(tmp_path), 16, 16), painted())


def test_real_pictures_are_turned_upright_and_cropped_not_squeezed(tmp_path: Path) -> None:
    image = painted()[0]
    sideways = Image.Exif()
    sideways[0x0112] = 6  # shown turned by 90 degrees clockwise
    to_pil_image(image).rotate(90).save(tmp_path / "a.png", exif=sideways)
    to_pil_image(F.pad(image, (8, 8))).save(tmp_path / "b.png")  # black at both sides
    read = read_pictures(picture_files(tmp_path), 16, 16)
    assert torch.equal(read[0], image)
    assert torch.equal(read[1], image)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reference_path: .*a\.png is not a PNG, JPEG or WebP picture"):
        read_pictures(picture_files(tmp_path), 16, 16)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="has 1 PNG"):
        picture_files(tmp_path)


def write_truth(folder: Path, drawings: dict[str, Tensor]) -> CaptionedConfig:
    folder.mkdir()
    for name, drawing in drawings.items():
        to_pil_image(drawing).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    return CaptionedConfig(path=folder)


def test_each_image_is_compared_with_the_real_picture_of_its_prompt(tmp_path: Path) -> None:
    judges = make_tiny_judges(tmp_path / "judges", STYLES, sorted(set(PROMPTS)), painted()[:3])
    drawings = dict(zip(("cat", "dog", "key"), painted(), strict=False))
    truth = read_truth(write_truth(tmp_path / "real", drawings), set(PROMPTS), 16, 16)
    measurer = Measurer({}, Judges.load(judges, torch.device("cpu")), None, 2, truth)
    right = torch.stack([drawings[prompt] for prompt in PROMPTS])
    swapped = right[[2, 3, 4, 5, 0, 1]]
    drawn, wrong = (measurer.summarize(measurer.measure(images, PROMPTS)) for images in (right, swapped))
    assert set(drawn) == metric_names([], judges, None, 2, has_truth=True)
    assert drawn["truth_l1"] == 0 < wrong["truth_l1"]
    for name in ("truth_ssim", "truth_edge_correlation", "truth_subject_similarity"):
        assert drawn[name] == pytest.approx(1)
        assert wrong[name] < 0.999


def test_a_prompt_without_a_real_picture_or_with_two_is_named(tmp_path: Path) -> None:
    source = write_truth(tmp_path / "real", {"cat": painted()[0], "dog": painted()[1]})
    with pytest.raises(DatasetError, match=r"evaluation\.truth has no picture of 'key' \(2 prompts have none\)"):
        read_truth(source, ("cat", "key", "owl"), 16, 16)
    (tmp_path / "real" / "dog.txt").write_text("cat", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"evaluation\.truth has two pictures of 'cat'"):
        read_truth(source, ("cat",), 16, 16)
    with pytest.raises(DatasetError, match=r"evaluation\.truth\.path .*nowhere: no such folder"):
        read_truth(CaptionedConfig(path=tmp_path / "nowhere"), ("cat",), 16, 16)
