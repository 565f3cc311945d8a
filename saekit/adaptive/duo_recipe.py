"""How the bundled Duo-LLM is made: coin-flip training on the standard library, then a router on the frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from saekit.activations.corpus import Corpus, load_corpus
from saekit.adaptive.duo_llm import DuoConfig, DuoLLM, next_token_nats
from saekit.adaptive.duo_router import budget_loss
from saekit.adaptive.stages import Stage, draw

LANGUAGE, ROUTER = "language", "router"


@dataclass(frozen=True, kw_only=True, slots=True)
class DuoRecipe:
    """A miniature of the paper's (there: 1.4 B parameters, 300 B tokens, then 10 B for the router).

    Attributes:
        big_chance: of the coin that routes each token in each layer.
        budget: share of big layers that the router is asked for.
        alpha: weight of the budget loss; ours, the paper gives none.
        hardest: what tau grows to, linearly from 1.
    """

    seed: int = 0
    width: int = 96
    layers: int = 6
    context: int = 96
    batch: int = 32
    language_steps: int = 500
    learning_rate: float = 3e-3
    router_batch: int = 16
    router_steps: int = 150
    router_learning_rate: float = 1e-2
    big_chance: float = 0.5
    budget: float = 0.5
    alpha: float = 10.0
    hardest: float = 10.0

    @property
    def stages(self) -> tuple[Stage, ...]:
        routers = tuple(f"layers.{number}.router" for number in range(self.layers))
        language = Stage(
            name=LANGUAGE,
            steps=self.language_steps,
            learning_rate=self.learning_rate,
            weight_decay=0.1,
            betas=(0.9, 0.95),
        )
        router = Stage(
            name=ROUTER,
            steps=self.router_steps,
            learning_rate=self.router_learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.95),
            start=LANGUAGE,
            only=routers,
        )
        return language, router

    def build(self) -> DuoLLM:
        sizes = DuoConfig(
            width=self.width, layers=self.layers, context=self.context, big=4 * self.width, small=self.width // 4
        )
        return DuoLLM(sizes, seed=self.seed)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        generator = draw(self.seed, stage, step)
        rows = load_once(self.context).train.ids
        trains_router = stage.name == ROUTER
        batch = self.router_batch if trains_router else self.batch
        ids = rows[torch.randint(len(rows), (batch,), generator=generator)]
        if not trains_router:
            coins = torch.rand(*ids.shape, self.layers, generator=generator) < self.big_chance
            return next_token_nats(model(ids, coins.long()).logits, ids).mean(), {}
        tau = 1 + (self.hardest - 1) * step / max(1, stage.steps - 1)
        run = model(ids, tau=tau)
        shares = (tau * run.router).softmax(-1)
        nats = next_token_nats(run.logits, ids).mean()
        budget = torch.tensor([1 - self.budget, self.budget])
        total = nats + self.alpha * budget_loss(shares, budget)
        return total, {"nats": float(nats.detach()), "big": float(shares[..., 1].detach().mean()) * self.layers}


@cache
def load_once(context: int) -> Corpus:
    """The standard library in pystd's tokens, divided by modules."""
    from saekit.targets import Target

    return load_corpus("stdlib", Target.load("pystd").tokenizer, context=context)
