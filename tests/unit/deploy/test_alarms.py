"""The study of alarms: spoils, known values of ROC, and thresholds that follow the good pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deploy.alarms import HEADROOM, Checks, roc, study, table, thresholds_of
from deploy.spoils import REPEATS, TUNED, UNSEEN, spoil
from trainer.evaluation.damage import THRESHOLDS

NUM_PROMPTS = 6


def pictures() -> Tensor:
    """Discs of several colors with a ring inside, REPEATS of each, on white: (24, 3, 64, 64) uint8."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    radius = ((x - 32).square() + (y - 32).square()).sqrt()
    colors = torch.rand(NUM_PROMPTS, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.8
    painted = torch.where(radius < 26, colors, 1.0)
    painted = torch.where((radius > 10) & (radius < 14), painted / 3, painted)
    return (painted * 255).round().to(torch.uint8).repeat_interleave(REPEATS, dim=0)


def test_roc_is_the_share_of_pairs_in_order() -> None:
    assert roc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1
    assert roc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])) == 0.75
    assert roc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


@pytest.mark.parametrize("name", [*TUNED, *UNSEEN])
def test_every_way_spoils_more_with_its_amount(name: str) -> None:
    way, images = (TUNED | UNSEEN)[name], pictures()
    mild, strong = (spoil(images, way, amount) for amount in (0.35, 1.0))
    assert mild.dtype == torch.uint8
    assert mild.shape == images.shape
    distances = [(each.float() - images.float()).abs().mean() for each in (mild, strong)]
    assert 0 < distances[0] < distances[1]


def test_no_kind_is_for_tuning_and_for_the_test() -> None:
    assert not TUNED.keys() & UNSEEN.keys()


def test_thresholds_lie_above_the_good_pictures_of_the_tuning_half() -> None:
    tuning = torch.tensor([True, True, False])
    good = [{name: torch.tensor([0.1, 0.3, 9.0]) * scale for name in THRESHOLDS} for scale in (1, 0.5)]
    assert thresholds_of(good, tuning) == {name: float(f"{0.2 * HEADROOM:.2g}") for name in THRESHOLDS}


def test_checks_are_made_of_prompts_that_had_no_part_in_the_thresholds() -> None:
    images = pictures()
    checks = Checks(images)
    spoiled = images.clone()
    spoiled[checks.tuning] = 255 - spoiled[checks.tuning]
    assert checks.damage(checks.changes(spoiled), THRESHOLDS) < 1e-6
    assert int(checks.tuning.sum()) == NUM_PROMPTS * REPEATS // 2


def test_the_study_reports_every_kind() -> None:
    images = pictures()
    paler = (images.float() * 0.97 + 255 * 0.03).round().to(torch.uint8)
    found = study(images, {"paler": paler}, {"a policy": 255 - images})
    assert found["thresholds"].keys() == THRESHOLDS.keys()
    assert found["tuned_kinds"].keys() == TUNED.keys()
    assert found["unseen_kinds"].keys() == {*UNSEEN, "policy: a policy", "all"}
    assert found["unseen_kinds"]["policy: a policy"]["roc_of_checks"] == 1
    assert table(found).count("\n") == 1 + len(TUNED) + len(UNSEEN) + 2
