"""A study: methods x budgets x seeds on your own data, in which stages with the same inputs are computed once; results on one page.

Each run is a folder METHOD/budget-N/seed-N of the study and, once finished, one JSON file in the results folder. The page is made
from these files only, so a study may be spread over days and machines.
"""

from __future__ import annotations

import errno
import time
import traceback
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tutelage.commands.curate import curate
from tutelage.commands.run import walk
from tutelage.data.walk import is_study
from tutelage.errors import TutelageError, number_of
from tutelage.files import toml, write_text
from tutelage.json_object import JSON
from tutelage.pipeline.preflight import preflight
from tutelage.pipeline.stage import open_run, settings_of
from tutelage.progress import duration, logger, processes
from tutelage.results import CurationResult, StudyEstimate, StudyResult
from tutelage.run_folder import STUDY, folder_name
from tutelage.settings import command, declared, resolve
from tutelage.settings.command_flags import CompareSettings, RunSettings
from tutelage.settings.stored import DEFAULT
from tutelage.study.methods import Variant, clip_weights, numbers, variants_of
from tutelage.study.records import check_data, kept_record, write_record
from tutelage.study.results_table import Record, record_name

OF_ALL = {  # settings that are the same in all runs of a study, or that the study itself gives each run
    "out", "cache", "seed", "config", "overwrite", "json", "task", "smoke", "no_baseline", "target", "val", "test", "classes"
}  # fmt: skip


@command(CompareSettings)
def compare(settings: CompareSettings) -> StudyResult | StudyEstimate:
    """Compare methods, label budgets and seeds on your own data, with all compute counted, and write one page of results.

    After an interruption the same command resumes. A failed method does not stop the others.
    """
    started, folder, of_runs = time.monotonic(), Path(settings.out), declared(RunSettings)
    chosen = variants_of(settings.methods, settings.set, [name for name in of_runs if name not in OF_ALL])
    amounts, draws = numbers(settings.budgets, "--budgets", 1), numbers(settings.seeds, "--seeds", 0)
    if processes() > 1:
        message = "`tutelage compare` cannot run in several processes of one group"
        raise TutelageError(message, "use one process, or start several commands with the same --out")
    every = sorted({*amounts, *(budget for variant in chosen for budget in variant.own.get("budget", []))})
    several = [(budget, one) for budget in every for one in chosen if budget in one.own.get("budget", amounts)]
    plan = [(variant, budget, seed) for seed in draws for budget, variant in several]
    kept = Path(settings.results) if settings.results else folder / "results"
    for name, place in (("--out", folder), ("--results", kept)):
        if place.exists() and not place.is_dir():
            raise TutelageError(f"{name} {place} is not a folder", "choose a folder, which may be new")
    if folder.is_dir() and any(folder.iterdir()) and not is_study(folder / STUDY):
        hint = f"use a new folder, such as --out {folder / 'study'}, or the folder of a study"
        raise TutelageError(f"--out {folder} contains other files", hint)
    of_all = {name: value for name, value in vars(settings).items() if name in of_runs}
    work = _Study(folder, kept, of_all, settings.match)
    done = [kept_record(kept, *work.identity(*one)) for one in plan]
    check_data(kept, [(record, work.identity(*one)[3]) for record, one in zip(done, plan, strict=True) if record])
    todo = [one for one, record in zip(plan, done, strict=True) if record is None]
    counts = " x ".join(
        number_of(len(many), one) for one, many in (("method", chosen), ("budget", amounts), ("seed", draws))
    )
    logger.info(f"{number_of(len(plan), 'run')}: {counts}; {len(plan) - len(todo)} are done")
    impossible = work.impossible({one[0].name: one for one in reversed(todo)}, first_start=len(todo) == len(plan))
    if settings.dry_run:
        from tutelage.study.cost_estimate import estimate

        possible = [(*one, work.resolved(*one)) for one in todo if one[0].name not in impossible]
        return estimate(possible, settings.match)
    about = {
        "methods": [variant.name for variant in chosen],
        "budgets": amounts,
        "seeds": draws,
        "set": settings.set,
        "match": settings.match,
        "results": str(kept.absolute()) if settings.results else "",
        "plan": [record_name(variant.name, *others) for variant, *others in plan],
    }
    failed = dict(impossible)
    work.write_settings(about, failed)
    for number, (variant, budget, seed) in enumerate(todo, 1):
        name = record_name(variant.name, budget, seed)
        if variant.name in impossible or kept_record(kept, *work.identity(variant, budget, seed)):
            continue  # or finished meanwhile: several processes may work on one study, each on some of its methods
        logger.info(f"run {number} of {len(todo)}: {variant.name}, budget {budget}, seed {seed}")
        try:
            work.one(variant, budget, seed)
        except Exception as error:  # the failure of one method does not stop the others; a full disk does
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = work.place(variant, budget, seed) / "traceback.txt"
            write_text(where, traceback.format_exc())
            kind = "" if isinstance(error, TutelageError) else f"{type(error).__name__}, see {where}: "
            failed[name] = kind + " ".join(str(error).split())
            logger.info(f"{name} has failed, the others go on: {failed[name]}")
    if len(failed) and not any(kept_record(kept, *work.identity(*one)) for one in plan):
        first = next(iter(failed.values()))
        hint = "correct that and repeat the command; traceback.txt in the folder of a run says more"
        raise TutelageError(f"no run of the study could be finished: {first}", hint)
    from tutelage.study.study_page import write_study

    work.write_settings(about, failed)
    summary = write_study(folder)
    logger.info(f"done in {duration(time.monotonic() - started)}; open {summary['page']}")
    return StudyResult(**summary)


