"""The cost of a run from that of its stages, and what sharing stages saved a study. Loads no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tutelage.json_object import JSON

ENOUGH = 256  # fewest teacher outputs computed at once for a valid time per output


def cost_of(record: JSON) -> dict[str, float]:
    """Cost of a run as if nothing had been shared: FLOPs in total and of the teacher, images trained on, seconds, MiB, bytes."""
    entries = record["compute_cost"].values()
    teacher = sum(entry["teacher"]["flops"] for entry in entries)
    return {
        "flops": teacher + sum(entry["flops"] for entry in entries),
        "teacher_flops": teacher,
        "images": sum(entry["images"] for entry in entries),
        "seconds": sum(entry["seconds"] + entry["teacher"]["seconds"] for entry in entries),
        "memory_mib": max((entry["memory_mib"] for entry in entries), default=0.0),
        "bytes": sum(entry["bytes"] + entry["teacher"].get("bytes", 0) for entry in entries),
    }


def shares(records: Sequence[JSON]) -> dict[str, float]:
    """Compare what the study computed with the cost of its runs one by one.

    Stages taken over from another run and teacher outputs found in the cache cost the study nothing. One by one, each run is
    charged for both; outputs that were found are charged the time it takes to compute as many.

    Returns:
        {"flops", "flops_unshared", "flops_share", "seconds", "seconds_unshared", "seconds_share"}.
    """
    entries = [entry for record in records for entry in record["compute_cost"].values()]
    times = [
        entry["teacher"]["seconds"] / entry["teacher"]["computed"]
        for entry in entries
        if entry["teacher"]["computed"] >= ENOUGH and entry["teacher"]["seconds"] > 0
    ]
    each = statistics.median(times) if times else 0.0
    done, unshared = {"flops": 0.0, "seconds": 0.0}, {"flops": 0.0, "seconds": 0.0}
    beside = [entry for record in records for entry in record.get("beside", {}).values()]
    for entry, needed in [*((one, True) for one in entries), *((one, False) for one in beside)]:
        teacher = entry["teacher"]
        found = max(0, teacher["outputs"] - teacher["computed"])
        if needed:  # a stage beside was computed, but its run does not need it
            unshared["flops"] += entry["flops"] + teacher["flops"]
            unshared["seconds"] += entry["seconds"] + teacher["seconds"] + found * each
        if not entry["taken_from"]:
            computed = min(1.0, teacher["computed"] / teacher["outputs"]) if teacher["outputs"] else 0.0
            done["flops"] += entry["flops"] + teacher["flops"] * computed
            done["seconds"] += entry["seconds"] + teacher["seconds"]
    return {
        **done,
        **{f"{name}_unshared": value for name, value in unshared.items()},
        **{f"{name}_share": done[name] / unshared[name] if unshared[name] else 1.0 for name in done},
    }
