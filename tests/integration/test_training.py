"""Runs from a run file to an exported model on real Ray Train, DeepSpeed, MLflow and the reward service's app.

Trainings of the same six steps: undisturbed on two workers, on two of which one is killed, and on one worker with
another micro-batch and ZeRO stage, with the prompts encoded before. All must be the same training, and one that its
guard ends must be its beginning.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import ray
import torch
import yaml
from diffusers import FluxPipeline
from safetensors.torch import load_file
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.clients.tracking import Tracker
from services.commands.main import main
from services.config.run import load_run_config
from services.config.steering import ERROR_TAG, TAG
from services.contract import REWARDS_PATH, RewardRequest
from tests.pictures import photo
from tests.serving import reward_app, serve_app
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX, make_tiny_flux
from tests.tiny_judges import make_tiny_judges
from tests.tiny_models import make_tiny_clip
from trainer.data.captioned_images import DatasetError
from trainer.data.conditioning import manifest_of
from trainer.data.prompt_embeddings import prepare, write_shard
from trainer.draws import evaluation_generator
from trainer.evaluation.drawing import Evaluation, to_uint8
from trainer.jobs.encode_images import encode, listed_images
from trainer.model.loading import load_text_encoders

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 6
HELD_OUT = PROMPTS[:5]
NUM_TOGETHER = 2  # images of an evaluation or of a check in one request
REQUESTS_BASE = 1 + 3 + 2  # the launcher's question, evaluation and check
REQUESTS_TWO_STEPS = 2 * 8 + 2  # 4 prompts × 2 branches each, and the check after them
TIMEOUT_S = 180
# Which callers' images share a forward of the reward is chance, and so are a gradient's last bits. 2 steps move 2e-3.
WEIGHTS_ATOL = 1e-5
# A colour that such bits round the other way moves a distance by up to this; two steps move it by 4e-2.
GUARD_RTOL = 2e-3


@dataclass
class Wiretap:
    """The reward app, seeing who calls: a worker is known by the port it calls from, never by a name."""

    app: ASGIApp
    on_request: Callable[[int, int], None] = field(default=lambda count, pid: None)  # requests so far, caller's pid
    count: int = 0
    asked: list[tuple[int, set[str | None]]] = field(default_factory=list)  # caller's pid, and all words of a request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == REWARDS_PATH:
            pid = pid_at_port(scope["client"][1])
            self.count += 1
            self.on_request(self.count, pid)
            receive = self._noted(receive, pid)
        await self.app(scope, receive, send)

    def _noted(self, receive: Receive, pid: int) -> Receive:
        body = bytearray()

        async def pass_on() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body"):
                pairs = RewardRequest.from_bytes(bytes(body)).pairs
                self.asked.append((pid, {word for pair in pairs for word in (pair.positive, pair.negative)}))
            return message

        return pass_on


def pid_at_port(port: int) -> int:
    (pid,) = {each.pid for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == port and each.pid}
    return pid


@dataclass
class Bench:
    """What the runs share: a Ray cluster, a reward service, an MLflow store, and a tiny model in `folder`."""

    folder: Path
    ray_address: str
    reward_url: str
    wiretap: Wiretap

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def write_run(
        self,
        name: str,
        stop_when: Sequence[dict[str, Any]] = (),
        sections: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> Path:
        """A run file with paths relative to `folder`, from where runs are started."""
        size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
        run = {
            "name": name,
            "num_steps": NUM_STEPS,
            "model": {"path": "flux", **size},
            "prompts": {"path": "train.txt"},
            "control_words": {"positive": "3D", "negative": "Flat"},
            "rollout": {"num_steps": 3},
            "rewards": [{"name": "tiny"}],
            "reward_service": {"url": self.reward_url},
            "optimizer": {"learning_rate": 1e-3},
            "engine": {"num_workers": 2, "global_batch": 4, "cpus_per_worker": 0.5} | engine,
            "checkpoint": {"every_num_steps": 2, "num_kept": 4},
            "guard": {"every_num_steps": 2, "num_prompts": 4, "stop_when": list(stop_when)},
            "evaluation": {
                "prompts_path": "heldout.txt",
                "num_steps": 3,
                "every_num_steps": 4,
                "batch": NUM_TOGETHER,
                "judge_path": "judge",
            },
            "tracking": {"uri": self.tracking_uri},
        }
        path = self.folder / f"{name}.yaml"
        chosen = {key: value for key, value in (run | dict(sections or {})).items() if value is not None}
        path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        return path

    def start(self, run_file: Path, program: str = "trainer.launch") -> subprocess.Popen[str]:
        environment = os.environ | {
            "RAY_ADDRESS": self.ray_address,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", program, run_file.name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **pipes)  # type: ignore[call-overload]

    def train(self, run_file: Path) -> Run:
        """Run to the end and return what it left."""
        return self.find(run_file.stem, self.finish(run_file))

    def finish(self, run_file: Path, program: str = "trainer.launch") -> str:
        """What the program prints until it has ended well."""
        with self.start(run_file, program) as process:
            try:
                output, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def set_tag(self, name: str, key: str, value: str) -> None:
        """On the run of this name, as a person may do in MLflow's pages."""
        Tracker.latest(self.tracking_uri, "srpo", name).set_tag(key, value)

    def find(self, name: str, output: str) -> Run:
        client = mlflow.MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("srpo")
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return Run(self.folder / "outputs" / name, client, run, output)


