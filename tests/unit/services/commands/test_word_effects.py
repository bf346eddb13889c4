"""Verdicts on control words from synthetic gradients with known effects."""

from __future__ import annotations

import numpy as np
import pytest

from services.commands.word_effects import (
    COMMON,
    INCONSISTENT,
    MOVES,
    NUM_MEANINGLESS,
    WEAK,
    Finding,
    Float64,
    Measured,
    TrialError,
    check_enough,
    meaningless_words,
    rank,
    rank_pairs,
)

NUM_IMAGES, NUM_PIXELS = 24, 300


def measured(effects: dict[str, Float64], floor: float = 1.0, base: int = -1, seed: int = 0) -> Measured:
    """Return images on which each word adds its effect (images, pixels) to the noise that every text adds.

    A similarity is the product of gradient and image, so that the two are consistent. The gradient of the text `base`
    is subtracted from the others.
    """
    rng = np.random.default_rng(seed)
    num_texts = len(effects) + NUM_MEANINGLESS
    shared = rng.normal(size=(NUM_IMAGES, 1, NUM_PIXELS)) * 10  # what the prompt alone does
    gradients = shared + floor * rng.normal(size=(NUM_IMAGES, num_texts, NUM_PIXELS)) / np.sqrt(NUM_PIXELS)
    for index, effect in enumerate(effects.values()):
        gradients[:, index] += effect
    images = rng.normal(size=(NUM_IMAGES, NUM_PIXELS))
    similarities = np.einsum("itp,ip->it", gradients, images)
    gradients = gradients - gradients[:, base, None]  # as they are measured
    return Measured(tuple(effects), meaningless_words(), similarities, np.einsum("itp,iup->itu", gradients, gradients))


