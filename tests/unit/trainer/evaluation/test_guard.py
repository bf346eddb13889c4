"""The guard of a run in one process: what it measures, when it ends the run, what it saves in a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torchvision.transforms.functional import to_pil_image

from services.config.run import load_run_config
from tests.tiny_judges import make_tiny_judges
from trainer.algorithm.rollout import Sampling
from trainer.data.prompt_files import load_prompts
from trainer.evaluation.drawing import Draw
from trainer.evaluation.guard import Guard, guard_pictures, measured_metrics
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurer, Similarities

ROOT = Path(__file__).resolve().parents[4]
RULE = {"metric": "guard/common_mode", "rises_by": 0.5}


@pytest.fixture(autouse=True)
def lone_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def brightness(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A reward for bright images whatever the words, a little higher under the positive one."""
    bright = images.double().mean(dim=(1, 2, 3)) / 255
    assert len(prompts) == len(images)
    return bright + 0.1, bright


def make_guard(
    folder: Path,
    judges: Path | None = None,
    evaluation: dict[str, Any] | None = None,
    reward: Similarities = brightness,
    **settings: Any,
) -> Guard:
    tree = yaml.safe_load((ROOT / "deploy/runs/tiny_srpo.yaml").read_text(encoding="utf-8"))
    tree["num_steps"] = 6
    tree["prompts"]["path"] = str(ROOT / tree["prompts"]["path"])
    tree["evaluation"] |= {"judge_path": judges and str(judges), "truth": None, "batch": 3} | (evaluation or {})
    tree["guard"] = {"num_prompts": 4, "stop_when": [RULE]} | settings
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = load_run_config(folder / "run.yaml")
    assert config.guard is not None
    device = torch.device("cpu")
    rewards = {"reward": reward} | ({"held_out_reward": brightness} if config.guard.held_out_reward else {})
    measurer = Measurer(
        rewards,
        Judges.load(judges, device) if judges else None,
        config.evaluation.reference_path,
        config.guard.num_images_per_prompt,
    )
    pictures = guard_pictures(config, config.guard, Sampling(1, 1.0, 3.0, 16, 16))
    return Guard(config, config.guard, pictures, measurer, device, folder)


def pictures(level: int) -> Draw:
    return lambda indices: torch.full((len(indices), 3, 16, 16), level, dtype=torch.uint8)


def test_checks_are_due_at_the_base_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, every_num_steps=4)
    assert [step for step in range(7) if guard.is_due(step)] == [0, 4, 6]


def test_prompts_are_some_of_the_training_prompts_and_always_the_same(tmp_path: Path) -> None:
    first, second = make_guard(tmp_path, num_prompts=20), make_guard(tmp_path, num_prompts=20)
    assert first.pictures.prompts == second.pictures.prompts
    assert len(set(first.pictures.prompts)) == 20
    assert set(first.pictures.prompts) <= set(load_prompts(ROOT / "deploy/tiny/prompts/train.txt", "prompt"))


def test_a_reward_that_rises_whatever_the_words_ends_the_run(tmp_path: Path) -> None:
    guard = make_guard(tmp_path)
    numbers = guard.check(0, pictures(51))
    assert numbers["guard/common_mode"] == pytest.approx(0.25)
    assert numbers["guard/reward"] == pytest.approx(0.1), "the difference does not see it"
    assert guard.is_best(0)
    guard.check(10, pictures(70))
    assert guard.is_best(10)
    assert guard.broken_rule is None
    guard.check(20, pictures(90))
    assert guard.broken_rule is not None
    assert (guard.last_step, guard.exported_step, guard.is_best(20)) == (20, 10, False)


def test_checks_survive_a_checkpoint_and_a_repeated_check(tmp_path: Path) -> None:
    guard, resumed = make_guard(tmp_path), make_guard(tmp_path)
    for step, level in ((0, 51), (10, 51)):
        guard.check(step, pictures(level))
    state = json.loads(json.dumps(guard.state()))
    guard.check(20, pictures(60))
    resumed.restore(state)
    assert (resumed.last_step, resumed.exported_step) == (10, 10)
    assert [step for step in (0, 10, 20) if resumed.is_due(step)] == [20]
    resumed.check(20, pictures(90))
    assert (resumed.broken_rule, resumed.exported_step) == (
        "guard/common_mode 0.4029 at step 20: rises_by 0.5 (base 0.25, bound 0.375)",
        10,
    )


def test_a_resumed_guard_still_knows_the_base_pictures(tmp_path: Path) -> None:
    guard, resumed = make_guard(tmp_path), make_guard(tmp_path)
    assert guard.check(0, pictures(51))["guard/base_pixel_distance"] == 0
    resumed.restore(guard.state())
    assert resumed.check(10, pictures(255))["guard/base_pixel_distance"] == pytest.approx(0.8)


@pytest.mark.parametrize("with_judges", [True, False])
def test_a_check_measures_exactly_the_announced_metrics(tmp_path: Path, with_judges: bool) -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    (tmp_path / "real").mkdir()
    for index, image in enumerate(images):
        to_pil_image(image).save(tmp_path / "real" / f"{index}.png")
    evaluation = {"reference_path": str(tmp_path / "real")}
    judges = None
    if with_judges:
        prompts = make_guard(tmp_path).pictures.prompts
        judges = make_tiny_judges(tmp_path / "judge", ("3D", "Flat"), prompts, images[:4])
    guard = make_guard(tmp_path, judges, evaluation, num_images_per_prompt=2, held_out_reward="other")
    numbers = guard.check(0, lambda indices: images[list(indices)])
    config = load_run_config(tmp_path / "run.yaml")
    assert config.guard is not None
    assert set(numbers) == measured_metrics(config, config.guard)
    assert {"guard/held_out_reward", "guard/held_out_common_mode", "guard/diversity_seeds"} <= set(numbers)
    assert ("guard/frechet_Flat" in numbers) == with_judges
    assert numbers.get("guard/frechet_wanted") == numbers.get("guard/frechet_3D")
    assert numbers["guard/frechet_reference"] == pytest.approx(0, abs=1e-6)


def test_a_number_that_is_not_finite_ends_the_run_by_name(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, reward=lambda images, _: (torch.full((len(images),), math.nan),) * 2)
    with pytest.raises(ValueError, match=r"step 0: .*not finite.*guard/common_mode"):
        guard.check(0, pictures(0))
