"""The recogniser of rotary position embeddings: proves from a graph what positions do to queries and keys.

It trusts no name and no spelling. It colours the graph by tokens and positions, cuts out what lies between a projection and its
attention, sees that this is linear, and evaluates it in fp64 on random vectors at many positions. Half-split, interleaved and partial
rotations come out with their frequencies and factor, whether written with rotate_half, complex numbers or a table of sines; anything
else is refused with the reason. Positions that reach hidden states another way (learned embeddings) refuse the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from effllm import compat
from effllm.passes import rope_eval, rope_fit, rope_flow, rope_scaling
from effllm.passes.base import Context
from effllm.passes.rope_flow import ANGLE, CONTENT, Attention, Refused
from effllm.report import Decision, PassReport
from effllm.runtime.rotary import Rotary


@dataclass
class RopeSites:
    """Finds rotary sites; changes nothing. `content` and `angle` are the inputs that hold tokens and positions.

    `found` has an entry per attention, in order: the rotation of its keys, or None where positions do not enter them. It is valid
    only where no Decision is "kept".
    """

    content: Tensor
    angle: Tensor
    found: list[Rotary | None] = field(default_factory=list)

    name = "rope_sites"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """One Decision per attention, and one for every node by which positions leak past a rotation."""
        del context
        report = PassReport(self.name)
        self.found.clear()
        sites = rope_flow.attentions(graph)
        held = [(n, compat.real_tensor(n)) for n in graph.nodes if n.op == "placeholder"]
        inputs = {kind: [n for n, t in held if t is own] for kind, own in ((CONTENT, self.content), (ANGLE, self.angle))}
        colour = rope_flow.colours(graph, inputs[CONTENT], inputs[ANGLE], [s.node for s in sites])
        known: set[fx.Node] = {s.node for s in sites}
        evaluator = rope_eval.Evaluator(graph, inputs[ANGLE], colour)
        for site in sites:
            report.decisions.append(self._site(site, colour, known, evaluator))
        if not sites:
            report.decisions.append(Decision("graph", "", "kept", "no-attention", "the graph has no attention that is recognised"))
        for node in graph.nodes:
            if colour[node] == CONTENT | ANGLE and node not in known and node.op != "output":
                reason = f"positions reach {node.name} outside of a rotation of queries and keys"
                report.decisions.append(Decision(node.name, compat.module_of(node)[0], "kept", "leak", reason))
                break  # all that follows from it leaks too
        return report

    def _site(self, site: Attention, colour: dict[fx.Node, int], known: set[fx.Node], evaluator: rope_eval.Evaluator) -> Decision:
        module, _ = compat.module_of(site.node)
        try:
            if site.value is not None and colour[site.value] & ANGLE:
                raise Refused("values", "values depend on positions")
            key, query = (self._operand(n, colour, known, evaluator) for n in (site.key, site.query))
        except Refused as error:
            return Decision(site.node.name, module, "kept", error.code, error.reason)
        if (key is None) != (query is None) or (key is not None and query is not None and not key.same_turn(query)):
            return Decision(site.node.name, module, "kept", "unlike", "queries and keys turn differently")
        self.found.append(key)
        if key is None:
            return Decision(site.node.name, module, "applied", "no-positions", "positions do not enter this attention")
        what = f"{key.scaling}, {key.layout}, {key.channels} of {key.head_dim} channels, factor {key.factor:.6g}"
        return Decision(site.node.name, module, "applied", "rotary", what, config={"scaling": key.scaling, "layout": key.layout, "channels": key.channels})

    def _operand(self, node: fx.Node, colour: dict[fx.Node, int], known: set[fx.Node], evaluator: rope_eval.Evaluator) -> Rotary | None:
        cut = rope_flow.rotation(node, colour)
        if cut is None:
            return None
        part, mixed = cut
        found = rope_fit.fit(evaluator.apply(part), evaluator.tokens, evaluator.epsilon)
        known |= mixed
        width = compat.example_value(part.root).shape[-1]
        name = rope_scaling.VARIES if found.varies else rope_scaling.classify(found.omega, found.factor)
        return Rotary(found.omega, found.layout, width, found.factor, name, found.limit, evaluator.source(part))


def one(found: list[Rotary | None]) -> Rotary:
    """The rotation that all rotary layers share. Raises Refused where they differ or there is none."""
    turning = [r for r in found if r is not None]
    if not turning:
        raise Refused("no-positions", "no layer rotates its keys")
    if not all(r.same_turn(turning[0]) and abs(r.factor - turning[0].factor) < 1e-9 for r in turning):
        raise Refused("layers-differ", "layers rotate their keys at different frequencies")
    return turning[0]

