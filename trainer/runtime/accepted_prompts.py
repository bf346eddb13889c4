"""Check before a run starts that the rewards accept its longest prompts under all of its control words.

A reward reads a limited number of tokens and refuses a longer text. That would end the run at the step that first draws
such a prompt. Only the service can count its tokens, so it scores black images, without gradient, under the prompts
with the most bytes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.clients.reward import RewardClient, RewardRejected
from services.config.rewards import ControlWordsConfig
from services.config.run import RunConfig
from services.contract import ContractError, PromptPair, RewardRequest, WeightedReward
from trainer.data.prompt_files import LocatedPrompt

_NUM_LONGEST = 8  # prompts to try under each pair of words


class RefusedError(ValueError):
    """Raised if a reward refuses some of the run's texts.

    The message names the reward, the words, the number of refused prompts, the first one and the reason.
    """


@dataclass(frozen=True, slots=True)
class _Setting:
    """How a run requests a reward: its scale and its words, which are None for bare prompts."""

    reward: str
    preference_scale: float
    positive: str | None
    negative: str | None


def longest(prompts: Iterable[LocatedPrompt]) -> list[LocatedPrompt]:
    """Return the few prompts with the most bytes, which tokenizers split into the most tokens."""
    return heapq.nlargest(_NUM_LONGEST, prompts, key=lambda each: len(each.prompt.encode(errors="replace")))


def require_accepted(
    client: RewardClient,
    config: RunConfig,
    trained: Collection[LocatedPrompt],
    measured: Collection[LocatedPrompt] = (),
) -> None:
    """Score the longest prompts once with each reward, under all words of the run.

    trained: the prompts that training draws. measured: those of guard and evaluation. Raises RefusedError if a reward
    refuses one, and RewardError if the service does not answer.
    """
    size = config.model.height_px, config.model.width_px
    for setting, prompts in _settings(config, trained, measured).items():
        tried = longest(prompts)
        if _refusal(client, setting, tried, size) is None:
            continue
        refusals = {each: _refusal(client, setting, [each], size) for each in tried}
        if refused := [(each, reason) for each, reason in refusals.items() if reason is not None]:
            words = f"{setting.positive} | {setting.negative}" if setting.positive else "no words"
            first, reason = refused[0]
            raise RefusedError(
                f"reward {setting.reward} does not accept {len(refused)} of the {len(tried)} longest of {len(prompts)} "
                f"prompts under {words}, such as {first.place}: {reason}"
            )


def _settings(
    config: RunConfig, trained: Collection[LocatedPrompt], measured: Collection[LocatedPrompt]
) -> Mapping[_Setting, Collection[LocatedPrompt]]:
    """Return every setting in which the run requests a reward, with its prompts, each once."""
    settings: defaultdict[_Setting, dict[LocatedPrompt, None]] = defaultdict(dict)

    def add(reward: str, scale: float, words: ControlWordsConfig | None, prompts: Collection[LocatedPrompt]) -> None:
        positive, negative = (words.positive, words.negative) if words else (None, None)
        settings[_Setting(reward, scale, positive, negative)] |= dict.fromkeys(prompts)

    run_words = config.control_words
    for reward in config.rewards:
        own, scale = reward.control_words, reward.preference_scale_denoise.start
        for words in run_words.pairs or (run_words,):
            add(reward.name, scale, None if config.objective.kind == "plain" else own or words, trained)
        add(reward.name, scale, own or run_words, measured)
    if config.guard is not None and config.guard.held_out_reward is not None:
        add(config.guard.held_out_reward, 0.0, run_words, measured)
    return {setting: prompts for setting, prompts in settings.items() if prompts}


def _refusal(
    client: RewardClient, setting: _Setting, prompts: Sequence[LocatedPrompt], size: tuple[int, int]
) -> ContractError | RewardRejected | None:
    """Return why the service refuses to score the prompts together, or None if it does not."""
    images, scales = np.zeros((len(prompts), 3, *size), np.uint8), (setting.preference_scale,) * len(prompts)
    try:
        pairs = tuple(PromptPair(each.prompt, setting.positive, setting.negative) for each in prompts)
        client.score(RewardRequest(images, pairs, scales, (WeightedReward(setting.reward),), with_gradient=False))
    except (ContractError, RewardRejected) as error:
        return error
    return None
