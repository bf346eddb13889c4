"""A step is the same on any number of workers, for every micro-batch and ZeRO stage: its numbers and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from services.config.run import RunConfig
from services.contract import RewardResponse
from tests.encoded import write_latents
from tests.local_reward import LocalReward
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from tests.workers import in_workers
from trainer.algorithm.rollout import Sampling, sample
from trainer.data.conditioning import encoder, load_policy, manifest_of
from trainer.data.prompt_embeddings import prepare, write_shard
from trainer.model.fragments import checkpoint_weights
from trainer.model.loading import load_text_encoders
from trainer.model.policy import Policy

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
        "recovery_weight": "normalized",
    },
    "updates": {"num_injections": 3, "update_per_injection": True, "branches": ["invert"]},
}
BASELINES: dict[str, dict[str, Any]] = {
    "refl": {"kind": "refl", "late_share": 1.0},
    "draft_lv": {"kind": "draft_lv"},
    "grpo": {"kind": "grpo", "group_size": 3, "num_trained_steps": 2, "num_updates": 2, "clip_range": 1.0},
}
# what a run in bfloat16 changes of the default one
BFLOAT16: dict[str, dict[str, Any]] = {
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "bfloat16 network": {"model": {"dtype": "bfloat16", "vae_dtype": "float32", "text_encoder_dtype": "float32"}},
    "bfloat16 rollout": {"rollout": {"dtype": "bfloat16"}},
}
SIZES = [(HEIGHT_PX, WIDTH_PX), (WIDTH_PX, HEIGHT_PX)]
STEP = 3
CLOSE = 1e-5  # of the largest gradient
# workers, micro_batch, stage; all must equal the first
LAYOUTS = [(1, 4, 0), (1, 1, 2), (2, 1, 0), (2, 2, 1), (2, 1, 2), (2, 2, 3), (2, 1, 3)]
BFLOAT16_LAYOUTS = [(2, 1, stage) for stage in (1, 2, 3)]
BASELINE_LAYOUTS = [LAYOUTS[0], LAYOUTS[1], (2, 1, 2), LAYOUTS[-1]]
# steps of several sizes; "offline" reads a dataset's images in place of rollouts
OTHER_SOURCES = ["sizes", "offline"]
PLACES = [
    *((name, layout) for name in OBJECTIVES for layout in LAYOUTS),
    *((name, layout) for name in BASELINES for layout in BASELINE_LAYOUTS),
    *((name, layout) for name in OTHER_SOURCES for layout in (LAYOUTS[0], (2, 1, 2))),
    ("embedded", LAYOUTS[0]),
    *(("bfloat16", layout) for layout in BFLOAT16_LAYOUTS),
    ("bfloat16 network", BFLOAT16_LAYOUTS[0]),
    *(("bfloat16 rollout", layout) for layout in (LAYOUTS[0], LAYOUTS[-1])),
]

Layout = tuple[int, int, int]
Result = tuple[dict[str, float], dict[str, Tensor]]


def make_run(folder: Path, name: str, num_workers: int, micro_batch: int, zero_stage: int) -> RunConfig:
    """Return a run of one step.

    With so large an epsilon AdamW moves a weight by 100 times its gradient, which float32 resolves well.
    """
    changes = BFLOAT16.get(name, {})
    objective = {"kind": "srp"} if name in BASELINES else OBJECTIVES.get(name, {})
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    sizes = SIZES if name in OTHER_SOURCES else []
    source: dict[str, Any] = {"prompts": {"path": folder / "prompts.txt"}}
    if name == "embedded":
        source["prompts"]["embeddings_path"] = folder / "embeddings"
    if name == "offline":
        source = {"dataset": {"path": folder / "images", "latents_path": folder / "latents"}}
    engine = {"num_workers": num_workers, "micro_batch": micro_batch, "zero_stage": zero_stage}
    run = {
        "name": "step",
        "num_steps": STEP + 1,
        "model": {"path": str(folder / "flux"), **size, "sizes": sizes, **changes.get("model", {})},
        **source,
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rollout": {"num_steps": 5 if name in BASELINES else 2, **changes.get("rollout", {})},
        "method": BASELINES.get(name, {"kind": "direct_align"}),
        "objective": objective,
        "rewards": REWARDS if objective else REWARDS[:1],
        "optimizer": {"learning_rate": 1e5, "epsilon": 1e3, "weight_decay": 0.0, "max_grad_norm": 1e6},
        "engine": engine | {"global_batch": GLOBAL_BATCH},
        "evaluation": {"prompts_path": folder / "prompts.txt"},
    }
    return RunConfig.model_validate(run)


def score(name: str, *request: Any) -> RewardResponse:
    return LocalReward(reads_text=name != "beauty")(name, *request)


def project(images: Tensor, text: str) -> Tensor:
    """Return a similarity (batch,) whose spread over images is as large as its values.

    GRPO divides by the spread of a group's rewards. A small one would magnify the rewards' rounding.
    """
    wave = (torch.arange(images[0].numel()) + sum(map(ord, text))).sin().view_as(images[0])
    return 10 * (images * wave).mean(dim=(1, 2, 3))


def spread_score(name: str, *request: Any) -> RewardResponse:
    return LocalReward(reads_text=name != "beauty", similarity=project)(name, *request)


def take_steps(rank: int, runs: Sequence[tuple[RunConfig, Path]]) -> None:
    """Take a training step of each run. Worker 0 writes its metrics and the weights after it, float32 ones of all."""
    from trainer.algorithm.methods import make_learner, num_backwards
    from trainer.model.engine import Engine, init_distributed

    device = init_distributed(use_gpu=False)
    for run, path in runs:
        flux = load_policy(run, device)
        engine = Engine.create(
            flux.transformer,
            run.optimizer,
            run.engine,
            num_backwards(run, dist.get_world_size()),
            getattr(torch, run.model.dtype),
        )
        calls: list[object] = []
        flux.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        reward = spread_score if run.method.kind == "grpo" else score
        learner = make_learner(run, engine, flux, reward, encoder(run, flux, PROMPTS))
        for materials in learner.roll_out(STEP):
            assert bool(calls) == (run.dataset is None), "rolled out, or read"
            for material in materials:
                learner.learn(material)
            learner.update()
        require_equal(len(calls))
        numbers = learner.metrics.mean_over_workers(device)
        engine.snapshot().save(path.with_suffix("") / f"{rank}.safetensors")
        dist.barrier()
        if rank == 0:
            torch.save((numbers, checkpoint_weights(sorted(path.with_suffix("").iterdir()))), path)


def require_equal(num_forwards: int) -> None:
    """Fail if the workers differ: stage 3 needs equal numbers, but may work with others by chance."""
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, num_forwards)
    assert len(set(counts)) == 1, counts


def write_drawn_images(folder: Path) -> None:
    """Write a dataset of images that the model itself has drawn."""
    flux = Policy.load(str(folder / "flux"), torch.float32)
    buckets = {}
    for size in SIZES:
        noise = flux.draw_noise([torch.Generator().manual_seed(index) for index in range(len(PROMPTS))], *size)
        conditioning = flux.encode_prompts(PROMPTS, MAX_SEQUENCE_LENGTH)
        with torch.no_grad():
            drawn = sample(flux, conditioning, noise, Sampling(2, 1.0, 3.0, *size))
            buckets[size] = flux.encode_image(flux.decode_image(drawn, *size)), PROMPTS
    write_latents(folder / "latents", folder / "flux", folder / "images", buckets)


@pytest.fixture(scope="module")
def results(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Result]:
    folder = tmp_path_factory.mktemp("step")
    (folder / "flux").symlink_to(flux_folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    write_drawn_images(folder)
    runs = {(name, layout): make_run(folder, name, *layout) for name, layout in PLACES}
    write_embeddings(runs["embedded", LAYOUTS[0]])
    paths = {place: folder / f"{number}.pt" for number, place in enumerate(runs)}
    for num_workers in (1, 2):
        places = [place for place in runs if place[1][0] == num_workers]
        in_workers(num_workers, take_steps, [(runs[place], paths[place]) for place in places])
    return {place: torch.load(path) for place, path in paths.items()}


def write_embeddings(run: RunConfig) -> None:
    """Write the prompts' embeddings as `srpo encode-prompts` does, in shards of other sizes than any micro-batch."""
    folder, source = run.prompts.embeddings_path, Path(run.model.path)
    assert folder is not None
    prepare(folder, manifest_of(run, source))
    text = load_text_encoders(str(source), torch.float32)
    for prompts in (PROMPTS[:3], PROMPTS[3:]):
        write_shard(folder, prompts, text.encode_prompts(prompts, MAX_SEQUENCE_LENGTH))


