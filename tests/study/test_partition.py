"""The picture of a partition: everything is in it, for few clients and for many, with and without categories."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import UserError
from fedloom.study.draw import Tips, _figure
from fedloom.study.partition import MOST_CATEGORIES, MOST_ROWS, partition_drawing, partition_file


def a_report(clients: int, categories: int, **more: Any) -> dict[str, Any]:
    """A data report of clients that hold some categories each, in different amounts."""
    lines = []
    for i in range(clients):
        held = {f"topic {k}": 1 + (i * 7 + k * 5) % 9 for k in range(categories) if (i + k + 1) % 3}
        rows = sum(held.values()) if categories else 5 + i % 7
        lengths = dict(zip(("p10", "p25", "p50", "p75", "p90"), (20, 30, 50 + i % 40, 120, 200), strict=True))
        lines.append(
            {"id": f"client {i}", "train": rows, "validation": 0, "test": 0, "categories": held, "lengths": lengths}
        )
    figures = {"js_mean": 0.25, "js_max": 0.5, "js_even": 0.0001, "tv_mean": 0.3, "tv_max": 0.6}
    both = {"category": figures if categories else None, "length": figures}
    report = {"source": "data/rows.jsonl", "split": "by_category", "max_length": 150, "clients": lines}
    return {**report, "heterogeneity": both, **more}


def texts(report: dict[str, Any], path: Path) -> list[str]:
    partition_file(report, path)
    return [element.text for element in ET.parse(path).iter() if element.text and element.text.strip()]


@pytest.mark.parametrize(("clients", "categories"), [(1, 1), (3, 4), (8, 0), (MOST_ROWS, 30), (MOST_ROWS + 1, 3)])
def test_every_client_and_category_is_named(tmp_path: Path, clients: int, categories: int) -> None:
    found = texts(a_report(clients, categories), tmp_path / "p.svg")
    said = " ".join(found)
    assert f"{clients:,} client" in said and "rows.jsonl" in said and "by category" in said
    assert "max_length 150" in found
    if clients <= MOST_ROWS:
        assert all(f"client {i}" in found for i in range(clients))
    else:
        assert f"{clients:,} clients, in an order of its own in each part" in found
    shown = min(categories, MOST_CATEGORIES if categories <= MOST_CATEGORIES else MOST_CATEGORIES - 1)
    assert sum(text.startswith("topic ") for text in found) == shown
    assert (f"{categories - shown} others" in found) == (categories > MOST_CATEGORIES)
    assert ("train" in found) == (categories == 0)
    assert ("Divergence of categories from the pool: 0.250 on average, 0.500 at most" in said) == bool(categories)
    assert "an even deal would have below 0.001" in said


def test_a_thousand_clients_and_names_from_anywhere(tmp_path: Path) -> None:
    found = texts(a_report(1000, 12), tmp_path / "p.svg")
    assert "shares of categories, the client's largest at the bottom" in found
    odd = a_report(2, 2)
    odd["clients"][0]["id"] = "<b>&\x00\n$x$ " + "long " * 20
    odd["clients"][0]["categories"] = {"$\\frac{1}{2}$ & <i>": 3}
    found = texts(odd, tmp_path / "odd.svg")
    assert any(text.startswith("<b>&") for text in found) and any("$\\frac{1}{2}$" in text for text in found)


def test_bars_are_as_long_as_the_counts(tmp_path: Path) -> None:
    report = a_report(3, 4)
    height, draw = partition_drawing(report)
    tips = Tips()
    with _figure(height) as figure:
        draw(figure, tips)
        figure.canvas.draw()
        left = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("rows"))
        widths: dict[int, list[float]] = {}
        for patch in left.patches:
            widths.setdefault(round(patch.get_y() + patch.get_height() / 2), []).append(patch.get_width())
    first = report["clients"][0]["categories"]["topic 0"]
    for y, client in enumerate(report["clients"]):
        assert sorted(width for width in widths[y] if width) == sorted(map(float, client["categories"].values()))
    assert f"client 0: {first} rows of topic 0" in tips.svg(height * 72)


def test_rows_that_were_never_tokenised_and_sizes_far_apart_are_drawn(tmp_path: Path) -> None:
    for clients in (3, MOST_ROWS + 5):
        report = a_report(clients, 2)
        report["clients"][0]["lengths"] = {}
        report["clients"][1].update(categories={"topic 1": 100_000}, train=100_000)
        report["clients"][2]["lengths"] = dict.fromkeys(("p10", "p25", "p50", "p75", "p90"), 5000)
        assert texts(report, tmp_path / "p.svg")
    bare = {**a_report(2, 0), "heterogeneity": {}, "max_length": None}
    assert not any("Divergence" in text or "max_length" in text for text in texts(bare, tmp_path / "p.svg"))


def test_what_it_is_written_as(tmp_path: Path) -> None:
    partition_file(a_report(3, 2), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    partition_file(a_report(3, 2), tmp_path / "p.pdf")
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"ends with \.gif"):
        partition_file(a_report(3, 2), tmp_path / "p.gif")
