"""A run's prompts: those that it encodes include the oracle's, which a reward need not accept."""

from __future__ import annotations

from pathlib import Path

import yaml

from services.config.run import RunConfig, load_run_config
from trainer.data.run_prompts import judged_prompts, told_prompts, used_prompts

ROOT = Path(__file__).resolve().parents[4]


def run(folder: Path, *, draws_oracle: bool) -> RunConfig:
    tree = yaml.safe_load((ROOT / "deploy/runs/tiny_srpo.yaml").read_text(encoding="utf-8"))
    (folder / "train.txt").write_text("red heart\n", encoding="utf-8")
    (folder / "two.txt").write_text("key\ntulip\n", encoding="utf-8")
    tree["prompts"]["path"] = str(folder / "train.txt")
    tree["evaluation"] |= {"prompts_path": str(folder / "two.txt"), "draws_oracle": draws_oracle}
    del tree["guard"]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_run_config(folder / "run.yaml")


def test_the_oracles_prompts_are_encoded_and_not_judged(tmp_path: Path) -> None:
    config = run(tmp_path, draws_oracle=True)
    assert [each.prompt for each in used_prompts(config)] == ["red heart", "key", "tulip", "3D. key", "3D. tulip"]
    assert [each.prompt for each in judged_prompts(config)] == ["key", "tulip"]
    assert told_prompts(config, ["key", "key"]) == ("3D. key", "3D. key")


def test_without_an_oracle_only_what_is_drawn_is_encoded(tmp_path: Path) -> None:
    config = run(tmp_path, draws_oracle=False)
    assert [each.prompt for each in used_prompts(config)] == ["red heart", "key", "tulip"]
