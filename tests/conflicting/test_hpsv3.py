"""HPS v3 through the authors' package, at a tiny size with random weights in the published format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reward_server.models import Hpsv3Args, Joint, load_reward
from services.contract import ContractError
from tests.pictures import photo, tensor_of

hpsv3 = pytest.importorskip("hpsv3", reason="needs the environment of deploy/serve_conflicting.yaml: make conflicting")

# 256·28·28 pixels, which the package does not resize: its PIL and our tensors are then the same bytes
OWN_SIZES = [(448, 448), (224, 896)]
CONFIG = """
model_name_or_path: {base}
rm_head_type: ranknet
use_special_tokens: true
reward_token: special
output_dim: 2
torch_dtype: float32
disable_flash_attn2: true
output_dir: {base}
report_to: none
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]


def make_base(folder: Path) -> Path:
    """A random Qwen2-VL with the files that its hub repository has."""
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = Qwen2TokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[1:])
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), fast, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    ids = {name: fast.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen2VLConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Hpsv3Args:
    """A config of the package and a checkpoint as HPSv3.safetensors: the state_dict of its own class."""
    from hpsv3.train import create_model_and_processor
    from hpsv3.utils.parser import DataConfig, ModelConfig, PEFTLoraConfig, TrainingConfig, parse_args_with_yaml
    from safetensors.torch import save_file

    folder = make_base(tmp_path_factory.mktemp("qwen2vl"))
    config = folder / "HPSv3_tiny.yaml"
    config.write_text(CONFIG.format(base=folder), encoding="utf-8")
    kinds = (DataConfig, TrainingConfig, ModelConfig, PEFTLoraConfig)
    (_, training, model, lora), _ = parse_args_with_yaml(kinds, str(config), is_train=False)
    torch.manual_seed(1)
    built, _, _ = create_model_and_processor(model, lora, training)
    save_file({name: weight.contiguous() for name, weight in built.state_dict().items()}, folder / "HPSv3.safetensors")
    return Hpsv3Args(kind="hpsv3", path=str(folder / "HPSv3.safetensors"), config=str(config))


@pytest.fixture(scope="module")
def reward(args: Hpsv3Args) -> Joint:
    loaded = load_reward(args)
    assert isinstance(loaded, Joint)
    return loaded


@torch.no_grad()
def test_the_mean_is_the_packages_own(reward: Joint, args: Hpsv3Args) -> None:
    package = hpsv3.HPSv3RewardInferencer(args.config, args.path, "cpu")
    for height, width in OWN_SIZES:
        picture = photo(height, width)
        for text in ("a cat", "3D. grinning face"):
            published = float(package.reward([picture], [text])[0][0])
            assert float(reward.score_pairs(tensor_of(picture), [text])[0]) == pytest.approx(published, abs=1e-4)


def test_pairs_of_a_batch_do_not_change_each_other(reward: Joint) -> None:
    images = torch.cat([tensor_of(photo(300, 500)), tensor_of(photo(300, 500)).flip(dims=[3])])
    texts = ["a cat", "a very long description of a grinning face"]
    with torch.no_grad():
        alone = torch.cat([reward.score_pairs(images[i : i + 1], [texts[i]]) for i in range(2)])
        torch.testing.assert_close(reward.score_pairs(images, texts), alone, rtol=1e-4, atol=1e-5)


def test_a_gradient_reaches_every_pixel(reward: Joint) -> None:
    images = tensor_of(photo(100, 140, contrast=0.6)).requires_grad_()
    reward.score_pairs(images, ["a cat"]).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_a_text_cannot_give_commands_or_be_too_long(reward: Joint) -> None:
    for text in ("<|Reward|>", "cat <|image_pad|>"):
        with pytest.raises(ContractError, match="reads as a command"):
            reward.score_pairs(tensor_of(photo(100, 100)), [text])
    with pytest.raises(ContractError, match="at most"):
        reward.score_pairs(tensor_of(photo(100, 100)), ["cat " * 8192])


def test_the_code_of_a_replica_loads_beside_the_package(args: Hpsv3Args) -> None:
    from reward_server.deployment import build  # on use: ray.serve takes seconds, also where the package is absent

    build({"rewards": {"apart": args.model_dump() | {"placement": "own"}}})
