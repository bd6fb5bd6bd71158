"""SVG charts in the page's colours, each with a title and a description for screen readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from markupsafe import Markup, escape

from tutelage.reporting.table import TITLES

Names = Mapping[str, str]  # model -> its name in a chart
Counts = Sequence[Sequence[int]]  # C rows of true classes, C columns of predicted ones
ByClass = dict[str, Sequence[float | None]]
Place = TypeVar("Place", float, np.ndarray)

WIDTH = 400  # units of a drawing, which the page shows 340 to 600 pixels wide
NAMES = {name: name for name in TITLES}  # short names, in the order of the legend; the CSS classes have the same names
CLASSES_SHOWN = 40  # most classes in a chart with a row for each class
CELLS_SHOWN = 25  # most classes in a confusion matrix; with more, the most frequent confusions are listed
MOST_WRITTEN = 999  # largest count written in a cell of the matrix; beyond it all cells show shares
PAIRS_SHOWN = 20  # confusions in that list
LEGEND = 17  # letters of a name in the legend: three names of that length fit, or all of NAMES
# SVG paths of the markers, from their top
OUTLINES = {"teacher": "l5 5l-5 5l-5 -5z", "committee": "m-4 1h8v8h-8z", "delivered": "l5 9h-10z"}
TICKS = (0, 0.25, 0.5, 0.75, 1)
FEWEST = 5  # fewest images in a calibration bin that is shown


def svg(height: float, title: str, description: str, parts: Sequence[str]) -> Markup:
    """An SVG drawing of the page's width."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: object, kind: str = "", anchor: str = "start") -> str:
    """An SVG text at a position."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(str(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """A straight SVG line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def polyline(points: Iterable[tuple[float, float]], kind: str, shape: str = "polyline") -> str:
    """A line through points, or with shape "polygon" the area that they enclose."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<{shape} points="{places}" class="{kind}"/>'


def scale(low: float, high: float, start: float, end: float) -> Callable[[Place], Place]:
    """Return the function from a quantity to its place on an axis that shows `low` at `start` and `high` at `end`."""
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1.0)


def mark(x: float, y: float, model: str) -> str:
    """The marker of a model: disc, ring, diamond, square or triangle, so that shape and colour both distinguish models."""
    if outline := OUTLINES.get(model):
        return f'<path d="M{x:.1f} {y - 5:.1f}{outline}" class="{model} mark"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{model} mark"/>'


def legend(models: Sequence[str], y: float, names: Names = NAMES) -> list[str]:
    """Markers and names in one row."""
    parts, x = [], 4.0
    for model in models:
        name = short(names[model], LEGEND)
        parts += [mark(x + 5, y - 4, model), text(x + 14, y, name)]
        x += 26 + 6.4 * len(name)
    return parts


def short(name: str, most: int = 12) -> str:
    """Shorten a name to `most` letters by cutting its middle: names differ most at their beginning and end."""
    return name if len(name) <= most else f"{name[: (most - 1) // 2]}…{name[-(most // 2) :]}"


def per_class(
    classes: Sequence[str], recall: ByClass, title: str = "Recall of each class", names: Names = NAMES
) -> Markup:
    """Draw recall (or another score) of each class by each model, the weakest classes of the first model first.

    Args:
        recall: for each model C numbers in [0, 1], None for a class without test images. names: of the models, in their order.
    """
    models = [model for model in names if model in recall]
    student = recall[models[0]]
    order = sorted((i for i, r in enumerate(student) if r is not None), key=lambda i: student[i] or 0.0)[:CLASSES_SHOWN]
    left, right, top, step = 108, WIDTH - 20, 44, 22
    bottom, x = top + step * len(order), scale(0, 1, left, right)
    parts = legend(models, 16, names)
    for share in TICKS:
        parts.append(line(x(share), top - 8, x(share), bottom - 6))
        parts.append(text(x(share), top - 12, f"{100 * share:g} %", "small", "middle"))
    for row, number in enumerate(order):
        y = top + step * (row + 0.4)
        there = {model: x(share) for model in models if (share := recall[model][number]) is not None}
        parts.append(text(left - 8, y + 4, short(classes[number]), "", "end"))
        parts.append(line(min(there.values()), y, max(there.values()), y, "span"))
        parts += [mark(place, y, model) for model, place in reversed(there.items())]
    words = "; ".join(
        f"{classes[i]}: " + ", ".join(f"{names[m]} {100 * r:.0f} %" for m in models if (r := recall[m][i]) is not None)
        for i in order
    )
    return svg(bottom + 4, title, words, parts)


def matrix(classes: Sequence[str], counts: Counts, model: str, shares: bool = False, names: Names = NAMES) -> Markup:
    """Draw a confusion matrix: rows are true classes, columns predicted ones; the shade is the share of the row.

    Args:
        shares: write percentages of the row instead of counts.
    """
    table = np.array(counts)
    size, left, top = len(classes), 110, 92
    cell = (WIDTH - left - 40) / size  # the last name leans to the right
    parts = []
    for column, name in enumerate(classes):
        x = left + cell * (column + 0.5) + 4
        parts.append(f'<g transform="translate({x:.1f} {top - 6}) rotate(-60)">{text(0, 0, short(name))}</g>')
    height = min(cell, 34)
    for row, name in enumerate(classes):
        y, total = top + height * row, max(1, int(table[row].sum()))
        parts.append(text(left - 8, y + height / 2 + 4, short(name), "", "end"))
        for column in range(size):
            share, x = table[row, column] / total, left + cell * column
            box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{height - 1:.1f}"'
            kind = "right" if row == column else "wrong"
            parts.append(f'{box} class="{kind}" fill-opacity="{share:.2f}"/>{box} class="cell"/>')
            number = round(100 * share) if shares else table[row, column]
            if number and cell >= 18:
                parts.append(text(x + cell / 2, y + height / 2 + 4, number, "small number", "middle"))
    worst = [f"{a} taken for {b} {n} times" for n, a, b, _ in sorted(confused(classes, table), reverse=True)[:5]]
    words = f"most often confused: {'; '.join(worst)}" if worst else "no errors"
    return svg(top + height * size + 6, f"Confusion matrix, {names[model]}", words, parts)


def confused(classes: Sequence[str], counts: Counts | np.ndarray) -> list[tuple[int, str, str, int]]:
    """Count, true class, predicted class and count of the true class, of each pair of classes that is confused."""
    table = np.array(counts)
    rows, columns = np.nonzero(table * (1 - np.eye(len(classes), dtype=int)))
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(int(table[r, c]), classes[r], classes[c], int(table[r].sum())) for r, c in places]


def confusions(
    classes: Sequence[str], counts: Counts, model: str, shares: bool = False, names: Names = NAMES, more: str = ""
) -> dict[str, object]:
    """The page's chart of confusions: the matrix, or with many classes a list of the most frequent confusions.

    Args:
        counts, shares: as in `matrix`. more: text appended to the note.

    Returns:
        {"title", "svg", "note"}.
    """
    title = f"Confusions of {names[model]}"
    if len(classes) <= CELLS_SHOWN:
        shares = shares or int(np.max(counts)) > MOST_WRITTEN
        note = f"Rows: true classes. Columns: predicted classes{', in percent of the row' if shares else ''}.{more}"
        return {"title": title, "svg": matrix(classes, counts, model, shares, names), "note": note}
    worst = sorted(confused(classes, counts), key=lambda pair: -pair[0])[:PAIRS_SHOWN]
    lines = [f"<li>{escape(a)} taken for {escape(b)}: {n:,} of {total:,}</li>" for n, a, b, total in worst]
    return {"title": title, "svg": Markup(f"<ol>{''.join(lines)}</ol>"), "note": f"The most frequent confusions.{more}"}


def pooled(evaluations: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> dict[str, np.ndarray]:
    """Sum the bins of `metrics.reliability` of several evaluations by model, for models that are in all of them."""
    first = evaluations[0] if evaluations else {}
    models = [model for model in first if all(model in one for one in evaluations)]
    return {model: np.sum([one[model] for one in evaluations], axis=0) for model in models}


def calibration(bins: Mapping[str, np.ndarray], names: Names = NAMES) -> Markup:
    """Draw the accuracy of each model against its confidence.

    Args:
        bins: (b, 3) float for each model, as from `metrics.reliability`. names: of the models, in their order.
    """
    models = [model for model in names if model in bins]
    left, right, top, bottom = 56, 356, 34, 334
    x, y = scale(0, 1, left, right), scale(0, 1, bottom, top)
    parts = legend(models, 16, names)
    for share in TICKS:
        parts += [line(left, y(share), right, y(share)), line(x(share), top, x(share), bottom)]
        parts.append(text(left - 6, y(share) + 4, f"{100 * share:g} %", "small", "end"))
        parts.append(text(x(share), bottom + 14, f"{100 * share:g} %", "small", "middle"))
    parts.append(line(left, bottom, right, top, "ideal"))
    parts.append(text((left + right) / 2, bottom + 32, "confidence", "", "middle"))
    turned = f"translate(14 {(top + bottom) / 2:.0f}) rotate(-90)"
    parts.append(f'<g transform="{turned}">{text(0, 0, "accuracy", "", "middle")}</g>')
    words = []
    for model in models:
        sure, correct, count = np.asarray(bins[model], float).T
        there = count >= FEWEST
        points = list(zip(x(sure[there] / count[there]), y(correct[there] / count[there]), strict=True))
        parts += [polyline(points, f"{model} path"), *(mark(*place, model) for place in points)]
        shares = 100 * sure.sum() / count.sum(), 100 * correct.sum() / count.sum()
        words.append(f"{names[model]}: mean confidence {shares[0]:.0f} %, accuracy {shares[1]:.0f} %")
    return svg(bottom + 40, "Calibration", "; ".join(words), parts)


def calibrations(bins: Mapping[str, np.ndarray], names: Names = NAMES, more: str = "") -> dict[str, object]:
    """The page's calibration chart. bins, names: as in `calibration`. more: text appended to the note.

    Returns:
        {"title", "svg", "note"}.
    """
    note = f"On the dashed line, accuracy equals confidence; bins with fewer than {FEWEST} images are left out.{more}"
    return {"title": "Calibration", "svg": calibration(bins, names), "note": note}


def curve(steps: Sequence[float], values: Sequence[float], title: str, across: str) -> Markup:
    """Draw one quantity over the course of training, smoothed (mean of 9 points) if there are more than 60."""
    left, right, top, bottom = 50, WIDTH - 14, 16, 200
    y = np.asarray(values, float)
    if len(y) > 60:
        y = np.convolve(np.pad(y, (4, 4), mode="edge"), np.ones(9) / 9, mode="valid")
    low, high, most = float(y.min()), float(y.max()), max(float(max(steps)), 1.0)
    across_at, up_at = scale(0, most, left, right), scale(low, high, bottom, top)
    parts = [
        line(left, bottom, right, bottom),
        line(left, top, right, top),
        text(left - 6, top + 4, f"{high:.2f}", "small", "end"),
        text(left - 6, bottom + 4, f"{low:.2f}", "small", "end"),
        text(right, bottom + 16, f"{most:,.0f} {across}", "small", "end"),
        text(left, bottom + 16, "0", "small", "middle"),
        polyline(((across_at(step), up_at(value)) for step, value in zip(steps, y, strict=True)), "distilled path"),
    ]
    return svg(bottom + 24, title, f"from {y[0]:.2f} to {y[-1]:.2f} over {most:,.0f} {across}", parts)
