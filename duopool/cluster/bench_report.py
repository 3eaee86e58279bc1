"""The HTML report of a benchmark: one file with its plots inside, for one system or for several beside each other.

A pure function from numbers to text; nothing is loaded when it is looked at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PERCENTILES = (0.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 100.0)
"""Of the time between tokens, as `Series.percentiles_ms` holds them."""
COLORS = ("#2f6fde", "#e08a1e", "#23966f", "#b0479c", "#7a6a58", "#cf3b4a")
MIN_MS, WIDTH, ROW, LABEL = 0.1, 560, 22, 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A column of the numbers."""

    name: str
    """Key in `Series.runs`."""
    title: str
    unit: str
    less_is_better: bool = True


METRICS = (
    Metric(name="ttft_p50_ms", title="Time to first token, p50", unit="ms"),
    Metric(name="inter_token_p50_ms", title="Between tokens, p50", unit="ms"),
    Metric(name="inter_token_p99_ms", title="Between tokens, p99", unit="ms"),
    Metric(name="output_tokens_per_s", title="Output tokens per second", unit="tok/s", less_is_better=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One system under one workload."""

    system: str
    workload: str
    runs: Mapping[str, Sequence[float]]
    """Values of every run by metric; NaN where there is none."""
    percentiles_ms: Sequence[float] = ()
    """Of the time between tokens over all runs, at PERCENTILES; empty when unknown."""


def page(title: str, series: Sequence[Series], *, facts: Mapping[str, str]) -> str:
    """The whole file. `facts` (machine, versions, command) stand at its end."""
    systems = list(dict.fromkeys(each.system for each in series))
    workloads = list(dict.fromkeys(each.workload for each in series))
    colors = {system: COLORS[at % len(COLORS)] for at, system in enumerate(systems)}
    legend = "".join(f'<span><i style="background:{colors[system]}"></i>{escape(system)}</span>' for system in systems)
    bars = "".join(_bars(metric, series, workloads, colors) for metric in METRICS)
    curves = "".join(
        _curves(workload, [each for each in series if each.workload == workload], colors) for workload in workloads
    )
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="legend">{legend}</p>'
        f"<h2>Medians <small>dots are single runs</small></h2><div class=plots>{bars}</div>"
        f"<h2>Time between tokens <small>how long the slow ones take</small></h2><div class=plots>{curves}</div>"
        f"<h2>Numbers</h2>{_table(series)}<h2>Measured on</h2><table>{rows}</table></body></html>\n"
    )


def _bars(metric: Metric, series: Sequence[Series], workloads: Sequence[str], colors: Mapping[str, str]) -> str:
    shown = [each for each in series if not math.isnan(_median(each, metric))]
    if not shown:
        return ""
    most = max(max(_numbers(each, metric)) for each in shown)
    room = WIDTH - LABEL - 90
    parts, y = [], 6
    for workload in workloads:
        group = [each for each in shown if each.workload == workload]
        if not group:
            continue
        parts.append(f'<text x="{LABEL - 8}" y="{y + ROW * len(group) / 2 + 4}" class="end">{escape(workload)}</text>')
        for each in group:
            value = _median(each, metric)
            width = room * value / most
            color = colors[each.system]
            told = f"{each.system}, {workload}: {value:.4g} {metric.unit}"
            parts.append(
                f'<rect x="{LABEL}" y="{y + 3}" width="{width:.1f}" height="{ROW - 8}" rx="2" fill="{color}" '
                f'opacity="0.85"><title>{escape(told)}</title></rect>'
            )
            places = [room * number / most for number in _numbers(each, metric)]
            parts += [f'<circle cx="{LABEL + x:.1f}" cy="{y + ROW / 2 - 1}" r="2.4" class="dot"/>' for x in places]
            last = max(width, *places)
            parts.append(f'<text x="{LABEL + last + 8:.1f}" y="{y + ROW / 2 + 3}">{value:.4g}</text>')
            y += ROW
        y += 8
    better = "less is better" if metric.less_is_better else "more is better"
    return (
        f"<figure><figcaption>{escape(metric.title)} <small>{metric.unit}, {better}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(metric.title)}">{"".join(parts)}</svg></figure>'
    )


def _curves(workload: str, series: Sequence[Series], colors: Mapping[str, str]) -> str:
    """Percentile against time, both axes stretched where the tail is: 90, 99 and 99.9 % are equally far apart."""
    drawn = [each for each in series if len(each.percentiles_ms) == len(PERCENTILES)]
    if not drawn:
        return ""
    left, top, width, height = 56, 10, WIDTH - 76, 190
    least = max(MIN_MS, min(value for each in drawn for value in each.percentiles_ms if value > 0) * 0.9)
    most = max(value for each in drawn for value in each.percentiles_ms) * 1.1
    deepest = -math.log10(1 - 99.9 / 100)

    def x_of(percentile: float) -> float:
        return left + width * min(1.0, -math.log10(max(1 - percentile / 100, 1e-3)) / deepest)

    def y_of(value: float) -> float:
        return top + height * (1 - math.log(max(value, least) / least) / math.log(most / least))

    parts = []
    for percentile in (0, 50, 90, 99, 99.9):
        x = x_of(percentile)
        parts.append(f'<path d="M{x:.1f},{top} V{top + height}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" class="middle">{percentile:g} %</text>')
    for value in _ticks(least, most):
        y = y_of(value)
        parts.append(f'<path d="M{left},{y:.1f} H{left + width}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="end">{value:g}</text>')
    for each in drawn:
        points = " ".join(
            f"{x_of(percentile):.1f},{y_of(value):.1f}"
            for percentile, value in zip(PERCENTILES, each.percentiles_ms, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colors[each.system]}" stroke-width="2">'
            f"<title>{escape(each.system)}</title></polyline>"
        )
    return (
        f"<figure><figcaption>{escape(workload)} <small>ms, by share of tokens</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {top + height + 24}" role="img" aria-label="{escape(workload)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(least: float, most: float) -> list[float]:
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if least <= step * 10.0**decade <= most]


def _table(series: Sequence[Series]) -> str:
    head = "".join(f"<th>{escape(metric.title)} [{metric.unit}]</th>" for metric in METRICS)
    rows = "".join(
        f"<tr><th>{escape(each.system)}</th><td>{escape(each.workload)}</td>"
        + "".join(f"<td class=number>{_cell(_median(each, metric))}</td>" for metric in METRICS)
        + "</tr>"
        for each in series
    )
    return f"<div class=wide><table><tr><th>system</th><th>workload</th>{head}</tr>{rows}</table></div>"


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.1f}"


def _numbers(series: Series, metric: Metric) -> list[float]:
    return [value for value in series.runs.get(metric.name, ()) if not math.isnan(value)]


def _median(series: Series, metric: Metric) -> float:
    numbers = _numbers(series, metric)
    return statistics.median(numbers) if numbers else math.nan


_STYLE = """
:root { color-scheme: light dark; --text: #1b2430; --soft: #5d6b7b; --line: #dfe3e8; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #e7ecf2; --soft: #98a5b4; --line: #2d353f;
  --page: #14181d; } }
body { margin: 24px auto; max-width: 1180px; padding: 0 16px; background: var(--page); color: var(--text);
font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 28px 0 8px; }
small { color: var(--soft); font-weight: 400; }
.legend span { margin-right: 16px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
text { fill: var(--text); font-size: 12px; }
.end { text-anchor: end; }
.middle { text-anchor: middle; fill: var(--soft); }
.grid { stroke: var(--line); fill: none; }
.dot { fill: var(--page); stroke: var(--text); stroke-width: 1; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); }
.number { text-align: right; }
.wide { overflow-x: auto; }
"""
