from __future__ import annotations

from typing import Any

import pytest

from deploy.demo import FORWARD, REVERSED, Outcome, claims, table
from services.config.run import load_run_config

GAPS = ("l1", "ssim", "edge_correlation", "hue_distance")
BASE = {"eval/truth_subject_similarity": 0.94, "eval/style_share_3D": 0.5, "eval/style_share_Flat": 0.4}
ALIGNED = BASE | {f"eval/gap_closed_{name}": 0.5 for name in GAPS} | {"eval/diversity_prompts": 4.0}
ALIGNED |= {"eval/style_share_3D": 0.51, "eval/style_share_Flat": 0.41}


def outcome(*, is_reversed: bool = False, stopped_by: str | None = None, **aligned: float) -> Outcome:
    evaluation: dict[str, Any] = {
        "base": BASE,
        "aligned": ALIGNED | {f"eval/{name}": value for name, value in aligned.items()},
        "oracle": {"eval/diversity_prompts": 5.0},
        "guard": {"exported_step": 18, "stopped_by": stopped_by},
    }
    return Outcome(load_run_config(REVERSED if is_reversed else FORWARD), evaluation, 1.0, "http://127.0.0.1:5000/#/")


@pytest.mark.parametrize("is_reversed", [False, True])
def test_all_claims_are_met_at_their_bounds(is_reversed: bool) -> None:
    found = claims(outcome(is_reversed=is_reversed))
    assert len(found) == len(GAPS) + 4
    assert all(claim.is_met for claim in found)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        *(({f"gap_closed_{name}": 0.49}, "half of the gap closed") for name in GAPS),
        ({"truth_subject_similarity": 0.93}, "subjects as close"),
        ({"diversity_prompts": 3.9}, "diversity"),
        ({"style_share_3D": 0.5}, "share of 3D raised"),
        ({"stopped_by": "guard/truth_l1 rises_by 0.1"}, "no alarm"),
    ],
)
def test_each_claim_can_be_missed(changes: dict[str, Any], missed: str) -> None:
    told = [claim.text for claim in claims(outcome(**changes)) if not claim.is_met]
    assert len(told) == 1
    assert missed in told[0]


def test_the_table_has_a_column_for_each_model_and_leaves_out_what_one_has_not() -> None:
    numbers = {"base": {"truth_l1": 0.06}, "aligned": {"truth_l1": 0.04, "gap_closed_l1": 0.7, "saturation": 0.3}}
    text = table({"runs": {"3D | Flat": numbers}, "num_images": 64, "claims": []})
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["3D", "|", "Flat:", "base", "aligned"],
        ["truth_l1", "0.060", "0.040"],
        ["gap_closed_l1", "0.700"],
    ]
