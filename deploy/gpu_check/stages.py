"""Run stages, each in a process of its own with a limit in seconds, so that none can take memory or time of the next.

The stages stand in the order of what they are worth. This file needs no package: the stages' processes import them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMITS_S = {"embedded": 75.0, "full_size": 150.0, "half_depth": 75.0, "reward_speed": 75.0, "kernels": 100.0}
LEAST_S = 10.0  # less is not enough to import


@dataclass(frozen=True, slots=True)
class Deadline:
    """When all stages together must have ended, by the monotonic clock."""

    ends: float

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()


def run_all(
    names: Sequence[str],
    command: Mapping[str, Sequence[str]],
    out: Path,
    deadline: Deadline,
    environment: Mapping[str, str],
    limits_s: Mapping[str, float],
    least_s: float = LEAST_S,
) -> dict[str, Any]:
    """Run each stage's command; return their results by name. A stage's file is OUT/NAME.json."""
    results = {}
    for name in names:
        path, limit_s = out / f"{name}.json", min(limits_s[name], deadline.left_s)
        path.unlink(missing_ok=True)
        if limit_s < least_s:
            write_tree(path, {"stage": name, "status": "not run", "error": "the time for all stages was used up"})
        else:
            print(f"{name}: at most {limit_s:.0f} s", flush=True)
            supervise(name, command[name], path, out / "log.txt", limit_s, environment)
        results[name] = json.loads(path.read_text(encoding="utf-8"))
        print("\n".join(f"  {line}" for line in lines_of(results[name])), flush=True)
    return results


def supervise(
    name: str, command: Sequence[str], path: Path, log: Path, limit_s: float, environment: Mapping[str, str]
) -> None:
    """Run one stage's command; say in its file if it was cut or died, beside the results that it had by then."""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"stage": name, "status": "running"}
    if tree["status"] == "running":
        error = (
            f"cut after {limit_s:.0f} s" if code is None else f"its process died with exit code {code}: see {log.name}"
        )
        tree |= {"status": "cut" if code is None else "failed", "error": error}
    tree["seconds_with_imports"] = round(time.monotonic() - started, 1)
    write_tree(path, tree)


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Return what a person reads of a stage: its status, and each check that failed."""
    checks = result.get("checks", [])
    failed = [check for check in checks if not check["is_within"]]
    kept = f", {len(checks) - len(failed)} of {len(checks)} checks kept" if checks else ""
    lines = [f"{result['status']} in {result.get('seconds_with_imports', 0):.0f} s{kept}"]
    if "error" in result:
        lines.append(result["error"])
    lines += [f"{check['name']}: {check['value']} must be {check['limit']}" for check in failed]
    errors = {name: each["error"] for name, each in result.get("results", {}).items() if _is_error(each)}
    return lines + [f"{name}: {error}" for name, error in errors.items()]


def is_good(result: Mapping[str, Any]) -> bool:
    """Tell whether a stage came to its end with every check kept. An item that does not work here is no failure."""
    return result["status"] == "done" and all(check["is_within"] for check in result["checks"])


def write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file that is never seen half written."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _is_error(result: Any) -> bool:
    return isinstance(result, dict) and isinstance(result.get("error"), str)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process with all that it started, such as compilers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
