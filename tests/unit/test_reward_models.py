"""Our differentiable preprocessing equals the published one; texts are never cut; missing weights are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hpsv2.src.open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from reward_server.models import ClipArgs, Hpsv2Args, load_reward
from reward_server.models.clip import ClipReward
from reward_server.models.hpsv2 import Hpsv2Reward
from reward_server.models.preprocess import fit_and_pad
from services.contract import ContractError
from tests.tiny_models import make_tiny_clip, make_tiny_hpsv2

SIZES = [(28, 28), (64, 64), (20, 20), (40, 90), (90, 40), (15, 31)]  # height, width
TEXTS = ["3D. grinning face", "Flat. cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hpsv2_args(tmp_path_factory: pytest.TempPathFactory) -> Hpsv2Args:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path_factory.mktemp("hpsv2"))
    return Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture)


def photo(height: int, width: int, contrast: float = 1.0) -> Image.Image:
    """A picture with edges and smooth parts, around middle grey."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 3) * np.cos(columns / 5), rows / height, (columns // 7 + rows // 5) % 2]
    pixels = np.stack([(wave - wave.min()) / (np.ptp(wave) + 1e-9) for wave in waves], axis=-1)
    pixels = 0.5 + contrast * (pixels - 0.5)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def tensor_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hpsv2_geometry_equals_the_packages_own(height: int, width: int) -> None:
    published = image_transform(28, is_train=False, resize_longest_max=True, mean=(0, 0, 0), std=(1, 1, 1))
    ours = fit_and_pad(tensor_of(photo(height, width)), 28)
    torch.testing.assert_close(ours[0], published(photo(height, width)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hpsv2_embeddings_equal_the_published_recipe(hpsv2_args: Hpsv2Args, height: int, width: int) -> None:
    model = open_clip.create_model(hpsv2_args.architecture, load_weights=False).eval()
    model.load_state_dict(torch.load(hpsv2_args.path, weights_only=True)["state_dict"])
    pixels = image_transform(28, is_train=False, resize_longest_max=True)(photo(height, width))
    reward = Hpsv2Reward(hpsv2_args)
    with torch.no_grad():
        ours = reward.embed_image(tensor_of(photo(height, width)))
        torch.testing.assert_close(ours, model.encode_image(pixels[None], normalize=True), rtol=1e-5, atol=1e-5)
        tokens = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
        torch.testing.assert_close(
            reward.embed_text(TEXTS), model.encode_text(tokens, normalize=True), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_pixels_equal_the_published_processor_up_to_rounding(clip_folder: Path, height: int, width: int) -> None:
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    picture = photo(height, width, contrast=0.6)  # the published one resizes bytes: it clips overshoot in each pass
    published = processor(picture, return_tensors="pt").pixel_values
    ours = ClipReward(ClipArgs(kind="clip", path=str(clip_folder)))._preprocess(tensor_of(picture))
    rounding = 1.5 / 255 / min(processor.image_std)
    torch.testing.assert_close(ours, published, rtol=0, atol=rounding)


def test_clip_texts_equal_transformers_own(clip_folder: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    ours = ClipReward(ClipArgs(kind="clip", path=str(clip_folder))).embed_text(TEXTS)
    with torch.no_grad():
        alone = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in TEXTS]
    torch.testing.assert_close(ours, normalize(torch.cat(alone), dim=-1), rtol=1e-5, atol=1e-6)


def test_a_gradient_reaches_every_pixel_of_an_image_of_any_size(clip_folder: Path, hpsv2_args: Hpsv2Args) -> None:
    for reward in (ClipReward(ClipArgs(kind="clip", path=str(clip_folder))), Hpsv2Reward(hpsv2_args)):
        images = (0.1 + 0.8 * torch.rand(2, 3, 50, 50)).requires_grad_()
        reward.embed_image(images).square().sum().backward()
        assert images.grad is not None
        assert (images.grad != 0).float().mean() > 0.99


def test_a_text_that_is_too_long_is_named_not_cut(clip_folder: Path, hpsv2_args: Hpsv2Args) -> None:
    for reward in (ClipReward(ClipArgs(kind="clip", path=str(clip_folder))), Hpsv2Reward(hpsv2_args)):
        text = "cat " * 100
        with pytest.raises(ContractError, match=r"text of \d+ tokens.*cat cat"):
            reward.embed_text(["cat", text])


@pytest.mark.parametrize("kind", ["clip", "hpsv2"])
def test_missing_weights_are_named(tmp_path: Path, kind: str) -> None:
    missing = str(tmp_path / "nowhere")
    args = ClipArgs(kind="clip", path=missing) if kind == "clip" else Hpsv2Args(kind="hpsv2", path=missing)
    with pytest.raises(ValueError, match="nowhere"):
        load_reward(args)


def test_the_checksum_is_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        load_reward(ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path / name, seed=seed)))).checksum
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same != other
