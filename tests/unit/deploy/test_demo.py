from __future__ import annotations

import pytest

from deploy.demo import FORWARD, REVERSED, Outcome, claims
from services.config.run import load_run_config

BASE = {"eval/subject_top5": 0.4}


def outcome(*, is_main: bool, base: dict[str, float], aligned: dict[str, float]) -> Outcome:
    evaluation = {"base": BASE | base, "aligned": {"eval/subject_top5": 0.37} | aligned}
    return Outcome(load_run_config(FORWARD if is_main else REVERSED), evaluation, 1.0, "http://127.0.0.1:5000/#/")


@pytest.mark.parametrize(
    ("share", "frechet", "subject", "missed"),
    [
        (0.6, 20.0, 0.37, ()),
        (0.599, 20.0, 0.37, ("share of 3D at least 60 %",)),
        (0.6, 20.1, 0.37, ("distance to real 3D at least halved",)),
        (0.6, 20.0, 0.35, ("subject found at least nine tenths as often as before",)),
        (0.5, 41.0, 0.37, ("at least doubled", "at least 60 %", "at least halved")),
    ],
)
def test_claims_toward_the_main_style(share: float, frechet: float, subject: float, missed: tuple[str, ...]) -> None:
    base = {"eval/style_share_3D": 0.29, "eval/frechet_3D": 40.0}
    aligned = {"eval/style_share_3D": share, "eval/frechet_3D": frechet, "eval/subject_top5": subject}
    assert_missed(outcome(is_main=True, base=base, aligned=aligned), missed, is_main=True)


@pytest.mark.parametrize(
    ("share", "frechet", "missed"),
    [
        (0.61, 8.0, ()),
        (0.6, 8.0, ("share of Flat raised",)),
        (0.61, 8.1, ("distance to real Flat not increased",)),
    ],
)
def test_claims_of_the_reversed_pair(share: float, frechet: float, missed: tuple[str, ...]) -> None:
    base = {"eval/style_share_Flat": 0.6, "eval/frechet_Flat": 8.0}
    aligned = {"eval/style_share_Flat": share, "eval/frechet_Flat": frechet}
    assert_missed(outcome(is_main=False, base=base, aligned=aligned), missed, is_main=False)


def assert_missed(outcome: Outcome, missed: tuple[str, ...], *, is_main: bool) -> None:
    found = claims(outcome, is_main=is_main)
    assert {each.run for each in found} == {outcome.label}
    told = [each.text for each in found if not each.is_met]
    assert len(told) == len(missed)
    assert all(part in text for part, text in zip(missed, told, strict=True))
