"""Make the manifests for KubeRay from deploy/serve.yaml, a run file and deploy/pod.yaml.

    python -m deploy.kube service > deploy/rayservice.yaml
    python -m deploy.kube job > deploy/rayjob.yaml
    python -m deploy.kube service --gpu | kubectl apply -f -
    python -m deploy.kube job --run deploy/runs/flux1_dev_srpo.yaml | kubectl apply -f -

Rewards, limits and worker counts are thus written down once. A run with `engine.use_gpu` gets GPUs; --gpu puts another
run, or the rewards, on GPUs. Every secret is a reference (SECRET; _OPTIONAL lists keys that it may lack). You make the
volume claims, which are named only if needed: srpo-weights for model paths under /weights, srpo-outputs (ReadWriteMany)
for a training.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deploy.settings import ROOT
from services.clients.jobs import STOP_WAIT
from services.config.run import RunConfig, load_run_config

Tree = dict[str, Any]

SECRET = "srpo-ray"  # kubectl create secret generic srpo-ray --from-literal=api-keys=… --from-literal=api-key=…
_OPTIONAL = {  # variables of pods that use hub or bucket, and their keys in the secret, which may lack them
    "HF_TOKEN": "hf-token",
    "AWS_ACCESS_KEY_ID": "aws-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-access-key",
    "AWS_SESSION_TOKEN": "aws-session-token",
}
SERVICE = "srpo-reward"
REWARD_URL = f"http://{SERVICE}-serve-svc:8000"  # the name that KubeRay gives the Kubernetes service of a RayService
MLFLOW_URL = "http://mlflow:5000"
RUN_FOLDER, OUTPUT_FOLDER, WEIGHTS_FOLDER = "/etc/srpo", "/outputs", "/weights"
_HEALTH = ("/api/healthz", 52365)  # of Ray's agent on every node: its raylet, on the head the GCS too
_SERVE_HEALTH = ("/-/healthz", 8000)  # of the node's HTTP proxy, which drains before it goes
_FAST_PROXY = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")  # deploy/haproxy.py has them too
_INGRESS = "RewardService"  # the deployment that answers HTTP, of reward_server/deployment.py
_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}  # of the autoscaler beside the head
_LOOPBACK = ("//127.0.0.1", "//localhost")  # a run file that names this machine means services of the same cluster


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


_HEAD = Size(cpus=2, memory_gib=4)
_SUBMITTER = Size(cpus=1, memory_gib=1)


def rayservice(serve: Tree, on_gpu: bool) -> list[Tree]:
    """Return the RayService of a Serve configuration; on a cluster it listens on all interfaces, with keys."""
    serve = copy.deepcopy(serve)
    serve["http_options"]["host"] = "0.0.0.0"
    if on_gpu:
        _move_to_gpus(serve)
    deployments = [each for application in serve["applications"] for each in application["deployments"]]
    options = [each.get("ray_actor_options", {}) for each in deployments]
    size = Size(
        cpus=max(2, math.ceil(max(each.get("num_cpus", 1) for each in options))),
        memory_gib=8,
        gpus=math.ceil(max(each.get("num_gpus", 0) for each in options)),
    )
    environment = [
        _secret("SRPO_API_KEYS", "api-keys"),
        *(_secret(name, key, optional=True) for name, key in _OPTIONAL.items()),
        *({"name": each, "value": "1"} for each in _FAST_PROXY),
    ]
    volumes = _weights(_strings(serve))
    head = _pod(_HEAD, environment, volumes, ports={"serve": 8000})
    worker = _pod(size, environment, volumes, ports={"serve": 8000})
    (replica,) = worker["spec"]["containers"]
    replica["readinessProbe"] = _probe(_SERVE_HEALTH, num_failures=1)  # no requests to a node that cannot take them
    # What was accepted may still be answered; 30 s, unless said, would cut it short.
    worker["spec"]["terminationGracePeriodSeconds"] = math.ceil(serve["http_options"]["request_timeout_s"]) + 20
    head["spec"]["automountServiceAccountToken"] = True  # the autoscaler beside it asks for pods
    cluster = _cluster(head, worker, group="replicas", num_workers=1, max_workers=4)
    cluster |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"securityContext": _RIGHTS}}
    spec = {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False, width=1000),
        "rayClusterDeletionDelaySeconds": serve["http_options"]["request_timeout_s"] + 10,  # after an upgrade, to drain
        "rayClusterConfig": cluster,
    }
    return [_resource("RayService", SERVICE, spec)]


def rayjob(run: RunConfig, on_gpu: bool) -> list[Tree]:
    """Return the RayJob of a training: a cluster of its own, one pod for each worker, its run file as a ConfigMap."""
    tree = run.model_dump(mode="json", exclude_unset=True)
    tree["output_dir"] = OUTPUT_FOLDER
    if on_gpu:
        tree.setdefault("engine", {})["use_gpu"] = True
    if any(here in run.reward_service.url for here in _LOOPBACK):
        tree.setdefault("reward_service", {})["url"] = REWARD_URL
    if any(here in run.tracking.uri for here in _LOOPBACK):
        tree.setdefault("tracking", {})["uri"] = MLFLOW_URL
    engine = RunConfig.model_validate(tree).engine

    name = "srpo-" + run.name.replace("_", "-")
    cpus = math.ceil(engine.cpus_per_worker)
    memory_gib = math.ceil(engine.memory_gib_per_worker or (96 if engine.use_gpu else 4))
    size = Size(cpus, memory_gib, gpus=int(engine.use_gpu))
    environment = [
        _secret("SRPO_API_KEY", "api-key"),
        _secret("MLFLOW_TRACKING_USERNAME", "mlflow-username", optional=True),
        _secret("MLFLOW_TRACKING_PASSWORD", "mlflow-password", optional=True),
        *(_secret(name, key, optional=True) for name, key in _OPTIONAL.items()),
        *({"name": name, "value": value} for name, value in STOP_WAIT.items()),
    ]
    volumes = [
        (RUN_FOLDER, {"name": "run", "configMap": {"name": name}}),
        (OUTPUT_FOLDER, {"name": "outputs", "persistentVolumeClaim": {"claimName": "srpo-outputs"}}),
        *_weights(_strings(tree)),
    ]
    head, worker = _pod(_HEAD, environment, volumes), _pod(size, environment, volumes)
    submitter = _pod(_SUBMITTER, [], [], is_ray_node=False)
    submitter["spec"]["restartPolicy"] = "Never"
    spec = {
        "entrypoint": f"cd /app && exec python -m trainer.launch {RUN_FOLDER}/run.yaml --resume auto",
        "backoffLimit": 2,  # with a new cluster each time, on which the run goes on
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,  # for a look at the logs
        "submitterPodTemplate": submitter,
        "rayClusterSpec": _cluster(head, worker, "trainers", engine.max_workers, engine.max_workers),
    }
    run_file = {"run.yaml": yaml.safe_dump(tree, sort_keys=False, width=1000)}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": run_file}
    return [config_map, _resource("RayJob", name, spec)]


def _move_to_gpus(serve: Tree) -> None:
    """Put each reward's model on the GPU of its replica, in place; replicas without a model get none."""
    for application in serve["applications"]:
        rewards = application["args"]["rewards"].values()
        for reward in rewards:
            reward["device"] = "cuda"
        are_all_apart = all(reward.get("placement") == "own" for reward in rewards)
        for deployment in application["deployments"]:
            if not (are_all_apart and deployment["name"] == _INGRESS):
                deployment.setdefault("ray_actor_options", {}).setdefault("num_gpus", 1)


