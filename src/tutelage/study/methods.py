"""The methods of a study: each trains the same student in its own way, given as stages and settings of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from tutelage.errors import TutelageError, did_you_mean, raise_all, shown
from tutelage.files import toml_of
from tutelage.json_object import JSON
from tutelage.settings.checking import checked_value
from tutelage.settings.command_flags import RunSettings
from tutelage.settings.presets import PRESETS

CLIP_TAGS = ("clip", "openai", "laion", "datacomp", "siglip", "dfn", "metaclip")  # in timm's tags of CLIP-like weights


@dataclass(frozen=True)
class Method:
    """A method of training the student. stages: of the pipeline. settings: those that define the method. model: name of its student
    in the evaluation. charged: folders of the stages whose compute adds up to the method's cost; other stages only give reference
    numbers. description: on the page. times: its training steps as a multiple of the requested number."""

    stages: tuple[str, ...]
    settings: JSON
    model: str
    charged: tuple[str, ...]
    description: str
    times: int = 1


_BASELINE = ("curate", "baseline")
_DISTILLED = ("curate", "adapt", "committee", "distill", "finetune")
_ALL = ("adapt", "committee", "distill", "finetune")


def _distilled(objective: str, description: str, charged: tuple[str, ...] = _ALL, **settings: str) -> Method:
    return Method(_DISTILLED, {"objective": objective, **settings}, "delivered", charged, description)


METHODS = {
    "scratch": Method(_BASELINE, {"student_weights": "scratch"}, "baseline", ("baseline",), "random weights, labels only"),
    "imagenet": Method(_BASELINE, {"student_weights": "pretrained"}, "baseline", ("baseline",), "pretrained weights, labels only"),
    "clip": Method(_BASELINE, {"student_weights": "pretrained"}, "baseline", ("baseline",), "CLIP weights, labels only"),
    "baseline-plus": Method(_BASELINE, {}, "baseline", ("baseline",), "labels only, for the steps of student and committee", times=2),
    "dino": Method(
        ("curate", "distill", "finetune"), {"objective": "dino", "student_weights": "scratch"}, "delivered", ("distill", "finetune"),
        "self-distillation on the transfer set, then fine-tuning on the labels",
    ),
    "task-agnostic": _distilled("task-agnostic", "targets: the frozen teacher's features, and the labels", ("distill", "finetune")),
    "task-oriented": _distilled("task-oriented", "targets: the committee's class probabilities, and the labels"),
    "pseudo-label": _distilled("pseudo-label", "targets: the committee's most likely class, as a hard label"),
    "teacher-only": _distilled(
        "task-oriented", "targets: the adapted teacher's class probabilities, no committee, and the labels",
        ("adapt", "distill", "finetune"), committee="none",
    ),
    "self-training": _distilled(
        "task-oriented", "targets: labels-only students' class probabilities, no teacher, and the labels",
        ("committee", "distill", "finetune"), committee="only",
    ),
    "paper": Method(
        _DISTILLED, {"preset": "paper", **PRESETS["paper"]}, "delivered", ("adapt", "distill", "finetune"),
        "KL divergence to the adapted teacher only, then full fine-tuning",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A method as a study runs it. name: as given, METHOD or METHOD:LABEL. own: settings that only this variant has."""

    name: str
    method: Method
    own: JSON = field(default_factory=dict)


def listed(values: Sequence[str]) -> list[str]:
    """Split values that were given with commas or one by one; keep the order and drop repeats."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",") if part.strip()))


def numbers(values: Sequence[str], flag: str, least: int) -> list[int]:
    """Parse a list of whole numbers, each at least `least` and of at most 18 digits; flag: the option's name, for the error message.

    Raises:
        TutelageError: the list is empty, or a value is too small or not a whole number.
    """
    found = listed(values)
    if not found:
        hint = f"use {flag} {max(5, least)}"
        raise TutelageError(f"{flag} without a number: expected whole numbers of at least {least}", hint)
    wrong = [value for value in found if not value.isdecimal() or len(value) > 18 or int(value) < least]
    if wrong:
        raise TutelageError(f"{flag} {shown(wrong)}: expected whole numbers of at least {least}", f"use {flag} 5,10,25")
    return [int(value) for value in found]


def variants_of(names: Sequence[str], overrides: Sequence[str], known: Sequence[str]) -> list[Variant]:
    """Return the methods of a study, each with its own settings.

    Args:
        names: METHOD or METHOD:LABEL. overrides: METHOD.SETTING=VALUE or METHOD:LABEL.SETTING=VALUE; those of METHOD apply to its
            variants too.
        known: names of the settings that a method may override.

    Raises:
        TutelageError: unknown methods or settings, or values that do not fit; all of them in one error.
    """
    faults, found = [], listed(names)
    if not found:
        message = f"--methods without a method: expected one or several of {', '.join(METHODS)}"
        faults.append(TutelageError(message, "use --methods scratch,task-oriented"))
    for name in found:
        if not re.fullmatch(r"[a-z-]+(:[A-Za-z0-9._-]{1,60})?", name):
            form = "METHOD or METHOD:LABEL, with a label of at most 60 letters, digits, dots, dashes and underscores"
            faults.append(TutelageError(f"--methods {name}: expected {form}", "for example task-oriented:no-labels"))
        elif name.partition(":")[0] not in METHODS:
            hint = did_you_mean(name.partition(":")[0], METHODS, f"use one of {', '.join(METHODS)}")
            faults.append(
                TutelageError(f"--methods {name}: no such method (a label of one's own follows after a colon)", hint)
            )
    settings: dict[str, JSON] = {}
    for text in overrides:
        try:
            name, setting, value = _override(text, found, known)
            settings.setdefault(name, {})[setting] = value
        except TutelageError as error:
            faults.append(error)
    for name, own in settings.items():  # a method may have budgets of its own
        try:
            if "budget" in own:
                own["budget"] = numbers([str(own["budget"]).strip("[]")], f"--set {name}.budget", 1)
        except TutelageError as error:
            faults.append(error)
    raise_all(faults)
    of = {name: name.partition(":")[0] for name in found}
    return [Variant(name, METHODS[of[name]], settings.get(of[name], {}) | settings.get(name, {})) for name in found]


def _override(text: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, str, object]:
    target, equals, value = text.partition("=")
    name, _, setting = target.strip().rpartition(".")
    setting = setting.replace("-", "_")
    if not equals or not name:
        raise TutelageError(f"--set {text}: expected METHOD.SETTING=VALUE", "for example --set task-agnostic.lr=3e-3")
    if name not in names and not any(one.partition(":")[0] == name for one in names):
        message = f"--set {text}: {name} is not in the study, whose methods are {', '.join(names)}"
        raise TutelageError(message, did_you_mean(name, names, f"add --methods {name}"))
    if setting not in known:
        message = f"--set {text}: {setting} is not a setting of `tutelage run` that a method can have"
        raise TutelageError(message, did_you_mean(setting, known, "`tutelage run --help` lists them"))
    try:
        given: object = toml_of(f"value = {value}")["value"]
    except ValueError:
        given = value.strip()
    if setting != "budget":  # of which a method may have several
        try:
            checked_value(RunSettings, setting, given)
        except TutelageError as error:
            raise TutelageError(f"--set {text}: {error.message}", error.hint) from None
    return name, setting, given


@cache
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
    hint = "use a student that has them" + (f", such as {shown(near, 4)}" if near else ", or leave the method out")
    raise TutelageError(f"method clip: timm has no CLIP weights for {name}", hint)
