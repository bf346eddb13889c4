"""What each reward says equals what its authors' code says, for any shape of image; and its gradient is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from aesthetic_predictor_v2_5 import convert_v2_5_from_siglip
from hpsv2.src.open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, SiglipImageProcessor

from reward_server.models import AestheticArgs, ClipArgs, Hpsv2Args, ImageOnly, PickScoreArgs, TwoTower, load_reward
from reward_server.models.aesthetic import AestheticReward
from reward_server.models.clip import ClipReward
from reward_server.models.hpsv2 import Hpsv2Reward
from reward_server.models.preprocess import ResizeAndCrop, fit_and_pad
from services.contract import ContractError
from tests.pictures import photo, tensor_of
from tests.tiny_models import make_tiny_aesthetic, make_tiny_clip, make_tiny_hpsv2, published_hpsv2

SIZES = [(28, 28), (64, 64), (20, 20), (40, 90), (90, 40), (15, 31)]  # height, width
TEXTS = ["3D. grinning face", "Flat. cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> ClipReward:
    return ClipReward(ClipArgs(kind="clip", path=str(clip_folder)))


@pytest.fixture(scope="module")
def hpsv2_args(tmp_path_factory: pytest.TempPathFactory) -> Hpsv2Args:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path_factory.mktemp("hpsv2"))
    return Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture)


@pytest.fixture(scope="module")
def hpsv2(hpsv2_args: Hpsv2Args) -> Hpsv2Reward:
    return Hpsv2Reward(hpsv2_args)


@pytest.fixture(scope="module")
def aesthetic_args(tmp_path_factory: pytest.TempPathFactory) -> AestheticArgs:
    backbone, head = make_tiny_aesthetic(tmp_path_factory.mktemp("aesthetic"))
    return AestheticArgs(kind="aesthetic", path=str(head), backbone=str(backbone))


@pytest.fixture(scope="module")
def aesthetic(aesthetic_args: AestheticArgs) -> AestheticReward:
    return AestheticReward(aesthetic_args)


@pytest.fixture(scope="module")
def hpsv2_score(hpsv2_args: Hpsv2Args) -> Iterator[Callable[[Sequence[Image.Image], str], list[float]]]:
    with published_hpsv2(hpsv2_args) as score:
        yield score


@torch.no_grad()
def similarity(reward: TwoTower, picture: Image.Image, text: str) -> float:
    return float(reward.embed_image(tensor_of(picture))[0] @ reward.embed_text([text])[0])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hpsv2_geometry_equals_the_packages_own(height: int, width: int) -> None:
    published = image_transform(28, is_train=False, resize_longest_max=True, mean=(0, 0, 0), std=(1, 1, 1))
    ours = fit_and_pad(tensor_of(photo(height, width)), 28)
    torch.testing.assert_close(ours[0], published(photo(height, width)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hpsv2_equals_the_packages_own_score(
    hpsv2: Hpsv2Reward, hpsv2_score: Callable[[Sequence[Image.Image], str], list[float]], height: int, width: int
) -> None:
    picture = photo(height, width)
    for text in TEXTS:
        assert [similarity(hpsv2, picture, text)] == pytest.approx(hpsv2_score([picture], text), abs=1e-5)


@pytest.mark.slow
def test_hpsv2_equals_the_packages_own_score_at_full_size(tmp_path: Path) -> None:
    """ViT-H-14 with random weights in the published format: half precision, as HPS_v2.1_compressed.pt is."""
    checkpoint = tmp_path / "HPS_random.pt"
    args = Hpsv2Args(kind="hpsv2", path=str(checkpoint))
    pictures = [photo(512, 512), photo(300, 500), photo(500, 300)]
    with published_hpsv2(args, writes_checkpoint=True) as score:
        published = score(pictures, TEXTS[0])
    reward = Hpsv2Reward(args)
    checkpoint.unlink()  # 2 GB that pytest would keep
    with torch.no_grad():
        text = reward.embed_text(TEXTS[:1])[0]
        ours = [float(reward.embed_image(tensor_of(picture))[0] @ text) for picture in pictures]
    assert ours == pytest.approx(published, abs=1e-4)
    assert np.ptp(published) > 1e-3  # the pictures differ to the model, so that the comparison says something


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", [CLIPImageProcessor, SiglipImageProcessor])
def test_pixels_equal_the_published_processors(kind: type, height: int, width: int) -> None:
    """Exactly for bytes; for floats up to its rounding, and but for overshoot, which bytes clip in each pass."""
    if kind is CLIPImageProcessor:
        processor = kind(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    else:
        processor = kind(size={"height": 28, "width": 28})
    picture = photo(height, width, contrast=0.6)
    published = processor(picture, return_tensors="pt").pixel_values
    preprocess = ResizeAndCrop.of_processor(processor)
    rounding = 1.5 / 255 / min(processor.image_std)
    torch.testing.assert_close(preprocess(tensor_of(picture)), published, rtol=0, atol=rounding)
    in_bytes = torch.from_numpy(np.array(picture)[None]).permute(0, 3, 1, 2)
    torch.testing.assert_close(preprocess(in_bytes), published, rtol=0, atol=1e-6)
    torch.testing.assert_close(preprocess(in_bytes.contiguous()), published, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [{"shortest_edge": 28}, {"shortest_edge": 32}, {"height": 28, "width": 28}], ids=str)
def test_bytes_shrunk_before_give_the_same_pixels(size: dict[str, int], height: int, width: int) -> None:
    preprocess = ResizeAndCrop(size, {"height": 28, "width": 28}, (0.5,) * 3, (0.25,) * 3)
    images = (tensor_of(photo(height, width)) * 255).round().to(torch.uint8)
    small = preprocess.shrink(images)
    assert small.dtype == torch.uint8
    assert preprocess(small).equal(preprocess(images))
    if 32 not in size.values():  # nothing is left to be cropped
        assert small.shape[-2:] == (28, 28)


def test_bytes_are_what_their_255th_part_is_to_a_model_that_resizes_floats(hpsv2: Hpsv2Reward) -> None:
    in_bytes = (tensor_of(photo(40, 90)) * 255).round().to(torch.uint8)
    torch.testing.assert_close(hpsv2.embed_image(in_bytes), hpsv2.embed_image(in_bytes / 255), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_equals_transformers_own_similarity(clip: ClipReward, clip_folder: Path, height: int, width: int) -> None:
    """On a picture of floats, which the published processor takes too and does not round."""
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    picture = photo(height, width, contrast=0.6)
    pixels = processor(tensor_of(picture), do_rescale=False, return_tensors="pt").pixel_values
    for text in TEXTS:
        with torch.no_grad():
            logits = model(pixel_values=pixels, **tokenizer(text, return_tensors="pt")).logits_per_image
        assert similarity(clip, picture, text) == pytest.approx(float(logits / model.logit_scale.exp()), abs=1e-5)


def test_pickscores_published_score_is_logit_scale_times_ours(clip_folder: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    reward = ClipReward(PickScoreArgs(kind="pickscore", path=str(clip_folder)))
    picture = photo(32, 32)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        published = model(pixel_values=pixels, **tokenizer(TEXTS[0], return_tensors="pt")).logits_per_image
    assert reward.logit_scale is not None
    assert reward.logit_scale * similarity(reward, picture, TEXTS[0]) == pytest.approx(float(published), abs=1e-4)


def test_texts_of_a_batch_do_not_change_each_other(clip: ClipReward, hpsv2: Hpsv2Reward) -> None:
    for reward in (clip, hpsv2):
        alone = torch.cat([reward.embed_text([text]) for text in TEXTS])
        torch.testing.assert_close(reward.embed_text(TEXTS), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_aesthetic_equals_the_packages_own_score(
    aesthetic: AestheticReward, aesthetic_args: AestheticArgs, height: int, width: int
) -> None:
    model, processor = convert_v2_5_from_siglip(aesthetic_args.path, aesthetic_args.backbone)
    images = tensor_of(photo(height, width, contrast=0.6))
    with torch.no_grad():
        pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
        published = model(pixels, return_dict=True).logits[:, 0]
        torch.testing.assert_close(aesthetic.score_image(images), published, rtol=0, atol=1e-5)


def test_a_gradient_reaches_every_pixel_of_an_image_of_any_size(
    clip: ClipReward, hpsv2: Hpsv2Reward, aesthetic: AestheticReward
) -> None:
    for evaluate in (clip.embed_image, hpsv2.embed_image, aesthetic.score_image):
        images = (0.1 + 0.8 * torch.rand(2, 3, 50, 50)).requires_grad_()
        evaluate(images).reshape(2, -1)[:, 0].sum().backward()
        assert images.grad is not None
        assert (images.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(28, 28), (24, 40)])
def test_gradients_equal_finite_differences(
    clip_folder: Path, hpsv2_args: Hpsv2Args, aesthetic_args: AestheticArgs, height: int, width: int
) -> None:
    """In float64, of everything between the pixels and the embedding: preprocessing, crops, model."""
    clip = ClipReward(ClipArgs(kind="clip", path=str(clip_folder), crops=2))
    hpsv2, aesthetic = Hpsv2Reward(hpsv2_args), AestheticReward(aesthetic_args)
    for module in (clip._model, hpsv2._model, aesthetic._backbone, aesthetic._head):
        module.double()
    images = tensor_of(photo(height, width, contrast=0.6)).double().requires_grad_()
    for evaluate in (clip.embed_image, hpsv2.embed_image, aesthetic.score_image):
        assert torch.autograd.gradcheck(evaluate, images, fast_mode=True)


def test_a_text_that_is_too_long_is_named_not_cut(clip: ClipReward, hpsv2: Hpsv2Reward) -> None:
    for reward in (clip, hpsv2):
        with pytest.raises(ContractError, match=rf"text has \d+ tokens.* at most {reward.max_text_tokens};.*cat cat"):
            reward.embed_text(["cat", "cat " * 100])


def test_a_reward_meets_one_protocol(clip_folder: Path, hpsv2_args: Hpsv2Args, aesthetic_args: AestheticArgs) -> None:
    for args in (ClipArgs(kind="clip", path=str(clip_folder)), hpsv2_args):
        reward = load_reward(args)
        assert isinstance(reward, TwoTower)
        assert not isinstance(reward, ImageOnly)
    reward = load_reward(aesthetic_args)
    assert isinstance(reward, ImageOnly)
    assert not isinstance(reward, TwoTower)
