"""HPS v2.1's file holds, under state_dict, what open_clip's ViT-H-14 needs: names, shapes and half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hpsv2.src.open_clip import factory
from torch import Tensor

from reward_server.models import Hpsv2Args, WeightsError
from reward_server.models.hpsv2 import Hpsv2Reward
from tests.tiny_models import make_tiny_hpsv2


def test_the_architecture_is_that_of_the_package_which_made_the_file() -> None:
    """On the meta device, at full size: 986 million numbers, which in half precision are the file's 1.97 GB."""
    with torch.device("meta"):
        ours = open_clip.create_model(Hpsv2Args.model_fields["architecture"].default, load_weights=False, device="meta")
        published = factory.create_model("ViT-H-14", precision="fp32", device="meta")
    shapes = [[(name, each.shape) for name, each in model.state_dict().items()] for model in (ours, published)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 686
    assert sum(shape.numel() for _, shape in shapes[0]) == 986_109_441


@pytest.fixture
def args(tmp_path: Path) -> Hpsv2Args:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path)
    return Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture)


def content(args: Hpsv2Args) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(args.path, weights_only=True)
    return loaded


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_half_precision_number_is_taken_as_it_is(args: Hpsv2Args, is_zip: bool) -> None:
    """Whichever of torch.save's two formats the file has."""
    torch.save(content(args), args.path, _use_new_zipfile_serialization=is_zip)
    stored: dict[str, Tensor] = content(args)["state_dict"]
    assert {each.dtype for each in stored.values()} == {torch.float16}
    reward = Hpsv2Reward(args)
    model = reward._model.state_dict()
    assert set(model) == set(stored)
    assert all(each.equal(stored[name].float()) for name, each in model.items())
    assert reward.logit_scale == pytest.approx(float(stored["logit_scale"].float().exp()))


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("visual.proj", None, r"Missing key.*visual\.proj"),
        ("visual.proj", torch.zeros(2, 2).half(), r"size mismatch for visual\.proj"),
        ("score_head.weight", torch.zeros(2).half(), r"Unexpected key.*score_head\.weight"),
    ],
)
def test_a_weight_too_many_or_too_few_is_named(args: Hpsv2Args, name: str, changed: Tensor | None, named: str) -> None:
    weights = {key: each for key, each in content(args)["state_dict"].items() if key != name}
    torch.save({"state_dict": weights | ({} if changed is None else {name: changed})}, args.path)
    with pytest.raises(WeightsError, match=rf"(?s)HPS_random.pt does not fit.*{named}"):
        Hpsv2Reward(args)
