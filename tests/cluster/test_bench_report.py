"""The report is one file that loads nothing, holds every number, and survives numbers that are missing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from duopool.cluster.bench_report import METRICS, PERCENTILES, Series, page

values = st.one_of(st.floats(1e-3, 1e6), st.just(math.nan))
series = st.builds(
    Series,
    system=st.sampled_from(["duopool", "peer <b>", "x & y"]),
    workload=st.sampled_from(["single", "c8", "prefix-1"]),
    runs=st.fixed_dictionaries({metric.name: st.lists(values, max_size=4) for metric in METRICS}),
    percentiles_ms=st.one_of(
        st.just([]), st.lists(st.floats(0, 1e5), min_size=len(PERCENTILES), max_size=len(PERCENTILES)).map(sorted)
    ).filter(lambda given: not given or given[-1] > 0),
)


@given(st.lists(series, min_size=1, max_size=6, unique_by=lambda each: (each.system, each.workload)))
def test_any_numbers_make_one_file_with_well_formed_plots(measured: list[Series]) -> None:
    text = page("A <title>", measured, facts={"cpu": "<fast>"})
    HTMLParser().feed(text)
    assert not re.search(r"""(?:src|href)=|https?:""", text)
    assert "nan" not in text.replace("finance", "")
    assert "<b>" not in text
    assert "<fast>" not in text
    for plot in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(plot)


def test_the_median_of_every_run_stands_in_bar_and_table() -> None:
    runs = {metric.name: [30.0, 10.0, 20.0] for metric in METRICS}
    text = page("x", [Series(system="duopool", workload="c8", runs=runs)], facts={})
    assert text.count("<figure>") == len(METRICS)
    assert text.count("duopool, c8: 20 ") == len(METRICS)
    assert text.count("<td class=number>20.0</td>") == len(METRICS)
    assert text.count('class="dot"') == 3 * len(METRICS)
