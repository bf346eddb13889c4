"""A run file's keys, and the errors that name what is wrong in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefinedType

from services.config.fields import Schedule
from services.config.run import ConfigError, RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[4]
RUNS = sorted((ROOT / "deploy" / "runs").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden" / "config_keys.txt"


def tree() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "runs" / "tiny_srpo.yaml").read_text(encoding="utf-8"))
    return loaded


def write(folder: Path, loaded: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(loaded), encoding="utf-8")
    return path


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys with their defaults, in the order of the file."""
    lines = []
    for name, field in model.model_fields.items():
        if field.discriminator is not None:
            for kind in get_args(field.annotation):
                lines += keys_of(kind, f"{prefix}{name}[{get_args(kind.model_fields['kind'].annotation)[0]}].")
            continue
        section, is_list = section_of(field.annotation), get_origin(field.annotation) is tuple
        if section is None or not isinstance(field.default, section | PydanticUndefinedType):
            lines.append(f"{prefix}{name}" + ("" if field.is_required() else f" = {field.default}"))
        if section is not None:
            lines += keys_of(section, f"{prefix}{name}{'[]' if is_list else ''}.")
    return lines


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation that is one, or may be one, or is a tuple of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None if annotation is Schedule else annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_committed_run_loads_and_is_named_for_its_file(path: Path) -> None:
    assert load_run_config(path).name == path.stem


def test_the_reversed_run_differs_in_name_pair_and_truth_only() -> None:
    there, back = (
        load_run_config(ROOT / "deploy" / "runs" / f"{name}.yaml") for name in ("tiny_srpo", "tiny_srpo_reversed")
    )
    words = {"positive": there.control_words.negative, "negative": there.control_words.positive}
    assert back.control_words.model_dump(include=set(words)) == words
    assert there.evaluation.truth is not None
    assert there.evaluation.truth.path == Path("deploy/tiny/truth/3D")
    truth = there.evaluation.truth.model_copy(update={"path": Path("deploy/tiny/truth/Flat")})
    evaluation = there.evaluation.model_copy(update={"truth": truth})
    assert back == there.model_copy(
        update={"name": back.name, "control_words": back.control_words, "evaluation": evaluation}
    )


