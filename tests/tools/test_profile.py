"""The flame graph's tree: times are counted once, and drawn as wide as they are long."""

from __future__ import annotations

import re

from benchmarks.profile.flame import WIDTH, Node, draw, table


def tree() -> Node:
    root = Node("all")
    node = "autograd::engine::evaluate_function: MmBackward0"
    for path, time in (
        (["round"], 100.0),
        (["round", "step"], 80.0),
        (["round", "step", "loss"], 30.0),
        (["round", "step", "loss", "aten::mm"], 10.0),
        (["round", "step", "loss", "aten::mm"], 15.0),
        (["round", "step", node], 40.0),
        (["round", "step", node, "MmBackward0"], 39.0),
        (["round", "step", node, "MmBackward0", "aten::mm"], 36.0),
    ):
        root.add(path, time)
    return root.children["round"]


def test_time_is_counted_once() -> None:
    root = tree()
    backward = root.children["step"].children["MmBackward0"]
    assert (backward.time, backward.own) == (40.0, 4.0)
    assert (root.own, root.children["step"].own, root.children["step"].children["loss"].own) == (20.0, 10.0, 5.0)
    first, second = table(root).splitlines()[2:4]
    assert first == "| backward | `mm` | 36.0% |" and second == "| loss | `mm` | 25.0% |"


def test_boxes_are_as_wide_as_the_times() -> None:
    svg = draw(tree(), "A & B")
    widths = dict(re.findall(r'<title>(\w+): [^<]*</title><rect [^>]*width="([\d.]+)"', svg))
    assert float(widths["round"]) == WIDTH and float(widths["step"]) == 0.8 * WIDTH
    assert "A &amp; B" in svg
