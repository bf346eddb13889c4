"""ImageReward v1.0 (arXiv 2304.05977): a BLIP that reads image and prompt together, built by the authors' package.

The package `image-reward` needs a timm and a transformers that conflict with ours, so this reward runs in replicas
with a Ray runtime_env of their own (deploy/serve_conflicting.yaml); nothing else may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from reward_server.models.precision import Precision, PrecisionArgs
from reward_server.models.preprocess import ResizeAndCrop
from reward_server.models.protocol import check_length
from reward_server.models.weights import (
    WeightsError,
    find_file,
    frozen,
    load_state_dict,
    verified_checksum,
)

_SIZE_PX = 224
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as the package


class ImageRewardArgs(PrecisionArgs):
    """`path`: the published ImageReward.pt, a file or THUDM/ImageReward/ImageReward.pt on the hub.

    `med_config`: the text encoder's configuration, published beside it. The tokenizer is bert-base-uncased, which the
    package takes from the hub's cache. `dtype` is BLIP's; the weights of the head, five linear layers, stay float32.
    """

    kind: Literal["image_reward"]
    med_config: str = "THUDM/ImageReward/med_config.json"


class ImageRewardReward:
    """A Joint. The score is normalized by the authors' mean and standard deviation over their data."""

    max_text_tokens = 35  # what the package cuts prompts to, start and end included

    def __init__(self, args: ImageRewardArgs) -> None:
        from ImageReward.ImageReward import ImageReward

        file = find_file(args.path)
        self.checksum = verified_checksum([file], args)
        model: Any = ImageReward(med_config=str(find_file(args.med_config)), device=args.device)
        try:
            missing = model.load_state_dict(load_state_dict(file), strict=False).missing_keys
        except RuntimeError as error:
            raise WeightsError(f"{file} does not fit ImageReward: {error}") from error
        # The published loader lets buffers and superfluous keys differ; a weight that is missing would stay random.
        if lacking := sorted(set(missing) & {name for name, _ in model.named_parameters()}):
            raise WeightsError(f"{file} does not fit ImageReward: {len(lacking)} weights are missing, as {lacking[0]}")
        self._precision = Precision(args)
        self._model = frozen(model).to(self._precision.device)
        self._model.blip = self._precision.place(self._model.blip)
        self._model.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self._tokenizer = model.blip.tokenizer
        self._preprocess = ResizeAndCrop(
            {"shortest_edge": _SIZE_PX}, {"height": _SIZE_PX, "width": _SIZE_PX}, _MEAN, _STD
        )
        # Trained so that P(i preferred to j) is the sigmoid of the difference before the normalization.
        self.logit_scale: float | None = float(model.std)

    def score_pairs(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        for text in texts:
            check_length(text, len(self._tokenizer(text).input_ids), self.max_text_tokens)
        # padded to the full length, as the package does it
        padded = {"padding": "max_length", "max_length": self.max_text_tokens, "return_tensors": "pt"}
        tokens = self._tokenizer(list(texts), **padded).to(self._precision.device)
        scores = self._precision.run(
            lambda pixels: self._model.score_gard(tokens.input_ids, tokens.attention_mask, pixels),
            self._preprocess(images),
        )
        return scores.squeeze(dim=-1)

    def shrink(self, images: Tensor) -> Tensor:
        return self._preprocess.shrink(images)
