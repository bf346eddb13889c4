"""`make attack`: climb the reward on purpose, without a policy, and see how much of the gain others confirm.

From the real Flat drawing of each subject that no training has seen, 60 steps of Adam on pixels, and on the VAE's
latents, raise R("3D. …") − R("Flat. …"). The keys of a run's reward are compared. A reward that cannot be cheated would
give its gain only for pictures that are nearer to the real 3D drawing and that the style judge, which gives no
gradient, calls 3D.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deploy.bench_method.one_run import InProcess
from deploy.bench_method.report import between
from deploy.settings import ROOT
from services.config.dataset import CaptionedConfig
from services.config.rewards import RewardConfig
from services.config.run import RunConfig, load_run_config
from services.contract import PromptPair
from trainer.algorithm.image_draws import draw_for_images
from trainer.algorithm.reward_loss import reward_images
from trainer.data.prompt_files import load_prompts
from trainer.evaluation.drawing import to_uint8
from trainer.evaluation.grids import side_by_side
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurer
from trainer.evaluation.real_pictures import read_truth
from trainer.evaluation.similarities import measures_of, reward_metrics
from trainer.model.policy import Policy

RUN_FILE = ROOT / "deploy" / "runs" / "tiny_srpo.yaml"
RESULTS = ROOT / "deploy" / "runs" / "results"
NUM_STEPS = 60
Space = Literal["pixels", "latents"]
# of Adam: a pixel can change by 0.6 in all, a latent by 3
RATES: dict[Space, float] = {"pixels": 0.01, "latents": 0.05}
_OPEN: dict[str, Any] = {"margin": 10.0, "ignores_tint": False, "satisfied_at": None, "augmentation": None}
KEYS: dict[str, dict[str, Any]] = {
    "none": {},
    "ignores_tint": {"ignores_tint": True},
    "augmentation": {"augmentation": {"max_shift": 0.06}},
    "satisfied_at": {"satisfied_at": 0.06},
    "all three": {"ignores_tint": True, "augmentation": {"max_shift": 0.06}, "satisfied_at": 0.06},
}
_SHOWN = {  # metric -> column and digits
    "reward": ("reward", 3),
    "style_share_3D": ("judged 3D", 2),
    "style_share_Spoiled": ("judged spoiled", 2),
    "truth_l1": ("L1 to real 3D", 3),
    "truth_ssim": ("SSIM to real 3D", 3),
    "truth_subject_similarity": ("subject", 3),
    "local_entropy": ("local entropy, bits", 2),
}


class Attack:
    """The drawings, the VAE, the reward and the judges; everything that all attacks share."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._size = config, (config.model.height_px, config.model.width_px)
        assert config.guard is not None
        assert config.guard.prompts_path is not None
        paths = config.evaluation.prompts_path, config.guard.prompts_path
        self.prompts = [prompt for path in paths for prompt in load_prompts(path, config.prompts.column)]
        words = config.control_words
        self._pairs = tuple(PromptPair(prompt, words.positive, words.negative) for prompt in self.prompts)
        self._start, self.real = (self._drawings(word) for word in (words.negative, words.positive))
        self._policy = Policy.load_vae(config.model.path, torch.float32)
        self._score = InProcess([reward.name for reward in config.rewards])
        truth = dict(zip(self.prompts, self.real, strict=True))
        assert config.evaluation.judge_path is not None
        judges = Judges.load(config.evaluation.judge_path, torch.device("cpu"))
        rewards = measures_of(self._score, config, reward_metrics(config))
        self._measurer = Measurer(rewards, judges, None, 1, truth)
        self.start = self._through_vae(self._start)
        self._before = self._measurer.measure(self.start, self.prompts)

    def run(self, space: Space, changes: dict[str, Any]) -> Tensor:
        """Return the pictures (num_images, 3, height, width) uint8 after NUM_STEPS steps up the reward."""
        reward = RewardConfig.model_validate({**self._config.rewards[0].model_dump(), **_OPEN, **changes})
        values, show = self._parameter(space)
        optimizer = torch.optim.Adam([values], lr=RATES[space])
        images = [(index, 0) for index in range(len(self.prompts))]
        scales = [torch.zeros(len(images))]
        for step in range(NUM_STEPS):
            draws = draw_for_images([reward], self._config.seed, step, images, self._size)
            shown = show(values).clamp(0, 1)
            rewarded = reward_images(shown, self._pairs, [reward], "srp", "denoise", scales, draws, self._score)
            optimizer.zero_grad()
            rewarded.hinges.sum().backward()
            optimizer.step()
        with torch.no_grad():
            return to_uint8(show(values))

    def numbers(self, images: Tensor) -> dict[str, float]:
        return self._measurer.summarize(self._measurer.measure(images, self.prompts, self._before))

    def _parameter(self, space: Space) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what an attack changes, and the function that makes images in [0, 1] of it."""
        pixels = self._start.float() / 255
        if space == "pixels":
            return pixels.requires_grad_(), lambda values: values
        latents = self._policy.encode_image(pixels).requires_grad_()
        return latents, self._decode

    def _decode(self, latents: Tensor) -> Tensor:
        return self._policy.decode_image(latents, *self._size)

    @torch.no_grad()
    def _through_vae(self, images: Tensor) -> Tensor:
        return to_uint8(self._decode(self._policy.encode_image(images.float() / 255)))

    def _drawings(self, word: str) -> Tensor:
        source = CaptionedConfig(path=ROOT / "deploy" / "tiny" / "truth" / word)
        truth = read_truth(source, self.prompts, *self._size)
        return torch.stack([truth[prompt] for prompt in self.prompts])


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the rows as Markdown."""
    lines = [["", *(title for title, _ in _SHOWN.values())], ["---"] * (1 + len(_SHOWN))]
    for name, numbers in rows.items():
        lines.append([name, *(f"{numbers[metric]:.{digits}f}" for metric, (_, digits) in _SHOWN.items())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    """Attack with each set of keys; write attack.json, attack.png and the table of results/README.md."""
    torch.set_num_threads(1)
    attack = Attack(load_run_config(RUN_FILE))
    columns, rows = [attack.start], {"start: real Flat, through the VAE": attack.numbers(attack.start)}
    rows["goal: real 3D"] = attack.numbers(attack.real)
    for space in RATES:
        for name, changes in KEYS.items():
            images = attack.run(space, changes)
            columns.append(images)
            rows[f"{space}, keys: {name}"] = attack.numbers(images)
            print(f"{space}, {name}: reward {rows[f'{space}, keys: {name}']['reward']:.3f}", flush=True)
    write(rows, [*columns, attack.real], attack.prompts)
    return 0


def write(rows: dict[str, dict[str, float]], columns: list[Tensor], prompts: list[str], folder: Path = RESULTS) -> None:
    shown = {name: {metric: numbers[metric] for metric in _SHOWN} for name, numbers in rows.items()}
    (folder / "attack.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    every = slice(None, None, max(1, len(prompts) // 8))
    side_by_side([each[every] for each in columns], prompts[every], num_columns=1).save(folder / "attack.png")
    between(folder / "README.md", "attack", table(shown))
    print(table(shown))


if __name__ == "__main__":
    sys.exit(main())