def direction(seed: int, length: float = 3.0) -> Float64:
    """Return a different random direction for each image."""
    drawn = np.random.default_rng(100 + seed).normal(size=(NUM_IMAGES, NUM_PIXELS))
    return np.asarray(length * drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def by_word(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.positive: finding for finding in findings}


def test_a_word_that_adds_a_gradient_of_its_own_moves_and_one_that_adds_none_is_weak() -> None:
    found = by_word(rank(measured({"3D": direction(0), "Flat": direction(1), "unknown": 0 * direction(2)})))
    assert {word: finding.verdict for word, finding in found.items()} == {"3D": MOVES, "Flat": MOVES, "unknown": WEAK}
    assert found["3D"].strength > 2
    assert found["3D"].share_moved == 1
    assert found["unknown"].strength_interval[1] < 1.2


def test_a_word_that_acts_on_few_images_is_inconsistent() -> None:
    sometimes = direction(0, length=12)
    sometimes[NUM_IMAGES // 6 :] = 0
    found = by_word(rank(measured({"sometimes": sometimes, "always": direction(1)})))
    assert found["sometimes"].verdict == INCONSISTENT
    assert found["sometimes"].strength > 1
    assert found["sometimes"].share_moved == pytest.approx(1 / 6, abs=0.1)
    assert found["always"].verdict == MOVES


def test_words_that_say_the_same_repeat_the_common_direction() -> None:
    same = direction(0)
    found = by_word(rank(measured({"nice": same, "good": 1.2 * same, "great": same, "3D": direction(1)})))
    assert [found[word].verdict for word in ("nice", "good", "great", "3D")] == [COMMON, COMMON, COMMON, MOVES]
    assert (found["nice"].common_share or 0) > 0.7
    assert found["3D"].common_share == pytest.approx(0, abs=0.05)


def test_a_word_opposed_to_the_others_repeats_nothing() -> None:
    same = direction(0)
    found = by_word(rank(measured({"nice": same, "good": same, "awful": -same})))
    assert (found["awful"].verdict, found["awful"].common_share) == (MOVES, 0)


def test_against_a_negative_a_meaningless_word_is_weak_although_its_reward_has_a_gradient() -> None:
    findings = rank(measured({"3D": direction(0), "unknown": 0 * direction(2), "Flat": direction(1)}), "Flat")
    found = by_word(findings)
    assert set(found) == {"3D", "unknown"}
    assert found["3D"].verdict == MOVES
    assert found["unknown"].verdict == WEAK
    assert (found["unknown"].common_share or 0) > 0.2  # all it does is leave the negative, as 3D does


def test_a_pair_is_as_strong_as_its_weaker_word() -> None:
    effects = {"3D": direction(0), "Flat": direction(1), "Oil": direction(3), "unknown": 0 * direction(2)}
    verdicts = {frozenset((pair.positive, pair.negative)): pair.verdict for pair in rank_pairs(measured(effects))}
    assert len(verdicts) == 6
    assert {pair for pair, verdict in verdicts.items() if verdict == WEAK} == {
        frozenset((word, "unknown")) for word in ("3D", "Flat", "Oil")
    }
    assert verdicts[frozenset(("3D", "Flat"))] == MOVES


def test_the_positive_word_of_a_pair_is_the_one_that_the_images_show_less() -> None:
    trial = measured({"3D": direction(0), "Flat": direction(1)})
    trial.similarities[:, 0] += 100
    (pair,) = rank_pairs(trial)
    assert (pair.positive, pair.negative) == ("Flat", "3D")
    assert pair.reward < 0
    assert pair.side_interval[0] <= pair.side <= pair.side_interval[1] < 0
    assert pair.share_agreeing == 1


def test_findings_come_by_verdict_and_then_by_strength() -> None:
    effects = {"unknown": 0 * direction(0), "some": direction(1, 2.5), "much": direction(2, 5)}
    assert [finding.positive for finding in rank(measured(effects))] == ["much", "some", "unknown"]


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_verdicts_do_not_depend_on_the_reward_s_unit(scale: float) -> None:
    trial = measured({"3D": direction(0), "unknown": 0 * direction(2)})
    scaled = Measured(trial.words, trial.meaningless, scale * trial.similarities, scale**2 * trial.gram)
    for one, other in zip(rank(trial), rank(scaled), strict=True):
        assert one.verdict == other.verdict
        assert other.strength == pytest.approx(one.strength)
        assert other.side == pytest.approx(one.side)


def test_what_all_texts_share_does_not_count() -> None:
    """The findings do not depend on which text's gradient is subtracted from the others."""
    effects = {"3D": direction(0), "Flat": direction(1), "unknown": 0 * direction(2)}
    for negative in (None, "Flat"):
        for one, other in zip(
            rank(measured(effects), negative), rank(measured(effects, base=0), negative), strict=True
        ):
            assert one.positive == other.positive
            assert one.strength == pytest.approx(other.strength)
            assert one.common_share == pytest.approx(other.common_share, abs=1e-9)


def test_most_meaningless_words_are_weak() -> None:
    """The noise floor holds for words that did not set it: about one in twenty is above."""
    verdicts = [
        finding.verdict
        for seed in range(10)
        for finding in rank(measured({f"unknown{i}": 0 * direction(i) for i in range(10)}, seed=seed))
    ]
    assert verdicts.count(WEAK) >= 0.9 * len(verdicts)


def test_a_reward_that_reads_no_text_is_named() -> None:
    deaf = measured({"3D": 0 * direction(0)}, floor=0.0)
    with pytest.raises(TrialError, match="same for all texts"):
        rank(Measured(deaf.words, deaf.meaningless, deaf.similarities, 0 * deaf.gram))


def test_meaningless_words_are_always_the_same_different_ones() -> None:
    words = meaningless_words()
    assert words == meaningless_words()
    assert words != meaningless_words(seed=1)
    assert len(set(words)) == len(words) == NUM_MEANINGLESS


def test_too_few_images_or_words_are_refused_before_any_request() -> None:
    with pytest.raises(TrialError, match=r"5 images.*at least 6"):
        check_enough(5, ["3D"])
    with pytest.raises(TrialError, match="besides the negative"):
        check_enough(6, ["Flat"], "Flat")
    check_enough(6, ["3D", "Flat"], "Flat")
