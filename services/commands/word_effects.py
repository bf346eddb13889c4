"""Judge which control words can change a reward on given images, before any training: arithmetic, no service.

A trainer follows the gradient of the reward with respect to the image, so a word is worth what it adds to that
gradient. It is compared with meaningless words (`meaningless_words`): a reward that has not learned a word treats it
like one of those. For an image x and texts t ("word. prompt"), with g_t = ∂ similarity(x, t) / ∂ x:

  effect of a word   e_w = g_w − mean of g over the meaningless words
  noise floor        Tukey's upper fence, Q3 + 1.5 · (Q3 − Q1), of ‖e_q‖ over the meaningless words q, each against
                     the mean of the others. A percentile would fail: by chance some of them contain a piece of a word
                     that the reward knows, and those few would set it
  strength           ‖e_w‖ / noise floor, one number an image; the geometric mean over the images
  common share       cos² between the gradient of the word's reward and the mean of the other candidates', over all
                     images, 0 if they point apart: how much of its effect any candidate would have
  side               the reward itself, mean / standard deviation over the images: which words the images show already

All of them follow from similarities and from the inner products of the gradients of each image (its Gram matrix), so
that no gradient has to be kept. rank_words.py calls the service. Not measured: whether a trained image looks like the
word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

# With fewer images not even a side that they all share is beyond chance: 2 · 0.5⁵ > 0.05 ≥ 2 · 0.5⁶.
MIN_IMAGES = 6
NUM_MEANINGLESS = 20  # five on each side of the middle half
_MIN_SHARE_MOVED = 0.5
_MAX_COMMON_SHARE = 0.5  # beyond it, more than half of what a word does is what the others do
_NUM_RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)
_CONSONANTS, _VOWELS = "jkqvwxz", "aeiou"  # rare letters, so that no word of a language is drawn

MOVES, COMMON, INCONSISTENT, WEAK = _VERDICTS = ("moves", "repeats the common direction", "inconsistent", "weak")


class TrialError(ValueError):
    """The words cannot be judged; the text names what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the service answered for each image under each text, in the order words, then meaningless words.

    similarities (images, texts).
    gram (images, texts, texts): inner products of ∂ similarity / ∂ image. From all gradients of an image one and the
    same gradient may be subtracted, because only differences between texts are used.
    """

    words: tuple[str, ...]
    meaningless: tuple[str, ...]
    similarities: Float64
    gram: Float64


@dataclass(frozen=True, slots=True)
class Finding:
    """One control word, or pair, on these images. Intervals are 95 % bootstrap intervals over the images."""

    positive: str
    negative: str | None  # None: the meaningless words
    verdict: str
    strength: float
    strength_interval: tuple[float, float]
    share_moved: float  # of the images, those with a strength above 1
    common_share: float | None  # None where there are no other words to compare with
    reward: float  # mean over the images
    side: float
    side_interval: tuple[float, float]
    share_agreeing: float  # of the images, those whose reward has the sign of the mean


def meaningless_words(count: int = NUM_MEANINGLESS, seed: int = 0) -> tuple[str, ...]:
    """Return different words of two or three syllables that mean nothing; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        letters = (rng.choice(list(kind)) for _ in range(rng.integers(2, 4)) for kind in (_CONSONANTS, _VOWELS))
        drawn["".join(letters)] = None
    return tuple(drawn)


def check_enough(num_images: int, words: Sequence[str], negative: str | None = None) -> None:
    """Raise TrialError if these images and words allow no judgment, whatever the service answers."""
    if num_images < MIN_IMAGES:
        raise TrialError(f"{num_images} images say nothing about consistency: give at least {MIN_IMAGES}")
    if not set(words) - {negative}:
        raise TrialError("no control words: give at least one besides the negative")


def rank(measured: Measured, negative: str | None = None) -> list[Finding]:
    """Judge each word against `negative` (None: against the meaningless words). Sort by verdict, then by strength.

    Raise TrialError for a reward whose gradient no text changes. Call `check_enough` first.
    """
    strengths = _strengths(measured)
    names = [word for word in measured.words if word != negative]
    pairs = _contrasts(measured, [(name, negative) for name in names])
    findings = []
    for row, name in enumerate(names):
        others = np.delete(pairs, row, axis=0)
        strength = strengths[:, measured.words.index(name)]
        findings.append(_finding(measured, (name, negative), strength, pairs[row], others))
    return _sorted(findings)


def rank_pairs(measured: Measured) -> list[Finding]:
    """Judge every two words against each other. A pair is as strong as its weaker word.

    Its positive word is the one that the images show less. Its common direction is that of the words outside the pair,
    each against the meaningless words. Raise TrialError as `rank` does.
    """
    strengths = _strengths(measured)
    alone = _contrasts(measured, [(word, None) for word in measured.words])
    findings = []
    for one, other in combinations(range(len(measured.words)), 2):
        means = measured.similarities[:, [one, other]].mean(axis=0)
        positive, negative = (one, other) if means[0] <= means[1] else (other, one)
        pair = measured.words[positive], measured.words[negative]
        (contrast,) = _contrasts(measured, [pair])
        others = np.delete(alone, [one, other], axis=0)
        findings.append(_finding(measured, pair, strengths[:, [one, other]].min(axis=1), contrast, others))
    return _sorted(findings)


