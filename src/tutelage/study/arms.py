"""The arms of a study: each is one method of training the same student, given as stages and settings of a run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tutelage.errors import TutelageError, did_you_mean, raise_all, shown
from tutelage.settings.presets import PRESETS

CLIP_TAGS = ("clip", "openai", "laion", "datacomp", "siglip", "dfn", "metaclip")  # in timm's tags of CLIP-like weights


@dataclass(frozen=True)
class Way:
    """How an arm trains its student. stages: of the pipeline. settings: those that define the arm. model: name of the arm's student
    in the evaluation. charged: folders of the stages whose compute adds up to the arm's cost; other stages only give reference
    numbers. says: description on the page. times: its training steps as a multiple of the requested number.
    """

    stages: tuple[str, ...]
    settings: dict[str, Any]
    model: str
    charged: tuple[str, ...]
    says: str
    times: int = 1


_ALONE = ("curate", "alone")
_DISTILLED = ("curate", "adapt", "committee", "transfer", "finetune")
_ALL = ("teacher", "committee", "transfer", "student")


def _distilled(objective: str, says: str, charged: tuple[str, ...] = _ALL, **settings: Any) -> Way:
    return Way(_DISTILLED, {"objective": objective, **settings}, "delivered", charged, says)


ARMS = {
    "scratch": Way(_ALONE, {"student_weights": "scratch"}, "baseline", ("alone",), "random weights, labels only"),
    "imagenet": Way(_ALONE, {"student_weights": "pretrained"}, "baseline", ("alone",), "pretrained weights, labels only"),
    "clip": Way(_ALONE, {"student_weights": "pretrained"}, "baseline", ("alone",), "CLIP weights, labels only"),
    "baseline-plus": Way(_ALONE, {}, "baseline", ("alone",), "labels only, for the steps of student and committee", times=2),
    "dino": Way(
        ("curate", "transfer", "finetune"), {"objective": "dino", "student_weights": "scratch"}, "delivered", ("transfer", "student"),
        "self-distillation on the transfer set, then fine-tuning on the labels",
    ),
    "agnostic": _distilled("agnostic", "targets: the frozen teacher's features, and the labels", ("transfer", "student")),
    "oriented": _distilled("oriented", "targets: the committee's class probabilities, and the labels"),
    "pseudo-label": _distilled("pseudo-label", "targets: the committee's most likely class, as a hard label"),
    "teacher-only": _distilled(
        "oriented", "targets: the adapted teacher's class probabilities, no committee, and the labels", ("teacher", "transfer", "student"),
        committee="none",
    ),
    "self-training": _distilled(
        "oriented", "targets: labels-only students' class probabilities, no teacher, and the labels", ("committee", "transfer", "student"),
        committee="only",
    ),
    "paper": Way(
        _DISTILLED, {"preset": "paper", **PRESETS["paper"]}, "delivered", ("teacher", "transfer", "student"),
        "KL divergence to the adapted teacher only, then full fine-tuning",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One arm of a study. name: as given, ARM or ARM:LABEL. way: how it trains. own: settings that only this arm has."""

    name: str
    way: Way
    own: dict[str, Any] = field(default_factory=dict)


def listed(values: Sequence[str]) -> list[str]:
    """Split values that were given with commas or one by one; keep the order and drop repeats."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",") if part.strip()))


def numbers(values: Sequence[str], flag: str, least: int) -> list[int]:
    """Parse a list of whole numbers, each at least `least`; flag: the option's name, for the error message.

    Raises:
        TutelageError: the list is empty, or a value is too small or not a whole number.
    """
    found = listed(values)
    if not found:
        hint = f"use {flag} {max(5, least)}"
        raise TutelageError(f"{flag} without a number: expected whole numbers of at least {least}", hint)
    wrong = [value for value in found if not value.isdecimal() or int(value) < least]
    if wrong:
        raise TutelageError(f"{flag} {shown(wrong)}: expected whole numbers of at least {least}, such as 5,10,25")
    return [int(value) for value in found]


def arms_of(names: Sequence[str], overrides: Sequence[str], known: Sequence[str]) -> list[Arm]:
    """Return the arms of a study, each with its own settings.

    Args:
        names: ARM or ARM:LABEL. overrides: ARM.SETTING=VALUE or ARM:LABEL.SETTING=VALUE; those of ARM apply to its variants too.
        known: names of the settings that an arm may override.

    Raises:
        TutelageError: unknown arms or settings; all of them in one error.
    """
    faults, found = [], listed(names)
    if not found:
        message = f"--arms without an arm: expected one or several of {', '.join(ARMS)}"
        faults.append(TutelageError(message, "use --arms scratch,oriented"))
    for name in found:
        if not re.fullmatch(r"[a-z-]+(:[A-Za-z0-9._-]+)?", name):
            form = "ARM or ARM:LABEL, with a label of letters, digits, dots, dashes and underscores"
            faults.append(TutelageError(f"--arms {name}: expected {form}"))
        elif name.partition(":")[0] not in ARMS:
            near = did_you_mean(name.partition(":")[0], ARMS)
            message = f"--arms {name}: expected one of {', '.join(ARMS)}, or one of them with :LABEL"
            faults.append(TutelageError(message, near))
    settings: dict[str, dict[str, Any]] = {}
    for text in overrides:
        try:
            name, setting, value = _override(text, found, known)
            settings.setdefault(name, {})[setting] = value
        except TutelageError as error:
            faults.append(error)
    for name, own in settings.items():  # an arm may have budgets of its own
        try:
            if "budget" in own:
                own["budget"] = numbers([str(own["budget"]).strip("[]")], f"--set {name}.budget", 1)
        except TutelageError as error:
            faults.append(error)
    raise_all(faults)
    return [
        Arm(name, ARMS[name.partition(":")[0]], {**settings.get(name.partition(":")[0], {}), **settings.get(name, {})})
        for name in found
    ]


def _override(text: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, str, Any]:
    target, equals, value = text.partition("=")
    name, _, setting = target.strip().rpartition(".")
    setting = setting.replace("-", "_")
    if not equals or not name:
        raise TutelageError(f"--set {text}: expected ARM.SETTING=VALUE, such as agnostic.lr=3e-3")
    if name not in names and not any(one.partition(":")[0] == name for one in names):
        message = f"--set {text}: arm {name} is not in the study, whose arms are {', '.join(names)}"
        raise TutelageError(message, did_you_mean(name, names))
    if setting not in known:
        message = f"--set {text}: {setting} is not a setting of `tutelage run` that an arm can have"
        raise TutelageError(message, did_you_mean(setting, known))
    try:
        return name, setting, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, setting, value.strip()


def clip_weights(student: str) -> str:
    """Return timm's name of the student with CLIP weights that were not fine-tuned on ImageNet's labels.

    Raises:
        TutelageError: timm has none; the hint names related models that have CLIP weights.
    """
    import timm

    from tutelage.models.teachers import resolve

    name = resolve(student, "student").partition(".")[0]
    family = name.partition("_")[0]
    tags = {one: one.partition(".")[2] for one in timm.list_pretrained()}
    every = [one for one, tag in tags.items() if any(clip in tag for clip in CLIP_TAGS) and "_ft_in" not in tag]
    if own := [one for one in every if one.partition(".")[0] == name]:
        return own[0]
    near = [one for one in every if one.startswith(family)]
    hint = "use a student that has them" + (f", such as {shown(near, 4)}" if near else ", or leave the arm out")
    raise TutelageError(f"arm clip: timm has no CLIP weights for {name}", hint)
