"""HPS v3 (arXiv 2508.03789): a Qwen2-VL that reads image and prompt together, loaded by the authors' package.

The package `hpsv3` pins a transformers that conflicts with ours, so this reward runs in replicas with a Ray runtime_env
of their own (deploy/serve_conflicting.yaml); nothing else may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from reward_server.models.preprocess import as_float, resize
from reward_server.models.protocol import check_length
from reward_server.models.transfer import to_device
from reward_server.models.weights import ROOT, WeightsArgs, WeightsError, find_file, frozen, verified_checksum
from services.contract import ContractError


class Hpsv3Args(WeightsArgs):
    """`path`: the published HPSv3.safetensors, a file or MizzenAI/HPSv3/HPSv3.safetensors.

    `config`: a YAML file of the package, which names the Qwen2-VL that it loads first; None: the package's own, for
    Qwen/Qwen2-VL-7B-Instruct. Its entries bf16 and torch_dtype are the precision, so this kind has no key for that.
    """

    kind: Literal["hpsv3"]
    config: str | None = None


class Hpsv3Reward:
    """A Joint. The model gives mean and spread of a score; the reward is the mean, as the authors advise."""

    logit_scale: float | None = None  # a probability would depend on the spreads as well

    def __init__(self, args: Hpsv3Args) -> None:
        from hpsv3 import HPSv3RewardInferencer

        file = find_file(args.path)
        if file.suffix != ".safetensors":
            raise WeightsError(f"{file} is not a safetensors file, and the package would unpickle it")
        self.checksum = verified_checksum([file], args)
        config = None if args.config is None else str(ROOT / args.config)
        # differentiable: the package's own image processor on tensors instead of PIL
        self._package: Any = HPSv3RewardInferencer(config, str(file), args.device, differentiable=True)
        frozen(self._package.model)
        self._device = torch.device(args.device)
        self._tokenizer = self._package.processor.tokenizer
        gray = torch.full((1, 3, 448, 448), 0.5)
        num_other_tokens = self._prepare(gray, [""])["input_ids"].shape[1]  # instruction and image
        self.max_text_tokens = int(self._package.model.config.max_position_embeddings) - num_other_tokens

    def score_pairs(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        for text in texts:
            self._check(text)
        means: Tensor = self._package.model(return_dict=True, **self._prepare(images, texts))["logits"][:, 0]
        return means.float()

    def _check(self, text: str) -> None:
        """Raise ContractError for a text that is too long or has a control token, such as <|Reward|>, in it."""
        check_length(text, len(self._tokenizer(text).input_ids), self.max_text_tokens)
        if controls := [token for token in self._tokenizer.get_added_vocab() if token in text]:
            raise ContractError(f"text holds {controls[0]!r}, a control token of this reward; remove it from {text!r}")

    def _prepare(self, images: Tensor, texts: Sequence[str]) -> Any:
        """Return the package's batch, with images at its own size (about 448² pixels) and in its range, 0 to 255."""
        from hpsv3.dataset.utils import smart_resize

        num_pixels = 256 * 28 * 28  # as in HPSv3RewardInferencer.prepare_batch
        try:
            height, width = smart_resize(*images.shape[-2:], min_pixels=num_pixels, max_pixels=num_pixels)
        except ValueError as error:  # of extreme shapes
            raise ContractError(f"image of {images.shape[-2]} x {images.shape[-1]} pixels: {error}") from error
        pixels = resize(as_float(to_device(images, self._device)), height, width).clamp(0, 1) * 255
        return self._package.prepare_batch(list(pixels), list(texts))
