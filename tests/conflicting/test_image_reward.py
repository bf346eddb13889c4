"""ImageReward through the authors' package: its own vision tower, whose size it fixes, and random weights."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch

from reward_server.models import ImageRewardArgs, Joint, WeightsError, load_reward
from services.contract import ContractError
from tests.pictures import photo, tensor_of

package = pytest.importorskip(
    "ImageReward", reason="needs the environment of deploy/serve_conflicting.yaml: make conflicting"
)

MED_CONFIG = {  # as published, but one layer instead of twelve
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> ImageRewardArgs:
    """ImageReward.pt and med_config.json as published, beside a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("image_reward")
    characters = [prefix + character for prefix in ("", "##") for character in string.printable.strip()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"[unused{index}]" for index in range(30522 - len(vocabulary))]
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the package's name for its tokenizer, bert-base-uncased, is a folder
        torch.manual_seed(0)
        model = package.ImageReward("med_config.json")
    for layer in (layer for layer in model.mlp.layers if isinstance(layer, torch.nn.Linear)):
        torch.nn.init.xavier_normal_(layer.weight)  # the package's own start is so small that every score is equal
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return ImageRewardArgs(
        kind="image_reward", path=str(folder / "ImageReward.pt"), med_config=str(folder / "med_config.json")
    )


@pytest.fixture(scope="module")
def reward(args: ImageRewardArgs) -> Joint:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(args.path).parent)
        loaded = load_reward(args)
    assert isinstance(loaded, Joint)
    return loaded


@torch.no_grad()
def test_the_score_is_the_packages_own(reward: Joint, args: ImageRewardArgs) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(args.path).parent)
        published = package.load(args.path, device="cpu", med_config=args.med_config)
    picture = photo(224, 224)  # which the package does not resize, so that nothing is rounded to bytes
    for text in ("a cat", "3d. grinning face"):
        score = published.score(text, picture)
        assert float(reward.score_pairs(tensor_of(picture), [text])[0]) == pytest.approx(score, abs=1e-4)
    picture = photo(301, 500, contrast=0.6)  # 224 x 372 when resized: the crop starts after 74 columns
    score = published.score("a cat", picture)
    assert float(reward.score_pairs(tensor_of(picture), ["a cat"])[0]) == pytest.approx(score, abs=2e-3)


def test_a_gradient_reaches_the_pixels_that_the_model_sees(reward: Joint) -> None:
    images = tensor_of(photo(224, 250, contrast=0.6)).requires_grad_()
    reward.score_pairs(images, ["a cat"]).sum().backward()
    assert images.grad is not None
    seen = images.grad[..., 13:237]
    assert (seen != 0).float().mean() > 0.99
    assert images.grad.count_nonzero() == seen.count_nonzero()  # the center crop leaves the rest out


def test_a_text_that_is_too_long_is_named_not_cut(reward: Joint) -> None:
    with pytest.raises(ContractError, match="at most 35"):
        reward.score_pairs(tensor_of(photo(224, 224)), ["cat " * 20])


def test_a_weight_that_the_file_lacks_is_named_not_random(args: ImageRewardArgs, tmp_path: Path) -> None:
    weights = torch.load(args.path, weights_only=True)
    del weights["mlp.layers.0.weight"]
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(args.path).parent)
        with pytest.raises(WeightsError, match=r"1 weights are missing, as mlp\.layers\.0\.weight"):
            load_reward(args.model_copy(update={"path": str(tmp_path / "ImageReward.pt")}))


def test_the_code_of_a_replica_loads_beside_the_package(args: ImageRewardArgs) -> None:
    from reward_server.deployment import build  # on use: ray.serve takes seconds, also where the package is absent

    build({"rewards": {"apart": args.model_dump() | {"placement": "own"}}})
