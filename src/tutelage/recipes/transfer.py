"""Stage 2: the adapted teacher's knowledge of the task goes to the student, on unlabelled images.

The teacher's outputs for M views of every image are computed once (or taken from the cache, or, above
`--cache-limit`, in the loop); the student sees the same views at its own size and matches the teacher's probabilities
(KL at temperature T) and, through a projection that is thrown away, its pooled features (cosine, on 256 principal
axes). Label propagation over the nearest-neighbour graph of the teacher's features sharpens the targets where held-out
labels say so. No label is read here but through the teacher and that graph. `--objective` teaches it otherwise: the
rivals that the method is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from tutelage import config as c
from tutelage.config import recipe
from tutelage.errors import TutelageError
from tutelage.progress import progress, say
from tutelage.recipes.stage import MetricsLog, checkpoint_steps, file_hash, open_run, save_weights, training_steps
from tutelage.runs import hash_of


@recipe
def transfer(
    *, out: c.Out = "", student: c.Student = "mobilenetv4-s", student_weights: c.StudentWeights = "pretrained",
    student_size: c.StudentSize = None, decoder: c.Decoder = "lraspp",
    teacher_weights: c.TeacherWeights = "pretrained", views: c.ViewCount = 2,
    objective: c.Objective = "oriented", agnostic_loss: c.AgnosticLoss = "contrastive",
    agnostic_features: c.AgnosticFeatures = "patches",
    refine: c.Refine = "propagate", cache_limit: c.CacheLimit = 20.0, epochs: c.Epochs = None, steps: c.Steps = None,
    batch_size: c.BatchSize = 128, lr: c.LearningRate = 2e-3, temperature: c.Temperature = 1.0, feature_weight: c.FeatureWeight = 2.0,
    mixup: c.Mixup = 0.0, class_weight: c.ClassWeight = "none",
    resize: c.Resize = "squash", flip: c.Flip = "horizontal", crop_area: c.CropArea = 0.6, part_area: c.PartArea = 0.5,
    view_seed: c.ViewSeed = 0,
    seed: c.Seed = 0, device: c.Device = "auto", precision: c.Precision = "auto", tracker: c.Tracker = "none",
    cache: c.Cache = None, overwrite: c.Overwrite = False, config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Teach the student on the transfer set.

    Returns:
        result of the stage: steps, images seen, loss, how the targets were refined, seconds of targets and of training.
    """
    settings = dict(locals())
    from tutelage import training
    from tutelage.compute import accelerator, training_flops
    from tutelage.recipes import self_taught
    from tutelage.recipes.ledger import Meter
    from tutelage.recipes.objectives import LABEL_FREE, QUEUE
    from tutelage.recipes.teach import Plan, teach

    with open_run(out, cache, settings, overwrite, together=True) as (run, cache_dir):
        curated = run.result("transfer_set", "transfer")
        job = _Job(run, cache_dir, curated, settings)
        inputs = job.inputs()
        hardware, meter = accelerator(device, precision), Meter()
        with hardware.main_process_first():  # it may take the stage over from another run of a study
            done = run.done("transfer", inputs)
        if done:
            return {**done, "reused": True}
        main, processes = hardware.is_main_process, hardware.num_processes
        view_settings = job.kind.views(settings)
        task, (targets, refined, target_seconds) = job.task, job.targets(view_settings, hardware, meter, inputs)
        module, built, targets = job.student(targets, hardware)
        count = len(task.transfer)
        total = training_steps(steps, epochs, count, batch_size)
        shown, small = float(batch_size), built.size
        if objective == "dino":  # as many pixels as the others see
            small = self_taught.small_side(built.module, built.size)
            shown = self_taught.images_in_a_step(batch_size, built.size, small)
            total = max(1, round(total * batch_size / shown))
        every = checkpoint_steps(total, round(shown))
        rate = training.scaled_rate(lr, batch_size)
        meter.trained, meter.train_flops = total * shown, training_flops(module, built.size)
        if objective == "dino":  # the averaged network looks at the large crops, and the head at crops of every size
            meter.train_flops += self_taught.extra_flops(module, built, batch_size / shown)
        if targets is not None and targets.table is None:  # online: at every step
            queued = QUEUE if agnostic_loss == "queue" and objective.startswith("agnostic") else 0
            meter.asked(0, b"online", total * (batch_size + queued), total * (batch_size + queued))
        optimizer = training.optimizer_for(module, rate, hardware.device)
        alone = objective == "dino"  # its targets come from the average, which must not run ahead with the first steps
        average = training.Average(module, self_taught.DECAY if alone else training.EMA_DECAY, steady=alone)
        checkpoints, clock = run.path / "checkpoints", run.clock("transfer")
        start = training.load_checkpoint(checkpoints, "transfer", inputs, module, optimizer, average)
        if start:
            say(f"transfer goes on after step {start:,} of {total:,}")
        hardware.wait_for_everyone()
        module, optimizer = hardware.prepare(module, optimizer)
        plain = hardware.unwrap_model(module)
        metrics = MetricsLog(run.path / "transfer" / "metrics.jsonl", start, tracker, run.path, hardware)

        def save(step: int) -> None:
            if main:
                training.save_checkpoint(checkpoints, "transfer", step, inputs, plain, optimizer, average)

        plan = Plan(
            total, batch_size, rate, temperature, feature_weight, mixup, seed, objective, agnostic_loss, job.labelled,
            job.kind.part(settings),
        )  # fmt: skip
        with progress("transfer", round(total * shown), round(start * shown)) as advance:
            loop = {"optimizer": optimizer, "average": average, "start": start, "log": metrics.write, "save": save,
                    "every": every, "advance": clock.ticking(advance) if main else advance}  # fmt: skip
            if objective == "dino":
                self_taught.teach_itself(module, built, small, task.transfer, view_settings, plan, hardware, **loop)
            else:
                assert targets is not None
                loop["labels"] = task.train.labels if job.dual else None
                loop["class_weights"] = job.kind.told_weights(targets, settings)
                teach(module, built, targets, plan, hardware, **loop)
        metrics.close()
        hardware.wait_for_everyone()
        if main:
            plain.load_state_dict(average.state)
            share = job.mixed(plain, built, hardware)
            own = plain.student if hasattr(plain, "student") else plain
            save_weights(run.path / "transfer" / "weights.safetensors", own.state_dict())
            seconds = clock.stop()
            result = {
                "outputs": hash_of([inputs, file_hash(run.path / "transfer" / "weights.safetensors")]), "student": built.about(),
                "curated": curated["outputs"], "objective": objective, "head": objective not in LABEL_FREE, "steps": total,
                "images_seen": round(total * shown), "processes": processes,
                "loss": metrics.last, "features": targets is not None and targets.embedding is not None, "labels_head": share,
                "refined": refined, "online": targets is not None and targets.table is None, "seconds": seconds,
                "target_seconds": target_seconds, "ledger": meter.entry(run.path / "transfer", seconds, target_seconds),
            }  # fmt: skip
            run.finish("transfer", inputs, result)
            (run.path / "transfer" / "target_seconds.json").unlink(missing_ok=True)
        hardware.wait_for_everyone()
        return run.result("transfer", "transfer")