def _contrasts(measured: Measured, pairs: Sequence[tuple[str, str | None]]) -> Float64:
    """Return the factors of the texts in each pair's reward (pairs, texts); None is the meaningless words' mean."""
    num_words, num_texts = len(measured.words), measured.similarities.shape[1]
    factors = np.zeros((len(pairs), num_texts))
    for row, (positive, negative) in enumerate(pairs):
        factors[row, measured.words.index(positive)] += 1
        if negative is None:
            factors[row, num_words:] -= 1 / (num_texts - num_words)
        else:
            factors[row, measured.words.index(negative)] -= 1
    return factors


def _strengths(measured: Measured) -> Float64:
    """Return strengths (images, words). Raise TrialError if the floor is 0: no text changes this reward's gradient."""
    num_words, num_meaningless = len(measured.words), len(measured.meaningless)
    words = _contrasts(measured, [(word, None) for word in measured.words])
    meaningless = np.zeros((num_meaningless, words.shape[1]))
    meaningless[:, num_words:] = np.eye(num_meaningless) - (1 - np.eye(num_meaningless)) / (num_meaningless - 1)
    first, third = np.quantile(_norms(meaningless, measured.gram), (0.25, 0.75), axis=1)
    floor = third + 1.5 * (third - first)
    if not (floor > 0).all():
        raise TrialError(f"the reward's gradient on images[{int(floor.argmin())}] is the same for all texts")
    return _norms(words, measured.gram) / floor[:, None]


def _norms(contrasts: Float64, gram: Float64) -> Float64:
    """Return the lengths (images, contrasts) of the gradients of sums of texts."""
    return np.sqrt(np.maximum(np.einsum("ra,iab,rb->ir", contrasts, gram, contrasts), 0))


def _finding(
    measured: Measured, pair: tuple[str, str | None], strength: Float64, contrast: Float64, others: Float64
) -> Finding:
    rewards = measured.similarities @ contrast
    logarithms = np.log(np.maximum(strength, np.finfo(float).tiny))
    typical = float(np.exp(logarithms.mean()))
    low, high = (float(np.exp(bound)) for bound in _bootstrap(logarithms, _mean))
    share_moved = float((strength > 1).mean())
    common_share = _common_share(contrast, others, measured.gram.sum(axis=0)) if len(others) else None
    return Finding(
        positive=pair[0],
        negative=pair[1],
        verdict=_verdict(typical, low, share_moved, common_share),
        strength=typical,
        strength_interval=(low, high),
        share_moved=share_moved,
        common_share=common_share,
        reward=float(rewards.mean()),
        side=float(_effect_size(rewards)),
        side_interval=_bootstrap(rewards, _effect_size),
        share_agreeing=float((np.sign(rewards) == np.sign(rewards.mean())).mean()),
    )


def _verdict(strength: float, strength_low: float, share_moved: float, common_share: float | None) -> str:
    """Return WEAK: like a meaningless word. INCONSISTENT: so on half of the images, or perhaps on others like these."""
    if strength <= 1:
        return WEAK
    if strength_low <= 1 or share_moved <= _MIN_SHARE_MOVED:
        return INCONSISTENT
    return COMMON if common_share is not None and common_share > _MAX_COMMON_SHARE else MOVES


def _common_share(contrast: Float64, others: Float64, gram: Float64) -> float:
    """Return cos² between the gradients of `contrast` and of the mean of `others`, or 0 if they are opposed.

    gram (texts, texts): the sum over all images.
    """
    mean = others.mean(axis=0)
    inner, lengths = contrast @ gram @ mean, (contrast @ gram @ contrast) * (mean @ gram @ mean)
    return float(max(inner, 0) ** 2 / lengths) if lengths > 0 else 0.0


def _mean(values: Float64) -> Float64:
    return np.asarray(values.mean(axis=-1))


def _effect_size(values: Float64) -> Float64:
    """Return mean / standard deviation over the last axis."""
    return np.asarray(values.mean(axis=-1) / np.maximum(values.std(axis=-1, ddof=1), np.finfo(float).tiny))


def _bootstrap(values: Float64, statistic: Callable[[Float64], Float64]) -> tuple[float, float]:
    """Return the 95 % interval of a statistic of the last axis, with the images drawn again with replacement."""
    draws = np.random.default_rng(0).integers(len(values), size=(_NUM_RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[draws]), _INTERVAL)
    return float(low), float(high)


def _sorted(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (_VERDICTS.index(finding.verdict), -finding.strength))
