"""Find a reward's weights by local path or hub id, check their checksum, and load them safely."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

# The folder that holds the package reward_server: a checkout, or Ray's copy of it (runtime_env working_dir).
ROOT = Path(__file__).resolve().parents[2]


class WeightsError(ValueError):
    """Weights that are missing, not in the published format, or not the ones that the arguments pin."""


class ChecksumError(WeightsError):
    """Weights that are not those that `checksum` pins."""


class WeightsArgs(BaseModel):
    """The keys of every kind of reward; a relative path starts at the folder that holds reward_server.

    placement: "ingress" loads it beside the HTTP app, the shortest way; "own" gives it a Serve deployment of its name,
    with replicas, autoscaling and environment of its own (deploy/serve.yaml).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    device: str = "cpu"
    placement: Literal["ingress", "own"] = "ingress"
    checksum: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None  # None: not pinned

    @property
    def num_views(self) -> int:
        """Return how often a forward sees each image: a batch costs images times views."""
        return 1

    @property
    def version_suffix(self) -> str:
        """Return what else than the weights changes the reward, to be named beside their checksum."""
        return ""

    @property
    def gradient_scale(self) -> float:
        """Return the factor of a reward while its gradient is computed, so that no small number is lost on the way."""
        return 1.0


_FOLDER_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")


def find_folder(path: str) -> Path:
    """Return a folder as transformers writes it: local or, for `owner/name`, the hub's snapshot. Raise WeightsError."""
    if (ROOT / path).is_dir():  # an absolute path stays what it is
        return ROOT / path
    if Path(path).is_absolute() or path.count("/") != 1:
        raise WeightsError(f"no reward model at {ROOT / path}: give a folder, or a hub id owner/name")
    folder = _download(path, _FOLDER_FILES)
    if not _weight_files(folder):  # repositories from before safetensors
        folder = _download(path, (*_FOLDER_FILES, "pytorch_model*.bin"))
    return folder


def find_file(path: str) -> Path:
    """Return a file of weights: local or, for `owner/name/file`, the hub's copy. Raise WeightsError."""
    if (ROOT / path).is_file():
        return ROOT / path
    if Path(path).is_absolute() or path.count("/") != 2:
        raise WeightsError(f"no weights at {ROOT / path}: give a file, or owner/name/file on the hub")
    repository, _, name = path.rpartition("/")
    file = _download(repository, (name,)) / name
    if not file.is_file():
        raise WeightsError(f"no weights at {ROOT / path}, and the hub's {repository} has no {name}")
    return file


def _download(repository: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise WeightsError(
            f"no reward model at {ROOT / repository}, and the hub does not give {repository}: {error}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights of a transformers folder, by name. Raise WeightsError if there are none."""
    if files := _weight_files(folder):
        return files
    raise WeightsError(f"{folder} has neither model*.safetensors nor pytorch_model*.bin")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def from_pretrained(model_class: Any, folder: Path) -> Any:
    """Load a frozen float32 model of transformers. Raise WeightsError unless every weight is read from the folder.

    transformers itself only warns, and fills a missing weight with random numbers.
    """
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{folder} is no {model_class.__name__}: {error}") from error
    if lacking := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise WeightsError(
            f"{folder} is no {model_class.__name__}: {len(lacking)} weights are missing or misshapen, as {lacking[0]}"
        )
    return frozen(model)


def verified_checksum(files: Iterable[Path], args: WeightsArgs) -> str:
    """Return "sha256:…" of the files' bytes, in this order. Raise ChecksumError if the arguments pin another one."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    found = f"sha256:{digest.hexdigest()}"
    if args.checksum not in (None, found):
        raise ChecksumError(f"weights at {args.path} have checksum {found}, but the arguments pin {args.checksum}")
    return found


def load_state_dict(file: Path) -> dict[str, Any]:
    """Read what torch.save wrote, tensors only (weights_only). Raise WeightsError if the file holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{file} is not a file of tensors written by torch.save: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}, but a state_dict is expected")
    return content


def fill(model: nn.Module, state_dict: dict[str, Tensor], source: Path) -> None:
    """Load every weight of the model from the file. Raise WeightsError naming a missing, extra or misshapen one."""
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{source} does not fit {type(model).__name__}: {error}") from error


def frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)
