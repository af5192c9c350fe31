"""Times of nested operators as a tree, drawn as an icicle in SVG, and as a table of what takes most."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from html import escape

WIDTH, LINE = 1200, 18
SMALLEST = 0.002  # of the whole: what is narrower is not drawn
COLOURS = {"loss": "#7fb3d5", "backward": "#f0b27a", "step": "#d5dbdb", "round": "#eaeded"}


@dataclass
class Node:
    """One name under its parents; `time` is all of its own and its children's, in microseconds."""

    name: str
    time: float = 0.0
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, path: list[str], time: float) -> None:
        """Count `time` at the end of the path; autograd's nodes lose the words that all of them have."""
        here, inside = self, False
        for name in path:
            short = name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")
            inside = here.name == short  # a node and its work under one name: counted with the outer one
            if not inside:
                here = here.children.setdefault(short, Node(short))
        if not inside:
            here.time += time

    @property
    def own(self) -> float:
        return max(0.0, self.time - sum(child.time for child in self.children.values()))


def table(root: Node, rows: int = 20) -> str:
    """Own time by name and by part of the step, the most first."""
    by_name: defaultdict[tuple[str, str], float] = defaultdict(float)

    def walk(node: Node, part: str) -> None:
        part = part_of(node.name, part)
        by_name[part, node.name] += node.own
        for child in node.children.values():
            walk(child, part)

    walk(root, "round")
    most = sorted(by_name.items(), key=lambda one: -one[1])[:rows]
    lines = ["| part | operator | share of the round |", "|---|---|--:|"]
    lines += [f"| {part} | `{name}` | {time / root.time:.1%} |" for (part, name), time in most]
    return "\n".join(lines)


def part_of(name: str, part: str) -> str:
    if name in ("loss", "step", "round"):
        return name
    return "backward" if part == "step" and "Backward" in name else part


def draw(root: Node, title: str) -> str:
    """An icicle: the whole above, what it consists of below, wider is longer."""
    boxes: list[str] = []
    deepest = 0

    def place(node: Node, left: float, level: int, part: str) -> None:
        nonlocal deepest
        share = node.time / root.time
        if share < SMALLEST:
            return
        deepest = max(deepest, level)
        part = part_of(node.name, part)
        width, top = share * WIDTH, 30 + level * LINE
        fits = int(width / 6.6)
        text = node.name if len(node.name) <= fits else node.name[: max(0, fits - 1)] + "…" if fits > 3 else ""
        boxes.append(
            f"<g><title>{escape(node.name)}: {share:.1%}, own {node.own / root.time:.1%}</title>"
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{LINE - 1}" fill="{COLOURS[part]}"/>'
            + (f'<text x="{left + 3:.1f}" y="{top + 12}">{escape(text)}</text>' if text else "")
            + "</g>"
        )
        for child in sorted(node.children.values(), key=lambda one: -one.time):
            place(child, left, level + 1, part)
            left += child.time / root.time * WIDTH

    place(root, 0.0, 0, "round")
    height = 30 + (deepest + 1) * LINE + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="11">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text x="4" y="16">{escape(title)}: loss blue, '
        "backward orange, the rest grey; names and shares under the pointer</text>" + "\n".join(boxes) + "</svg>\n"
    )
