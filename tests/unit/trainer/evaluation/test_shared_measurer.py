"""Two workers measure what one measures: the same numbers and images in the same order, in a resumed run too.

A tiny FLUX draws, tiny judges judge, and real pictures, a folder of them and a reward of the images are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torchvision.transforms.functional import to_pil_image

from services.config.run import RunConfig, load_run_config
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from tests.tiny_judges import make_tiny_judges
from tests.workers import in_workers
from trainer.algorithm.rollout import Sampling
from trainer.data.conditioning import encode_ahead
from trainer.evaluation.drawing import PictureSet
from trainer.evaluation.guard import Guard, guard_pictures
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurements, Measurer, metric_names
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.shared_measurer import SharedMeasurer
from trainer.model.policy import Policy

SAMPLING = Sampling(2, 1.0, 3.0, HEIGHT_PX, WIDTH_PX)
RULE = {"metric": "guard/truth_l1", "above": 9.0}  # a number of pictures of all workers
SHARES: dict[int, list[int]] = {}  # how many pictures each call of a reward saw, by worker


def redness(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    assert len(images) == len(prompts)
    SHARES.setdefault(dist.get_rank(), []).append(len(images))
    red = images[:, 0].double().mean(dim=(1, 2)) / 255
    return red, 1 - red


def write_pictures(folder: Path) -> None:
    """Real pictures of each prompt with judges that know them, and a folder of five."""
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (len(PROMPTS), 3, HEIGHT_PX, WIDTH_PX), dtype=torch.uint8, generator=random)
    for name in ("truth", "reference"):
        (folder / name).mkdir()
    for index, (prompt, image) in enumerate(zip(PROMPTS, real, strict=True)):
        to_pil_image(image).save(folder / "truth" / f"{index}.png")
        (folder / "truth" / f"{index}.txt").write_text(prompt, encoding="utf-8")
    for index, image in enumerate(255 - real[:5]):
        to_pil_image(image).save(folder / "reference" / f"{index}.png")
    make_tiny_judges(folder / "judge", ("3D", "Flat"), PROMPTS, real[..., :HEIGHT_PX])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")


def run_of(folder: Path) -> RunConfig:
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    evaluation = {name: str(folder / name.removesuffix("_path")) for name in ("judge_path", "reference_path")}
    run: dict[str, Any] = {
        "name": "tiny",
        "num_steps": 6,
        "model": {"path": "flux", **size},
        "prompts": {"path": str(folder / "prompts.txt")},
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rewards": [{"name": "redness"}],
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": evaluation
        | {"prompts_path": str(folder / "prompts.txt"), "batch": 2, "truth": {"path": str(folder / "truth")}},
        "guard": {"num_prompts": 8, "stop_when": [RULE]},
    }
    path = folder / f"run{dist.get_rank()}.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return load_run_config(path)


def measurer_of(config: RunConfig, pictures: PictureSet, num_images_per_prompt: int) -> Measurer:
    evaluation, truth = config.evaluation, truth_of(config, pictures.own_prompts())
    assert evaluation.judge_path is not None
    judges = Judges.load(evaluation.judge_path, torch.device("cpu"))
    reference = evaluation.reference_path
    return Measurer({"reward": redness}, judges, reference, num_images_per_prompt, truth, evaluation.batch)


def measure_all(folder: Path, flux_folder: Path, out: Path) -> None:
    """Measure base and changed policy as guard and evaluation do, and again as a run that was resumed in between."""
    policy, config = Policy.load(str(flux_folder), torch.float32), run_of(folder)
    encode = encode_ahead(policy, PROMPTS, MAX_SEQUENCE_LENGTH)
    out.mkdir(exist_ok=True)
    assert config.guard is not None
    of_guard = guard_pictures(config, config.guard, SAMPLING)
    of_evaluation = PictureSet(tuple(each for each in PROMPTS[:3] for _ in range(3)), 0, 2, SAMPLING)

    def guard() -> Guard:
        measurer = measurer_of(config, of_guard, 1)
        return Guard(config, config.guard, of_guard, measurer, torch.device("cpu"), out)  # type: ignore[arg-type]

    def evaluation() -> SharedMeasurer:
        return SharedMeasurer(of_evaluation, measurer_of(config, of_evaluation, 3), out / "base.safetensors")

    def draw_guard(indices: Sequence[int]) -> Tensor:
        return of_guard.draw_chunk(policy, encode, indices)

    def draw_evaluation(indices: Sequence[int]) -> Tensor:
        return of_evaluation.draw_chunk(policy, encode, indices)

    first, evaluated = guard(), evaluation()
    numbers = {"guard base": first.check(0, draw_guard)}
    measured = {"base": evaluated.measure(draw_evaluation, of_base=True)}
    with torch.no_grad():
        policy.transformer.get_parameter("proj_out.weight").add_(0.3)
    numbers["guard changed"] = first.check(10, draw_guard)
    measured["changed"] = evaluated.measure(draw_evaluation)
    SHARES.clear()
    resumed = guard()
    resumed.restore(first.state())
    numbers["guard resumed"] = resumed.check(10, draw_guard)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, SHARES[dist.get_rank()])
    for name, each in measured.items():
        if each is not None:
            numbers[name] = evaluated.summarize(each)
            numbers[f"{name} alone"] = measurer_of(config, of_evaluation, 3).summarize(each)
            numbers[name] |= values_by_row(each)
    if dist.get_rank() == 0:
        (out / "numbers.json").write_text(json.dumps({"numbers": numbers, "shares": shares}), encoding="utf-8")


def values_by_row(measurements: Measurements) -> dict[str, float]:
    columns = measurements.values | {"pixels": measurements.images.double().mean(dim=(1, 2, 3))}
    return {f"{name} {row}": float(value) for name, column in columns.items() for row, value in enumerate(column)}


def in_worker(rank: int, folder: Path, flux_folder: Path, out: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_rank() == rank
    measure_all(folder, flux_folder, out)


def in_this_process(folder: Path, flux_folder: Path, out: Path) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        measure_all(folder, flux_folder, out)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(num_threads)


def test_two_workers_measure_what_one_measures_each_its_share(flux_folder: Path, tmp_path: Path) -> None:
    """Eight pictures of a check and nine of an evaluation, in chunks of two: one worker's last chunk is but filling.

    No picture is drawn with another number of pictures, or its last bits and with them a color could differ.
    """
    write_pictures(tmp_path)
    in_this_process(tmp_path, flux_folder, tmp_path / "one")
    in_workers(2, in_worker, tmp_path, flux_folder, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "numbers.json").read_text()) for name in ("one", "two"))
    assert (one["shares"], two["shares"]) == ([[2, 2, 2, 2]], [[2, 2], [2, 2]])
    one, two = one["numbers"], two["numbers"]
    assert set(one["base"]) > metric_names(["reward"], tmp_path / "judge", tmp_path / "reference", 3, has_truth=True)
    for name, numbers in one.items():
        assert two[name] == pytest.approx(numbers, abs=1e-6, rel=1e-6), name
    assert two["guard resumed"] == pytest.approx(one["guard changed"], abs=1e-6, rel=1e-6)
    for name, alone in ((name, two[f"{name} alone"]) for name in ("base", "changed")):
        assert {number: two[name][number] for number in alone} == pytest.approx(alone, abs=1e-6, rel=1e-6)
    assert one["guard changed"]["guard/base_pixel_distance"] > 1e-3
    assert 0 < one["guard base"]["guard/subject_top5"] < 1, "five are the nearest of eight"
    for number in ("frechet_reference", "frechet_3D", "truth_l1", "reward", "diversity_seeds"):
        assert one["changed"][number] != pytest.approx(one["base"][number], rel=1e-3), "they can be told apart"
    assert len({one["base"][f"pixels {row}"] for row in range(9)}) == 9, "an order can be told from another"
    images = [load_file(tmp_path / name / "guard_base.safetensors")["images"] for name in ("one", "two")]
    assert images[0].equal(images[1])
