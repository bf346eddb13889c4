"""The reward models: images and texts in, embeddings out. The one home of transformers' CLIP, open_clip and HPS v2.

A model reads images of any size in [0, 1] and does its own preprocessing as differentiable tensor operations, so that
a gradient reaches the pixels of the sender. What is published as PIL transforms is reproduced here and tested
against the published code. Not here: what is done with the embeddings (srp.py), batching and caching (scorer.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import center_crop, normalize

from services.contract import ContractError

# The folder that holds this package: a checkout, or Ray's copy of it (runtime_env working_dir).
ROOT = Path(__file__).resolve().parent.parent


class RewardModel(Protocol):
    """What a reward must offer to be served. Embeddings need not be normalised."""

    checksum: str  # of the weights, "sha256:…"

    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1], any size, on any device -> (batch, embedding), differentiable."""
        ...

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """(batch, embedding), no gradient. Raises ContractError naming a text that is too long: none is cut."""
        ...


class _Args(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    device: str = "cpu"


class ClipArgs(_Args):
    """A CLIPModel of transformers: a folder (relative: to the checkout) or a hub id (openai/clip-vit-base-patch32)."""

    kind: Literal["clip"]
    path: str


class Hpsv2Args(_Args):
    """HPS v2 or v2.1: the published checkpoint file (huggingface.co/xswu/HPSv2), e.g. HPS_v2.1_compressed.pt."""

    kind: Literal["hpsv2"]
    path: str
    architecture: str = "ViT-H-14"  # any name that open_clip knows


RewardArgs = Annotated[ClipArgs | Hpsv2Args, Field(discriminator="kind")]


def load_reward(args: ClipArgs | Hpsv2Args) -> RewardModel:
    """Load the weights. Raises ValueError naming the path where they are missing."""
    return ClipReward(args) if isinstance(args, ClipArgs) else Hpsv2Reward(args)


class ClipReward:
    """Any checkpoint in the format of transformers' CLIPModel, preprocessing as its preprocessor_config.json says."""

    def __init__(self, args: ClipArgs) -> None:
        # Imported on use, so that serving one kind of model does not pay for the other's library.
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        folder = _model_folder(args.path)
        self._device = torch.device(args.device)
        self._model = _frozen(CLIPModel.from_pretrained(folder, dtype=torch.float32)).to(self._device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._preprocess = _ClipPreprocess(CLIPImageProcessor.from_pretrained(folder), folder)
        self.checksum = _checksum(sorted(folder.glob("*.safetensors")))

    def embed_image(self, images: Tensor) -> Tensor:
        pixels = self._preprocess(images.to(self._device))
        embeds: Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
        return embeds

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        max_tokens = self._model.config.text_config.max_position_embeddings
        for text in texts:
            _check_length(text, len(self._tokenizer(text).input_ids), max_tokens)
        tokens = self._tokenizer(list(texts), padding=True, return_tensors="pt").to(self._device)
        embeds: Tensor = self._model.get_text_features(**tokens).pooler_output
        return embeds


class Hpsv2Reward:
    """HPS v2 (arXiv 2306.09341): open_clip's architecture with the weights of checkpoint["state_dict"]."""

    def __init__(self, args: Hpsv2Args) -> None:
        import open_clip

        file = _weights_file(args.path)
        self._device = torch.device(args.device)
        model = open_clip.create_model(args.architecture, load_weights=False)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"], strict=True)
        self._model = _frozen(model).to(self._device)
        self._tokenizer: Any = open_clip.get_tokenizer(args.architecture)
        self._size_px = int(model.visual.image_size[0])
        self._mean, self._std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
        self.checksum = _checksum([file])

    def embed_image(self, images: Tensor) -> Tensor:
        padded = fit_and_pad(images.to(self._device), self._size_px)
        embeds: Tensor = self._model.encode_image(normalize(padded, self._mean, self._std))
        return embeds

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        for text in texts:  # the tokenizer cuts silently; two tokens more for start and end of text
            _check_length(text, len(self._tokenizer.encode(text)) + 2, self._tokenizer.context_length)
        embeds: Tensor = self._model.encode_text(self._tokenizer(list(texts)).to(self._device))
        return embeds


def fit_and_pad(images: Tensor, size_px: int) -> Tensor:
    """hpsv2's own geometry: the longest side becomes size_px (bicubic), the rest is filled with black, centred.

    The fill comes before the normalisation, so it is black to the model. (hpsv2 leaves an image whose longest side
    already fits unpadded, and then fails on it if it is not square; it is padded here.)
    """
    height, width = images.shape[-2:]
    scale = size_px / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    free_height, free_width = size_px - images.shape[-2], size_px - images.shape[-1]
    left, top = free_width // 2, free_height // 2
    return pad(images, [left, free_width - left, top, free_height - top])


def resize(images: Tensor, height_px: int, width_px: int, mode: str = "bicubic") -> Tensor:
    """What torchvision's Resize does to float images, antialiasing included; the identity where the size fits."""
    if images.shape[-2:] == (height_px, width_px):
        return images
    return interpolate(images, size=(height_px, width_px), mode=mode, antialias=True)


_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as written in preprocessor_config.json


class _ClipPreprocess:
    """CLIPImageProcessor as differentiable tensor operations: resize, centre crop, normalise."""

    def __init__(self, processor: Any, folder: Path) -> None:
        if processor.resample not in _RESAMPLE_MODES:
            raise ValueError(f"{folder}: resample {processor.resample} is not supported; 2 and 3 are")
        self._mode = _RESAMPLE_MODES[processor.resample]
        self._size = dict(processor.size) if processor.do_resize else None
        self._crop = dict(processor.crop_size) if processor.do_center_crop else None
        self._mean, self._std = list(processor.image_mean), list(processor.image_std)

    def __call__(self, images: Tensor) -> Tensor:
        height, width = self._resized_px(*images.shape[-2:])
        # The published processor resizes bytes, which cannot overshoot as a bicubic kernel does.
        images = resize(images, height, width, self._mode).clamp(0, 1)
        if self._crop is not None:
            images = center_crop(images, [self._crop["height"], self._crop["width"]])
        return normalize(images, self._mean, self._std)

    def _resized_px(self, height: int, width: int) -> tuple[int, int]:
        if self._size is None:
            return height, width
        if "shortest_edge" not in self._size or self._size["shortest_edge"] is None:
            return self._size["height"], self._size["width"]
        edge = self._size["shortest_edge"]
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def _model_folder(path: str) -> Path:
    """A local folder or, for `owner/name`, the hub's snapshot of it."""
    if (ROOT / path).is_dir():
        return ROOT / path
    if Path(path).is_absolute() or path.count("/") != 1:
        raise ValueError(f"no reward model at {ROOT / path}: give a folder with a CLIPModel, or a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"no reward model at {ROOT / path}, and the hub does not give {path}: {error}") from error


def _weights_file(path: str) -> Path:
    file = ROOT / path  # an absolute path stays what it is
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}: download HPS_v2.1_compressed.pt from huggingface.co/xswu/HPSv2")
    return file


def _frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)


def _checksum(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _check_length(text: str, num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise ContractError(
            f"text of {num_tokens} tokens, but this reward reads at most {max_tokens}; shorten it: {text!r}"
        )
