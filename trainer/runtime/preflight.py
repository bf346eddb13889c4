"""Asked before it matters: do the rewards take a run's longest prompts under all of its words?

A reward reads so many tokens and refuses a longer text, which would end the run at whichever step draws that prompt
first. Only the service can count its tokens: it is asked about black images, without gradient, under the prompts of
most bytes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.clients.reward import RewardClient, RewardRejected
from services.config.objective import ControlWordsConfig
from services.config.run import RunConfig
from services.contract import ContractError, PromptPair, RewardRequest, WeightedReward
from trainer.data.prompt_files import LocatedPrompt

_NUM_ASKED = 8  # prompts under each pair of words


class RefusedError(ValueError):
    """A reward does not take some of the run's texts; the text names reward, words, how many, the first and why."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What a reward is asked about prompts; words of None leave them bare."""

    reward: str
    preference_scale: float
    positive: str | None
    negative: str | None


def longest(prompts: Iterable[LocatedPrompt]) -> list[LocatedPrompt]:
    """The few of most bytes, of which tokenizers make the most tokens."""
    return heapq.nlargest(_NUM_ASKED, prompts, key=lambda each: len(each.prompt.encode(errors="replace")))


def require_accepted(
    client: RewardClient, config: RunConfig, drawn: Collection[LocatedPrompt], judged: Collection[LocatedPrompt] = ()
) -> None:
    """Ask each reward about the longest prompts that training draws, and about those that are only looked at.

    Raises RefusedError, or RewardError where the service does not answer.
    """
    size = config.model.height_px, config.model.width_px
    for question, prompts in _questions(config, drawn, judged).items():
        asked = longest(prompts)
        if _refusal(client, question, asked, size) is None:
            continue
        refusals = {each: _refusal(client, question, [each], size) for each in asked}
        if refused := [(each, why) for each, why in refusals.items() if why is not None]:
            words = f"{question.positive} | {question.negative}" if question.positive else "no words"
            first, why = refused[0]
            raise RefusedError(
                f"reward {question.reward} does not take {len(refused)} of the {len(asked)} longest of {len(prompts)} "
                f"prompts under {words}, such as {first.place}: {why}"
            )


def _questions(
    config: RunConfig, drawn: Collection[LocatedPrompt], judged: Collection[LocatedPrompt]
) -> Mapping[_Question, Collection[LocatedPrompt]]:
    """Each with its prompts, none twice."""
    questions: defaultdict[_Question, dict[LocatedPrompt, None]] = defaultdict(dict)

    def ask(reward: str, scale: float, words: ControlWordsConfig | None, prompts: Collection[LocatedPrompt]) -> None:
        positive, negative = (words.positive, words.negative) if words else (None, None)
        questions[_Question(reward, scale, positive, negative)] |= dict.fromkeys(prompts)

    run_words = config.control_words
    for reward in config.rewards:
        own, scale = reward.control_words, reward.preference_scale_denoise.start
        for words in run_words.pairs or (run_words,):
            ask(reward.name, scale, None if config.objective.kind == "direct_align" else own or words, drawn)
        ask(reward.name, scale, own or run_words, judged)
    if config.guard is not None and config.guard.held_out_reward is not None:
        ask(config.guard.held_out_reward, 0.0, run_words, judged)
    return {question: prompts for question, prompts in questions.items() if prompts}


def _refusal(
    client: RewardClient, question: _Question, prompts: Sequence[LocatedPrompt], size: tuple[int, int]
) -> ContractError | RewardRejected | None:
    """Why the service refuses to score the prompts together; None: it does not."""
    images, scales = np.zeros((len(prompts), 3, *size), np.uint8), (question.preference_scale,) * len(prompts)
    try:
        pairs = tuple(PromptPair(each.prompt, question.positive, question.negative) for each in prompts)
        client.score(RewardRequest(images, pairs, scales, (WeightedReward(question.reward),), with_gradient=False))
    except (ContractError, RewardRejected) as error:
        return error
    return None
