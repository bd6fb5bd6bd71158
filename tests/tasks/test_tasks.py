"""The protocol of a task: what is in it, both classes have, and a reader finds in one place what it means."""

from __future__ import annotations

import inspect

import pytest

from tutelage.tasks import TASKS, Classification, Segmentation, Task, task_of

METHODS = {name: one for name, one in vars(Task).items() if inspect.isfunction(one) and not name.startswith("_")}
CONSTANTS = [name for name in Task.__annotations__ if name.isupper()]


@pytest.mark.parametrize("kind", [Classification, Segmentation])
def test_a_task_is_complete(kind: type):
    """Each task has every constant and defines every method itself, with the parameters of the protocol, which has no body to inherit."""
    assert len(CONSTANTS) > 10
    assert len(METHODS) > 20
    assert [name for name in CONSTANTS if name not in vars(kind)] == []
    assert [name for name in METHODS if name not in vars(kind)] == []
    for name, method in METHODS.items():
        assert list(inspect.signature(getattr(kind, name)).parameters) == list(inspect.signature(method).parameters)
        assert method.__doc__, f"{name} says what it does, once for all tasks"


def test_a_task_is_found_by_its_name():
    """The name in the settings stands for one task, which describes its own scores."""
    assert isinstance(task_of("classification"), Classification)
    assert isinstance(task_of("segmentation"), Segmentation)
    assert {one.METRICS.main for one in TASKS.values()} == {"accuracy", "miou"}
    assert all(set(one.FROM_LOGITS + one.FROM_FEATURES) - {"distilled"} <= set(one.PASSES) for one in TASKS.values())
    assert all(set(one.PASSES) == set(one.RATES) for one in TASKS.values())
