"""The structure graph of a group as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import networkx as nx

CHAR, HEIGHT, GAP_X, GAP_Y, PAD = 7.2, 26, 24, 44, 20
COLOURS = {"write": "#cfe8cf", "carry": "#fdf0c4", "read": "#f6d0cc", "operation": "#dde6f3"}


def svg(graph: nx.DiGraph, title: str) -> str:
    """Draw a structure graph in layers, data flowing down.

    Args:
        graph: As :func:`irprune.analysis.dependency.structure` gives it: nodes have a ``role`` and a
            ``label``.
        title: What stands above.
    """
    layers = _layers(graph)
    widths = {node: CHAR * len(_label(graph, node)) + 16 for node in graph}
    spans = [sum(widths[node] for node in layer) + GAP_X * (len(layer) - 1) for layer in layers]
    width = max([*spans, CHAR * len(title)], default=0) + 2 * PAD
    centres: dict[str, tuple[float, float]] = {}
    top = 2.0 * PAD
    for layer, span in zip(layers, spans, strict=True):
        left = (width - span) / 2
        for node in layer:
            centres[node] = (left + widths[node] / 2, top + HEIGHT / 2)
            left += widths[node] + GAP_X
        top += HEIGHT + GAP_Y
    height = top + PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        ' font-family="monospace" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{PAD}" y="{PAD}" font-weight="bold">{escape(title)}</text>',
    ]
    parts += [_edge(centres[a], centres[b]) for a, b in sorted(graph.edges)]
    parts += [_node(graph, node, centres[node], widths[node]) for node in sorted(graph)]
    parts += _legend(height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    """Nodes just above the first that they flow into, ends as high as they can be, few crossings."""
    depth: dict[str, int] = {}
    for number, layer in enumerate(nx.topological_generations(graph)):
        depth.update(dict.fromkeys(layer, number))
    for node in reversed(list(nx.topological_sort(graph))):
        below = [depth[successor] for successor in graph.successors(node)]
        depth[node] = min(below) - 1 if below else depth[node]
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in sorted(graph):
        layers[depth[node]].append(node)
    for _ in range(4):
        _untangle(graph, layers)
    return layers


def _untangle(graph: nx.DiGraph, layers: list[list[str]]) -> None:
    """Order each layer by the mean place of its neighbours above and below (the barycentre heuristic)."""
    place: dict[str, float] = {}
    for layer in layers:
        place.update({node: (number + 0.5) / len(layer) for number, node in enumerate(layer)})

    def centre(node: str) -> float:
        near = [place[other] for other in (*graph.predecessors(node), *graph.successors(node))]
        return sum(near) / len(near) if near else place[node]

    for layer in layers:
        layer.sort(key=lambda node: (centre(node), node))
        place.update({node: (number + 0.5) / len(layer) for number, node in enumerate(layer)})


def _label(graph: nx.DiGraph, node: str) -> str:
    return str(graph.nodes[node]["label"])


def _edge(a: tuple[float, float], b: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = (a[0], a[1] + HEIGHT / 2), (b[0], b[1] - HEIGHT / 2)
    bend = (y2 - y1) / 2
    curve = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    return f'<path d="{curve}" fill="none" stroke="#555" marker-end="url(#tip)"/>'


def _node(graph: nx.DiGraph, node: str, centre: tuple[float, float], width: float) -> str:
    x, y = centre
    data: Mapping[str, str] = graph.nodes[node]
    told = f"{node} ({data['role']}; in {graph.in_degree(node)}, out {graph.out_degree(node)})"
    corner = 12 if data["role"] == "operation" else 2
    return (
        f"<g><title>{escape(told)}</title>"
        f'<rect x="{x - width / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="{corner}"'
        f' fill="{COLOURS[data["role"]]}" stroke="#555"/>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(_label(graph, node))}</text></g>'
    )


def _legend(height: float) -> list[str]:
    texts = {"write": "writes", "carry": "per index", "operation": "operation", "read": "reads"}
    out = []
    for number, (role, text) in enumerate(texts.items()):
        x, y = PAD + number * 110, height - PAD
        out.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[role]}" stroke="#555"/>')
        out.append(f'<text x="{x + 18}" y="{y}">{text}</text>')
    return out
