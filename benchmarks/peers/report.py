"""The comparison as Markdown and as one HTML file with plots and nothing to fetch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from peers.loads import Measurement

Medians = Mapping[str, Mapping[str, Measurement]]
"""System -> burst -> median."""

COLUMNS = (
    ("ttft_p50", "first token p50, ms", False),
    ("itl_p50", "between tokens p50, ms", False),
    ("itl_p99", "between tokens p99, ms", False),
    ("tokens_per_s", "tokens/s", True),
)
"""(field, title, whether more is better)"""
COLOURS = ("#2f6fde", "#e07b39", "#3f9b6c", "#a05fc0", "#c2497b", "#7a7a7a")


def markdown(medians: Medians) -> str:
    """A table per burst: each number, and in brackets the first system's share of it."""
    first = next(iter(medians))
    lines = []
    for burst in bursts_of(medians):
        lines += [f"**{burst}**", "", "| system | " + " | ".join(title for _, title, _ in COLUMNS) + " |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        for system, found in medians.items():
            if burst not in found:
                continue
            cells = [_cell(found[burst], medians[first].get(burst), name, system == first) for name, _, _ in COLUMNS]
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def page(medians: Medians, *, machine: str, command: str) -> str:
    """A self-contained HTML page: one bar chart per burst and number, then the tables' figures."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Duopool beside its peers</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}",
        "h2{margin:2rem 0 .3rem}.row{display:flex;flex-wrap:wrap;gap:1rem}svg{background:#fafafa;border-radius:6px}",
        "code{background:#eee;padding:.1em .3em}@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}",
        "svg{background:#242424}text{fill:#ddd}code{background:#333}}</style>",
        f"<h1>Duopool beside its peers</h1><p>{html.escape(machine)}</p><p><code>{html.escape(command)}</code></p>",
    ]
    for burst in bursts_of(medians):
        parts.append(f"<h2>{html.escape(burst)}</h2><div class=row>")
        for name, title, is_more_better in COLUMNS:
            values = [(system, getattr(found[burst], name)) for system, found in medians.items() if burst in found]
            parts.append(_bars(title + (", more is better" if is_more_better else ", less is better"), values))
        parts.append("</div>")
    return "\n".join(parts) + "\n"


def bursts_of(medians: Medians) -> list[str]:
    """Bursts in the order of their first mention."""
    return list(dict.fromkeys(burst for found in medians.values() for burst in found))


def _cell(one: Measurement, ours: Measurement | None, name: str, is_ours: bool) -> str:
    value = getattr(one, name)
    text = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
    if is_ours or ours is None or not value:
        return text
    return f"{text} ({getattr(ours, name) / value:.2f} x)"


def _bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    width, bar, top = 330, 22, 26
    most = max(value for _, value in values) or 1.0
    rows = []
    for place, (system, value) in enumerate(values):
        y, length = top + place * bar, 150 * value / most
        colour = COLOURS[place % len(COLOURS)]
        rows.append(
            f"<text x=110 y={y + 14} text-anchor=end font-size=12>{html.escape(system)}</text>"
            f"<rect x=115 y={y + 2} width={length:.1f} height={bar - 6} fill='{colour}' rx=2></rect>"
            f"<text x={120 + length:.1f} y={y + 14} font-size=12>{value:,.1f}</text>"
        )
    height = top + bar * len(values) + 6
    return (
        f"<svg width={width} height={height} role=img aria-label='{html.escape(title)}'>"
        f"<text x=10 y=17 font-size=13 font-weight=600>{html.escape(title)}</text>{''.join(rows)}</svg>"
    )
