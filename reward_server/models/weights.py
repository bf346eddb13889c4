"""Where a reward's weights lie, and that they are the ones meant: local path or hub id, checksum, safe loading."""

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
    """The weights found are not those that `checksum` pins."""


class WeightsArgs(BaseModel):
    """What every kind of reward says; a relative path is taken from the folder of reward_server.

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
        """How often a forward sees each image: what a batch costs is images times views."""
        return 1

    @property
    def version_suffix(self) -> str:
        """What else than the weights makes the reward another one, to be told beside their checksum."""
        return ""


_FOLDER_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")


def find_folder(path: str) -> Path:
    """A folder as transformers writes them: local or, for `owner/name`, the hub's snapshot. Raises WeightsError."""
    if (ROOT / path).is_dir():  # an absolute path stays what it is
        return ROOT / path
    if Path(path).is_absolute() or path.count("/") != 1:
        raise WeightsError(f"no reward model at {ROOT / path}: give a folder, or a hub id owner/name")
    folder = _download(path, _FOLDER_FILES)
    if not _weight_files(folder):  # repositories from before safetensors
        folder = _download(path, (*_FOLDER_FILES, "pytorch_model*.bin"))
    return folder


def find_file(path: str) -> Path:
    """A file of weights: local or, for `owner/name/file`, the hub's copy. Raises WeightsError."""
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
    """The files of weights of a transformers folder, in the order of their names. Raises WeightsError if none."""
    if files := _weight_files(folder):
        return files
    raise WeightsError(f"{folder} has neither model*.safetensors nor pytorch_model*.bin")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def from_pretrained(model_class: Any, folder: Path) -> Any:
    """A frozen float32 model of transformers with every weight read from the folder. Raises WeightsError otherwise.

    transformers itself fills what a file lacks with random numbers, and only warns.
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
    """ "sha256:…" over the files' bytes, in this order. ChecksumError where the arguments pin another one."""
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
    """What torch.save wrote, tensors only (weights_only). WeightsError where it holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{file} is not a file of tensors written by torch.save: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}, but a state_dict is expected")
    return content


def fill(model: nn.Module, state_dict: dict[str, Tensor], source: Path) -> None:
    """Every weight of the model comes from the file and the other way round. WeightsError naming what differs."""
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{source} does not fit {type(model).__name__}: {error}") from error


def frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)
