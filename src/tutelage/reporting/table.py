"""Results as a table in a terminal."""

from __future__ import annotations

from typing import Any

from tutelage.reporting.scores import words_of

TITLES = {"student": "student, taught", "alone": "student alone", "teacher": "teacher, adapted"}


def scores_table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """One line a model, columns aligned.

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
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def text_of(command: str, result: dict[str, Any]) -> str:
    """What a command prints on stdout when nobody asked for JSON."""
    if command in ("run", "evaluate"):
        rows = [(title, result[name]) for name, title in TITLES.items() if name in result]
        return scores_table(rows)
    if command == "demo":
        return str(result["text"])
    if command in ("doctor", "cache"):
        return ""  # they print as they go
    return "\n".join(
        f"{name}: {value}"
        for name, value in result.items()
        if isinstance(value, str | int | float) and name not in ("inputs", "curated")
    )
