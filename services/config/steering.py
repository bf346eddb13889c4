"""Steering: what a running training is asked to maximize, as the JSON of a tag on its MLflow run.

    srpo.steering        the request; `srpo steer` writes it, and anybody may do so in MLflow's own pages
    srpo.steering.3      version 3 as it came into force; the training writes one tag for each version
    srpo.steering_error  why the last request was refused; it is removed as soon as a good one is there

    {"positive": "Flat", "negative": "3D", "preference_scale": 0.2, "weights": {"fluent-clip": 2}, "version": 3}

A tag is complete: what it leaves out is as in the run file, and without a tag everything is. Versions count what came
into force, from 0, the run file's. `srpo steer` writes the next version; an edit by hand need not name one.
services/STEERING.md tells the whole story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as shorten  # values in errors
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from services.config.fields import Frozen, Schedule, Word, describe_mistake
from services.config.rewards import RunWordsConfig
from services.config.run import RunConfig

TAG = "srpo.steering"
ERROR_TAG = "srpo.steering_error"
_LARGEST = 1e6  # of a scale or weight: larger ones are typing mistakes, or infinite in float32
_MAX_REASON_CHARS = 500
_LAST_VERSION = 10**9


class SteeringError(ValueError):
    """A request that cannot come into force; the text names its part, the offending value and what to do."""


class Steering(Frozen):
    """What replaces parts of the run file. An empty one replaces nothing.

    >>> Steering(positive="Flat", negative="3D", version=3).summary
    'version 3: Flat | 3D'
    """

    version: Annotated[int, Field(ge=0, le=_LAST_VERSION)] = 0
    """Counts what came into force. In a tag 0 means the next one."""

    positive: Word | None = None
    """The control word that is wanted. Give both words, or none."""

    negative: Word | None = None
    """The control word that is to be avoided."""

    preference_scale: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] | None = None
    """k of both branches, of every reward and at every level."""

    weights: dict[str, Annotated[float, Field(gt=0, le=_LARGEST)]] = Field(default_factory=dict)
    """The weights of rewards by their names."""

    @model_validator(mode="after")
    def _words_come_as_a_pair(self) -> Steering:
        if (self.positive is None) != (self.negative is None):
            missing = "positive" if self.positive is None else "negative"
            raise ValueError(f"{missing} is missing: words come as a pair")
        return self

    @classmethod
    def from_tag(cls, text: str | None) -> Steering:
        """Return what a tag requests; None stands for no tag. Raise SteeringError if it cannot be read."""
        try:
            tree = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"not JSON: {error} (got {shorten(text)})") from error
        return cls.parse(tree)

    @classmethod
    def parse(cls, tree: object) -> Steering:
        """Return the Steering of a JSON object. Raise SteeringError, which names every wrong part."""
        try:
            return cls.model_validate(tree, strict=True)
        except ValidationError as error:
            mistakes = "; ".join(describe_mistake(item, shorten) for item in error.errors())
            raise SteeringError(mistakes[:_MAX_REASON_CHARS]) from error

    def to_tag(self) -> str:
        """Return the text of the tag, without what is as in the run file."""
        return self.model_dump_json(exclude_defaults=True)

    @property
    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.positive} | {self.negative}"] if self.positive else []
        parts += [f"k {self.preference_scale:g}"] if self.preference_scale is not None else []
        parts += [f"weight of {name} {weight:g}" for name, weight in self.weights.items()]
        return f"version {self.version}: {', '.join(parts) or 'as in the run file'}"

    def after(self, in_force: Steering) -> Steering:
        """Return what comes into force when this is requested: `in_force` itself if this requests the same.

        An edit that keeps or omits the version of what is in force gets the next one, so that no two share a version.
        Raise SteeringError if there is no next one.
        """
        if self.version <= in_force.version and self.model_copy(update={"version": in_force.version}) == in_force:
            return in_force
        version = max(self.version, in_force.version + 1)
        if version > _LAST_VERSION:
            raise SteeringError(f"version {in_force.version} is in force, the last there is: no edit can follow")
        return self.model_copy(update={"version": version})

    def check(self, config: RunConfig) -> None:
        """Raise SteeringError for what this run does not have, or what would have no effect on it."""
        names, kind = [reward.name for reward in config.rewards], config.objective.kind
        if unknown := [name for name in self.weights if name not in names]:
            raise SteeringError(f"weights: the run has no reward {unknown[0]!r}; it has {', '.join(names)}")
        if self.preference_scale is not None and kind != "srp_guided":
            raise SteeringError(f"preference_scale has no effect: the run's objective.kind is {kind}, not srp_guided")
        if self.positive is None:
            return
        if kind == "plain":
            raise SteeringError("positive and negative have no effect: the run's objective.kind is plain")
        if not any(reward.pair == "words" and reward.control_words is None for reward in config.rewards):
            raise SteeringError("positive and negative have no effect: each reward of the run has a pair of its own")

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return the run with this in force. A reward with control words of its own keeps them."""
        changed = {}
        if self.preference_scale is not None:
            scale = Schedule(kind="constant", start=self.preference_scale)
            changed = {"preference_scale_denoise": scale, "preference_scale_invert": scale}
        rewards = tuple(
            reward.model_copy(update=changed | {"weight": self.weights.get(reward.name, reward.weight)})
            for reward in config.rewards
        )
        words = config.control_words
        if self.positive is not None and self.negative is not None:
            words = RunWordsConfig(positive=self.positive, negative=self.negative)
        return config.model_copy(update={"control_words": words, "rewards": rewards})


def version_tag(version: int) -> str:
    """Return the name of the tag that keeps a version.

    >>> version_tag(3)
    'srpo.steering.3'
    """
    return f"{TAG}.{version}"


def last_in_force(tags: Mapping[str, str]) -> Steering:
    """Return what came into force last, by a run's tags; version 0 if nothing did. Other tags are ignored."""
    versions = [Steering()]
    for name, text in tags.items():
        try:
            steering = Steering.from_tag(text) if name.startswith(f"{TAG}.") else Steering()
        except SteeringError:
            continue
        if name == version_tag(steering.version):
            versions.append(steering)
    return max(versions, key=lambda each: each.version)
