"""The verbs that start, follow, list and stop Ray jobs: submit, evaluate, encode-prompts, encode-images, jobs, stop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.clients.jobs import ALIVE, DEFAULT_ADDRESS, Jobs
from services.commands.usage import UsageError, add_resume, add_run_file, launch_arguments
from services.config.run import load_run_config

_EXIT_INTERRUPTED = 130  # as in shells


@dataclass(frozen=True, slots=True)
class JobVerb:
    """A verb that runs a program with a run file as a Ray job."""

    name: str
    help: str
    program: str
    old_names: tuple[str, ...] = ()
    has_models: bool = False
    needs_dataset: bool = False
    may_resume: bool = False
    may_use_gpu: bool = False  # the program itself, if it is the only worker; several request their own GPUs


JOB_VERBS = (
    JobVerb("submit", "train as a Ray job, or go on with a training, and follow it", "trainer.launch", may_resume=True),
    JobVerb(
        "evaluate",
        "compare models with a run's base model, as a Ray job",
        "trainer.jobs.evaluate",
        has_models=True,
        may_use_gpu=True,
    ),
    JobVerb(
        "encode-prompts",
        "encode a run's prompts once, before it trains, as a Ray job",
        "trainer.jobs.encode_prompts",
        old_names=("embed",),
    ),
    JobVerb(
        "encode-images",
        "encode the images of a run's dataset into latents once, before it trains, as a Ray job",
        "trainer.jobs.encode_images",
        old_names=("encode",),
        needs_dataset=True,
    ),
)


def configure_job(parser: argparse.ArgumentParser, verb: JobVerb) -> None:
    """Add the arguments of `verb`."""
    add_run_file(parser)
    if verb.may_resume:
        add_resume(parser)
    if verb.has_models:
        text = "folder of a model or checkpoint; without any, the run's own model"
        parser.add_argument("models", nargs="*", metavar="[NAME=]FOLDER", help=text)
    _add_address(parser)
    parser.set_defaults(handler=partial(_submit, verb=verb))


def configure_jobs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo jobs`."""
    _add_address(parser)
    parser.set_defaults(handler=_list_jobs)


def configure_stop(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo stop`."""
    parser.add_argument("job", metavar="JOB", help="the job's id, as `srpo jobs` lists it")
    _add_address(parser)
    parser.set_defaults(handler=_stop_job)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="address of the cluster's dashboard (%(default)s)")


def _submit(args: argparse.Namespace, verb: JobVerb) -> int:
    """Submit the verb's program as a Ray job, and follow it."""
    config = load_run_config(args.run, args.set if verb.may_resume else ())
    if verb.needs_dataset and config.dataset is None:
        raise UsageError(f"{args.run} has no dataset, so that there is nothing to encode")
    num_gpus = int(verb.may_use_gpu and config.engine.use_gpu and config.engine.max_workers == 1)
    arguments: Sequence[str] = args.models if verb.has_models else launch_arguments(args) if verb.may_resume else ()
    jobs, run_file = Jobs(args.address), Path(args.run).absolute()
    return _follow(jobs, jobs.submit(run_file, arguments, verb.program, num_gpus))


def _follow(jobs: Jobs, job_id: str) -> int:
    """Print what the job prints until it ends. Ctrl-C stops the following only: the job goes on."""
    print(f"job {job_id} (Ctrl-C leaves it running; `srpo stop {job_id}` ends it)", flush=True)
    try:
        for piece in jobs.follow(job_id):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on")
        return _EXIT_INTERRUPTED
    status = jobs.status(job_id)
    print(f"job {job_id}: {status}")
    return 0 if status == "SUCCEEDED" else 1


def _list_jobs(args: argparse.Namespace) -> int:
    """Print one line a job: id, status, run file."""
    for job in Jobs(args.address).list():
        print(f"{job.id}  {job.status:9}  {job.run}")
    return 0


def _stop_job(args: argparse.Namespace) -> int:
    """Stop the job and wait until it has ended. Return 1 if it still runs after Ray should have killed it."""
    jobs = Jobs(args.address)
    status = jobs.end(args.job, tell=partial(print, flush=True))
    print(f"job {args.job}: {status}")
    return int(status in ALIVE)
