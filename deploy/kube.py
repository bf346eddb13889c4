"""Make the manifests for KubeRay from deploy/serve.yaml, a run file and deploy/pod.yaml.

    python -m deploy.kube service > deploy/rayservice.yaml
    python -m deploy.kube job > deploy/rayjob.yaml
    python -m deploy.kube service --gpu | kubectl apply -f -
    python -m deploy.kube job --run deploy/runs/flux1_dev_srpo.yaml | kubectl apply -f -

Rewards, limits and worker counts are thus written down once. A run with `engine.use_gpu` gets GPUs; --gpu puts another
run, or the rewards, on GPUs. Workers on GPUs share a pod up to --gpus-per-node, so that NVLink joins them. Every secret
is a reference (SECRET; OPTIONAL lists keys that it may lack). You make the volume claims, which are named only if
needed: srpo-weights for model paths under /weights, srpo-outputs (ReadWriteMany) for a training, srpo-models
(ReadWriteMany) for what is loaded from the hub.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from deploy.pods import (
    HUB_CACHE,
    HUB_VOLUME,
    OPTIONAL,
    Size,
    Tree,
    is_hub_id,
    is_of_hub,
    pod,
    probe,
    secret,
    strings,
    weights,
)
from deploy.settings import ROOT
from services.clients.jobs import STOP_WAIT
from services.config.engine import EngineConfig
from services.config.run import RunConfig, load_run_config

SERVICE = "srpo-reward"
REWARD_URL = f"http://{SERVICE}-serve-svc:8000"  # the name that KubeRay gives the Kubernetes service of a RayService
MLFLOW_URL = "http://mlflow:5000"
RUN_FOLDER, OUTPUT_FOLDER = "/etc/srpo", "/outputs"
GPUS_PER_NODE = 8
_SERVE_HEALTH = ("/-/healthz", 8000)  # of the node's HTTP proxy, which drains before it goes
_FAST_PROXY = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")  # deploy/haproxy.py has them too
_INGRESS = "RewardService"  # the deployment that answers HTTP, of reward_server/deployment.py
_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}  # of the autoscaler beside the head
_LOOPBACK = ("//127.0.0.1", "//localhost")  # a run file that names this machine means services of the same cluster
_HEAD = Size(cpus=2, memory_gib=4)
_SUBMITTER = Size(cpus=1, memory_gib=1)


def rayservice(serve: Tree, on_gpu: bool) -> list[Tree]:
    """Return the RayService of a Serve configuration; on a cluster it listens on all interfaces, with keys.

    A pod has room for one replica of each deployment, so that those with a part of a GPU each can share one.
    """
    serve = copy.deepcopy(serve)
    serve["http_options"]["host"] = "0.0.0.0"
    if on_gpu:
        _move_to_gpus(serve)
    deployments = [each for application in serve["applications"] for each in application["deployments"]]
    options = [each.get("ray_actor_options", {}) for each in deployments]
    gpus = math.ceil(max(each.get("num_gpus", 0) for each in options))
    cpus = max(2, math.ceil(sum(each.get("num_cpus", 1) for each in options)))
    size = Size(cpus, memory_gib=32 if gpus else 8, gpus=gpus)  # weights pass through it on their way to a GPU
    environment = [
        secret("SRPO_API_KEYS", "api-keys"),
        *(secret(name, key, optional=True) for name, key in OPTIONAL.items()),
        *({"name": each, "value": "1"} for each in _FAST_PROXY),
    ]
    volumes = weights(strings(serve))
    if any(is_of_hub(reward) for each in serve["applications"] for reward in each["args"]["rewards"].values()):
        environment, volumes = [*environment, HUB_CACHE], [*volumes, HUB_VOLUME]
    head = pod(_HEAD, environment, volumes, ports={"serve": 8000})
    worker = pod(size, environment, volumes, ports={"serve": 8000})
    (replica,) = worker["spec"]["containers"]
    replica["readinessProbe"] = probe(_SERVE_HEALTH, num_failures=1)  # no requests to a node that cannot take them
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


def rayjob(run: RunConfig, on_gpu: bool, gpus_per_node: int = GPUS_PER_NODE) -> list[Tree]:
    """Return the RayJob of a training: a cluster of its own, its run file as a ConfigMap.

    Each worker has a pod, and workers on GPUs share one as far as a node has GPUs.
    """
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
    num_pods, size = _worker_pods(engine, gpus_per_node)
    environment = [
        secret("SRPO_API_KEY", "api-key"),
        secret("MLFLOW_TRACKING_USERNAME", "mlflow-username", optional=True),
        secret("MLFLOW_TRACKING_PASSWORD", "mlflow-password", optional=True),
        *(secret(name, key, optional=True) for name, key in OPTIONAL.items()),
        *({"name": name, "value": value} for name, value in STOP_WAIT.items()),
    ]
    volumes = [
        (RUN_FOLDER, {"name": "run", "configMap": {"name": name}}),
        (OUTPUT_FOLDER, {"name": "outputs", "persistentVolumeClaim": {"claimName": "srpo-outputs"}}),
        *weights(strings(tree)),
    ]
    if is_hub_id(run.model.path):
        environment, volumes = [*environment, HUB_CACHE], [*volumes, HUB_VOLUME]
    head, worker = pod(_HEAD, environment, volumes), pod(size, environment, volumes)
    submitter = pod(_SUBMITTER, [], [], is_ray_node=False)
    submitter["spec"]["restartPolicy"] = "Never"
    spec = {
        "entrypoint": f"cd /app && exec python -m trainer.launch {RUN_FOLDER}/run.yaml --resume auto",
        "backoffLimit": 2,  # with a new cluster each time, on which the run goes on
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,  # for a look at the logs
        "submitterPodTemplate": submitter,
        "rayClusterSpec": _cluster(head, worker, "trainers", num_pods, num_pods),
    }
    run_file = {"run.yaml": yaml.safe_dump(tree, sort_keys=False, width=1000)}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": run_file}
    return [config_map, _resource("RayJob", name, spec)]


def _worker_pods(engine: EngineConfig, gpus_per_node: int) -> tuple[int, Size]:
    """Return how many pods of what size the workers need, all alike. Raise ValueError if a node has no GPU for them."""
    memory_gib = engine.memory_gib_per_worker or (96 if engine.use_gpu else 4)
    if not engine.use_gpu:
        return engine.max_workers, Size(math.ceil(engine.cpus_per_worker), math.ceil(memory_gib))
    if gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node is {gpus_per_node}: a worker needs one")
    num_pods = math.ceil(engine.max_workers / gpus_per_node)
    each = math.ceil(engine.max_workers / num_pods)  # 12 workers on nodes of 8: 6 and 6, not 8 and 4
    return num_pods, Size(math.ceil(each * engine.cpus_per_worker), math.ceil(each * memory_gib), each)


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
    parser.add_argument("--gpus-per-node", type=int, default=GPUS_PER_NODE, help="of a training (%(default)s)")
    parser.add_argument("--serve-config", type=Path, default=ROOT / "deploy" / "serve.yaml")
    parser.add_argument("--run", type=Path, default=ROOT / "deploy" / "runs" / "tiny_srpo.yaml")
    args = parser.parse_args(arguments)
    if args.what == "service":
        manifests = rayservice(yaml.safe_load(args.serve_config.read_text(encoding="utf-8")), args.gpu)
    else:
        manifests = rayjob(load_run_config(args.run), args.gpu, args.gpus_per_node)
    made_from = args.serve_config if args.what == "service" else args.run
    print(f"# Made by `python -m deploy.kube {args.what}` from {made_from.name} and pod.yaml; change those, not this.")
    print(yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=120), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
