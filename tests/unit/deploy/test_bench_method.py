"""The comparison of methods: every task of the committed plan is a run, the choice of a learning rate, the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deploy.bench_method.__main__ import PLAN, Bench
from deploy.bench_method.plan import (
    Plan,
    Task,
    ablation_task,
    base_of,
    base_task,
    default_task,
    final_task,
    hacking_task,
    load_plan,
    merged,
    sweep_task,
)
from deploy.bench_method.report import between, default_text, guards_text, picture, table_of
from deploy.bench_method.results import Estimate, Result, Row, best_learning_rate


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(PLAN)


@pytest.fixture(scope="module")
def tasks(plan: Plan) -> list[Task]:
    found = [base_task(plan, path, 0) for path in (plan.validation_path, plan.test_path)]
    for method in plan.methods:
        rates = plan.learning_rates_of(method)
        found += [sweep_task(plan, method, rate) for rate in rates]
        found += [final_task(plan, method, rates[0], seed) for seed in plan.seeds]
        found += [default_task(plan, seed) for seed in plan.seeds if method is plan.methods[0]]
    found += [hacking_task(plan, seed) for seed in plan.seeds]
    return [*found, *(ablation_task(plan, each, 1e-5, 0) for each in plan.ablations)]


TRUTH = {"truth_l1": 0.05, "truth_ssim": 0.8, "truth_edge_correlation": 0.9, "truth_hue_distance": 0.05}
ORACLE = {"truth_l1": 0.03, "truth_ssim": 0.9, "truth_edge_correlation": 1.0, "truth_hue_distance": 0.01}
ORACLE |= {"diversity_prompts": 5.0}


def numbers_at(gap: float, share: float = 0.5, **more: float) -> dict[str, float]:
    """The numbers of a model that has closed this part of every gap."""
    truth = {name: value + gap * (ORACLE[name] - value) for name, value in TRUTH.items()}
    numbers = {"style_share_3D": share, "truth_subject_similarity": 0.95, "diversity_prompts": 4.0, "damage": 0.5}
    return truth | numbers | {"lattice_share": 0.04, "frechet_Flat": 4.0, "frechet_3D": 4.0} | more


BASE = Result({"checks": [{"cpu_s": 0.0, "num_steps": 0, "numbers": numbers_at(0, damage=0.0)}], "oracle": ORACLE})


def result_of(task: Task, gap: float, error: str | None = None, **more: float) -> Result:
    checks = [{"cpu_s": 30.0, "num_steps": 17, "numbers": numbers_at(gap, **more)}]
    return Result({"task": task.model_dump(mode="json"), "checks": checks, "oracle": None, "error": error}, BASE)


def test_every_task_is_a_run_with_a_name_of_its_own(tasks: list[Task]) -> None:
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.config.engine.num_workers == 1
        assert task.config.guard is None
        assert Task.model_validate_json(task.model_dump_json()) == task


def test_ablations_change_one_run_and_differ_from_each_other(plan: Plan) -> None:
    configs = [ablation_task(plan, each, 1e-5, 0).config for each in plan.ablations]
    trees = [config.model_copy(update={"name": ""}).model_dump_json() for config in configs]
    assert len(set(trees)) == len(trees)


def test_held_out_prompts_of_the_table_choose_nothing(tasks: list[Task], plan: Plan) -> None:
    for task in tasks:
        reports = task.name.startswith(("final", "default", f"base-{plan.test_path.stem}"))
        assert (task.config.evaluation.prompts_path == plan.test_path) == reports


def test_changes_go_over_a_tree_section_by_section() -> None:
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}, "d": 2}


def test_the_best_rate_closes_most_of_the_gaps(plan: Plan) -> None:
    slow, good, far = (sweep_task(plan, plan.methods[0], rate) for rate in (1e-5, 1e-4, 1e-3))
    swept = [result_of(slow, 0.3), result_of(good, 0.5), result_of(far, -0.2, share=0.97)]
    assert best_learning_rate(swept) == 1e-4
    one_measure = result_of(far, 0.5, truth_l1=0.02)
    assert best_learning_rate([*swept[:2], one_measure]) == 1e-3
    assert one_measure.mean_gap_closed == pytest.approx((1.5 + 3 * 0.5) / 4)
    broken = result_of(far, 0.9, error="the loss is nan")
    assert best_learning_rate([swept[0], broken]) == 1e-5
    with pytest.raises(ValueError, match="every learning rate failed"):
        best_learning_rate([broken])


def test_a_result_stands_between_the_base_of_its_prompts_and_seed_and_the_oracle(plan: Plan, tmp_path: Path) -> None:
    bench, task = Bench(plan, tmp_path), final_task(plan, plan.methods[0], 1e-5, 2)
    own, other = (base_task(plan, plan.test_path, seed) for seed in (2, 1))
    for each, gap in ((task, 0.4), (own, 0.0), (other, 0.2)):
        found = result_of(each, gap).found | {"oracle": ORACLE}
        (tmp_path / f"{each.name}.json").write_text(json.dumps(found), encoding="utf-8")
    result = bench.result(task)
    assert result is not None
    assert result.check()["gap_closed_l1"] == pytest.approx(0.4)
    assert result.check()["oracle_diversity_share"] == pytest.approx(0.8)


def test_a_result_counts_only_for_the_task_as_it_is_now(plan: Plan, tmp_path: Path) -> None:
    bench, task = Bench(plan, tmp_path), base_task(plan, plan.test_path, 0)
    assert bench.result(task) is None
    found = result_of(task, 0.2).found
    del found["task"]["config"]["tracking"]  # a key that is newer than the run has its default
    (tmp_path / f"{task.name}.json").write_text(json.dumps(found), encoding="utf-8")
    assert bench.result(task) is not None
    changed = task.config.model_copy(update={"num_steps": task.config.num_steps + 1})
    assert bench.result(task.model_copy(update={"config": changed})) is None


def test_standard_errors_are_over_seeds() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]).error == pytest.approx(1 / 3**0.5)
    assert Estimate.of([0.5]).as_text(percent=True) == "50 %"


def test_a_table_says_what_is_missing(plan: Plan) -> None:
    method = plan.methods[0]
    runs = [result_of(final_task(plan, method, 1e-4, seed), share) for seed, share in ((1, 0.4), (2, 0.6))]
    rows = [Row.of("whole", 1e-4, runs), Row.of("short", 1e-4, [*runs, None]), Row.of("none", None, [None])]
    broken = Row.of("broken", 1e-3, [result_of(final_task(plan, method, 1e-3, 1), 0.4, error="nan")])
    lines = table_of([*rows, broken]).splitlines()
    assert "| whole | 1e-4 | 17 ± 0 | 50 ± 10 % | 50 ± 10 % |" in lines[2]
    assert "short (2 of 3 seeds)" in lines[3]
    assert "| none | – | not run |" in lines[4]
    assert "| broken | 1e-3 | broke down |" in lines[5]
    assert len({line.count("|") for line in lines}) == 1


def test_the_guards_flag_a_run_at_its_first_check_beyond_a_bound_and_clear_the_others(plan: Plan) -> None:
    task = hacking_task(plan, 1)
    base = Result(BASE.found | {"task": base_task(plan, plan.validation_path, 1).model_dump(mode="json")})

    def hacking(*drifts: tuple[float, float]) -> Result:
        checks = [result_of(task, 0, damage=hurt, truth_l1=l1).found["checks"][0] for hurt, l1 in drifts]
        return Result(result_of(task, 0).found | {"checks": checks}, base)

    soon = hacking((0.9, 0.051), (1.5, 0.054), (4.0, 0.1), (8.0, 0.2))
    late = hacking((0.9, 0.054), (3.0, 0.1), (4.0, 0.2))  # by then a third of its drift
    never = hacking((0.9, 0.051))
    sound, hurt = (result_of(final_task(plan, plan.methods[0], 1e-4, 1), 0.5, damage=each) for each in (0.9, 1.1))
    text = guards_text([(base, soon), (base, late), (base, never)], [(base, sound), (base, hurt)], plan)
    assert "of 3 runs 1 are flagged before a quarter" in text
    assert "by truth_l1." in text
    assert "| damage above 1 | damage | 0 | 1.5 | 8 | 8 | 19% | 19% |" in text
    assert "| damage above 1 | truth_l1 | 0.05 | 0.1 | 0.2 | 0.2 | 33% | 33% |" in text
    assert "| 1 | never |" in text
    assert f"Of the 2 runs of the table 1 are flagged: {hurt.name}." in text


def test_the_default_recipe_is_listed_each_time_that_its_runs_were_judged(plan: Plan) -> None:
    rate, method = 8e-5, plan.method(plan.published)
    published = Row.of("", rate, [result_of(final_task(plan, method, rate, seed), 0.6) for seed in (1, 2)])
    runs = []
    for seed, judged in ((1, {3: (6.0, 0.4), 4: (8.0, 0.5)}), (2, {4: (7.0, 0.5), 5: (10.0, 0.7)})):
        run = result_of(default_task(plan, seed), 0.0)
        checks = [
            result_of(default_task(plan, seed), gap).found["checks"][0] | {"cpu_s": cpu_s, "num_steps": steps}
            for steps, (cpu_s, gap) in judged.items()
        ]
        runs.append(Result(run.found | {"checks": checks}, BASE))
    lines = default_text(published, Row.of("", None, runs)).splitlines()
    assert lines[2].startswith("| published schedule, at its end | 30.0 ± 0.0 | 1.00 | 60 ± 0 % |")
    assert [line.split(" | ")[:4] for line in lines[3:]] == [
        ["| default recipe, 4 ± 0 steps", "6.5 ± 0.5", "0.22", "45 ± 5 %"],
        ["| default recipe, 4 ± 0 steps", "9.0 ± 1.0", "0.30", "60 ± 10 %"],
    ]
    assert default_text(published, Row.of("", None, [None])) == "Not run."


def test_a_run_is_compared_with_the_base_of_its_words_and_real_pictures(plan: Plan) -> None:
    for task in (hacking_task(plan, 1), final_task(plan, plan.methods[0], 1e-5, 1)):
        base = base_of(plan, task)
        assert base.config.control_words == task.config.control_words
        assert base.config.evaluation.truth == task.config.evaluation.truth
        assert base.config.evaluation.prompts_path == task.config.evaluation.prompts_path
        assert base.config.evaluation.draws_oracle
        assert base.config.seed == task.config.seed


def test_every_ablation_is_as_the_plan_says(plan: Plan) -> None:
    for each in plan.ablations:
        config = ablation_task(plan, each, 1e-5, 0).config
        assert config.optimizer.learning_rate == (each.learning_rates or (1e-5,))[0]
        changes = {key: value for key, value in each.changes.items() if key != "rewards"}
        tree = json.loads(config.model_dump_json())
        assert all(tree[key] == merged(tree[key], value) for key, value in changes.items())


def test_text_between_markers_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n", encoding="utf-8")
    for _ in range(2):
        between(file, "x", "new \\1")
    assert file.read_text(encoding="utf-8") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="has no <!-- y -->"):
        between(file, "y", "new")


def test_the_picture_has_a_row_a_method(plan: Plan, tmp_path: Path) -> None:
    results = [result_of(final_task(plan, each, 1e-4, 1), 0.5) for each in plan.methods[:2]]
    for number, each in enumerate(results):
        images = torch.full((24, 3, 64, 64), 100 * number, dtype=torch.uint8)
        save_file({"images": images}, tmp_path / f"{each.name}.safetensors")
    sheet = picture([(each.name, each) for each in results], tmp_path, num_images_per_prompt=2)
    assert sheet.size[1] == 2 * 64
    assert sheet.getpixel((sheet.width - 10, 100)) == (100, 100, 100)
