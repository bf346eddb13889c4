"""List the prompts that a run draws, judges and guards with, each with the place that an error names."""

from __future__ import annotations

from collections.abc import Iterable

from services.config.evaluation import GuardConfig
from services.config.run import RunConfig
from services.contract import PromptPair
from trainer.data.batches import located_prompts, open_batches
from trainer.data.prompt_files import LocatedPrompt
from trainer.draws import draw_guard_prompts


def used_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Return every prompt that the run will encode, once. Raise PromptsError, which names the key as well."""
    return _once((*drawn_prompts(config), *judged_prompts(config), *oracle_prompts(config)))


def drawn_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Return the prompts that training will draw. Raise PromptsError or DatasetError."""
    batches = open_batches(config)
    place_of = dict(batches.located)
    drawn = (prompt for step in range(config.num_steps) for prompt in batches.batch(step).prompts)
    return _once(LocatedPrompt(prompt, place_of[prompt]) for prompt in drawn)


def judged_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Return the prompts of evaluation and guard. Raise PromptsError."""
    held_out = located_prompts(config, "evaluation.prompts_path", config.evaluation.prompts_path)
    return _once((*held_out, *(located_guard_prompts(config, config.guard) if config.guard else ())))


def oracle_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Return the evaluation's prompts under the positive word if evaluation.draws_oracle, else none."""
    if not config.evaluation.draws_oracle:
        return []
    held_out = located_prompts(config, "evaluation.prompts_path", config.evaluation.prompts_path)
    told = told_prompts(config, [each.prompt for each in held_out])
    return [each._replace(prompt=prompt) for each, prompt in zip(held_out, told, strict=True)]


def told_prompts(config: RunConfig, prompts: Iterable[str]) -> tuple[str, ...]:
    """Return each prompt under the run's positive control word, as in "3D. grinning face"."""
    words = config.control_words
    return tuple(PromptPair(prompt, words.positive, words.negative).positive_text for prompt in prompts)


def located_guard_prompts(config: RunConfig, guard: GuardConfig) -> tuple[LocatedPrompt, ...]:
    """Return the prompts of every check. Raise PromptsError, or ValueError for fewer than guard.num_prompts."""
    if guard.prompts_path is None:
        prompts = _once(open_batches(config).located)
    else:
        prompts = located_prompts(config, "guard.prompts_path", guard.prompts_path)
    return draw_guard_prompts(config.seed, prompts, guard.num_prompts)


def _once(prompts: Iterable[LocatedPrompt]) -> list[LocatedPrompt]:
    """Return each text at its first place."""
    by_text: dict[str, LocatedPrompt] = {}
    for each in prompts:
        by_text.setdefault(each.prompt, each)
    return list(by_text.values())