@dataclass
class Run:
    """What a run left: its folder, its MLflow record and what it printed."""

    folder: Path
    client: mlflow.MlflowClient
    record: Any
    output: str

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) as logged, in time: a repeated step comes twice."""
        points = self.client.get_metric_history(self.record.info.run_id, metric)
        return [(point.step, point.value) for point in points]

    def last_values(self, metric: str) -> list[float]:
        """The value of each step, the last one where a step was repeated."""
        by_step = dict(self.history(metric))
        assert sorted(by_step) == list(range(1, NUM_STEPS + 1))
        return [by_step[step] for step in sorted(by_step)]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")

    def weights_at(self, step: int) -> dict[str, torch.Tensor]:
        """Those of a checkpoint that is kept."""
        for file in (self.folder / "checkpoints").rglob("mp_rank_00_model_states.pt"):
            states = torch.load(file, weights_only=False)
            if states["step"] == step:
                return states["module"]
        raise AssertionError(f"no checkpoint of step {step}")

    def artifacts(self, folder: str | None = None) -> set[str]:
        return {item.path for item in self.client.list_artifacts(self.record.info.run_id, folder)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("training")
    make_tiny_flux(folder / "flux")
    make_tiny_clip(folder / "clip")
    real = torch.randint(0, 256, (len(PROMPTS), 3, 16, 16), dtype=torch.uint8)
    make_tiny_judges(folder / "judge", ("3D", "Flat"), PROMPTS, real)
    (folder / "train.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n".join(HELD_OUT), encoding="utf-8")
    wiretap = Wiretap(reward_app(Worker({"tiny": ClipArgs(kind="clip", path=str(folder / "clip"))}, WorkerArgs())))
    # short, because the path of a socket must be
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder, serve_app(wiretap) as url:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=ray_folder, log_to_driver=False)
        try:
            yield Bench(folder, ray.get_runtime_context().gcs_address, url, wiretap)
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Run:
    return bench.train(bench.write_run("undisturbed", zero_stage=2))


def test_a_run_leaves_numbers_pictures_and_files(undisturbed: Run) -> None:
    summary = json.loads((undisturbed.folder / "evaluation.json").read_text())
    numbers = {"eval/style_share_3D", "eval/style_share_Flat", "eval/frechet_3D", "eval/frechet_Flat"}
    numbers |= {"eval/subject_top5", "eval/reward"}
    assert set(summary["base"]) == set(summary["aligned"]) == numbers
    assert summary["num_images"] == len(HELD_OUT)
    assert {"load", "base_evaluation", "steps", "aligned_evaluation", "export"} <= set(summary["seconds"])
    assert undisturbed.record.info.status == "FINISHED"
    assert [step for step, _ in undisturbed.history("eval/reward")] == [0, NUM_STEPS]
    metrics = {"loss", "grad_norm", "reward_denoise", "reward_invert", "seconds_rollout", "seconds_reward"}
    metrics |= {
        "steering_version",
        "discount_denoise",
        "tiny/preference_scale_denoise",
        "recovery_weight_invert",
    }  # λ, k and w
    for metric in metrics:
        assert [step for step, _ in undisturbed.history(metric)] == list(range(1, NUM_STEPS + 1))
    assert undisturbed.record.data.params["engine.zero_stage"] == "2"
    assert {"undisturbed.yaml", "evaluation.json", "before_after.png", "model"} <= undisturbed.artifacts()
    grids = {re.split(r"\W", path)[3] for path in undisturbed.artifacts("images") if "samples" in path}
    assert grids == {"0", "4", str(NUM_STEPS)}
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in undisturbed.output


def test_the_exported_model_draws_what_the_trainer_drew(undisturbed: Run) -> None:
    pipeline = FluxPipeline.from_pretrained(undisturbed.folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(HELD_OUT),
        generator=[evaluation_generator(0, index) for index in range(len(HELD_OUT))],
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=3,
        guidance_scale=3.5,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="pt",
    ).images
    aligned = Evaluation.load(undisturbed.folder / "aligned.safetensors").images
    base = Evaluation.load(undisturbed.folder / "base.safetensors").images
    assert (to_uint8(drawn).int() - aligned.int()).abs().max() <= 1
    assert not torch.equal(base, aligned)


def changed(run_file: Path, section: str, **values: Any) -> Path:
    run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    run[section] |= values
    run_file.write_text(yaml.safe_dump(run), encoding="utf-8")
    return run_file


def test_one_worker_with_other_micro_batches_and_stage_and_prompts_from_disk_is_the_same_training(
    bench: Bench, undisturbed: Run
) -> None:
    run_file = bench.write_run("alone", num_workers=1, micro_batch=2, zero_stage=3)
    changed(run_file, "prompts", embeddings_path="embeddings", shard_prompts=3)
    kept = begin_embeddings(run_file, bench.folder)
    written = kept.stat().st_mtime_ns
    told = bench.finish(run_file, "trainer.jobs.encode_prompts")
    assert f"{len(PROMPTS)} prompts, 2 of them embedded before" in told
    assert f"embedded {len(PROMPTS) - 2}/{len(PROMPTS) - 2} prompts" in told, "in shards of three"
    assert kept.stat().st_mtime_ns == written, "what was there is not made again"
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".json"] + 3 * [".safetensors"]
    alone = bench.train(run_file)
    for metric in ("loss", "grad_norm", "reward_denoise", "reward_invert"):
        assert alone.last_values(metric) == pytest.approx(undisturbed.last_values(metric), abs=1e-5)
    torch.testing.assert_close(alone.weights(), undisturbed.weights(), rtol=0, atol=1e-4)


def begin_embeddings(run_file: Path, folder: Path) -> Path:
    """What a job that was killed leaves: a shard of two prompts, and a part of another. Returns the shard."""
    run, embeddings = load_run_config(run_file), folder / "embeddings"
    prepare(embeddings, manifest_of(run, folder / "flux"))
    text = load_text_encoders(str(folder / "flux"), torch.float32)
    shard = write_shard(embeddings, PROMPTS[:2], text.encode_prompts(PROMPTS[:2], MAX_SEQUENCE_LENGTH))
    (embeddings / "0.safetensors.partial").write_bytes(shard.read_bytes()[:100])
    return shard


def test_a_killed_worker_costs_steps_but_changes_nothing(bench: Bench, undisturbed: Run) -> None:
    """So does a tag that cannot be understood."""

    def on_request(count: int, pid: int) -> None:
        if count == REQUESTS_BASE + 1:
            bench.set_tag("killed", TAG, '{"positive": ""}')
        elif count == REQUESTS_BASE + 2 * REQUESTS_TWO_STEPS + 3:  # in step 5
            os.kill(pid, signal.SIGKILL)

    bench.wiretap.count = 0
    bench.wiretap.on_request = on_request
    killed = bench.train(bench.write_run("killed", zero_stage=2))
    losses = [step for step, _ in killed.history("loss")]
    assert losses.count(1) == losses.count(2) == 1, "it resumed from a checkpoint"
    assert [step for step, _ in killed.history("eval/reward")] == [0, NUM_STEPS]
    assert killed.last_values("loss") == pytest.approx(undisturbed.last_values("loss"), abs=1e-6)
    torch.testing.assert_close(killed.weights(), undisturbed.weights(), rtol=0, atol=WEIGHTS_ATOL)
    assert killed.last_values("steering_version") == [0] * NUM_STEPS
    assert "positive: " in killed.record.data.tags[ERROR_TAG]


def test_a_rule_ends_a_run_and_the_best_checkpoint_is_exported(bench: Bench, undisturbed: Run) -> None:
    """Broken first at step 4, while a worker is killed in step 4: what was noted before is not forgotten.

    Neither is that the run was steered: to the words of its file, which leaves the training the same.
    """
    rule = rule_broken_first_at(undisturbed, step=4)

    def on_request(count: int, pid: int) -> None:
        begun = count - REQUESTS_BASE - REQUESTS_TWO_STEPS
        if begun == 1:  # in step 3
            bench.set_tag("guarded", TAG, '{"positive": "3D", "negative": "Flat"}')
        # the words are tried out, then the fifth request of step 4: a worker sends four, so both have begun it and
        # step 3 is on record
        elif begun == 8 + 1 + 5:
            os.kill(pid, signal.SIGKILL)

    bench.wiretap.count = 0
    bench.wiretap.on_request = on_request
    guarded = bench.train(bench.write_run("guarded", [rule], zero_stage=2))
    losses = [step for step, _ in guarded.history("loss")]
    assert losses.count(3) == 2, "killed in step 4, resumed before step 3"
    assert losses[-1] == 4, "ended after step 4"
    assert guarded.history("steering_version") == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1)]
    seen = dict(undisturbed.history(rule["metric"])[:3])
    assert dict(guarded.history(rule["metric"])) == pytest.approx(seen, rel=GUARD_RTOL)
    assert guarded.record.info.status == "FINISHED"
    assert guarded.record.data.tags["exported_step"] == "2"
    assert guarded.record.data.tags["stopped_by"] in guarded.output
    assert rule["metric"] in guarded.record.data.tags["stopped_by"]
    summary = json.loads((guarded.folder / "evaluation.json").read_text())
    assert summary["guard"]["exported_step"] == 2
    torch.testing.assert_close(guarded.weights(), undisturbed.weights_at(2), rtol=0, atol=WEIGHTS_ATOL)


def rule_broken_first_at(run: Run, step: int) -> dict[str, Any]:
    """A bound on a number that the guard has seen in `run`, halfway between it and all that came before."""
    for metric in ("guard/reward", "guard/common_mode", "guard/frechet_3D", "guard/frechet_Flat"):
        values = dict(run.history(metric))
        before = [value for earlier, value in values.items() if earlier < step]
        beyond = 4 * GUARD_RTOL * abs(values[step])  # so that no last bit decides
        if values[step] > max(before) + beyond:
            return {"metric": metric, "above": (values[step] + max(before)) / 2}
        if values[step] < min(before) - beyond:
            return {"metric": metric, "below": (values[step] + min(before)) / 2}
    raise AssertionError("no number of the guard is new at this step")


def test_a_run_on_real_images_reads_their_latents(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Encoded by Ray Data once: what is there is left alone, and a bad image is named."""
    images = bench.folder / "images"
    images.mkdir()
    for index, caption in enumerate(PROMPTS):
        height, width = (HEIGHT_PX, WIDTH_PX) if index % 2 else (WIDTH_PX + 9, HEIGHT_PX)
        photo(height, width).rotate(index).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(caption, encoding="utf-8")
    latents = bench.folder / "latents"
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "sizes": [[HEIGHT_PX, WIDTH_PX], [WIDTH_PX, HEIGHT_PX]]}
    offline = {
        "num_steps": 2,
        "model": {"path": str(bench.folder / "flux"), **size, "max_sequence_length": MAX_SEQUENCE_LENGTH},
        "prompts": None,
        "dataset": {"path": str(images), "latents_path": str(latents)},
    }
    run_file = bench.write_run("offline", sections=offline, num_workers=1)
    config = load_run_config(run_file)
    encode(config, listed_images(config))
    written = {file: file.stat().st_mtime_ns for file in latents.glob("*.safetensors")}
    assert len(written) == 2

    whole = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"1 of 8 images are bad: .*0\.png is damaged"):
        encode(config, listed_images(config))
    (images / "0.png").write_bytes(whole)
    (images / "0.txt").write_text("another caption", encoding="utf-8")
    assert "another caption" in encode(config, listed_images(config)).read_text(encoding="utf-8")
    assert {file: file.stat().st_mtime_ns for file in latents.glob("*.safetensors")} == written
    assert "all images are encoded already" in capsys.readouterr().out

    bench.wiretap.on_request = lambda count, pid: None
    run = bench.train(run_file)
    assert [step for step, _ in run.history("loss")] == [1, 2]
    assert run.record.data.params["dataset.path"] == str(images)
    assert [step for step, _ in run.history("eval/reward")] == [0, 2]


