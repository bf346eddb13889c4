from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from deploy.kube import main, rayjob, rayservice
from deploy.settings import ROOT
from services.config.run import RunConfig, load_run_config

SCHEMAS = ROOT.parent / "shared" / "kuberay"
DEPLOY = ROOT / "deploy"
SERVE = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
TINY = load_run_config(DEPLOY / "runs" / "tiny_srpo.yaml")
FLUX = load_run_config(DEPLOY / "runs" / "flux1_dev_srpo.yaml")
MANIFESTS = {
    "service": rayservice(SERVE, on_gpu=False),
    "service on GPUs": rayservice(SERVE, on_gpu=True),
    "training": rayjob(TINY, on_gpu=False),
    "training on GPUs": rayjob(TINY, on_gpu=True),
    "training of FLUX": rayjob(FLUX, on_gpu=False),
}
EVERY = pytest.mark.parametrize("manifests", MANIFESTS.values(), ids=MANIFESTS.keys())


def schema_of(kind: str) -> Any:
    if not SCHEMAS.is_dir():
        pytest.skip(f"no KubeRay schemas at {SCHEMAS}")
    return closed(json.loads((SCHEMAS / f"{kind.lower()}s.v1.schema.json").read_text(encoding="utf-8")))


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors: the API server would drop them without a word."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return result | {"additionalProperties": False} if is_object else result


