"""CLIP and PickScore: a CLIPModel of transformers with the preprocessing that its own files describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reward_server.models.precision import Precision
from reward_server.models.preprocess import ResizeAndCrop
from reward_server.models.protocol import check_length
from reward_server.models.traced import traced
from reward_server.models.views import ViewsArgs, embed_views
from reward_server.models.weights import find_folder, from_pretrained, verified_checksum, weight_files


class ClipArgs(ViewsArgs):
    """A CLIPModel: a folder (relative: to the checkout) or a hub id (openai/clip-vit-base-patch32)."""

    kind: Literal["clip"]


class PickScoreArgs(ViewsArgs):
    """PickScore v1 (arXiv 2305.01569), the hub id yuvalkirstain/PickScore_v1 or a folder with its files.

    The published score is logit_scale·cosine (a temperature of about 1/100 for their softmax over images). The reward
    here is the cosine, as for every other CLIP, so that preference_scale and margins mean the same; logit_scale is
    read from the checkpoint, listed with the model, and used for probabilities.
    """

    kind: Literal["pickscore"]


class ClipReward:
    """Any checkpoint in the format of transformers' CLIPModel: a TwoTower."""

    def __init__(self, args: ClipArgs | PickScoreArgs) -> None:
        # Imported on use: serving one kind of model does not load the library of another.
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        folder = find_folder(args.path)
        self.checksum = verified_checksum(weight_files(folder), args)
        self._precision, self._crops = Precision(args), args.crops
        self._model = from_pretrained(CLIPModel, folder)
        self.logit_scale: float | None = float(self._model.logit_scale.exp())
        self._model = self._precision.place(self._model)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._preprocess = ResizeAndCrop.of_processor(CLIPImageProcessor.from_pretrained(folder))
        self.max_text_tokens = int(self._model.config.text_config.max_position_embeddings)
        self._forward: Callable[[Tensor], Tensor] = self._eager
        # A GPU works while Python prepares the next operation.
        if self._precision.device.type == "cpu" and self._precision.is_float32:
            image_shape = 3, self._preprocess.height_px, self._preprocess.width_px
            self._forward = traced(self._model, self._eager, image_shape)

    def embed_image(self, images: Tensor) -> Tensor:
        crop_px = self._preprocess.height_px, self._preprocess.width_px
        return embed_views(images, self._preprocess, self._encode, self._crops, crop_px)

    def shrink(self, images: Tensor) -> Tensor:
        return images if self._crops else self._preprocess.shrink(images)  # crops are cut out of whole images

    def _encode(self, pixels: Tensor) -> Tensor:
        forward = self._eager if pixels.requires_grad else self._forward
        return self._precision.run(forward, pixels)

    def _eager(self, pixels: Tensor) -> Tensor:
        embeds: Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
        return embeds

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            check_length(text, len(self._tokenizer(text).input_ids), self.max_text_tokens)
        tokens = self._tokenizer(list(texts), padding=True, return_tensors="pt").to(self._precision.device)
        embeds = self._precision.run_text(lambda: self._model.get_text_features(**tokens).pooler_output)
        return normalize(embeds, dim=-1)