@dataclass(frozen=True)
class _Study:
    """A study. kept: folder of its records. given: the settings that all runs share. match: what is equal for all methods."""

    folder: Path
    kept: Path
    given: JSON
    match: str

    @cached_property
    def settings(self) -> JSON:
        """All settings of a run, before its method's own."""
        cache = str(Path(self.given["cache"] or self.folder / "cache"))
        return {**vars(RunSettings()), **self.given, "no_baseline": True, "config": None, "cache": cache}

    def write_settings(self, about: JSON, failed: dict[str, str]) -> None:
        """Write study.toml: what is compared, what failed and why, and the settings."""
        settings = {name: DEFAULT if value is None else value for name, value in self.given.items()}
        reasons = [f"{name}: {reason}" for name, reason in failed.items()]
        write_text(self.folder / STUDY, toml({"study": {**about, "failed": reasons}, "settings": settings}))

    def place(self, variant: Variant, budget: int, seed: int) -> Path:
        """Return the folder of one run."""
        return self.folder / folder_name(variant.name) / f"budget-{budget}" / f"seed-{seed}"

    def of(self, variant: Variant, budget: int, seed: int) -> JSON:
        """Return all settings of one run."""
        own = {**variant.method.settings, **variant.own, "budget": budget, "seed": seed}
        settings = {**self.settings, **own, "out": str(self.place(variant, budget, seed))}
        if variant.name.partition(":")[0] == "clip":
            settings["student"] = clip_weights(settings["student"])
        return settings

    def resolved(self, variant: Variant, budget: int, seed: int) -> RunSettings:
        """Return the checked settings of one run."""
        return resolve(RunSettings, self.of(variant, budget, seed))

    def identity(self, variant: Variant, budget: int, seed: int) -> tuple[str, int, int, JSON]:
        """Return the method, budget, seed and settings that a kept result must match."""
        try:
            settings = self.of(variant, budget, seed)
        except TutelageError:  # reported by `impossible`
            settings = {**self.settings, **variant.method.settings, **variant.own, "budget": budget, "seed": seed}
        return variant.name, budget, seed, {**settings, "match": self.match}

    def impossible(self, first: dict[str, tuple[Variant, int, int]], first_start: bool) -> dict[str, str]:
        """Return the methods that cannot be run, each with the reason, and report them before anything starts; an error if no method can
        be run, and no run of the study is finished. first: name of a method -> its first run. first_start: whether no run of the study is
        finished yet."""
        faults: dict[str, TutelageError] = {}
        for name, one in first.items():
            try:
                preflight(self.resolved(*one), Path(self.settings["cache"]))
            except TutelageError as error:
                faults[name] = error
        if first_start and faults and len(faults) == len(first):
            raise next(iter(faults.values()))
        reasons = {name: " ".join(str(error).split()) for name, error in faults.items()}
        for name, reason in reasons.items():
            logger.info(f"method {name} cannot be run, the others can: {reason}")
        return reasons

    def one(self, variant: Variant, budget: int, seed: int) -> Record:
        """Do one run, and write its record."""
        # what failed with other settings is moved aside
        settings = replace(self.resolved(variant, budget, seed), overwrite=True)
        with open_run(settings) as (run, _):
            if self.match == "flops" or variant.method.times > 1:
                from tutelage.study.cost_estimate import steps_of

                curate(**settings_of(curate, settings))
                count = CurationResult(**run.result("curate", "compare")).images.transfer
                settings = replace(settings, epochs=None, steps=steps_of(variant, settings, count, self.match))
            walk(run, variant.method.stages, settings)
            return write_record(self.kept, run, variant.method, self.identity(variant, budget, seed))