def test_a_rule_that_the_base_model_breaks_ends_the_run_at_its_first_check(bench: Bench) -> None:
    """A mistake of the run file, found by a worker: it is told in one line, and no worker is started again."""
    pids = set()
    bench.wiretap.on_request = lambda _, pid: pids.add(pid)
    sections = {"finetune": {"kind": "lora", "rank": 2}, "ema": {"decay": 0.5}}
    rule = {"metric": "guard/saturation", "above": -1.0}
    with bench.start(bench.write_run("mistaken", [rule], sections)) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "guard.stop_when.0: the base model is beyond it: guard/saturation" in line
    assert len(pids) == 2, "the launcher, and worker 0 once"
    record = bench.find("mistaken", output).record
    assert record.info.status == "FAILED"
    assert 0 < int(record.data.tags["num_trained_parameters"]) < 5000, "the adapter's alone"


def test_a_run_is_steered_at_a_step_on_all_workers_and_when_stopped_leaves_none(bench: Bench) -> None:
    """And a run whose encoder is too short for its prompts says that."""
    in_step_4 = threading.Event()
    base, steered = {"3D", "Flat"}, {"Oil", "Photo"}
    first_of_step = {step: REQUESTS_BASE + 1 + after for step, after in {1: 0, 2: 8 + 1, 4: 8 + 1 + 8 + 2 + 8}.items()}

    def on_request(count: int, _: int) -> None:
        if count == first_of_step[1]:
            words = ["--positive", "Oil", "--negative", "Photo"]
            assert main(["steer", "stopped", *words, "--tracking-uri", bench.tracking_uri]) == 0
        elif count == first_of_step[2]:
            bench.set_tag("stopped", TAG, '{"weights": {"nobody": 1}}')
        elif count == first_of_step[4]:
            in_step_4.set()

    bench.wiretap.count, bench.wiretap.asked = 0, []
    bench.wiretap.on_request = on_request
    run_file = changed(bench.write_run("stopped"), "model", max_sequence_length=3)
    with bench.start(run_file) as process:
        assert in_step_4.wait(TIMEOUT_S)
        running = [psutil.Process(pid) for pid in {pid for pid, _ in bench.wiretap.asked}]
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    stopped = bench.find("stopped", output)
    assert stopped.record.info.status == "KILLED"
    warning = stopped.record.data.tags["warning_long_prompts"]
    assert f"of {len(PROMPTS)} prompts have more than 3 T5 tokens (model.max_sequence_length)" in warning
    assert output.count(f"warning: {warning}") == 1
    _, alive = psutil.wait_procs(running, timeout=30)
    assert not alive
    expected = [base] * (REQUESTS_BASE + 8) + [steered] * (1 + 8) + [base] * 2 + [steered] * 8  # a check is not steered
    assert [words for _, words in bench.wiretap.asked[: len(expected)]] == expected
    step_2 = bench.wiretap.asked[first_of_step[2] - 1 :][:8]
    assert len({pid for pid, _ in step_2}) == 2
    assert stopped.history("steering_version")[:3] == [(1, 0), (2, 1), (3, 1)]
    assert "no reward 'nobody'" in stopped.record.data.tags[ERROR_TAG]
    assert "steered to version 1: Oil | Photo" in output
