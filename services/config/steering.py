"""What a run is asked to maximise while it trains: the JSON of a tag on its MLflow run, and what it makes of the run.

    srpo.steering        what is asked for; `srpo steer` writes it, and so may anybody, in MLflow's own pages
    srpo.steering.3      version 3 as it came into force; the training writes one for each, so that they are the history
    srpo.steering_error  why the last one was refused; gone as soon as a good one is there

    {"positive": "Flat", "negative": "3D", "preference_scale": 0.2, "weights": {"fluent-clip": 2}, "version": 3}

A tag says everything: what it leaves out is as in the run file, and so is all where there is no tag. Versions count
what came into force, from 0, the run file's. `srpo steer` writes the next one; an edit by hand need not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as shown  # a value in an error, cut short
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from services.config.objective import Frozen, RunWordsConfig, Schedule, Word
from services.config.run import RunConfig

TAG = "srpo.steering"
ERROR_TAG = "srpo.steering_error"
_LARGEST = 1e6  # of a scale or weight: beyond it lie typing mistakes, and the infinities of float32
_MAX_REASON_CHARS = 500
_LAST_VERSION = 10**9


class SteeringError(ValueError):
    """A tag that cannot come into force; the text names the part of it, the offending value and the cure."""


class Steering(Frozen):
    """What replaces parts of the run file; the empty one replaces nothing.

    >>> Steering(positive="Flat", negative="3D", version=3).told
    'version 3: Flat | 3D'
    """

    version: Annotated[int, Field(ge=0, le=_LAST_VERSION)] = 0  # 0 in a tag: the next one
    positive: Word | None = None  # both words, or none
    negative: Word | None = None
    # k, of both branches, of every reward and at every level
    preference_scale: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] | None = None
    weights: dict[str, Annotated[float, Field(gt=0, le=_LARGEST)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _words_come_as_a_pair(self) -> Steering:
        if (self.positive is None) != (self.negative is None):
            missing = "positive" if self.positive is None else "negative"
            raise ValueError(f"{missing} is missing: words come as a pair")
        return self

    @classmethod
    def from_tag(cls, text: str | None) -> Steering:
        """What a tag asks for; None where the run has none. Raises SteeringError."""
        try:
            tree = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"not JSON: {error} (got {shown(text)})") from error
        return cls.parse(tree)

    @classmethod
    def parse(cls, tree: object) -> Steering:
        """Raises SteeringError."""
        try:
            return cls.model_validate(tree, strict=True)
        except ValidationError as error:
            raise SteeringError("; ".join(_line(item) for item in error.errors())[:_MAX_REASON_CHARS]) from error

    def to_tag(self) -> str:
        return self.model_dump_json(exclude_defaults=True)

    @property
    def told(self) -> str:
        """For people, in a line."""
        parts = [f"{self.positive} | {self.negative}"] if self.positive else []
        parts += [f"k {self.preference_scale:g}"] if self.preference_scale is not None else []
        parts += [f"weight of {name} {weight:g}" for name, weight in self.weights.items()]
        return f"version {self.version}: {', '.join(parts) or 'as in the run file'}"

    def after(self, in_force: Steering) -> Steering:
        """What comes into force where this is asked for: `in_force` itself if that is what this asks for.

        An edit that keeps or omits the version of what is in force gets the next one; so no two share a version.
        Raises SteeringError where there is no next one.
        """
        if self.version <= in_force.version and self.model_copy(update={"version": in_force.version}) == in_force:
            return in_force
        version = max(self.version, in_force.version + 1)
        if version > _LAST_VERSION:
            raise SteeringError(f"version {in_force.version} is in force, the last there is: no edit can follow")
        return self.model_copy(update={"version": version})

    def check(self, config: RunConfig) -> None:
        """Raise SteeringError for what this run does not know, or what would have no effect on it."""
        names, kind = [reward.name for reward in config.rewards], config.objective.kind
        if unknown := [name for name in self.weights if name not in names]:
            raise SteeringError(f"weights: the run has no reward {unknown[0]!r}; it has {', '.join(names)}")
        if self.preference_scale is not None and kind != "srp_guided":
            raise SteeringError(f"preference_scale has no effect: the run's objective.kind is {kind}, not srp_guided")
        if self.positive is None:
            return
        if kind == "direct_align":
            raise SteeringError("positive and negative have no effect: the run's objective.kind is direct_align")
        if not any(reward.pair == "words" and reward.control_words is None for reward in config.rewards):
            raise SteeringError("positive and negative have no effect: each reward of the run has a pair of its own")

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The run as it is to go on. A reward with control words of its own keeps them."""
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
    return f"{TAG}.{version}"


def last_in_force(tags: Mapping[str, str]) -> Steering:
    """What a run's tags say came into force last; version 0 if nothing did. What is no version's tag is passed over."""
    versions = [Steering()]
    for name, text in tags.items():
        try:
            steering = Steering.from_tag(text) if name.startswith(f"{TAG}.") else Steering()
        except SteeringError:
            continue
        if name == version_tag(steering.version):
            versions.append(steering)
    return max(versions, key=lambda each: each.version)


def _line(item: Mapping[str, object]) -> str:
    place = ".".join(map(str, item["loc"])) if isinstance(item["loc"], tuple) else ""
    got = "" if isinstance(item["input"], dict) else f" (got {shown(item['input'])})"
    return (f"{place}: " if place else "") + f"{str(item['msg']).removeprefix('Value error, ')}{got}"
