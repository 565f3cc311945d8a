"""Models that decide how much to compute: what they decided, what follows if they decide otherwise, and why.

A-ViT (patches halt), Duo-LLM (a big or a small layer for each token), AdaTape (a tape of any length is read) and RIN
(latents carried from step to step choose what to read) are here, trained in miniature; early exit makes a decider of
any language model. To make your own model one, let every decision pass through submodules: one that
reads (its input is the decision path), an `nn.Identity` that everything else reads through (the content path), and
one each for scores and decisions. Then say where these are, and how a forward pass becomes a `DecisionTrace`:

    import torch
    from torch import nn

    from saekit.adaptive import DecidingTarget, DecisionTrace, Flip, Step, Where, trace_with
    from saekit.targets import Site, Target

    class Gate(nn.Module):                            # a looped model: each token runs the core again, or stops
        def __init__(self):
            super().__init__()
            self.linear, self.score, self.decision = nn.Linear(8, 1), nn.Identity(), nn.Identity()

        def forward(self, x, live):
            score = self.score(self.linear(x)[..., 0])
            return score, self.decision((score > 0) & live)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.gate, self.content = nn.Linear(8, 8), Gate(), nn.Identity()

        def forward(self, x):
            live, self.seen = torch.ones(x.shape[:2], dtype=torch.bool), []
            for _ in range(3):
                x = torch.where(live[..., None], self.core(x).tanh(), x)
                score, stops = self.gate(x, live)     # "gate:in@0", "gate:in@1", ...: one Site per call
                self.seen.append((score, live, stops))
                x, live = self.content(x), live & ~stops
            return x

    def trace(x):
        model(x)
        score, live, stops = (torch.stack(parts, 1) for parts in zip(*model.seen))
        return DecisionTrace(model="loop", options=("go on", "stop"), decision=stops.long(), margin=score, score=score,
                             live=live, macs=live.sum((1, 2)) * 64.0, full_macs=3 * x.shape[1] * 64.0)

    model = Loop()
    step = lambda n: Step(reads=Site.parse(f"gate:in@{n}"), content=Site.parse(f"content:in@{n}"),
                          score=Site.parse(f"gate.score:out@{n}"), decision=Site.parse(f"gate.decision:out@{n}"))
    loop = DecidingTarget(target=Target.wrap(model, example=torch.zeros(1, 4, 8)), steps=tuple(map(step, range(3))),
                          options=("go on", "stop"), trace_batch=trace)
    images = torch.randn(2, 4, 8)
    flipped = trace_with(loop, images, [Flip(Where(steps=(0,), places=(1,)))])

A `readout` in a `Step` (the score as a linear function of what is read) makes attribution to features exact.
"""

from saekit.adaptive.attribution import DecisionAttribution as DecisionAttribution
from saekit.adaptive.attribution import attribute_decisions as attribute_decisions
from saekit.adaptive.deciding import DecidingTarget as DecidingTarget
from saekit.adaptive.deciding import Step as Step
from saekit.adaptive.deciding import a_vit_target as a_vit_target
from saekit.adaptive.deciding import adatape_target as adatape_target
from saekit.adaptive.deciding import duo_target as duo_target
from saekit.adaptive.early_exit import early_exit_target as early_exit_target
from saekit.adaptive.early_exit import skipping as skipping
from saekit.adaptive.effects import against_random as against_random
from saekit.adaptive.effects import trace_edited as trace_edited
from saekit.adaptive.harvest import harvest as harvest
from saekit.adaptive.harvest import live_only as live_only
from saekit.adaptive.harvest import train_decision_sae as train_decision_sae
from saekit.adaptive.interventions import DecisionEdit as DecisionEdit
from saekit.adaptive.interventions import Flip as Flip
from saekit.adaptive.interventions import Force as Force
from saekit.adaptive.interventions import Replay as Replay
from saekit.adaptive.interventions import Shift as Shift
from saekit.adaptive.interventions import Where as Where
from saekit.adaptive.interventions import deciding as deciding
from saekit.adaptive.interventions import shuffled as shuffled
from saekit.adaptive.interventions import trace_with as trace_with
from saekit.adaptive.interventions import transplanted as transplanted
from saekit.adaptive.rin_target import rin_target as rin_target
from saekit.adaptive.saved import load_adaptive as load_adaptive
from saekit.adaptive.saved import save_adaptive as save_adaptive
from saekit.adaptive.trace import DecisionTrace as DecisionTrace
