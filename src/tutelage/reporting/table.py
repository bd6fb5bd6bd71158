"""Results as text tables for the terminal."""

from __future__ import annotations

import shutil
import textwrap

from tutelage.json_object import JSON
from tutelage.reporting.scores import words_of

TITLES = {  # of the models of an evaluation, in the order of tables and legends
    "delivered": "delivered student",
    "distilled": "distilled student",
    "baseline": "baseline (labels only)",
    "teacher": "teacher (adapted)",
    "committee": "committee",
}


def delivered_name(results: JSON) -> str | None:
    """Name of the delivered model in an evaluation: "distilled" or "baseline" if it is one of these, else "delivered".

    Returns:
        None if no student has been delivered.
    """
    if "delivered" not in results:
        return None
    what = results["delivered"].get("what")
    return what if what in ("distilled", "baseline") and what in results else "delivered"


def title_of(what: str) -> str:
    """Title of a student. what: distilled, baseline, or a method of fine-tuning: head, full, long, steep."""
    return TITLES.get(what, f"fine-tuned student ({what})")


def models_of(results: JSON) -> dict[str, tuple[str, JSON]]:
    """The distinct models of an evaluation: name -> title and scores; the title marks the delivered one.

    A committee whose students have weight 0 equals its teacher, and is left out.
    """
    delivered, found = delivered_name(results), {}
    for name, title in TITLES.items():
        if name not in results or (name == "delivered" and delivered != name):
            continue
        if name == "committee" and not results[name]["weight"]:
            continue
        title = title_of(results[name].get("what", "distilled")) if name == "delivered" else title
        found[name] = f"{title}, delivered" if name == delivered else title, results[name]
    return found


def scores_table(rows: list[tuple[str, JSON]]) -> str:
    """Format one line per model, with aligned columns.

    Args:
        rows: title and scores: {"test": {"accuracy", ...}, "parameters", "latency_ms"}; a dash for what is missing.
    """
    columns = words_of(next((one["test"] for _, one in rows if one.get("test")), None)).table[:4]
    cells: list[tuple[str, ...]] = [("model", *(title for title, _ in columns), "parameters", "ms/image")]
    for title, one in rows:
        test = one.get("test", {})
        numbers = [f"{test[name]:.3f}" if name in test else "-" for _, name in columns]
        size = f"{one['parameters']:,}" if one.get("parameters") else "-"
        time = f"{one['latency_ms']:.2f}" if one.get("latency_ms") else "-"
        cells.append((title, *numbers, size, time))
    return _aligned(cells)


