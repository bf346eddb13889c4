"""`make alarms`: find the thresholds of `damage` on good and on spoiled pictures, and test them on what they never saw.

Good pictures: those of the base model told "3D" or "Flat", beside those it draws untold from the same noise. Spoiled
pictures: the same, spoiled in fifteen ways at three strengths; eleven are for tuning, four for the test only. Hacked
pictures, for the test too: those of policies trained with keys that ask for reward hacking. A check is 33 pictures, as
in the demo's guard; ROC is the area under the curve of `damage`, good against spoiled. What is drawn is kept in
outputs/alarms, and not drawn again: delete that folder after a change of weights or of the policies here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.bench_method.one_run import Run
from deploy.bench_method.plan import Task, merged
from deploy.bench_method.report import between
from deploy.settings import ROOT, free_port
from deploy.spoils import REPEATS, TUNED, UNSEEN, spoil
from services.config.run import RunConfig
from trainer.data.run_prompts import told_prompts
from trainer.evaluation.damage import THRESHOLDS, changes, damage
from trainer.evaluation.grids import side_by_side

RUN_FILE = ROOT / "deploy" / "runs" / "tiny_srpo.yaml"
RESULTS = ROOT / "deploy" / "runs" / "results"
STRENGTHS = (0.35, 0.7, 1.0)
CHECK_SIZE, NUM_CHECKS, HEADROOM = 33, 200, 1.25  # pictures of a check, drawn with replacement; thresholds above good
HACKED: dict[str, tuple[dict[str, Any], float]] = {  # changes over the run file, and CPU-seconds of training
    "rate 1e-4, never satisfied, toward 3D": ({"optimizer": {"learning_rate": 1e-4}}, 40),
    "plain reward, rate 1e-4, toward Flat": (
        {
            "optimizer": {"learning_rate": 1e-4},
            "control_words": {"positive": "Flat", "negative": "3D"},
            "objective": {"kind": "sgp", "branches": ["denoise"]},
        },
        60,
    ),
}
_HACKABLE = {"rewards": [{"name": "fluent-clip", "margin": 10.0}]}
WORDS = ("3D", "Flat")


class Checks:
    """Damage of random checks of pictures, and of single pictures, against the base model's of the same noise.

    Thresholds come from one half of the prompts (`tuning`), everything else from the other half.
    """

    def __init__(self, base: Tensor) -> None:
        self._base = base
        number = torch.arange(len(base)) // REPEATS
        self.tuning, self._test = (number % 2 == half for half in (0, 1))
        rows = int(self._test.sum())
        self._draws = torch.randint(rows, (NUM_CHECKS, CHECK_SIZE), generator=torch.Generator().manual_seed(0))

    def changes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the changes of each picture, (num_images,), by name."""
        return changes(images, self._base)

    def of_checks(self, found: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> Tensor:
        """Return the damage of NUM_CHECKS random checks of the test's pictures."""
        means = {name: value[self._test][self._draws].mean(dim=1) for name, value in found.items()}
        return torch.stack([means[name] / limit for name, limit in thresholds.items()]).amax(dim=0)

    def of_pictures(self, found: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> Tensor:
        """Return the damage of each of the test's pictures."""
        return torch.stack([found[name][self._test] / limit for name, limit in thresholds.items()]).amax(dim=0)

    def damage(self, found: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> float:
        """Return the damage of all of the test's pictures together."""
        return damage({name: float(value[self._test].mean()) for name, value in found.items()}, thresholds)


def thresholds_of(good: Sequence[Mapping[str, Tensor]], tuning: Tensor) -> dict[str, float]:
    """Return the threshold of each change: HEADROOM over the largest mean of the good sets, with two digits."""
    limits = {name: HEADROOM * max(float(each[name][tuning].mean()) for each in good) for name in THRESHOLDS}
    return {name: float(f"{limit:.2g}") for name, limit in limits.items()}


def roc(good: Tensor, spoiled: Tensor) -> float:
    """Return the area under the ROC curve: how often a spoiled one has the larger number, ties counting half."""
    difference = spoiled[:, None] - good[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def study(base: Tensor, good: Mapping[str, Tensor], hacked: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return thresholds and, by kind of spoil, the ROC of checks and pictures and the damage of the mildest."""
    checks = Checks(base)
    good_changes = {name: checks.changes(images) for name, images in good.items()}
    tuning = {name: [checks.changes(spoil(base, way, each)) for each in STRENGTHS] for name, way in TUNED.items()}
    limits = thresholds_of(list(good_changes.values()), checks.tuning)
    unseen = {name: [checks.changes(spoil(base, way, each)) for each in STRENGTHS] for name, way in UNSEEN.items()}
    unseen |= {f"policy: {name}": [checks.changes(images)] for name, images in hacked.items()}

    def compare(sets: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        found = {}
        for kind, score in (("checks", checks.of_checks), ("pictures", checks.of_pictures)):
            fine = torch.cat([score(each, limits) for each in good_changes.values()])
            found[f"roc_of_{kind}"] = round(roc(fine, torch.cat([score(each, limits) for each in sets])), 4)
        mildest = min(checks.damage(each, limits) for each in sets)
        return found | {"damage_of_the_mildest": round(mildest, 2)}

    everything = [each for sets in unseen.values() for each in sets]
    return {
        "thresholds": limits,
        "damage_of_good": {name: round(checks.damage(each, limits), 2) for name, each in good_changes.items()},
        "tuned_kinds": {name: compare(sets) for name, sets in tuning.items()},
        "unseen_kinds": {name: compare(sets) for name, sets in unseen.items()} | {"all": compare(everything)},
    }


def run_of(settings: Mapping[str, Any]) -> Run:
    """Return the demo's run in this process, with changes, on the prompts of validation: REPEATS pictures of each."""
    tree = yaml.safe_load(RUN_FILE.read_text(encoding="utf-8"))
    guard = tree.pop("guard")
    tree = merged(tree, {"engine": {"num_workers": 1, "zero_stage": 0, "micro_batch": 4}, "seed": 9})
    tree = merged(tree, {"evaluation": {"prompts_path": guard["prompts_path"], "num_images_per_prompt": REPEATS}})
    config = RunConfig.model_validate(merged(tree, settings))
    return Run(Task(name="alarms", config=config, checks_at_cpu_s=()))


def table(found: Mapping[str, Any]) -> str:
    """Return the ROC by kind as Markdown."""
    lines = [
        "| pictures | for | ROC, checks | ROC, pictures | damage of the mildest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for use, key in (("tuning", "tuned_kinds"), ("test", "unseen_kinds")):
        for name, numbers in found[key].items():
            cells = [f"{numbers[column]:.3f}" for column in ("roc_of_checks", "roc_of_pictures")]
            lines.append(f"| {name} | {use} | {' | '.join(cells)} | {numbers['damage_of_the_mildest']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Draw, spoil, train the hackers, and write alarms.json and the table of results/README.md."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    cache = ROOT / "outputs" / "alarms" / "images.safetensors"
    images = load_file(cache) if cache.is_file() else draw()
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(images, cache)
    good, hacked = {word: images[word] for word in WORDS}, {name: images[name] for name in HACKED}
    write(study(images["base"], good, hacked))
    shown = slice(0, len(images["base"]), 2 * REPEATS + 1)
    side_by_side(
        [images[name][shown] for name in ("base", *WORDS, *HACKED)], [""] * len(images["base"][shown]), 2
    ).save(cache.with_name("images.png"))
    return 0


def draw() -> dict[str, Tensor]:
    """Return the pictures of the base, of the base told each word, and of the policies that hack, by name."""
    images: dict[str, Tensor] = {}
    for name, (settings, cpu_s) in HACKED.items():
        run = run_of(merged(settings, _HACKABLE))
        if not images:
            images["base"] = run.draw()
            images |= {word: run.draw(told_prompts_of(run, word)) for word in WORDS}
        run.train_until(cpu_s)
        images[name] = run.draw()
    return images


def told_prompts_of(run: Run, word: str) -> tuple[str, ...]:
    words = run.task.config.control_words.model_copy(update={"positive": word})
    return told_prompts(run.task.config.model_copy(update={"control_words": words}), run.prompts)


def write(found: Mapping[str, Any], folder: Path = RESULTS) -> None:
    (folder / "alarms.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    between(folder / "README.md", "alarms", table(found))
    print(table(found), f"\nthresholds: {found['thresholds']}\ndamage of good pictures: {found['damage_of_good']}")


if __name__ == "__main__":
    sys.exit(main())