@pytest.mark.parametrize(
    ("name", "layout"), [place for place in PLACES if place[1] != LAYOUTS[0] and place[0] not in BFLOAT16], ids=str
)
def test_a_step_is_the_same_in_every_layout(
    results: dict[tuple[str, Layout], Result], name: str, layout: Layout, flux: Any
) -> None:
    numbers, weights = results[name, layout]
    expected_numbers, expected_weights = results[name, LAYOUTS[0]]
    assert numbers.keys() == expected_numbers.keys()
    for key in (key for key in numbers if not key.startswith("seconds_")):
        is_norm = key == "grad_norm"
        assert numbers[key] == pytest.approx(expected_numbers[key], abs=0 if is_norm else 1e-5, rel=1e-5), key
    start = flux.transformer.state_dict()
    moved, expected = ({key: each[key] - start[key] for key in start} for each in (weights, expected_weights))
    largest = max(each.abs().max() for each in expected.values())
    assert largest > 1e-2, "the gradient shows"
    torch.testing.assert_close(moved, expected, rtol=0, atol=CLOSE * float(largest))


def test_a_step_with_embeddings_from_disk_is_the_same_to_the_last_bit(
    results: dict[tuple[str, Layout], Result],
) -> None:
    (numbers, weights), (expected_numbers, expected_weights) = (
        results[name, LAYOUTS[0]] for name in ("embedded", "default")
    )
    for key in (key for key in numbers if not key.startswith("seconds_")):
        assert numbers[key] == expected_numbers[key], key
    assert all(weight.equal(expected_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize(("name", "layout"), [place for place in PLACES if place[0] in BFLOAT16], ids=str)
def test_a_step_in_bfloat16_has_the_loss_and_the_gradient_of_float32_in_every_stage(
    results: dict[tuple[str, Layout], Result], name: str, layout: Layout, flux: Any
) -> None:
    numbers, expected_numbers = results[name, layout][0], results["default", LAYOUTS[0]][0]
    for key in (key for key in numbers if not key.startswith("seconds_")):
        close = 0.05 if key == "grad_norm" else 1e-3
        assert numbers[key] == pytest.approx(expected_numbers[key], rel=close), key
    gradient, expected, in_stage_1 = (
        whole_gradient(results[place], place[0], flux)
        for place in ((name, layout), ("default", LAYOUTS[0]), ("bfloat16", BFLOAT16_LAYOUTS[0]))
    )
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.99
    assert not gradient.equal(expected), "it ran in bfloat16"
    if name == "bfloat16":
        assert (gradient - in_stage_1).norm() < 1e-3 * expected.norm()


def whole_gradient(result: Result, name: str, flux: Any) -> Tensor:
    """Return by how much every weight has moved, which is in proportion to its gradient, all in one."""
    dtype = getattr(torch, BFLOAT16.get(name, {}).get("model", {}).get("dtype", "float32"))
    start = {key: each.to(dtype).float() for key, each in flux.transformer.state_dict().items()}
    return torch.cat([(result[1][key] - start[key]).flatten() for key in start])