def _aligned(cells: list[tuple[str, ...]]) -> str:
    """Align rows of cells, the first of them titles: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    first, rest = widths[0], widths[1:]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], rest)]).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def study_table(result: JSON) -> str:
    """One line per method and budget: mean and spread in percent, seeds, points behind the best, interval, TFLOPs; then failed runs."""
    rows = result["table"]
    score = words_of(rows[0]).title
    cells: list[tuple[str, ...]] = [
        ("method", "budget", f"{score} %", "seeds", "behind", "95 % interval", "p", "TFLOPs")
    ]
    for row in rows:
        confidence = ("best" if row["best"] else "-", "", "")
        if row["behind"] is not None:
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            confidence = (f"{100 * row['behind']:.1f}", interval, "" if row["p"] is None else f"{row['p']:.2g}")
        cells.append((row["method"], *_mean(row), *confidence, f"{row['flops'] / 1e12:.1f}"))
    cells += [("(its teacher)", *_mean(row), "-", "", "", "") for row in result["teachers"]]
    failed = [f"failed: {name}: {reason}" for name, reason in result["failed"].items()]
    missing = [f"not finished: {', '.join(result['missing'])}"] if result["missing"] else []
    return "\n".join([_aligned(cells), *failed, *missing, f"page: {result['page']}"])


def _mean(row: JSON) -> tuple[str, str, str]:
    """Budget, mean and spread in percent, and number of seeds."""
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    return str(row["budget"]), f"{100 * row['score']:.1f}{spread}", str(row["seeds"])


def times_table(result: JSON) -> str:
    """What `bench` measured: one line per model, number of threads and batch size."""
    machine = result["machine"]
    known = ", ".join(machine["instruction_sets"]) or "instruction sets unknown"
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {known}"]
    lines.append(f"{'model':<18}{'threads':>8}{'batch':>7}{'median ms':>11}{'p95 ms':>9}{'x eager':>9}")
    for row in result["rows"]:
        where = row["device"] if row["device"] != "cpu" else row["threads"]
        lines.append(
            f"{row['model']:<18}{where:>8}{row['batch']:>7}{row['median_ms']:>11.2f}{row['p95_ms']:>9.2f}{row['times_as_fast']:>9.2f}"
        )
    for name, one in result["files"].items():
        lines.append(f"{name:<18} {one['bytes']:>12,} bytes on disk, {one['peak_mib']:,.0f} MiB peak memory")
    return "\n".join(lines)


def export_text(result: JSON) -> str:
    """What `export` wrote: one line per file, the recommended one marked."""
    lines = [f"in {result['export']}:"]
    for name, one in result["proof"]["files"].items():
        time = f", {result['latency'][name]['median_ms']:.2f} ms" if name in result["latency"] else ""
        score = f", {result['proof']['score']} {one['score']:.4f}" if one["score"] is not None else ""
        best = "  <- recommended" if name == result["recommended"] and len(result["latency"]) > 1 else ""
        same = f", same decision {100 * one['agreement']:.2f} %"
        lines.append(f"{name:<16} {one['bytes']:>12,} bytes{time}{score}{same}{best}")
    return "\n".join(lines)


def cache_text(result: JSON) -> str:
    """What the cache holds: one line per entry, then the sum."""
    lines = [
        f"{one['gib']:9.3f} GiB  used {one['days']:5.1f} days ago  {one['what']}  ({one['name']})"
        + ("  removed" if one["name"] in result["removed"] else "")
        for one in result["entries"]
    ]
    return "\n".join([*lines, f"{result['gib']:9.3f} GiB in {result['cache']}"])


def doctor_text(found: JSON) -> str:
    """What this machine has: one paragraph per subject, as wide as the terminal."""

    def listed(what: JSON, text: str = "{}: {}") -> str:
        words = {"True": "yes", "False": "no", "None": "missing"}
        return ", ".join(text.format(name, words.get(str(value), value)) for name, value in what.items())

    devices, threads, hub = found["devices"], found["threads"], found["weights"]["hub"]
    rows = {
        "python": found["python"],
        "versions": listed(found["versions"], "{} {}"),
        "cpu": f"{devices['cpu']}, {devices['cores']} cores, {threads['usable_cores']} usable",
        "gpu": ", ".join(devices["cuda"]) or ("Apple MPS" if devices["mps"] else "none"),
        "threads": f"{threads['torch']}; OMP_WAIT_POLICY {threads['omp_wait_policy']}",
        "free disk": listed(found["disk_gib"], "{} {:.0f} GiB"),
        "free memory": f"{found['memory_gib']:.1f} GiB",
        "hub": f"no: {hub}" if hub else "reachable",
        "packages": listed(found["weights"]["packages"]),
        "extras": listed(found["extras"]),
    }
    lines = list(rows.items())
    lines += [("to change", f"- {line}") for line in found["advice"]] or [("to change", "nothing")]
    width = shutil.get_terminal_size((120, 24)).columns
    return "\n".join(
        textwrap.fill(f"{name:<13}{text}", width, subsequent_indent=" " * 13, break_on_hyphens=False)
        for name, text in lines
    )


def text_of(command: str, result: JSON) -> str:
    """What a command prints on stdout without --json."""
    if command in ("run", "evaluate"):
        return scores_table(list(models_of(result).values()))
    if command == "demo":
        return str(result["text"])
    texts = {"benchmark": times_table, "export": export_text, "doctor": doctor_text, "cache": cache_text}
    if text := study_table if command == "compare" and "table" in result else texts.get(command):
        return text(result)
    plain = {name: value for name, value in result.items() if isinstance(value, str | int | float)}
    return "\n".join(f"{name}: {value}" for name, value in plain.items() if name not in ("inputs", "curated"))
