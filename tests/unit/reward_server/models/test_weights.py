"""Weights are found, complete and the ones pinned, or the error names them; nothing in a file is executed."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from reward_server.models import (
    AestheticArgs,
    AnyArgs,
    ChecksumError,
    ClipArgs,
    Hpsv2Args,
    Hpsv3Args,
    ImageRewardArgs,
    PickScoreArgs,
    RewardArgs,
    WeightsError,
    load_reward,
)
from reward_server.models.weights import ROOT, load_state_dict
from tests.tiny_models import make_tiny_aesthetic, make_tiny_clip, make_tiny_hpsv2

KINDS = ["clip", "pickscore", "hpsv2", "aesthetic"]


@pytest.fixture
def args(tmp_path: Path, request: pytest.FixtureRequest) -> AnyArgs:
    """Of the kind that the test asks for, with weights in a folder of the test."""
    kind: str = request.param
    if kind == "clip":
        return ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path)))
    if kind == "pickscore":
        return PickScoreArgs(kind="pickscore", path=str(make_tiny_clip(tmp_path)))
    if kind == "hpsv2":
        architecture, checkpoint = make_tiny_hpsv2(tmp_path)
        return Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture)
    backbone, head = make_tiny_aesthetic(tmp_path)
    return AestheticArgs(kind="aesthetic", path=str(head), backbone=str(backbone))


@pytest.mark.parametrize("args", KINDS, indirect=True)
def test_a_pinned_checksum_must_be_that_of_the_weights(args: AnyArgs) -> None:
    found = load_reward(args).checksum
    assert load_reward(args.model_copy(update={"checksum": found})).checksum == found
    with pytest.raises(ChecksumError, match=rf"{found}, but the arguments pin sha256:0000"):
        load_reward(args.model_copy(update={"checksum": f"sha256:{'0' * 64}"}))


def test_the_checksum_is_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        load_reward(ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path / name, seed=seed)))).checksum
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same != other


@pytest.mark.parametrize(
    "args",
    [
        {"kind": "clip"},
        {"kind": "pickscore"},
        {"kind": "hpsv2"},
        {"kind": "aesthetic"},
    ],
    ids=KINDS,
)
def test_missing_weights_are_named(tmp_path: Path, args: dict[str, str]) -> None:
    missing: AnyArgs = TypeAdapter(RewardArgs).validate_python(args | {"path": str(tmp_path / "nowhere")})
    with pytest.raises(WeightsError, match="nowhere"):
        load_reward(missing)


@pytest.mark.parametrize("args", ["hpsv2", "aesthetic"], indirect=True)
@pytest.mark.parametrize("content", ["other tensors", "an object", "text"])
def test_a_file_of_something_else_is_refused(args: AnyArgs, content: str) -> None:
    file = Path(args.path)
    if content == "other tensors":
        torch.save({"state_dict": OrderedDict(weight=torch.zeros(3))}, file)
    elif content == "an object":
        torch.save(Path("a pickled object"), file)
    else:
        file.write_text("<html>moved</html>", encoding="utf-8")
    with pytest.raises(WeightsError, match=file.name):
        load_reward(args)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Hostile()}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"weights\.pt"):
        load_state_dict(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("args", ["clip"], indirect=True)
def test_a_weight_that_the_file_lacks_is_named_not_random(args: AnyArgs) -> None:
    file = Path(args.path) / "model.safetensors"
    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 weights .* visual_projection\.weight"):
        load_reward(args)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    backbone, _ = make_tiny_aesthetic(tmp_path)
    with pytest.raises(WeightsError, match="CLIPModel"):
        load_reward(ClipArgs(kind="clip", path=str(backbone)))


@pytest.mark.parametrize("args", ["clip"], indirect=True)
def test_weights_from_before_safetensors_are_read_too(args: AnyArgs, tmp_path: Path) -> None:
    folder = shutil.copytree(args.path, tmp_path / "older")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    older = load_reward(ClipArgs(kind="clip", path=str(folder)))
    assert older.checksum != load_reward(args).checksum


def test_arguments_that_make_no_sense_are_refused() -> None:
    adapter: TypeAdapter[AnyArgs] = TypeAdapter(RewardArgs)
    for wrong, field in (
        ({"kind": "clip", "path": "x", "checksum": "md5:1"}, "checksum"),
        ({"kind": "clip", "path": "x", "crops": -1}, "crops"),
        ({"kind": "aesthetic", "path": "x", "crops": 2}, "crops"),
        ({"kind": "beauty", "path": "x"}, "kind"),
    ):
        with pytest.raises(ValidationError, match=field):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("file", ["serve.yaml", "serve_conflicting.yaml"])
def test_the_rewards_of_the_serve_configs_are_valid(file: str) -> None:
    (application,) = yaml.safe_load((ROOT / "deploy" / file).read_text(encoding="utf-8"))["applications"]
    rewards = TypeAdapter(dict[str, RewardArgs]).validate_python(application["args"]["rewards"])
    own = {name for name, args in rewards.items() if args.placement == "own"}
    assert {deployment["name"] for deployment in application["deployments"]} == own | {"RewardService"}


def test_the_two_with_packages_of_their_own_say_so_without_them(tmp_path: Path) -> None:
    """Here their packages are not installed: tests/conflicting covers what they do where they are."""
    for args in (
        ImageRewardArgs(kind="image_reward", path=str(tmp_path)),
        Hpsv3Args(kind="hpsv3", path=str(tmp_path)),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"ImageReward|hpsv3"):
            load_reward(args)