def test_the_set_of_keys_and_defaults_changes_only_on_purpose() -> None:
    """A run file is an interface: after a change that is meant, write the new list to tests/golden/config_keys.txt."""
    assert "\n".join(keys_of(RunConfig)) + "\n" == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("place", "key", "value", "named"),
    [
        ((), "num_step", 60, "num_step"),
        (("engine",), "zero_stagee", 2, "engine.zero_stagee: unknown key"),
        (("engine",), "zero_stage", 5, "engine.zero_stage"),
        (("engine",), "global_batch", 7, "7 is not a multiple of"),
        (("finetune",), "rank", 4, "finetune: rank 4: of no use to kind full"),
        (("finetune",), "target_modules", [], "finetune.target_modules"),
        (("ema",), "decay", 1.0, "ema.decay"),
        (("optimizer",), "learning_rate", -1e-5, "optimizer.learning_rate"),
        (("optimizer",), "learning_rate", float("nan"), "optimizer.learning_rate"),
        (("control_words",), "positive", "", "control_words.positive"),
        (("control_words",), "positive", " ", "control_words.positive"),
        (("control_words",), "kind", "random", "control_words.kind"),
        (("control_words",), "kind", "cycle", "control_words: kind cycle needs pairs"),
        (("control_words",), "pairs", [{"positive": "3D"}], "control_words.pairs.0.negative"),
        (("control_words",), "pairs", [{"positive": "3D", "negative": "Flat"}], "kind fixed has positive and negative"),
        (("rollout",), "shift", "dynamical", "rollout.shift"),
        ((), "method", {"kind": "dpo"}, "method: Input tag 'dpo'"),
        ((), "method", {"kind": "refl", "group_size": 8}, "method.refl.group_size"),
        ((), "method", {"kind": "refl"}, "objective.kind srp_guided has a k for each noise level"),
        ((), "method", {"kind": "grpo", "group_size": 1}, "method.grpo.group_size"),
        ((), "method", {"kind": "grpo", "num_updates": 3}, "num_trained_steps 4 is not a multiple of num_updates 3"),
        (("objective",), "kind", "srpo", "objective.kind"),
        (("objective",), "kind", "direct_align", "objective.kind 'direct_align' is now 'plain'"),
        (("objective",), "branches", [], "objective: branches must be one or both"),
        (("objective",), "branches", ["invert", "invert"], "objective: branches must be one or both"),
        (("objective",), "grid_index_range", (25, 5), "objective: grid_index_range must rise"),
        (("objective",), "grid_index_range", (5, 51), "objective: grid_index_range must rise"),
        (("objective",), "grid_index_range", (0, 25), "objective.grid_index_range must rise within (0, 50)"),
        (("objective",), "grid_index_range", (5, 50), "objective.grid_index_range must rise within (0, 50)"),
        (("objective",), "sigma_range", (0.0, 0.9), "objective: sigma_range must rise within (0, 1)"),
        (("objective",), "sigma_range", (0.5, 1.2), "objective: sigma_range must rise within (0, 1)"),
        (("objective",), "sigma_range", (0.9, 0.5), "objective: sigma_range must rise within (0, 1)"),
        (("objective",), "level_range", (0, 995), "objective: level_range must rise"),
        (("objective",), "level_range", (5, 1000), "objective: level_range must rise"),
        (("objective",), "num_delta_levels", 1000, "num_delta_levels 1000 is larger than the range"),
        (("objective",), "num_injections", 992, "num_injections 992 is more than the levels of (5, 995)"),
        (("objective",), "discount", {"kind": "cosine", "start": 1.0}, "a cosine schedule needs an end"),
        (("objective",), "discount", {"kind": "constant", "start": 1, "end": 2}, "a constant schedule has no end"),
        (("objective",), "discount", {"start": float("inf"), "end": 1.0}, "objective.discount.start"),
        (("rewards", 0), "weight", 0, "rewards.0.weight"),
        (("rewards", 0), "weight", float("nan"), "rewards.0.weight"),
        (("rewards", 0), "margin", float("nan"), "rewards.0.margin"),
        (("rewards", 0), "pair", "image", "rewards.0.pair"),
        (("rewards", 0), "control_words", {"positive": "3D", "negative": ""}, "rewards.0.control_words.negative"),
        (("model",), "sizes", [[64, 64], [64, 64]], "model: sizes: each size may come once"),
        (("model",), "sizes", [[64, 0]], "model.sizes.0.1"),
        ((), "prompts", {}, "give either prompts.path, to roll out, or dataset, to train on real images, not neither"),
        (
            (),
            "dataset",
            {"path": "images", "latents_path": "latents"},
            "not both (a dataset's captions are its prompts)",
        ),
        (("model",), "dtype", "bfloat16", "engine.zero_stage 0 cannot train a model.dtype of bfloat16"),
        (("rollout",), "dtype", "float16", "rollout.dtype"),
        (("model",), "vae_dtype", "fp8", "model.vae_dtype"),
        ((), "rewards", [], "rewards"),
        ((), "rewards", [{"name": "a"}, {"name": "a"}], "rewards: each name may come once, not ['a', 'a']"),
    ],
)
def test_a_bad_key_or_value_is_named_with_file_and_value(
    tmp_path: Path, place: tuple[str | int, ...], key: str, value: object, named: str
) -> None:
    loaded = tree()
    branch: Any = loaded | {"objective": {}, "finetune": {}, "ema": {"decay": 0.9}}
    loaded = branch
    for name in place:
        branch = branch[name]
    branch[key] = value
    loaded["engine"] |= {"zero_stage": 0} if key == "dtype" else {}
    path = write(tmp_path, loaded)
    with pytest.raises(ConfigError) as error:
        load_run_config(path)
    shown = value if isinstance(value, str | int | float) else ""  # a section's message shows what is wrong in it
    for part in (str(path), named, str(shown)):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"sigma_range": [0.5, 0.9], "grid_index_range": [5, 20]}, "give sigma_range or grid_index_range, not both"),
        ({"delta_sigma": 0.1, "num_delta_levels": 50}, "give delta_sigma or num_delta_levels, not both"),
        ({"kind": "sgp"}, "rewards.0.satisfied_at 0.25 needs a difference of two similarities"),
    ],
)
def test_keys_that_contradict_each_other_are_named(tmp_path: Path, objective: dict[str, Any], named: str) -> None:
    rewards = [{"name": "tiny", "satisfied_at": 0.25}]
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_run_config(write(tmp_path, tree() | {"objective": objective, "rewards": rewards}))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"rollout": {"dtype": "float32"}, "model": {"dtype": "bfloat16"}},
            "rollout.dtype float32: weights in a model.dtype of bfloat16 have no more digits to give",
        ),
        (
            {"rollout": {"dtype": "bfloat16"}, "method": {"kind": "grpo"}, "objective": {"kind": "srp"}},
            "rollout.dtype bfloat16 with a model.dtype of float32: method.kind grpo would take the difference for a",
        ),
    ],
)
def test_a_dtype_that_rollouts_cannot_have_is_named(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    model = tree()["model"] | changed.get("model", {})
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_run_config(write(tmp_path, tree() | changed | {"model": model}))


def test_every_part_has_the_models_dtype_unless_it_is_given_its_own(tmp_path: Path) -> None:
    model = tree()["model"] | {"dtype": "bfloat16"}
    run = load_run_config(write(tmp_path, tree() | {"model": model}))
    assert {run.rollout_dtype, run.vae_dtype, run.text_encoder_dtype} == {"bfloat16"}
    own = {"vae_dtype": "float32", "text_encoder_dtype": "float32"}
    run = load_run_config(write(tmp_path, tree() | {"model": model | own, "rollout": {"dtype": "bfloat16"}}))
    assert (run.rollout_dtype, run.vae_dtype, run.text_encoder_dtype) == ("bfloat16", "float32", "float32")


def test_several_pairs_of_words(tmp_path: Path) -> None:
    pairs = [{"positive": "3D", "negative": "Flat"}, {"positive": "Real", "negative": "Oil", "weight": 3}]
    words = load_run_config(
        write(tmp_path, tree() | {"control_words": {"kind": "choice", "pairs": pairs}})
    ).control_words
    assert (words.positive, words.negative) == ("3D", "Flat"), "evaluation and guard have the first one"
    assert type(words).model_validate_json(words.model_dump_json()) == words, "as it goes to the workers"
    named = {"kind": "choice", "pairs": pairs, "positive": "Real", "negative": "Oil"}
    assert load_run_config(write(tmp_path, tree() | {"control_words": named})).control_words.positive == "Real"
    spoilt = {"kind": "cycle", "pairs": pairs}
    with pytest.raises(ConfigError, match="weight 3 has no effect with kind cycle"):
        load_run_config(write(tmp_path, tree() | {"control_words": spoilt}))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    loaded = tree()
    del loaded["optimizer"]["learning_rate"]
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        load_run_config(write(tmp_path, loaded))


@pytest.mark.parametrize("text", ["", "a: [1", "- a list"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run_config(path)


def test_a_run_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("name: größer\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text"):
        load_run_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read run file .*absent\.yaml"):
        load_run_config(tmp_path / "absent.yaml")
