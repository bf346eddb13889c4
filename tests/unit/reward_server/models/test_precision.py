"""In bfloat16 and float16 rewards and gradients stay float32 numbers within the dtype's rounding of float32's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from reward_server.models import AestheticArgs, AnyArgs, ClipArgs, Hpsv2Args, Hpsv3Args
from reward_server.models.precision import Precision, PrecisionArgs
from reward_server.scoring.scorer import Job, Scorer
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward
from tests.pictures import photo, tensor_of
from tests.tiny_models import make_tiny_aesthetic, make_tiny_clip, make_tiny_hpsv2

IMAGES = torch.cat([tensor_of(photo(96, 64, contrast=contrast)) for contrast in (0.3, 0.6, 0.9)]).numpy()
PAIRS = tuple(PromptPair(f"grinning face {index}", "3D", "Flat") for index in range(3))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AnyArgs]:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path_factory.mktemp("hpsv2"))
    backbone, head = make_tiny_aesthetic(tmp_path_factory.mktemp("aesthetic"))
    return {
        "clip": ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path_factory.mktemp("clip"))), crops=1),
        "fluent-clip": ClipArgs(kind="clip", path="deploy/tiny/reward"),
        "hpsv2": Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture),
        "aesthetic": AestheticArgs(kind="aesthetic", path=str(head), backbone=str(backbone)),
    }


@pytest.fixture(scope="module")
def exact(kinds: dict[str, AnyArgs]) -> dict[str, RewardResponse]:
    return score_all(Scorer(kinds))


def score_all(scorer: Scorer) -> dict[str, RewardResponse]:
    answers = {}
    for name in scorer.rewards:
        request = RewardRequest(IMAGES, PAIRS, (0.3, 0.5, 0.7), (WeightedReward(name),))
        (answer,) = scorer.score([Job(request, name, "1")])
        assert isinstance(answer, RewardResponse), answer
        answers[name] = answer
    return answers


def gradients(answer: RewardResponse) -> NDArray[np.float64]:
    """One row for each image."""
    assert isinstance(answer.image_gradient, np.ndarray)
    assert answer.image_gradient.dtype == np.float32
    return answer.image_gradient.reshape(len(IMAGES), -1).astype(np.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rewards_and_gradients_differ_from_float32_by_rounding(
    kinds: dict[str, AnyArgs], exact: dict[str, RewardResponse], dtype: str, autocast: bool
) -> None:
    changed = {name: args.model_copy(update={"dtype": dtype, "autocast": autocast}) for name, args in kinds.items()}
    rounding = torch.finfo(getattr(torch, dtype)).eps  # 0.0078 and 0.00098
    for name, answer in score_all(Scorer(changed)).items():
        errors = np.abs(answer.rewards - exact[name].rewards)
        assert 0 < errors.max() < 2 * rounding, name  # of rewards whose similarities are between −1 and 1
        found, true = gradients(answer), gradients(exact[name])
        lengths = np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
        cosines = (found * true).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
        assert cosines.min() > 1 - rounding, name
        assert lengths == pytest.approx(1, abs=4 * rounding), name
        suffix = f"+dtype={dtype}" + ("+autocast" if autocast else "")
        assert suffix in answer.scorers[0], "such rewards are not those of float32, and say so"


def test_weights_take_the_memory_of_their_dtype_unless_under_autocast() -> None:
    for autocast, weights in ((False, torch.bfloat16), (True, torch.float32)):
        args = PrecisionArgs(path="x", dtype="bfloat16", autocast=autocast)
        assert Precision(args).place(nn.Linear(2, 2)).weight.dtype == weights


def test_precision_that_a_reward_cannot_have_is_named() -> None:
    with pytest.raises(ValidationError, match="autocast: true needs dtype bfloat16 or float16"):
        ClipArgs(kind="clip", path="x", autocast=True)
    with pytest.raises(ValidationError, match="bf16"):
        ClipArgs.model_validate({"kind": "clip", "path": "x", "dtype": "bf16"})
    with pytest.raises(ValidationError, match="dtype"):  # its package's own config says
        Hpsv3Args.model_validate({"kind": "hpsv3", "path": "x", "dtype": "bfloat16"})
