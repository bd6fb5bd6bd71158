"""SVG charts of a study: score against labels, and score against compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from tutelage.reporting.charts import WIDTH, line, polyline, scale, short, svg, text

LEFT, TOP, RIGHT, BOTTOM = 44, 16, WIDTH - 122, 250  # the names stand to the right of the lines
ROOM = 1.3  # factor by which the axis extends beyond the smallest and the largest cost
STEP = 14  # least vertical distance of two names
NAME = 17  # letters of a name that fit in the right margin


def against_labels(
    methods: dict[str, dict[int, tuple[float, float | None]]],
    teacher: dict[int, tuple[float, float | None]],
    across: str = "labels per class",
    score: str = "accuracy",
) -> Markup:
    """Draw a line for each method, with a band of one standard deviation over seeds.

    Args:
        methods: name -> budget -> mean and spread of the score, in [0, 1]. teacher: budget -> the same.
        across: unit of a budget, the title of the axis. score: name of the score.
    """
    every = {**methods, **({"teacher": teacher} if teacher else {})}
    budgets = sorted({budget for of in every.values() for budget in of})
    parts, y = _levels([(mean, sd) for of in every.values() for mean, sd in of.values()])
    x = scale(math.log(budgets[0]), math.log(budgets[-1]), LEFT, RIGHT)
    parts += _columns({x(math.log(budget)): budget for budget in budgets}, across)
    kinds, ends, words = {}, {}, []
    for number, (name, of) in enumerate(every.items()):
        kind = kinds[name] = _kind(name, number)
        points = [(x(math.log(budget)), mean, sd or 0) for budget, (mean, sd) in sorted(of.items())]
        band = [(b, y(m + sd)) for b, m, sd in points] + [(b, y(m - sd)) for b, m, sd in reversed(points)]
        if len(points) > 1:
            parts.append(polyline(band, f"{kind} band", "polygon"))
        parts.append(polyline([(b, y(m)) for b, m, _ in points], f"{kind} path"))
        parts += [f'<circle cx="{b:.1f}" cy="{y(m):.1f}" r="3.5" class="{kind} mark"/>' for b, m, _ in points]
        ends[name] = points[-1][0], y(points[-1][1])
        words.append(f"{name}: " + ", ".join(f"{100 * m:.1f} % at {b}" for b, (m, _) in sorted(of.items())))
    parts += _names(ends, kinds)
    return svg(BOTTOM + 40, f"{score} against {across}", "; ".join(words), parts)


def against_compute(
    methods: dict[str, tuple[float, float, float | None]],
    order: Sequence[str],
    teacher: float | None = None,
    score: str = "accuracy",
) -> Markup:
    """Draw a disc for each method, its score against all its FLOPs on a logarithmic axis, and the teacher as a line.

    Args:
        methods: name -> FLOPs, mean and spread of the score. order: method names in the order of their colours. teacher: its mean score.
    """
    known = [(mean, sd) for _, mean, sd in methods.values()]
    parts, y = _levels(known if teacher is None else [*known, (teacher, None)])
    costs = [cost for cost, _, _ in methods.values()]
    first, last = math.log10(min(costs) / ROOM), math.log10(max(costs) * ROOM)
    x = scale(first, last, LEFT, RIGHT)
    ticks = {x(math.log10(tick)): _amount(tick) for tick in _ticks(first, last)}
    parts += _columns(ticks, "FLOPs of training, including the teacher's")
    kinds = {name: _kind(name, list(order).index(name)) for name in methods}
    places = {name: (x(math.log10(cost)), y(mean)) for name, (cost, mean, _) in methods.items()}
    if teacher is not None:
        kinds["teacher"], places["teacher"] = "teacher", (RIGHT, y(teacher))
        parts.append(line(LEFT, y(teacher), RIGHT, y(teacher), "teacher path"))
    for name, (_, mean, spread) in methods.items():
        cx, cy = places[name]
        if spread:
            parts.append(line(cx, y(mean - spread), cx, y(mean + spread), f"{kinds[name]} path"))
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" class="{kinds[name]} mark"/>')
    parts += _names(places, kinds)
    words = [f"{name}: {100 * mean:.1f} % for {_amount(cost)}FLOPs" for name, (cost, mean, _) in methods.items()]
    words += [f"the adapted teacher: {100 * teacher:.1f} %"] if teacher is not None else []
    return svg(BOTTOM + 40, f"{score} against compute", "; ".join(words), parts)


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers between 10**first and 10**last: powers of ten if there are at least two, else finer steps."""
    powers = range(math.floor(first), math.ceil(last) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        every = [step * 10.0**power for power in powers for step in steps]
        found = [tick for tick in every if first <= math.log10(tick) <= last]
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
    return "teacher" if name == "teacher" else f"method{number % 9}"


def _levels(scores: Sequence[tuple[float, float | None]]) -> tuple[list[str], Callable[[float], float]]:
    """Labelled horizontal lines around the scores, at every 5 points, or every 10 where they lie far apart, and the function from a score
    to its height. scores: mean and spread of each."""
    values = [mean + sign * (spread or 0) for mean, spread in scores for sign in (-1, 1)]
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    low, high = max(0.0, low), min(1.0, max(high, low + step))
    y, step = scale(low, high, BOTTOM, TOP), _step(high - low - 0.05)
    parts = []
    for level in (round(low + step * i, 2) for i in range(round((high - low) / step) + 1)):
        parts.append(line(LEFT, y(level), RIGHT, y(level)))
        parts.append(text(LEFT - 6, y(level) + 4, f"{100 * level:.0f} %", "small", "end"))
    return parts, y


def _step(range_: float) -> float:
    return 0.05 if range_ <= 0.35 else 0.1


def _columns(ticks: Mapping[float, object], title: str) -> list[str]:
    """Labelled vertical lines, and the title of their axis."""
    parts = []
    for x, label in ticks.items():
        parts += [line(x, TOP, x, BOTTOM), text(x, BOTTOM + 15, label, "small", "middle")]
    return [*parts, text((LEFT + RIGHT) / 2, BOTTOM + 32, title, "", "middle")]


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
        parts.append(line(x + 5, y, RIGHT + 8, height, f"{kinds[name]} lead"))
        parts.append(text(RIGHT + 11, height + 4, short(name, NAME), f"{kinds[name]} name"))
    return parts
