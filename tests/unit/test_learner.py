"""A step is the same on any number of workers, for every micro-batch and ZeRO stage: its numbers and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.config import RunConfig
from services.contract import Float32, PromptPair, RewardResponse
from tests.encoded import write_latents
from tests.local_reward import LocalReward
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from tests.workers import in_workers
from trainer.flux import FluxModel
from trainer.rollout import Sampling, sample

GLOBAL_BATCH = 4
REWARDS = [
    {"name": "tiny"},
    {"name": "red", "weight": 0.5, "margin": 0.4, "control_words": {"positive": "Red", "negative": "Blue"}},
    {"name": "beauty", "weight": 2.0, "pair": "noised_image"},
]
DISCOUNT = {"kind": "cosine", "start": 0.5, "end": 1.5}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {
        "num_injections": 2,
        "injection_noise": "fresh",
        "discount": DISCOUNT,
        "recovery_weight": "normalised",
    },
    "updates": {"num_injections": 3, "update_per_injection": True, "branches": ["invert"]},
}
SIZES = [(HEIGHT_PX, WIDTH_PX), (WIDTH_PX, HEIGHT_PX)]
STEP = 3
# workers, micro_batch, stage; the first is what the others must equal
LAYOUTS = [(1, 4, 0), (1, 1, 2), (2, 1, 0), (2, 2, 1), (2, 1, 2), (2, 2, 3), (2, 1, 3)]
# steps of several sizes; "offline" has images of a dataset in place of rollouts
OTHER_SOURCES = ["sizes", "offline"]
PLACES = [
    *((name, layout) for name in OBJECTIVES for layout in LAYOUTS),
    *((name, layout) for name in OTHER_SOURCES for layout in (LAYOUTS[0], (2, 1, 2))),
]

Layout = tuple[int, int, int]
Result = tuple[dict[str, float], dict[str, Tensor]]


def make_run(folder: Path, name: str, num_workers: int, micro_batch: int, zero_stage: int) -> RunConfig:
    """For one step. AdamW with so large an epsilon moves a weight by lr times its gradient."""
    objective = OBJECTIVES.get(name, {})
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    sizes = SIZES if name in OTHER_SOURCES else []
    source: dict[str, Any] = {"prompts": {"path": folder / "prompts.txt"}}
    if name == "offline":
        source = {"dataset": {"path": folder / "images", "latents_path": folder / "latents"}}
    engine = {"num_workers": num_workers, "micro_batch": micro_batch, "zero_stage": zero_stage}
    run = {
        "name": "step",
        "num_steps": STEP + 1,
        "model": {"path": str(folder / "flux"), **size, "sizes": sizes},
        **source,
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rollout": {"num_steps": 2},
        "objective": objective,
        "rewards": REWARDS if objective else REWARDS[:1],
        "optimizer": {"learning_rate": 1e3, "epsilon": 1e3, "weight_decay": 0.0, "max_grad_norm": 1e6},
        "engine": engine | {"global_batch": GLOBAL_BATCH},
        "evaluation": {"prompts_path": folder / "prompts.txt"},
    }
    return RunConfig.model_validate(run)


def score(name: str, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...]) -> RewardResponse:
    return LocalReward(reads_text=name != "beauty")(name, images, pairs, scales)


def take_steps(rank: int, runs: Sequence[tuple[RunConfig, Path]]) -> None:
    """A training step of each run; worker 0 writes its numbers and the weights after it."""
    from trainer.engine import Engine, init_distributed
    from trainer.learner import Learner, num_backwards

    device = init_distributed(use_gpu=False)
    for run, path in runs:
        flux = FluxModel.load(run.model.path, torch.float32)
        engine = Engine.create(flux.transformer, run.optimizer, run.engine, num_backwards(run), torch.float32)

        def encode(prompts: Sequence[str], flux: FluxModel = flux) -> Any:
            return flux.encode_prompts(prompts, MAX_SEQUENCE_LENGTH)

        calls: list[object] = []
        flux.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        learner = Learner(run, engine, flux, score, encode)
        for injections in learner.roll_out(STEP):
            assert bool(calls) == (run.dataset is None), "rolled out, or read"
            for injection in injections:
                learner.learn(injection)
            learner.update()
        numbers = learner.numbers.mean_over_workers(device)
        engine.export(lambda policy, path=path, numbers=numbers: torch.save((numbers, policy.state_dict()), path))  # type: ignore[misc]


def write_drawn_images(folder: Path) -> None:
    """A dataset of images that the model itself has drawn."""
    flux = FluxModel.load(str(folder / "flux"), torch.float32)
    buckets = {}
    for size in SIZES:
        noise = flux.draw_noise([torch.Generator().manual_seed(index) for index in range(len(PROMPTS))], *size)
        conditioning = flux.encode_prompts(PROMPTS, MAX_SEQUENCE_LENGTH)
        with torch.no_grad():
            drawn = sample(flux.transformer, flux, conditioning, noise, Sampling(2, 1.0, 3.0, *size))
            buckets[size] = flux.encode_image(flux.decode_image(drawn, *size)), PROMPTS
    write_latents(folder / "latents", folder / "flux", buckets)


@pytest.fixture(scope="module")
def results(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Result]:
    folder = tmp_path_factory.mktemp("step")
    (folder / "flux").symlink_to(flux_folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    write_drawn_images(folder)
    places = {(name, layout): folder / f"{name}-{layout}.pt" for name, layout in PLACES}
    for num_workers in (1, 2):
        in_workers(
            num_workers,
            take_steps,
            [
                (make_run(folder, name, *layout), path)
                for (name, layout), path in places.items()
                if layout[0] == num_workers
            ],
        )
    return {place: torch.load(path) for place, path in places.items()}


@pytest.mark.parametrize(("name", "layout"), [place for place in PLACES if place[1] != LAYOUTS[0]], ids=str)
def test_a_step_is_the_same_in_every_layout(
    results: dict[tuple[str, Layout], Result], name: str, layout: Layout, flux: Any
) -> None:
    numbers, weights = results[name, layout]
    expected_numbers, expected_weights = results[name, LAYOUTS[0]]
    assert numbers.keys() == expected_numbers.keys()
    for key in (key for key in numbers if not key.startswith("seconds_")):
        assert numbers[key] == pytest.approx(expected_numbers[key], abs=1e-5, rel=1e-5), key
    start = flux.transformer.state_dict()
    assert max((expected_weights[key] - start[key]).abs().max() for key in start) > 1e-4, "the gradient shows"
    torch.testing.assert_close(dict(weights), dict(expected_weights), rtol=0, atol=1e-7)
