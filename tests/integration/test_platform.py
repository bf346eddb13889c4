"""The platform as a person uses it: services up on ports of their own, jobs, commands, the demo, services down.

One set of services for the whole file, at tiny size with random weights; nothing of a running `make up` is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import PIL.Image
import psutil
import pytest
import torch
import yaml

from deploy.demo import demo, table
from deploy.local import LocalServices, main
from deploy.settings import ROOT, LocalError, Settings, free_port
from services.clients.jobs import ADDRESS_VARIABLES, Jobs, JobsError
from services.clients.tracking import Tracker
from services.commands import main as cli
from tests.integration.platform_runs import REWARD, at, srpo, write_run
from tests.pictures import photo
from tests.tiny_flux import HEIGHT_PX, PROMPTS, WIDTH_PX, make_tiny_flux
from tests.tiny_judges import make_tiny_judges
from tests.tiny_models import make_tiny_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, judges and prompts that run files name by relative paths."""
    folder = tmp_path_factory.mktemp("platform")
    make_tiny_flux(folder / "flux")
    make_tiny_clip(folder / "clip")
    held_out = PROMPTS[:4]
    real = torch.randint(0, 256, (len(held_out), 3, 16, 16), dtype=torch.uint8)
    make_tiny_judges(folder / "judge", ("3D", "Flat"), held_out, real)
    (folder / "train.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n".join(held_out), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def where(folder: Path) -> Settings:
    serve = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8"))
    serve["applications"][0]["args"]["rewards"] = {REWARD: {"kind": "clip", "path": str(folder / "clip")}}
    (folder / "serve.yaml").write_text(yaml.safe_dump(serve), encoding="utf-8")
    return Settings(free_port(), free_port(), free_port(), folder / "run", folder / "serve.yaml")


@pytest.fixture(scope="module")
def services(where: Settings) -> Iterator[LocalServices]:
    services = LocalServices(where)
    started = services.up()
    assert [process.name for process in started] == ["ray", "mlflow"]
    yield services
    services.down()


@pytest.fixture(scope="module")
def run_files(folder: Path) -> list[Path]:
    """The demo's two, with all that its claims need: real pictures, an oracle and a guard."""
    (folder / "real").mkdir()
    for index, prompt in enumerate(PROMPTS[:4]):
        photo(HEIGHT_PX + index, WIDTH_PX).save(folder / f"real/{index}.png")
        (folder / f"real/{index}.txt").write_text(prompt, encoding="utf-8")
    evaluation = {"prompts_path": "heldout.txt", "num_steps": 2, "judge_path": "judge", "truth": {"path": "real"}}
    changes = {
        "evaluation": {**evaluation, "draws_oracle": True},
        "guard": {"prompts_path": "heldout.txt", "num_prompts": 4},
    }
    return [write_run(folder, "there", "3D", "Flat", **changes), write_run(folder, "back", "Flat", "3D", **changes)]


def test_up_again_starts_nothing(services: LocalServices, where: Settings) -> None:
    assert LocalServices(where).up() == []


def test_other_services_on_the_same_port_are_refused_by_name(services: LocalServices, folder: Path) -> None:
    others = LocalServices(replace(services.settings, run_dir=folder / "other"))
    with pytest.raises(LocalError, match=rf"port {services.settings.dashboard_port} .* --dashboard-port"):
        others.up()
    assert not (folder / "other" / "ray.json").exists()
    assert services.ray.is_running()


def test_a_reward_that_cannot_load_is_named_and_nothing_is_left_running(
    folder: Path, where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "1")  # in place of three tries of 15 s
    config = where.serve_config.read_text(encoding="utf-8").replace(str(folder / "clip"), str(folder / "absent"))
    (folder / "bad_serve.yaml").write_text(config, encoding="utf-8")
    ports = free_port(), free_port(), free_port()
    services = LocalServices(Settings(*ports, folder / "bad", folder / "bad_serve.yaml"))
    with pytest.raises(LocalError, match=r"DEPLOY_FAILED: .*no reward model at .*absent"):
        services.up()
    assert not services.ray.is_running()
    assert not services.mlflow.is_running()


def test_a_ray_that_gives_up_is_started_once_more_and_knows_no_other_cluster(
    folder: Path, where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    services = LocalServices(Settings(free_port(), free_port(), free_port(), folder / "again", where.serve_config))
    services.ray.start([sys.executable, "-c", "raise SystemExit('timed out during startup')"], folder, {})
    try:
        services._wait_for_ray(f"{services.settings.dashboard_url}/api/serve/applications/")
        assert services.ray.is_running()
        leader = json.loads((folder / "again" / "ray.json").read_text(encoding="utf-8"))["pid"]
        environment = psutil.Process(leader).environ()
        assert "RAY_AUTH_MODE" in environment
        assert not environment.keys() & set(ADDRESS_VARIABLES)
    finally:
        services.down()


def test_an_up_that_is_terminated_leaves_nothing_running(folder: Path, where: Settings) -> None:
    run_dir = folder / "terminated"
    ports = [f"--{name}-port={free_port()}" for name in ("dashboard", "serve", "mlflow")]
    command = [*(sys.executable, "-m", "deploy.local", "up", f"--run-dir={run_dir}"), *ports]
    command.append(f"--serve-config={where.serve_config}")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert any(" is up " in line for line in up.stdout)  # the first of the three
        services = LocalServices(replace(where, run_dir=run_dir))
        family = services.ray.members() + services.mlflow.members()
        assert family
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
    assert up.returncode == 130
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not list(run_dir.glob("*.json"))


def test_score_prints_reward_and_both_similarities(services: LocalServices, folder: Path) -> None:
    PIL.Image.new("RGBA", (20, 30), (255, 0, 0, 128)).save(folder / "red.png")
    pair = ("--prompt", "red heart", "--positive", "3D", "--negative", "Flat")
    result = srpo("score", "red.png", *pair, "--json", "--url", services.settings.serve_url, cwd=folder)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)
    difference = numbers["positive_similarity"] - numbers["negative_similarity"]
    assert numbers["reward"] == pytest.approx(difference, abs=1e-6)


def test_a_failing_job_fails_the_command_and_shows_why(services: LocalServices, folder: Path) -> None:
    run = write_run(folder, "no_model", "3D", "Flat", model={"path": "nowhere", "height_px": 32, "width_px": 48})
    result = srpo("submit", run.name, "--address", services.settings.dashboard_url, cwd=folder)
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert any(job.run == str(run) and job.status == "FAILED" for job in Jobs(services.settings.dashboard_url).list())


def test_evaluate_compares_in_a_job_of_its_own(services: LocalServices, folder: Path) -> None:
    settings = services.settings
    run = write_run(folder, "judged", "3D", "Flat", comparison={"num_draws": 20}, **at(settings))
    result = srpo("evaluate", run.name, "again=flux", "--address", settings.dashboard_url, cwd=folder)
    assert result.returncode == 0, result.stdout
    numbers = json.loads((folder / "outputs/judged/comparison/numbers.json").read_text(encoding="utf-8"))
    assert set(numbers) == {"base", "again"}
    assert numbers["again"][f"reward_{REWARD}"]["difference"]["value"] == 0
    assert "report.html" in result.stdout


def test_a_wrong_token_is_refused_with_the_cure(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(JobsError, match="token"):
        Jobs(services.settings.dashboard_url)


def test_the_address_that_is_given_counts_whatever_the_environment_names(
    services: LocalServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    Jobs(services.settings.dashboard_url).list()
    assert os.environ.keys() >= set(ADDRESS_VARIABLES)


def test_rays_own_command_trains(services: LocalServices, folder: Path) -> None:
    """As deploy/OPERATING.md has it; such a job runs in the checkout."""
    address, output_dir = services.settings.dashboard_url, folder / "plain_outputs"
    run = write_run(folder, "plain", "3D", "Flat", output_dir=str(output_dir), **at(services.settings))
    tree = yaml.safe_load(run.read_text(encoding="utf-8"))
    for section, key in (("model", "path"), ("prompts", "path"), ("evaluation", "prompts_path")):
        tree[section][key] = str(folder / tree[section][key])
    tree["evaluation"]["judge_path"] = None
    run.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address, "--"]
    command += ["python", "-m", "trainer.launch", str(run)]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "done: " in result.stdout
    assert (output_dir / "plain" / "latest" / "evaluation.json").is_file()


def test_a_stopped_job_ends(services: LocalServices, folder: Path, run_files: list[Path], monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    jobs = Jobs(services.settings.dashboard_url)
    job_id = jobs.submit(run_files[0])
    jobs.stop(job_id)
    list(jobs.follow(job_id))
    assert jobs.status(job_id) == "STOPPED"


def test_a_job_sees_the_caller_s_keys_prints_none_and_has_time_to_end(
    services: LocalServices, run_files: list[Path], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    key = f"key-{secrets.token_hex(8)}"
    for name in ("SRPO_API_KEY", "MLFLOW_TRACKING_TOKEN", "no_proxy"):
        monkeypatch.setenv(name, key)
    jobs, printed, told = Jobs(address := services.settings.dashboard_url), "", ""
    digest = hashlib.sha256(key.encode()).hexdigest()
    job_id = jobs.submit(run_files[0], [digest], program="tests.integration.slow_to_end")
    for piece in jobs.follow(job_id):
        printed += piece
        if "ready" in printed and not told:
            assert cli.main(["stop", job_id, "--address", address]) == 0
            told = capsys.readouterr().out
    seen = "MLFLOW_TRACKING_TOKEN SRPO_API_KEY no_proxy"
    assert f"driver: {seen}\n" in printed
    assert f"worker: {seen}\n" in printed
    assert printed.endswith("checkpoint written\n")
    assert told.startswith(f"job {job_id} is ending (5 s; a training writes a checkpoint)\n")
    assert told.endswith(f"\njob {job_id}: STOPPED\n")
    assert key not in printed
    assert key not in "".join(file.read_text() for file in (services.settings.run_dir / "logs").iterdir())


def test_demo_shows_both_directions_and_leaves_running_services_up(
    services: LocalServices, folder: Path, run_files: list[Path], monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    summary = demo(LocalServices(services.settings), run_files, folder / "out")
    assert json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8")) == summary
    assert set(summary["runs"]) == {"3D | Flat", "Flat | 3D"}
    for policies in summary["runs"].values():
        assert set(policies["base"]) == set(policies["oracle"])
        gaps = set(policies["aligned"]) - set(policies["base"])
        assert gaps == {f"gap_closed_{name}" for name in ("l1", "ssim", "edge_correlation", "hue_distance")}
        base, aligned, oracle = (policies[name]["truth_l1"] for name in ("base", "aligned", "oracle"))
        assert policies["aligned"]["gap_closed_l1"] == pytest.approx((base - aligned) / (base - oracle))
    with PIL.Image.open(folder / "out" / "before_after.png") as picture:
        assert picture.width > 3 * WIDTH_PX
    assert "3D | Flat" in table(summary)
    assert "ETA" in capfd.readouterr().out
    assert services.ray.is_running()
    assert services.mlflow.is_running()


def test_down_ends_jobs_and_leaves_no_process_and_no_listener(
    services: LocalServices, where: Settings, folder: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    job_id = submit_endless(where, folder)
    leaders = [json.loads((where.run_dir / f"{name}.json").read_text())["pid"] for name in ("ray", "mlflow")]
    family = [child for pid in leaders for child in psutil.Process(pid).children(recursive=True)]
    assert main(["down", f"--run-dir={where.run_dir}", f"--dashboard-port={where.dashboard_port}"]) == 0
    text = capsys.readouterr().out
    assert f"stopping job {job_id}" in text
    assert "stopped: ray, mlflow" in text
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for port in (where.dashboard_port, where.serve_port, where.mlflow_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert LocalServices(where).down() == []
    store = f"sqlite:///{where.run_dir / 'mlflow' / 'mlflow.db'}"
    run_id = Tracker.latest(store, "srpo", "endless").run_id
    assert mlflow.MlflowClient(store).get_run(run_id).info.status == "KILLED"


def submit_endless(where: Settings, folder: Path) -> str:
    """A training that has begun and would go on for many minutes; its job."""
    jobs, printed = Jobs(where.dashboard_url), ""
    job_id = jobs.submit(write_run(folder, "endless", "3D", "Flat", num_steps=5000, **at(where)))
    for piece in jobs.follow(job_id):
        printed += piece
        if "step 1/" in printed:
            return job_id
    raise AssertionError(printed)
