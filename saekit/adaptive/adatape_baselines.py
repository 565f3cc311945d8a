"""What AdaTape is held against, on parity and on digits: each trained as long, on the same inputs in the same order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from saekit.adaptive.a_vit_recipe import load_once
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig, PlainTransformer
from saekit.adaptive.adatape_recipe import parity, sequences
from saekit.adaptive.adatape_report import N_TEST, TEST_SEED
from saekit.adaptive.digits import on_canvas
from saekit.adaptive.ponder_net import PonderNet, ponder_prior, ponder_task
from saekit.adaptive.stages import Stage, draw
from saekit.adaptive.universal import UniversalTransformer
from saekit.errors import SaekitError
from saekit.patching.statistics import rank_correlation

Task = Literal["parity", "digits"]
Model = Literal["tape", "still", "learnt", "unchosen", "plain", "shallow", "coarse", "universal", "ponder"]
STAGE = "baseline"
LENGTH, CANVAS, COARSE, FINE, BANK = 16, 10, 5, 2, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineRecipe:
    """One model on one task.

    Attributes:
        model: tape (AdaTape as it is), still (its query never moves), learnt (a bank of its own, not the input's),
            unchosen (entries in an order that no query has chosen), plain (a transformer on all entries); on
            pictures alone shallow (the same with half the blocks, which costs about what AdaTape does) and coarse
            (a transformer on as few tokens as AdaTape has of its own); universal, ponder.
        steps: of training; None is 2,000 on parity, 1,320 (60 epochs) on digits.
        most: steps that universal and ponder may take at most.
        cost_weight: of AdaTape's impurity and of the steps of the universal transformer; the released code's.
        prior_weight, prior_chance: of PonderNet's prior; its paper's, and ours.
    """

    task: Task = "parity"
    model: Model = "tape"
    seed: int = 0
    steps: int | None = None
    most: int = 8
    learning_rate: float = 1e-3
    cost_weight: float = 0.01
    prior_weight: float = 0.01
    prior_chance: float = 0.2

    def __post_init__(self) -> None:
        if self.model in ("coarse", "shallow") and self.task == "parity":
            raise SaekitError(f"{self.model!r} is for pictures alone; give 'plain' on parity")

    @property
    def stages(self) -> tuple[Stage, ...]:
        steps = self.steps or {"parity": 2000, "digits": 1320}[self.task]
        return (Stage(name=STAGE, steps=steps, learning_rate=self.learning_rate, weight_decay=0.01, betas=(0.9, 0.99)),)

    @property
    def config(self) -> AdaTapeConfig:
        """Sizes: as bundled on parity; on digits four blocks, of which the last three see the tape."""
        common: dict[str, Any] = {
            "moves_query": self.model != "still",
            "bank": "learnt" if self.model == "learnt" else "input",
            "chooses": self.model != "unchosen",
        }
        if self.model in ("universal", "ponder"):
            common["longest"] = self.most
        if self.task == "parity":
            return AdaTapeConfig(length=LENGTH, **common)
        fine = {"coarse": COARSE, **dict.fromkeys(("plain", "shallow", "universal", "ponder"), FINE)}
        layers = 2 if self.model == "shallow" else 4
        sizes = {"picture": CANVAS, "coarse": COARSE, "layers": layers, "insert": 1, "classes": 10}
        return AdaTapeConfig(fine=fine.get(self.model, BANK), **sizes, **common)

    def build(self) -> nn.Module:
        kinds: dict[str, type[Any]] = {"universal": UniversalTransformer, "ponder": PonderNet}
        kinds |= dict.fromkeys(("plain", "shallow", "coarse"), PlainTransformer)
        return kinds.get(self.model, AdaTape)(self.config, seed=self.seed)

    def batch_at(self, stage: Stage, step: int) -> tuple[Tensor, Tensor]:
        """The same for every model of a task and seed."""
        generator = draw(self.seed, stage, step)
        if self.task == "parity":
            symbols = sequences(128, LENGTH, generator)
            return symbols, parity(symbols)
        digits = load_once(self.seed)
        chosen = torch.randint(len(digits.train), (64,), generator=generator)
        moved = torch.randint(-1, 2, (64, 2), generator=generator)
        return on_canvas(digits.train[chosen], CANVAS, moved), digits.train_labels[chosen]

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        inputs, labels = self.batch_at(stage, step)
        run = model(inputs)
        if isinstance(model, PonderNet):
            total = ponder_task(run, labels) + self.prior_weight * ponder_prior(run.halting, self.prior_chance)
            return total, {}
        logits = run if isinstance(model, PlainTransformer) else run.logits
        task = nn.functional.cross_entropy(logits, labels)
        if isinstance(model, AdaTape):
            return task + self.cost_weight * run.tape.impurity.mean(), {}
        if isinstance(model, UniversalTransformer):
            return task + self.cost_weight * (run.steps + run.remainder).mean(), {}
        return task, {}

    def tests(self) -> tuple[Tensor, Tensor]:
        """Inputs that no training has, and labels."""
        if self.task == "parity":
            symbols = sequences(N_TEST, LENGTH, torch.Generator().manual_seed(TEST_SEED))
            return symbols, parity(symbols)
        digits = load_once(self.seed)
        return digits.test_images(CANVAS), digits.test_labels


@torch.no_grad()
def measure_baseline(recipe: BaselineRecipe, model: nn.Module) -> dict[str, float]:
    """Accuracy, cost, and for what decides its length whether that follows difficulty.

    length_by_difficulty is Spearman's correlation with the loss of a classifier of another sort (logistic regression
    on pixels, which saw the training digits alone); only on digits, since parity has no easy sequences.
    """
    inputs, labels = recipe.tests()
    run = model.eval()(inputs)
    logits = run if isinstance(model, PlainTransformer) else run.logits
    found = {"accuracy": float((logits.argmax(1) == labels).float().mean())}
    if isinstance(model, PlainTransformer):
        return found | {"macs": float(model.macs)}
    lengths = cast(Tensor, run.tape.length if isinstance(model, AdaTape) else run.steps)
    macs = model.macs if isinstance(model, AdaTape) else cast(Any, model).loop.macs
    found |= {"macs": float(macs(lengths).mean()), "length": float(lengths.float().mean())}
    found["length_spread"] = float(lengths.float().std())
    if recipe.task == "digits" and found["length_spread"] > 0:
        found["length_by_difficulty"] = rank_correlation(lengths, difficulty(recipe.seed))
    return found


def difficulty(seed: int) -> Tensor:
    """Of every test digit: the cross-entropy of a logistic regression on pixels, `(n,)` in nats."""
    try:
        from sklearn.linear_model import LogisticRegression  # optional, and slow to import
    except ImportError as error:
        raise SaekitError("difficulty is judged with scikit-learn; pip install 'saekit[adaptive]'") from error
    digits = load_once(seed)
    judge = LogisticRegression(max_iter=2000).fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())
    chances = torch.from_numpy(judge.predict_proba(digits.test.flatten(1).numpy()))
    return -chances.gather(1, digits.test_labels[:, None])[:, 0].log()