def errors_in(manifest: dict[str, Any]) -> list[str]:
    validator = Draft202012Validator(schema_of(manifest["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def ray_resource(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (resource,) = (each for each in manifests if each["apiVersion"] == "ray.io/v1")
    return resource


def pods_in(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec, wherever in the resource its template is."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods_in(value)
    if isinstance(tree, list):
        for value in tree:
            yield from pods_in(value)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {key: leaf for name, value in tree.items() for key, leaf in leaves(value, f"{path}/{name}").items()}
    if isinstance(tree, list):
        return {key: leaf for at, value in enumerate(tree) for key, leaf in leaves(value, f"{path}/{at}").items()}
    return {path: tree}


@pytest.mark.parametrize(("what", "file"), [("service", "rayservice.yaml"), ("job", "rayjob.yaml")])
def test_the_committed_file_is_what_the_command_prints(
    what: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([what])
    assert (DEPLOY / file).read_text(encoding="utf-8") == capsys.readouterr().out, "run `make manifests`"


@EVERY
def test_kuberay_knows_every_field_and_takes_every_value(manifests: list[dict[str, Any]]) -> None:
    assert errors_in(ray_resource(manifests)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serveConfig": "x"}, "serveConfig"),
        ({"serveConfigV2": {}}, "serveConfigV2"),
        ({"rayClusterConfig": {}}, "head"),
    ],
)
def test_a_wrong_field_would_be_found(change: dict[str, Any], message: str) -> None:
    broken = copy.deepcopy(ray_resource(MANIFESTS["service"]))
    broken["spec"] |= change
    assert any(message in error for error in errors_in(broken))


def test_the_service_is_the_one_of_serve_yaml_but_for_the_address() -> None:
    served = leaves(yaml.safe_load(ray_resource(MANIFESTS["service"])["spec"]["serveConfigV2"]))
    different = {path for path, value in leaves(SERVE).items() if served.get(path) != value}
    assert different == {"/http_options/host"}
    assert served.keys() == leaves(SERVE).keys()
    assert SERVE["http_options"]["host"] == "127.0.0.1"  # the caller's own stays as it was


def test_a_gpu_changes_devices_and_resources_and_nothing_else() -> None:
    for name, kinds in (("service", ("device", "num_gpus")), ("training", ("use_gpu",))):
        cpu, gpu = leaves(MANIFESTS[name]), leaves(MANIFESTS[f"{name} on GPUs"])
        changed = {path for path in cpu.keys() | gpu.keys() if cpu.get(path) != gpu.get(path)}
        texts = {path for path in changed if path.endswith(("/serveConfigV2", "/run.yaml"))}
        amounts = ("/resources/", "/tolerations/", "/sizeLimit", "eplicas")  # workers on GPUs share pods
        assert all(any(amount in path for amount in amounts) for path in changed - texts)
        for path in texts:
            before, after = (leaves(yaml.safe_load(each[path])) for each in (cpu, gpu))
            added = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
            assert added
            assert all(key.endswith(kinds) for key in added)


@pytest.mark.parametrize(
    ("num_workers", "gpus_per_node", "pods", "gpus"),
    [(32, 8, 4, 8), (7, 8, 1, 7), (12, 8, 2, 6), (1, 8, 1, 1), (32, 4, 8, 4)],
)
def test_workers_on_gpus_share_a_pod_as_far_as_a_node_has_gpus(
    num_workers: int, gpus_per_node: int, pods: int, gpus: int
) -> None:
    """So that NVLink joins them, and the pods are alike."""
    engine = FLUX.engine.model_copy(update={"num_workers": num_workers, "global_batch": num_workers})
    run = FLUX.model_copy(update={"engine": engine})
    group, pod = trainers(rayjob(run, on_gpu=False, gpus_per_node=gpus_per_node))
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == pods
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    assert pod["containers"][0]["resources"]["limits"]["memory"] == f"{96 * gpus}Gi"
    assert pod["containers"][0]["resources"]["limits"]["cpu"] == str(gpus)


def test_a_node_without_gpus_is_named() -> None:
    with pytest.raises(ValueError, match="--gpus-per-node is 0: a worker needs one"):
        rayjob(FLUX, on_gpu=False, gpus_per_node=0)


def trainers(manifests: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group of a training's workers, and its pod."""
    (group,) = ray_resource(manifests)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (pod,) = pods_in(group)
    return group, pod


@EVERY
def test_every_ray_node_has_shared_memory_within_its_own(manifests: list[dict[str, Any]]) -> None:
    """A container has 64 MiB otherwise, on which NCCL fails and Ray's object store goes to the disk."""
    nodes = [pod for pod in pods_in(manifests) if "livenessProbe" in pod["containers"][0]]
    assert nodes
    for pod in nodes:
        (container,) = pod["containers"]
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
        assert volume["emptyDir"]["medium"] == "Memory"
        size_gib = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        assert 0.3 < size_gib / int(container["resources"]["limits"]["memory"].removesuffix("Gi")) <= 0.5


def test_what_comes_from_the_hub_is_kept_on_a_volume_that_pods_share() -> None:
    rewards = {
        "hpsv2.1": {"kind": "hpsv2", "path": "xswu/HPSv2/HPS_v2.1_compressed.pt"},
        "aesthetic": {"kind": "aesthetic", "path": "/weights/head.pth"},  # whose backbone is the hub's
        "hpsv3": {"kind": "hpsv3", "path": "/weights/HPSv3.safetensors"},  # whose base is
    }
    for name, reward in rewards.items():
        serve = copy.deepcopy(SERVE)
        serve["applications"][0]["args"]["rewards"] = {name: reward}
        assert hub_caches(rayservice(serve, on_gpu=True)) == {True}, name
    assert hub_caches(MANIFESTS["service"]) == hub_caches(MANIFESTS["training"]) == {False}
    assert hub_caches(MANIFESTS["training of FLUX"]) == {True}


def hub_caches(manifests: list[dict[str, Any]]) -> set[bool]:
    """Whether the nodes keep the hub's files on the claim srpo-models, and say so."""
    found = set()
    for pod in (pod for pod in pods_in(manifests) if "livenessProbe" in pod["containers"][0]):
        claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: claims[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        home = [each["value"] for each in pod["containers"][0]["env"] if each["name"] == "HF_HOME"]
        assert len(home) == list(mounts.values()).count("srpo-models")
        found.add(bool(home) and mounts[home[0]] == "srpo-models")
    return found


def test_rewards_with_a_part_of_a_gpu_each_share_one_pod() -> None:
    serve = copy.deepcopy(SERVE)
    (application,) = serve["applications"]
    names = ("one", "two", "three")
    application["args"]["rewards"] = {
        name: {"kind": "clip", "path": "deploy/tiny/reward", "placement": "own"} for name in names
    }
    application["deployments"] += [
        {"name": name, "ray_actor_options": {"num_cpus": 1, "num_gpus": 0.3}} for name in names
    ]
    (group,) = ray_resource(rayservice(serve, on_gpu=True))["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (pod,) = pods_in(group)
    limits = pod["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("1", "4")


def test_the_run_of_the_job_is_the_run_file_with_the_cluster_s_addresses(tmp_path: Path) -> None:
    config_map = MANIFESTS["training"][0]
    run_file = tmp_path / "run.yaml"
    run_file.write_text(config_map["data"]["run.yaml"], encoding="utf-8")
    before, after = (leaves(run.model_dump(mode="json")) for run in (TINY, load_run_config(run_file)))
    different = {path for path, value in before.items() if after[path] != value}
    assert different == {"/output_dir", "/reward_service/url", "/tracking/uri"}


def test_addresses_that_a_run_names_itself_are_kept() -> None:
    elsewhere = TINY.model_copy(
        update={"reward_service": TINY.reward_service.model_copy(update={"url": "https://rewards.example.org"})}
    )
    run = RunConfig.model_validate(yaml.safe_load(rayjob(elsewhere, on_gpu=False)[0]["data"]["run.yaml"]))
    assert run.reward_service.url == "https://rewards.example.org"


def test_weights_are_mounted_read_only_where_a_setting_names_them() -> None:
    serve = copy.deepcopy(SERVE)
    serve["applications"][0]["args"]["rewards"] = {"hpsv2.1": {"kind": "hpsv2", "path": "/weights/hps.pt"}}
    for pod in pods_in(rayservice(serve, on_gpu=True)):
        claims = [each["persistentVolumeClaim"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
        assert claims == [{"claimName": "srpo-weights", "readOnly": True}]
    assert "persistentVolumeClaim" not in json.dumps(MANIFESTS["service"])


@EVERY
def test_every_container_is_confined(manifests: list[dict[str, Any]]) -> None:
    pods = list(pods_in(manifests))
    assert len(pods) >= 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]


@EVERY
def test_what_hub_and_bucket_need_may_be_left_out_of_the_secret(manifests: list[dict[str, Any]]) -> None:
    nodes = [container for pod in pods_in(manifests) for container in pod["containers"] if "livenessProbe" in container]
    assert nodes
    for container in nodes:
        references = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef", {}) for each in container["env"]}
        for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert references[name]["optional"] is True


def test_a_worker_s_pod_has_the_memory_that_ray_reserves_for_it() -> None:
    engine = TINY.engine.model_copy(update={"memory_gib_per_worker": 5.5})
    (group,) = ray_resource(rayjob(TINY.model_copy(update={"engine": engine}), on_gpu=False))["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ]
    (pod,) = pods_in(group)
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "6Gi"


def test_a_job_that_is_stopped_has_time_for_a_checkpoint() -> None:
    (pod,) = pods_in(ray_resource(MANIFESTS["training"])["spec"]["rayClusterSpec"]["headGroupSpec"])
    values = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert int(values["RAY_JOB_STOP_WAIT_TIME_S"] or 0) > 30


@EVERY
def test_secrets_are_references(manifests: list[dict[str, Any]]) -> None:
    variables = [each for pod in pods_in(manifests) for container in pod["containers"] for each in container["env"]]
    secret = [each for each in variables if any(word in each["name"] for word in ("KEY", "TOKEN", "PASSWORD", "USER"))]
    assert secret
    assert all(each.keys() == {"name", "valueFrom"} and "secretKeyRef" in each["valueFrom"] for each in secret)
    assert not any(each["kind"] == "Secret" for each in manifests)


@EVERY
def test_every_ray_node_is_probed(manifests: list[dict[str, Any]]) -> None:
    cluster_key = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
    resource = ray_resource(manifests)
    for pod in pods_in(resource["spec"][cluster_key[resource["kind"]]]):
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= pod["containers"][0].keys()


def test_replicas_have_the_time_to_answer_what_they_accepted() -> None:
    (group,) = ray_resource(MANIFESTS["service"])["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (pod,) = pods_in(group)
    assert pod["terminationGracePeriodSeconds"] > SERVE["http_options"]["request_timeout_s"]


@pytest.mark.parametrize(("placements", "num_gpus"), [(("own", "own"), None), (("own", "ingress"), 1)])
def test_the_deployment_that_only_passes_on_gets_no_gpu(placements: tuple[str, str], num_gpus: int | None) -> None:
    serve = copy.deepcopy(SERVE)
    (application,) = serve["applications"]
    rewards = {f"reward-{index}": {"kind": "clip", "path": "x", "placement": p} for index, p in enumerate(placements)}
    application["args"]["rewards"] = rewards
    application["deployments"].append({"name": "reward-0", "ray_actor_options": {"num_cpus": 1}})
    spec = ray_resource(rayservice(serve, on_gpu=True))["spec"]
    (served,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    gpus = {each["name"]: each["ray_actor_options"].get("num_gpus") for each in served["deployments"]}
    assert gpus == {"RewardService": num_gpus, "reward-0": 1}
