"""The part of a card that a reward needs follows from the bytes of its weights and of what an image keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from deploy.reward_memory import Need, main, need_of
from deploy.settings import ROOT
from reward_server.models import ClipArgs, Hpsv2Args
from tests.tiny_models import make_tiny_hpsv2

FLUENT = ClipArgs(kind="clip", path="deploy/tiny/reward")


def test_weights_are_counted_exactly_and_halve_in_half_the_bytes() -> None:
    weights = load_file(ROOT / "deploy" / "tiny" / "reward" / "model.safetensors")
    num_parameters = sum(weight.numel() for weight in weights.values() if weight.is_floating_point())
    whole, half = (need_of(FLUENT.model_copy(update={"dtype": dtype}), 64) for dtype in ("float32", "bfloat16"))
    assert whole.weight_bytes == pytest.approx(4 * num_parameters, rel=0.01)  # the rest are position ids
    assert half.weight_bytes == pytest.approx(2 * num_parameters, rel=0.01)
    images_and_gradients = 2 * 3 * 64**2 * 4  # stay float32
    kept, kept_in_half = (each.bytes_per_image - images_and_gradients for each in (whole, half))
    assert 0.45 < kept_in_half / kept < 0.65


def test_a_crop_costs_as_much_again(tmp_path: Path) -> None:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path)
    args = Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture)
    alone, cropped = (need_of(args.model_copy(update={"crops": crops}), 64) for crops in (0, 3))
    assert cropped.weight_bytes == alone.weight_bytes
    images_and_gradients = 2 * 3 * 64**2 * 4
    ratio = (cropped.bytes_per_image - images_and_gradients) / (alone.bytes_per_image - images_and_gradients)
    assert ratio == pytest.approx(4, rel=0.1)


def test_the_share_is_rounded_up() -> None:
    need = Need(weight_bytes=2 * 2**30, bytes_per_image=100 * 2**20)
    gib = 0.6 + 1.15 * (2 + 64 * 100 / 1024)
    assert need.gib(64) == pytest.approx(gib)
    assert need.num_gpus(64, 80) == pytest.approx(0.13)
    assert gib / 80 == pytest.approx(0.126, abs=0.001)


def test_a_reward_that_does_not_fit_is_said_to_be_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--card-gib", "1", "--images", "64", "--image-px", "64"])
    assert "fluent-clip" in capsys.readouterr().out
    main(["--card-gib", "0.5", "--images", "64", "--image-px", "64"])
    assert "does not fit, lower --images" in capsys.readouterr().out
