"""Make a pod of our image from deploy/pod.yaml: its size, variables, secrets, volumes and probes.

    pod(Size(cpus=8, memory_gib=768, gpus=8), environment, volumes)

A node of Ray has its probes and its shared memory from here; KubeRay would add its own ones otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import TypeAdapter

from deploy.settings import ROOT
from reward_server.models import AnyArgs, RewardArgs

Tree = dict[str, Any]
Volume = tuple[str, Tree]  # mount path, volume

SECRET = "srpo-ray"  # kubectl create secret generic srpo-ray --from-literal=api-keys=… --from-literal=api-key=…
OPTIONAL = {  # variables of pods that use hub or bucket, and their keys in the secret, which may lack them
    "HF_TOKEN": "hf-token",
    "AWS_ACCESS_KEY_ID": "aws-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-access-key",
    "AWS_SESSION_TOKEN": "aws-session-token",
}
WEIGHTS_FOLDER, HUB_FOLDER = "/weights", "/models"
# Of a pod's memory, and counted in it: Ray's object store takes 0.3, NCCL's buffers between its processes the rest.
_SHARED_MEMORY_SHARE = 0.4
_HEALTH = ("/api/healthz", 52365)  # of Ray's agent on every node: its raylet, on the head the GCS too
HUB_CACHE = {"name": "HF_HOME", "value": HUB_FOLDER}
HUB_VOLUME = (HUB_FOLDER, {"name": "models", "persistentVolumeClaim": {"claimName": "srpo-models"}})


@dataclass(frozen=True, slots=True)
class Size:
    """Requests and limits of a pod, which are equal: Ray plans with these numbers. Memory is a starting point."""

    cpus: int
    memory_gib: int
    gpus: int = 0

    @property
    def resources(self) -> Tree:
        amounts = {"cpu": str(self.cpus), "memory": f"{self.memory_gib}Gi"}
        if self.gpus:
            amounts["nvidia.com/gpu"] = str(self.gpus)
        return {"requests": amounts, "limits": dict(amounts)}


def pod(
    size: Size,
    environment: Sequence[Tree],
    volumes: Sequence[Volume],
    *,
    ports: Mapping[str, int] | None = None,
    is_ray_node: bool = True,
) -> Tree:
    """Return deploy/pod.yaml with size, variables and volumes, and what a node of Ray needs."""
    made: Tree = yaml.safe_load((ROOT / "deploy" / "pod.yaml").read_text(encoding="utf-8"))
    (container,) = made["spec"]["containers"]
    container["resources"] = size.resources
    container["env"] += environment
    for path, volume in volumes:
        container["volumeMounts"].append({"name": volume["name"], "mountPath": path})
        made["spec"]["volumes"].append(volume)
    if ports:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    if size.gpus:
        made["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if is_ray_node:
        shared = {"medium": "Memory", "sizeLimit": f"{math.ceil(size.memory_gib * _SHARED_MEMORY_SHARE)}Gi"}
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
        made["spec"]["volumes"].append({"name": "shared-memory", "emptyDir": shared})
        container["startupProbe"] = probe(_HEALTH, num_failures=60)
        container["livenessProbe"] = probe(_HEALTH, num_failures=24)  # two minutes: a restart loses what runs there
        container["readinessProbe"] = probe(_HEALTH, num_failures=3)
    return made


def probe(place: tuple[str, int], num_failures: int) -> Tree:
    path, port = place
    request = {"path": path, "port": port}
    return {"httpGet": request, "periodSeconds": 5, "timeoutSeconds": 4, "failureThreshold": num_failures}


def secret(variable: str, key: str, optional: bool = False) -> Tree:
    reference: Tree = {"name": SECRET, "key": key}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference | ({"optional": True} if optional else {})}}


def is_of_hub(reward: Tree) -> bool:
    """Return whether a reward of serve.yaml loads anything from the hub, be it by default."""
    args = TypeAdapter[AnyArgs](RewardArgs).validate_python(reward)
    paths = [getattr(args, name) for name in ("path", "backbone", "med_config") if hasattr(args, name)]
    return any(is_hub_id(path) for path in paths) or args.kind in ("image_reward", "hpsv3")  # tokenizer; Qwen2-VL


def is_hub_id(path: str) -> bool:
    return not path.startswith(("/", ".")) and not (ROOT / path).exists()


def weights(texts: Sequence[str]) -> list[Volume]:
    """Return the volume with the weights, if a setting names a path in it."""
    if not any(text.startswith(f"{WEIGHTS_FOLDER}/") for text in texts):
        return []
    claim = {"claimName": "srpo-weights", "readOnly": True}
    return [(WEIGHTS_FOLDER, {"name": "weights", "persistentVolumeClaim": claim})]


def strings(tree: object) -> list[str]:
    """Yield all strings in a tree of settings."""
    if isinstance(tree, Mapping):
        return [text for value in tree.values() for text in strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in strings(value)]
    return [tree] if isinstance(tree, str) else []