class _Job:
    """What depends on the objective: which images and labels take part, what is told, what is trained."""

    def __init__(self, run, cache_dir, curated, settings):
        from tutelage.recipes.objectives import LABELLED_SHARE
        from tutelage.tasks import task_of

        self.kind: Any = task_of(curated["task"])
        self.run, self.cache_dir, self.curated, self.settings = run, cache_dir, curated, settings
        self.objective = settings["objective"]
        self.adapted = None if self.objective == "dino" else run.result("teacher", "transfer")
        self.dual = self.objective == "dual-head"
        self.labelled = round(LABELLED_SHARE * settings["batch_size"]) if self.dual else 0
        self.level: int | None = 0  # which of the numbers that may be kept of a view; None: the teacher runs online

    @cached_property
    def task(self):
        """The images; a finished stage does not open them."""
        from tutelage.data.manifest import load_task
        from tutelage.recipes.objectives import LABEL_FREE
        from tutelage.recipes.teaching import without_labels

        task = load_task(self.run.path, self.cache_dir)
        return without_labels(task) if self.objective in LABEL_FREE else task

    def inputs(self) -> str:
        """The hash of all that the student depends on: of label-free objectives the images alone, whatever their labels."""
        from tutelage.data.manifest import transfer_keys
        from tutelage.recipes.objectives import LABEL_FREE
        from tutelage.targets import gibibytes

        images, told, widths = self.curated["outputs"], self.adapted, [0]
        if self.objective in LABEL_FREE:
            images = hash_of([b"".join(sorted(transfer_keys(self.run.path))).hex(), len(self.curated["classes"])])
        if told is not None:
            frozen, widths = self.objective == "agnostic", self.kind.widths(told, self.settings)
            about = told["teacher"]
            window = [about["window"]] if about.get("window") else []
            told = [about["hash"], about["size"], *window] if frozen else told["outputs"]
        count, views, limit = self.curated["images"]["transfer"], self.settings["views"], self.settings["cache_limit"]
        self.level = next((i for i, width in enumerate(widths) if gibibytes(count, views, width) <= limit), None)
        online = self.level or self.level is None
        free = {"out", "cache", "device", "tracker", "overwrite", "config", "cache_limit"}
        free |= {*self.kind.UNUSED, *self.kind.UNUSED_IN_TRANSFER}
        used = {**self.settings, "part_area": self.kind.part(self.settings)}
        if self.objective == "agnostic":  # no class is told
            used["class_weight"] = "none"
        return hash_of(["transfer", images, told, online, {k: v for k, v in used.items() if k not in free}])

    def targets(self, views, hardware, meter, inputs: str) -> tuple[Any, dict[str, Any], float]:
        """What the student is to match, how it was refined, and the seconds that took; nothing for `dino`."""
        from tutelage.compute import flops
        from tutelage.recipes.objectives import NEEDS_FEATURES
        from tutelage.recipes.teaching import make_targets, tell_reduction

        if self.adapted is None:
            return None, {"kind": "none"}, 0.0
        kind, agnostic, folder = self.kind, self.objective == "agnostic", self.run.path / "teacher"
        teacher = kind.told_by(folder, self.adapted, self.settings, hardware, self.level or 0)
        if self.level:
            whole = kind.told_by(folder, self.adapted, self.settings, hardware, 0)
            tell_reduction(whole, teacher, self.task.transfer, views)
        if self.objective in NEEDS_FEATURES and teacher.network.output != "features":
            raise TutelageError(
                f"--objective {self.objective} with a fine-tuned teacher, which keeps logits only", "a frozen teacher: --adapt probe",
                "--objective oriented or agnostic, or --adapt probe",
            )  # fmt: skip
        meter.teacher_flops = flops(teacher.module, teacher.network.size)
        matched = self.settings["feature_weight"] > 0 and self.objective != "pseudo-label" and kind.POOLED
        refine = self.settings["refine"] if kind.POOLED and not agnostic else "none"
        return make_targets(
            self.run, self.task, teacher, views, self.settings["views"], refine,
            matched or self.objective in NEEDS_FEATURES, self.settings["cache_limit"], self.cache_dir, hardware, inputs, meter,
        )  # fmt: skip

    def student(self, targets: Any, hardware) -> tuple[Any, Any, Any]:
        """The module to train, the student in it, and the targets without features where it cannot match them."""
        import torch

        from tutelage import training
        from tutelage.models.students import SelfTaught, Taught, plain_head
        from tutelage.recipes.objectives import NEEDS_FEATURES

        s = self.settings
        torch.manual_seed(training.seed_of(s["seed"], "student"))
        built = self.kind.student(s, len(self.task.classes))
        module, width = built.module, 0
        if targets is not None and targets.embedding is not None:
            width = targets.embedding[1].shape[1]
        wrapped = self.kind.in_transfer(module, width, s)
        if wrapped is not None:
            return _placed(wrapped, built, hardware), built, targets
        beside = targets is None or targets.embedding is not None or self.dual
        strict = self.objective in (*NEEDS_FEATURES, "dual-head", "dino")
        if strict and not plain_head(module, built.size):
            raise TutelageError(
                f"--objective {self.objective} with --student {built.name}, whose head is not one linear layer on pooled features",
                "a student with one", "--objective oriented or pseudo-label, or another student",
            )  # fmt: skip
        if beside and not Taught.possible(module, built.size):
            say(f"{built.name} has no single head on pooled features: the teacher's features are not matched")
            assert targets is not None
            targets, beside = replace(targets, embedding=None), False
        if beside and targets is None:
            module = SelfTaught(module, built.size)
        elif beside:
            assert targets is not None
            module = Taught(module, width or 1, built.size, second_head=self.dual)
        return _placed(module, built, hardware), built, targets

    def mixed(self, module, built, hardware) -> float | None:
        """Fold the second head of `dual-head` into the student's own; its share, chosen on validation images where there are any."""
        import numpy as np
        import torch

        from tutelage.recipes.teach import best_share, mix_heads
        from tutelage.targets import CLEAN, view_outputs

        if not self.dual:
            return None
        share = 0.5
        if self.task.val:
            both = view_outputs(
                lambda images: torch.cat(module(images)[::2], dim=1), module, built, self.task.val.images, CLEAN,
                self.kind.views(self.settings), hardware,
            )  # fmt: skip
            own, second = np.split(both, 2, axis=1)
            share = best_share(own, second, self.task.val.labels)
        mix_heads(module, share)
        say(
            f"dual head: share of the labels' head {share:g}"
            + ("" if self.task.val else " (no validation images to choose it on)")
        )
        return share


def _placed(module, built, hardware):
    """The module on its device, in the memory format that suits the student."""
    import torch

    module = module.to(hardware.device)
    return module.to(memory_format=torch.channels_last) if built.channels_last else module
