"""Write the results of finished runs: method.json, the tables in results/README and LOG, and the pictures."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from safetensors.torch import load_file
from torch import Tensor

from deploy.bench_method.plan import Plan
from deploy.bench_method.results import Estimate, Result, Row, broken_rules, is_in_time
from deploy.settings import ROOT
from services.config.evaluation import StopRuleConfig

_RESULTS = ROOT / "deploy" / "runs" / "results"
_TABLES, _LOG = _RESULTS / "README.md", ROOT / "deploy" / "runs" / "LOG.md"
_LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed")
_NUM_PICTURES, _LABEL_PX = 10, 250
_GAP_TITLES = {
    "gap_closed_l1": "gap closed: L1",
    "gap_closed_ssim": "SSIM",
    "gap_closed_edge_correlation": "edges",
    "gap_closed_hue_distance": "hue",
}


def write_report(plan: Plan, stages: Mapping[str, Sequence[Row]], texts: Mapping[str, str], folder: Path) -> None:
    """Write method.json, the tables, and pictures from `folder`: of the first seed, and of every learning rate.

    `stages`: the rows of methods, sweep, ablations, default and hacking; `texts`: those of guards and default.
    """
    methods, sweep = stages["methods"], stages["sweep"]
    summary = {
        "plan": json.loads(plan.model_dump_json()),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": _processor()},
        "versions": {name: version(name) for name in _LIBRARIES},
        **{stage: [_as_json(row) for row in rows] for stage, rows in stages.items()},
    }
    (_RESULTS / "method.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    between(_TABLES, "bench-method", table_of(methods))
    for what, text in texts.items():
        between(_TABLES, f"bench-method-{what}", text)
    between(_LOG, "bench-method-sweep", table_of(sweep))
    between(_LOG, "bench-method-ablations", table_of([row for row in stages["ablations"] if row.results]))
    strips = [(row.label, row.results[0]) for row in methods if row.results]
    picture(strips, folder, plan.test_images_per_prompt).save(_RESULTS / "method.png")
    swept = [(f"{row.label} {_rate(row)}", row.results[0]) for row in sweep if row.results]
    picture(swept, folder, num_images_per_prompt=1).save(_RESULTS / "method_sweep.png")


def between(file: Path, marker: str, text: str) -> None:
    """Replace what stands between <!-- marker --> and <!-- /marker -->. Raise ValueError if they are missing."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    whole = file.read_text(encoding="utf-8")
    if start not in whole or end not in whole:
        raise ValueError(f"{file} has no {start} … {end}")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    file.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", whole), encoding="utf-8")