def _resource(kind: str, name: str, spec: Tree) -> Tree:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _cluster(head: Tree, worker: Tree, group: str, num_workers: int, max_workers: int) -> Tree:
    """Return a Ray cluster whose head, which cannot be replaced, offers no CPU, so that all work is on workers."""
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay makes the token's secret and hands it to every pod
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": group,
                "replicas": num_workers,
                "minReplicas": num_workers,
                "maxReplicas": max_workers,
                "rayStartParams": {},
                "template": worker,
            }
        ],
    }


def _pod(
    size: Size,
    environment: Sequence[Tree],
    volumes: Sequence[tuple[str, Tree]],
    *,
    ports: Mapping[str, int] | None = None,
    is_ray_node: bool = True,
) -> Tree:
    """Return deploy/pod.yaml with size, variables and volumes (mount path, volume); KubeRay adds probes to a node."""
    pod: Tree = yaml.safe_load((ROOT / "deploy" / "pod.yaml").read_text(encoding="utf-8"))
    (container,) = pod["spec"]["containers"]
    container["resources"] = size.resources
    container["env"] += environment
    for path, volume in volumes:
        container["volumeMounts"].append({"name": volume["name"], "mountPath": path})
        pod["spec"]["volumes"].append(volume)
    if ports:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    if size.gpus:
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if is_ray_node:
        container["startupProbe"] = _probe(_HEALTH, num_failures=60)
        container["livenessProbe"] = _probe(_HEALTH, num_failures=24)  # two minutes: a restart loses what runs there
        container["readinessProbe"] = _probe(_HEALTH, num_failures=3)
    return pod


def _probe(place: tuple[str, int], num_failures: int) -> Tree:
    path, port = place
    request = {"path": path, "port": port}
    return {"httpGet": request, "periodSeconds": 5, "timeoutSeconds": 4, "failureThreshold": num_failures}


def _secret(variable: str, key: str, optional: bool = False) -> Tree:
    reference: Tree = {"name": SECRET, "key": key}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference | ({"optional": True} if optional else {})}}


def _weights(texts: Sequence[str]) -> list[tuple[str, Tree]]:
    """Return the volume with the weights, if a setting names a path in it."""
    if not any(text.startswith(f"{WEIGHTS_FOLDER}/") for text in texts):
        return []
    claim = {"claimName": "srpo-weights", "readOnly": True}
    return [(WEIGHTS_FOLDER, {"name": "weights", "persistentVolumeClaim": claim})]


def _strings(tree: object) -> list[str]:
    """Yield all strings in a tree of settings."""
    if isinstance(tree, Mapping):
        return [text for value in tree.values() for text in _strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in _strings(value)]
    return [tree] if isinstance(tree, str) else []


class _Dumper(yaml.SafeDumper):
    """Writes YAML as people do: no aliases, and a text of several lines as a block."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the manifests. Raise what a wrong run file or Serve configuration raises."""
    parser = argparse.ArgumentParser("deploy.kube", description="Manifests for KubeRay, to standard output.")
    parser.add_argument("what", choices=("service", "job"))
    parser.add_argument("--gpu", action="store_true", help="on GPU nodes, whether or not the file asks for GPUs")
    parser.add_argument("--serve-config", type=Path, default=ROOT / "deploy" / "serve.yaml")
    parser.add_argument("--run", type=Path, default=ROOT / "deploy" / "runs" / "tiny_srpo.yaml")
    args = parser.parse_args(arguments)
    if args.what == "service":
        manifests = rayservice(yaml.safe_load(args.serve_config.read_text(encoding="utf-8")), args.gpu)
    else:
        manifests = rayjob(load_run_config(args.run), args.gpu)
    made_from = args.serve_config if args.what == "service" else args.run
    print(f"# Made by `python -m deploy.kube {args.what}` from {made_from.name} and pod.yaml; change those, not this.")
    print(yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=120), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
