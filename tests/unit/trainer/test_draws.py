"""What each sample gets is a pure function of (seed, step, sample_index), however many workers share the batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.config.rewards import RunWordsConfig
from trainer.draws import (
    batch_indices,
    draw_levels,
    draw_rows,
    draw_words,
    evaluation_generator,
    image_generator,
    injection_generator,
    noise_generator,
    shard,
)

Sample = tuple[int, tuple[int, ...], tuple[float, ...]]


def numbers(generator: torch.Generator) -> tuple[float, ...]:
    return tuple(torch.randn(4, generator=generator).tolist())


def samples_of(seed: int, step: int, global_batch: int, rank: int, num_workers: int) -> dict[int, Sample]:
    """Prompt, level and noise of every sample that one worker handles in a step."""
    prompts = batch_indices(seed, step, global_batch, num_prompts=7)
    return {
        index: (
            prompts[index],
            draw_levels(seed, step, index, (5, 995), 3),
            numbers(noise_generator(seed, step, index)),
        )
        for index in shard(global_batch, rank, num_workers)
    }


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.sampled_from([2, 4, 6]))
def test_two_workers_see_the_samples_of_one(seed: int, step: int, global_batch: int) -> None:
    alone = samples_of(seed, step, global_batch, 0, 1)
    shared = [samples_of(seed, step, global_batch, rank, 2) for rank in range(2)]
    assert shared[0] | shared[1] == alone
    assert len(shared[0]) == len(shared[1])


def test_every_seed_step_and_sample_has_its_own_noise_and_evaluation_its_own_stream() -> None:
    places = [(seed, step, index) for seed in range(3) for step in range(3) for index in range(3)]
    noises = [numbers(noise_generator(*place)) for place in places]
    noises += [numbers(evaluation_generator(seed, index)) for seed in range(3) for index in range(3)]
    assert len(set(noises)) == len(noises)


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9))
def test_every_prompt_comes_once_an_epoch(seed: int, global_batch: int, num_prompts: int) -> None:
    num_epochs = global_batch  # the fewest epochs that surely are a whole number of steps
    drawn = [index for step in range(num_prompts) for index in batch_indices(seed, step, global_batch, num_prompts)]
    for epoch in range(num_epochs):
        assert sorted(drawn[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


def test_epochs_are_shuffled_anew() -> None:
    first, second = (batch_indices(seed=0, step=step, global_batch=50, num_prompts=50) for step in range(2))
    assert first != second != list(range(50)) != first


def test_levels_cover_their_range_both_ends_included() -> None:
    counts = Counter(level for step in range(400) for level in draw_levels(0, step, 0, (3, 6), 1))
    assert sorted(counts) == [3, 4, 5, 6]
    assert min(counts.values()) > 60


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 50), st.data())
def test_levels_of_several_injections_come_from_equal_parts(
    seed: int, low: int, width: int, data: st.DataObject
) -> None:
    num_levels = data.draw(st.integers(1, width + 1))
    levels = draw_levels(seed, 0, 0, (low, low + width), num_levels)
    size = (width + 1) / num_levels
    for part, level in enumerate(levels):
        assert low + int(part * size) <= level < low + (part + 1) * size


def test_every_injection_has_noise_of_its_own() -> None:
    streams = (injection_generator, image_generator)
    noises = [numbers(stream(0, step, 0, number)) for stream in streams for step in (0, 1) for number in (0, 1)]
    noises.append(numbers(noise_generator(0, 0, 0)))
    assert len(set(noises)) == len(noises)


PAIRS = ({"positive": "3D", "negative": "Flat"}, {"positive": "Real", "negative": "Oil", "weight": 3})


def drawn(seed: int = 0, num_steps: int = 300, num_samples: int = 4, **words: object) -> list[list[str]]:
    """Positive words by step and sample."""
    config = RunWordsConfig.model_validate(words)
    return [
        [draw_words(config, seed, step, index).positive for index in range(num_samples)] for step in range(num_steps)
    ]


def test_one_pair_is_everybodys() -> None:
    assert drawn(num_steps=2, num_samples=2, positive="3D", negative="Flat") == [["3D", "3D"], ["3D", "3D"]]


def test_pairs_take_turns() -> None:
    pairs = [{**pair, "weight": 1} for pair in PAIRS]
    assert drawn(num_steps=3, num_samples=2, kind="cycle", pairs=pairs) == [["3D"] * 2, ["Real"] * 2, ["3D"] * 2]
    by_sample = drawn(num_steps=2, num_samples=3, kind="cycle", pairs=pairs, per="sample")
    assert by_sample == [["3D", "Real", "3D"], ["Real", "3D", "Real"]]


@pytest.mark.parametrize("per", ["step", "sample"])
def test_a_choice_follows_its_weights_and_the_seed_alone(per: str) -> None:
    choice = drawn(kind="choice", pairs=PAIRS, per=per)
    assert choice == drawn(kind="choice", pairs=PAIRS, per=per) != drawn(seed=1, kind="choice", pairs=PAIRS, per=per)
    share = sum(step.count("Real") for step in choice) / 1200
    assert share == pytest.approx(0.75, abs=0.08)
    assert all(len(set(step)) == 1 for step in choice) == (per == "step")


def test_impossible_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        noise_generator(-1, 0, 0)


def test_rows_to_show_are_drawn_by_the_seed_and_none_twice() -> None:
    rows = draw_rows(0, 64, 24)
    assert rows == sorted(set(rows))
    assert len(rows) == 24
    assert rows == draw_rows(0, 64, 24) != draw_rows(1, 64, 24)
    assert draw_rows(0, 3, 3) == [0, 1, 2]
