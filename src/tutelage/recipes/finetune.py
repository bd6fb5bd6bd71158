"""Stage 3: the taught student sees the labels themselves, if that helps.

`keep` leaves the student as stage 2 made it, `head` trains its last layer, `full` all of it with small steps. `auto` tries them
on held-out labels. Without a validation split the student has already learnt from all labels through the teacher, so
cross-validated scores are optimistic, and are marked so; `keep` wins unless another is better by a standard error.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tutelage import config as c
from tutelage.config import recipe
from tutelage.progress import progress, say
from tutelage.recipes.stage import file_hash, open_run, save_weights
from tutelage.runs import hash_of

PASSES = 15  # over the labelled images
RATES = {"head": 1e-3, "full": 1e-4}  # at batch 128
BATCH = 64


@recipe
def finetune(
    *, out: c.Out = "", finetune: c.Finetune = "auto", class_weight: c.ClassWeight = "none", resize: c.Resize = "squash",
    flip: c.Flip = "horizontal", crop_area: c.CropArea = 0.6, view_seed: c.ViewSeed = 0, seed: c.Seed = 0,
    device: c.Device = "auto", precision: c.Precision = "auto", cache: c.Cache = None, overwrite: c.Overwrite = False,
    config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune the student on the labelled images, or keep it.

    Returns:
        result of the stage: what was chosen, the validation accuracies, seconds.
    """
    settings = dict(locals())
    from tutelage.compute import accelerator
    from tutelage.data.manifest import load_task
    from tutelage.recipes import supervised
    from tutelage.recipes.taught import load_student

    with open_run(out, cache, settings, overwrite) as (run, cache_dir):
        curated, taught = run.result("transfer_set", "finetune"), run.result("transfer", "finetune")
        inputs = hash_of(["finetune", curated["outputs"], taught["outputs"], {
            k: settings[k] for k in ("finetune", "class_weight", "resize", "flip", "crop_area", "view_seed", "seed")
        }])  # fmt: skip
        if done := run.done("student", inputs):
            return {**done, "reused": True}
        clock, task = run.clock("student"), load_task(run.path, cache_dir)
        hardware = accelerator(device, precision)
        student = load_student(run.path / "transfer", taught["student"], len(task.classes))
        work = _Work(task, student, settings, hardware, clock)
        validation: dict[str, Any] = {}
        chosen = finetune
        if finetune == "auto":
            right = {how: work.held_out(how) for how in ("keep", "head", "full")}
            chosen = "keep"
            for how, one in right.items():
                gain, error = supervised.paired_gain(one, right["keep"])
                validation[how] = {"accuracy": float(np.mean(one)), "gain": gain, "standard_error": error}
                if how != "keep" and gain > error and gain > validation[chosen]["gain"]:
                    chosen = how
            said = ", ".join(f"{how} {one['accuracy']:.3f}" for how, one in validation.items())
            optimistic = "" if task.val else " (optimistic: the student has met all labels through the teacher)"
            say(f"last stage: {chosen}; validation accuracy {said}{optimistic}")
        module = work.trained(chosen, np.arange(len(task.train)))
        save_weights(run.path / "student" / "weights.safetensors", module.state_dict())
        result = {
            "outputs": file_hash(run.path / "student" / "weights.safetensors"), "curated": curated["outputs"], "chosen": chosen,
            "validation": validation,
            "optimistic": task.val is None, "student": taught["student"], "seconds": clock.stop(),
        }  # fmt: skip
        return run.finish("student", inputs, result)


class _Work:
    """The last stage while it runs."""

    def __init__(self, task, student, settings, hardware, clock):
        from tutelage.targets import ViewSettings

        self.task, self.student, self.settings, self.hardware, self.clock = task, student, settings, hardware, clock
        self.views = ViewSettings(
            settings["view_seed"], settings["flip"], settings["crop_area"], resize=settings["resize"]
        )

    def held_out(self, how: str) -> np.ndarray:
        """(n,) bool: whether each image, held out of this last stage, is classified rightly."""
        from tutelage.data.target_set import folds

        train = self.task.train
        if self.task.val:
            module = self.trained(how, np.arange(len(train)))
            return self.logits(module, self.task.val.images).argmax(1) == self.task.val.labels
        fold = folds(train.labels, train.groups, self.settings["seed"])
        right = np.zeros(len(train), dtype=bool)
        for number in np.unique(fold):
            held = np.flatnonzero(fold == number)
            module = self.trained(how, np.flatnonzero(fold != number))
            right[held] = self.logits(module, train.images.take(held)).argmax(1) == train.labels[held]
        return right

    def trained(self, how: str, positions: np.ndarray):
        """A copy of the student after the last stage on these labelled images."""
        from tutelage import losses, training
        from tutelage.models.students import head_of
        from tutelage.recipes import supervised

        module = copy.deepcopy(self.student.module).to(self.hardware.device)
        if how == "keep":
            return module.eval()
        module.requires_grad_(how == "full")
        head_of(module).requires_grad_(True)
        train, classes = self.task.train, len(self.task.classes)
        labels, batch = train.labels[positions], max(2, min(BATCH, len(positions)))
        steps = supervised.epochs_to_steps(PASSES, len(positions), batch)
        rate = training.scaled_rate(RATES[how], batch)
        plan = supervised.Plan(steps, batch, rate, self.settings["seed"], classes, backbone=how == "full")
        weights = losses.class_weights(training.torch.from_numpy(labels), classes, self.settings["class_weight"])
        with progress(f"last stage, {how}", steps * batch) as advance:
            state = supervised.train_on_labels(
                module, self.student, train.images.take(positions), labels, plan, self.views,
                class_weights=None if weights is None else weights.to(self.hardware.device), accelerator=self.hardware,
                advance=self.clock.ticking(advance), what="fine-tuning the student",
            )  # fmt: skip
        return supervised.chosen_state(module, state)

    def logits(self, module, images) -> np.ndarray:
        from tutelage.recipes.supervised import predict_logits

        return predict_logits(module, self.student, images, self.settings["resize"], self.hardware)