def table_of(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    wanted = next(row.results[0].wanted for row in rows if row.results)
    columns: dict[str, Callable[[Row], str]] = {"steps": lambda row: row.estimate("num_steps").as_text()}
    columns |= {title: partial(_gap_cell, name) for name, title in _GAP_TITLES.items()}
    columns |= {
        "subject": lambda row: row.estimate("truth_subject_similarity").as_text(digits=3),
        f"judged {wanted}": lambda row: row.estimate(f"style_share_{wanted}").as_text(percent=True),
        "diversity, of the oracle's": partial(_gap_cell, "oracle_diversity_share"),
        "damage": lambda row: row.estimate("damage").as_text(digits=2),
        "CPU-s": lambda row: row.estimate("cpu_s").as_text(),
    }
    head = ["", "learning rate", *columns]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        label = row.label + (f" ({len(row.results)} of {row.num_wanted} seeds)" if row.is_short else "")
        empty = [""] * (len(columns) - 1)
        cells = [cell_of(row) for cell_of in columns.values()] if row.results else [row.trouble, *empty]
        lines.append([label, _rate(row), *cells])
    return _as_table(lines)


def _gap_cell(name: str, row: Row) -> str:
    """Return how much of a gap is closed; a base closes none, by definition."""
    return "–" if row.learning_rate is None else row.estimate(name).as_text(percent=True)


def _as_table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def default_text(published: Row, default: Row) -> str:
    """Return how soon the default recipe reaches what the published schedule has at its end, as Markdown.

    There is a line for each time, in CPU-seconds, at which the recipe's runs were judged.
    """
    if not published.results or not default.results:
        return "Not run."
    whole_cpu_s = published.estimate("cpu_s").mean
    lines = [("published schedule, at its end", [each.check() for each in published.results])]
    for judged in zip(*(each.checks for each in default.results), strict=True):
        steps = Estimate.of([check["num_steps"] for check in judged]).as_text()
        lines.append((f"default recipe, {steps} steps", list(judged)))
    columns = ["CPU-s", "share of CPU-s", *_GAP_TITLES.values(), "subject", "damage"]
    table = [["", *columns], ["---"] * (1 + len(columns))]
    for label, checks in lines:
        found = {name: Estimate.of([check[name] for check in checks]) for name in checks[0]}
        cells = [found["cpu_s"].as_text(digits=1), f"{found['cpu_s'].mean / whole_cpu_s:.2f}"]
        cells += [found[name].as_text(percent=True) for name in _GAP_TITLES]
        cells += [found["truth_subject_similarity"].as_text(digits=3), found["damage"].as_text(digits=2)]
        table.append([label, *cells])
    return _as_table(table)


def guards_text(hacking: Sequence[tuple[Result, Result]], healthy: Sequence[tuple[Result, Result]], plan: Plan) -> str:
    """Return what the rules find in the hacking runs and in healthy ones (each with its base model), as Markdown."""
    columns = ["seed", "flagged", "by", "number", "base", "when flagged", "at most", "at the end"]
    table = [[*columns, "share of the most", "share of the end"]]
    table.append(["---"] * len(table[0]))
    num_in_time = 0
    for base, run in hacking:
        if found := broken_rules(base, run, plan.stop_when):
            index, rule = found[0]
            num_in_time += is_in_time(base, run, index, plan.hacking_drift)
            table += _drifts(base, run, index, rule)
        else:
            table.append([str(run.seed), "never", *[""] * (len(table[0]) - 2)])
    lines = [
        f"`{plan.hacking.name}` at {plan.hacking.learning_rates[0]:g}, judged {plan.num_hacking_checks} times: of "
        f"{len(hacking)} runs {num_in_time} are flagged before a quarter of their final drift, counted by "
        f"{plan.hacking_drift}."
    ]
    flagged = [each.name for own_base, each in healthy if broken_rules(own_base, each, plan.stop_when)]
    names = ": " + ", ".join(flagged) if flagged else ""
    lines += ["", _as_table(table), "", f"Of the {len(healthy)} runs of the table {len(flagged)} are flagged{names}."]
    return "\n".join(lines)


def _drifts(base: Result, run: Result, index: int, rule: StopRuleConfig) -> list[list[str]]:
    """Return a line for each number: its drift when the rule was broken, and the share of its later drift."""
    first, then, last = base.check(), run.check(index), run.check()
    steps = f"after {then['num_steps']} of {last['num_steps']} steps"
    by, lines = f"{rule.metric.removeprefix('guard/')} {rule.summary}", []
    for name in ("damage", "truth_l1", "lattice_share"):
        values = [first[name], then[name], max(check[name] for check in run.checks), last[name]]
        drifts = [value - first[name] for value in values]
        shares = [f"{drifts[1] / drift:.0%}" if drift else "–" for drift in drifts[2:]]
        lines.append([str(run.seed), steps, by, name, *(f"{value:.3g}" for value in values), *shares])
    return lines


def _rate(row: Row) -> str:
    return "–" if row.learning_rate is None else f"{row.learning_rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "learning_rate": row.learning_rate,
        "trouble": row.trouble,
        "runs": [{"seed": each.seed, "checks": [_rounded(check) for check in each.checks]} for each in row.results],
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def picture(strips: Sequence[tuple[str, Result]], folder: Path, num_images_per_prompt: int) -> PIL.Image.Image:
    """Draw a row for each method with its name, a column for each of the first prompts."""
    font = PIL.ImageFont.load_default(size=12)
    images = [_shown(folder, result, num_images_per_prompt) for _, result in strips]
    size = images[0].shape[-1]
    sheet = PIL.Image.new("RGB", (_LABEL_PX + _NUM_PICTURES * size, len(strips) * size), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for number, ((label, _), row) in enumerate(zip(strips, images, strict=True)):
        pen.text((4, number * size + size // 2 - 8), label, fill="black", font=font)
        for column, image in enumerate(row):
            tile = PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile, (_LABEL_PX + column * size, number * size))
    return sheet


def _shown(folder: Path, result: Result, num_images_per_prompt: int) -> Tensor:
    images = load_file(folder / f"{result.name}.safetensors")["images"][::num_images_per_prompt]
    return images[:: max(1, len(images) // _NUM_PICTURES)][:_NUM_PICTURES]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
