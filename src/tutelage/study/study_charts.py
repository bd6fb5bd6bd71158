"""SVG charts of a study: score against labels, and score against compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from tutelage.reporting.charts import WIDTH, line, short, svg, text

LEFT, TOP, RIGHT, BOTTOM = 44, 16, WIDTH - 122, 250  # the names stand to the right of the lines
ROOM = 1.3  # factor by which the axis extends beyond the smallest and the largest cost
STEP = 14  # least vertical distance of two names
NAME = 17  # letters of a name that fit in the right margin


def against_labels(
    arms: dict[str, dict[int, tuple[float, float | None]]], teacher: dict[int, tuple[float, float | None]],
    across: str = "labels per class", score: str = "accuracy",
) -> Markup:  # fmt: skip
    """Draw a line for each arm, with a band of one standard deviation over seeds.

    Args:
        arms: name -> budget -> mean and spread of the score, in [0, 1]. teacher: budget -> the same.
        across: unit of a budget, the title of the axis. score: name of the score.
    """
    every = {**arms, **({"teacher": teacher} if teacher else {})}
    budgets = sorted({budget for of in every.values() for budget in of})
    low, high = _range(
        [mean + sign * (sd or 0) for of in every.values() for mean, sd in of.values() for sign in (-1, 1)]
    )

    def x(budget: int) -> float:
        first, last = math.log(budgets[0]), math.log(budgets[-1])
        return LEFT + (RIGHT - LEFT) * (math.log(budget) - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = _levels(low, high, y)
    for budget in budgets:
        parts += [line(x(budget), TOP, x(budget), BOTTOM), text(x(budget), BOTTOM + 15, budget, "small", "middle")]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 32, across, "", "middle"))
    for number, (name, of) in enumerate(every.items()):
        kind, points = _kind(name, number), sorted(of.items())
        band = [(x(b), y(m + (sd or 0))) for b, (m, sd) in points] + [
            (x(b), y(m - (sd or 0))) for b, (m, sd) in reversed(points)
        ]
        if len(points) > 1:
            parts.append(f'<polygon points="{_points(band)}" class="{kind} band"/>')
        parts.append(f'<polyline points="{_points([(x(b), y(m)) for b, (m, _) in points])}" class="{kind} path"/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(m):.1f}" r="3.5" class="{kind} mark"/>' for b, (m, _) in points]
    ends = {name: (x(max(of)), y(of[max(of)][0])) for name, of in every.items()}
    parts += _names(ends, {name: _kind(name, number) for number, name in enumerate(every)})
    words = "; ".join(
        f"{name}: " + ", ".join(f"{100 * m:.1f} % at {b}" for b, (m, _) in sorted(of.items()))
        for name, of in every.items()
    )
    return svg(BOTTOM + 40, f"{score} against {across}", words, parts)


def against_compute(
    arms: dict[str, tuple[float, float, float | None]], order: Sequence[str], teacher: float | None = None, score: str = "accuracy"
) -> Markup:  # fmt: skip
    """Draw a disc for each arm, its score against all its FLOPs on a logarithmic axis, and the teacher as a line.

    Args:
        arms: name -> FLOPs, mean and spread of the score. order: arm names in the order of their colours. teacher: its mean score.
    """
    known = [
        *([] if teacher is None else [teacher]),
        *(m + sign * (sd or 0) for _, m, sd in arms.values() for sign in (-1, 1)),
    ]
    low, high = _range(known)
    costs = [cost for cost, _, _ in arms.values()]
    first, last = math.log10(min(costs) / ROOM), math.log10(max(costs) * ROOM)

    def x(cost: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log10(cost) - first) / (last - first)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = _levels(low, high, y)
    for tick in _ticks(first, last):
        parts += [line(x(tick), TOP, x(tick), BOTTOM), text(x(tick), BOTTOM + 15, _amount(tick), "small", "middle")]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 32, "FLOPs of training, including the teacher's", "", "middle"))
    kinds = {name: _kind(name, list(order).index(name)) for name in arms}
    places = {name: (x(cost), y(mean)) for name, (cost, mean, _) in arms.items()}
    if teacher is not None:
        kinds["teacher"], places["teacher"] = "teacher", (RIGHT, y(teacher))
        parts.append(line(LEFT, y(teacher), RIGHT, y(teacher), "teacher path"))
    for name, (cost, mean, spread) in arms.items():
        if spread:
            parts.append(line(x(cost), y(mean - spread), x(cost), y(mean + spread), f"{kinds[name]} path"))
        parts.append(f'<circle cx="{x(cost):.1f}" cy="{y(mean):.1f}" r="5" class="{kinds[name]} mark"/>')
    parts += _names(places, kinds)
    words = "; ".join(f"{name}: {100 * mean:.1f} % for {_amount(cost)}FLOPs" for name, (cost, mean, _) in arms.items())
    words += f"; the adapted teacher: {100 * teacher:.1f} %" if teacher is not None else ""
    return svg(BOTTOM + 40, f"{score} against compute", words, parts)


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers between 10**first and 10**last: powers of ten if there are at least two, else finer steps."""
    powers = range(math.floor(first), math.ceil(last) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [
            step * 10.0**power for power in powers for step in steps if first <= math.log10(step * 10.0**power) <= last
        ]
        if len(found) >= 2:
            break
    return found[:: max(1, len(found) // 4)]


def _amount(flops: float) -> str:
    """A number with an SI prefix: 1e12 -> "1 T"."""
    for power, sign in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {sign}"
    return f"{flops:.3g} "


def _kind(name: str, number: int) -> str:
    return "teacher" if name == "teacher" else f"arm{number % 9}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits around the values, in steps of 5 points, or of 10 where the values lie far apart."""
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    return max(0.0, low), min(1.0, max(high, low + step))


def _step(range_: float) -> float:
    return 0.05 if range_ <= 0.35 else 0.1


def _levels(low: float, high: float, y) -> list[str]:
    """Labelled horizontal lines at every 5 or 10 points."""
    step = _step(high - low - 0.05)
    levels = [round(low + step * i, 2) for i in range(round((high - low) / step) + 1)]
    return [part for level in levels for part in (
        line(LEFT, y(level), RIGHT, y(level)), text(LEFT - 6, y(level) + 4, f"{100 * level:.0f} %", "small", "end")
    )]  # fmt: skip


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _names(places: dict[str, tuple[float, float]], kinds: dict[str, str]) -> list[str]:
    """Names at the right edge, moved apart so that none overlap, each with a line to its point."""
    order = sorted(places, key=lambda name: places[name][1])
    heights: list[float] = []
    for name in order:
        heights.append(max(places[name][1], heights[-1] + STEP if heights else TOP))
    over = (heights[-1] if heights else 0) - BOTTOM
    if over > 0:  # move up from the bottom, so that none lies below the axis
        for i in range(len(heights) - 1, -1, -1):
            heights[i] = min(heights[i], BOTTOM - STEP * (len(heights) - 1 - i))
    parts = []
    for name, height in zip(order, heights, strict=True):
        x, y = places[name]
        parts.append(
            f'<line x1="{x + 5:.1f}" y1="{y:.1f}" x2="{RIGHT + 8}" y2="{height:.1f}" class="{kinds[name]} lead"/>'
        )
        parts.append(
            f'<text x="{RIGHT + 11}" y="{height + 4:.1f}" class="{kinds[name]} name">{escape(short(name, NAME))}</text>'
        )
    return parts
