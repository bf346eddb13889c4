"""Find a checkpoint on disk or on the hub, load it through diffusers and check it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from trainer.model.text_encoders import TextEncoders

if TYPE_CHECKING:
    from diffusers import FluxPipeline

INDEX = "model_index.json"
_NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


class ModelError(ValueError):
    """The model cannot be used; the text names model.path and the cure."""


def check_model_path(path: str) -> None:
    """Raise ModelError, before anything heavy is read, if `path` is neither a FLUX folder nor possibly a hub id."""
    index = Path(path) / INDEX
    if index.is_file():
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if kind != "FluxPipeline":
            raise ModelError(f"model.path {path} holds a {kind}, not a FluxPipeline: give a FLUX model")
    elif Path(path).is_dir():
        raise ModelError(f"model.path {path} has no {INDEX}: give the folder that FluxPipeline.save_pretrained wrote")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or Path(path).parent.is_dir():
        raise ModelError(f"model.path {path}: no such folder; give a FLUX folder in diffusers' format, or a hub id")


def model_folder(path: str) -> Path:
    """Return a model's folder: `path` itself, or where the hub's model of that id is kept. Raise ModelError."""
    check_model_path(path)
    if Path(path).is_dir():
        return Path(path)
    from diffusers import FluxPipeline

    try:
        return Path(FluxPipeline.download(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} cannot be fetched: {error}") from error


def load_text_encoders(
    path: str, dtype: torch.dtype, device: torch.device | str = "cpu", *, only_tokenizers: bool = False
) -> TextEncoders:
    """Load the text encoders of a folder or a hub id, and nothing else of the model. Raise ModelError."""
    without = ("transformer", "vae", *(("text_encoder", "text_encoder_2") if only_tokenizers else ()))
    return TextEncoders(load_pipeline(model_folder(path), dtype, device, **dict.fromkeys(without)))


def load_pipeline(
    source: Path, dtype: torch.dtype | Mapping[str, torch.dtype], device: torch.device | str, **without: None
) -> FluxPipeline:
    """Load a pipeline without the parts that are given as None. Raise ModelError.

    dtype: of all parts, or of each by its name, "default" of all others.
    """
    from diffusers import FluxPipeline  # on use: it takes 5 s, and preflight.py only checks the path

    dtypes = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    try:
        networks = {
            part: _load_network(source, part, dtypes.get(part, dtypes["default"]))
            for part in _NETWORKS
            if part not in without
        }
        pipeline = FluxPipeline.from_pretrained(source, **networks, **without).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model.path {source} cannot be loaded: {error}") from error
    for part, network in networks.items():
        require_finite(network, f"model.path {source}: {part}")
    return pipeline


def _load_network(source: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """Load one network of a folder by the class that its index names. Raise ValueError for a weight that is not there.

    The libraries themselves only warn, and go on with random numbers or none.
    """
    library, name = json.loads((source / INDEX).read_text(encoding="utf-8"))[part]
    kind: Any = getattr(import_module(library), name)
    network, found = kind.from_pretrained(source / part, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{part} has no {missing[0]} in its files")
    loaded: nn.Module = network
    return loaded


def require_finite(part: nn.Module, name: str) -> None:
    """Raise ModelError for the first weight that is not finite. It allocates two numbers a tensor."""
    for key, tensor in part.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ModelError(f"{name}/{key} holds NaN or infinite numbers: fetch or train the model anew")
