"""Charts of a study: accuracy against labels, and against compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from tutelage.reporting.charts import WIDTH, line, svg, text

LEFT, TOP, RIGHT, BOTTOM = 52, 16, WIDTH - 118, 260  # names stand at the right of the lines
STEP = 13  # least distance of two names


def against_labels(
    arms: dict[str, dict[int, tuple[float, float | None]]], teacher: dict[int, tuple[float, float | None]],
    across: str = "labels per class",
) -> Markup:  # fmt: skip
    """A line for each arm, with a band of one standard deviation over seeds.

    Args:
        arms: name -> budget -> mean and spread of the accuracy, in [0, 1]. teacher: budget -> the same. across: what a budget counts.
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
    return svg(BOTTOM + 40, f"Accuracy against {across}", words, parts)


def against_compute(arms: dict[str, tuple[float, float]], order: Sequence[str]) -> Markup:
    """A disc for each arm: accuracy, and the FLOPs of everything it took, on a logarithmic axis.

    Args:
        arms: name -> FLOPs and mean accuracy. order: names in the order of their colours.
    """
    low, high = _range([accuracy for _, accuracy in arms.values()])
    first = math.floor(math.log10(min(cost for cost, _ in arms.values())))
    last = max(first + 1, math.ceil(math.log10(max(cost for cost, _ in arms.values()))))

    def x(cost: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log10(cost) - first) / (last - first)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = _levels(low, high, y)
    for power in range(first, last + 1):
        parts += [
            line(x(10**power), TOP, x(10**power), BOTTOM),
            text(x(10**power), BOTTOM + 15, _amount(10**power), "small", "middle"),
        ]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 32, "FLOPs of training, the teacher's counted", "", "middle"))
    kinds = {name: _kind(name, list(order).index(name)) for name in arms}
    parts += [
        f'<circle cx="{x(cost):.1f}" cy="{y(a):.1f}" r="5" class="{kinds[name]} mark"/>'
        for name, (cost, a) in arms.items()
    ]
    places = {name: (x(cost), y(accuracy)) for name, (cost, accuracy) in arms.items()}
    parts += _names(places, kinds)
    words = "; ".join(f"{name}: {100 * a:.1f} % for {_amount(cost)}FLOPs" for name, (cost, a) in arms.items())
    return svg(BOTTOM + 40, "Accuracy against compute", words, parts)


def _amount(flops: float) -> str:
    """1e12 -> "1 T"."""
    for power, sign in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {sign}"
    return f"{flops:.3g} "


def _kind(name: str, number: int) -> str:
    return "teacher" if name == "teacher" else f"arm{number % 9}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values take, in steps of 5 points."""
    low, high = math.floor(20 * min(values)) / 20, math.ceil(20 * max(values)) / 20
    return max(0.0, low), min(1.0, max(high, low + 0.05))


def _levels(low: float, high: float, y) -> list[str]:
    """Horizontal lines at whole fives or tens of points."""
    step = 0.05 if high - low <= 0.4 else 0.1
    levels = [round(low + step * i, 2) for i in range(round((high - low) / step) + 1)]
    return [part for level in levels for part in (
        line(LEFT, y(level), RIGHT, y(level)), text(LEFT - 6, y(level) + 4, f"{100 * level:.0f} %", "small", "end")
    )]  # fmt: skip


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _names(places: dict[str, tuple[float, float]], kinds: dict[str, str]) -> list[str]:
    """Names at the right edge, pushed apart, each with a line to its place."""
    order = sorted(places, key=lambda name: places[name][1])
    heights: list[float] = []
    for name in order:
        heights.append(max(places[name][1], heights[-1] + STEP if heights else TOP))
    over = (heights[-1] if heights else 0) - BOTTOM
    if over > 0:  # from below: none lower than the axis
        for i in range(len(heights) - 1, -1, -1):
            heights[i] = min(heights[i], BOTTOM - STEP * (len(heights) - 1 - i))
    parts = []
    for name, height in zip(order, heights, strict=True):
        x, y = places[name]
        parts.append(
            f'<line x1="{x + 5:.1f}" y1="{y:.1f}" x2="{RIGHT + 8}" y2="{height:.1f}" class="{kinds[name]} lead"/>'
        )
        parts.append(
            f'<text x="{RIGHT + 11}" y="{height + 4:.1f}" class="{kinds[name]} name">{escape(name[:20])}</text>'
        )
    return parts
