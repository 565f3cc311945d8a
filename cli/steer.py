"""`saekit steer`: what a model writes with and without an edit of some features."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .output import columns, warn, write_facts

if TYPE_CHECKING:
    from saekit.patching import Intervention
    from saekit.patching.operation import Operation
    from saekit.targets import Site

How = Literal["add", "set", "scale", "zero"]
# what an operation works with if nothing is said
DEFAULTS = {"scale": 2.0, "zero": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Steer:
    """Let a model go on from a prompt, as it is and with some features edited.

    The edit acts on every token but BOS, of the prompt and of what is generated; what the SAE does not
    reconstruct stays. Without --sae it is the bundled SAE on the bundled model.

    Example:
      saekit steer "def area(self, width):" --features 69 --how add --amount 150
      saekit steer "import os" --sae my-sae --features 12 40 --how zero --json
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """Text to go on from."""
    features: tuple[int, ...]
    """Features to edit."""
    how: How = "add"
    """add the amount, set to it, scale by it, or zero."""
    amount: float | None = None
    """In units of the feature's strength; for scale, the factor (2 if not given)."""
    where: Literal["all", "prompt", "new"] = "all"
    """Edit everywhere, in the prompt alone, or from its last token on."""
    tokens: int = 40
    """How many new tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    """Of the draws, if the temperature is above 0."""
    sae: Path | None = None
    """Folder or file of an SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    model: str | None = None
    """Another model than the one it was trained on."""
    site: str | None = None
    """Another Site than the one it was trained at."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.patching import OffDistributionWarning

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OffDistributionWarning)
            facts = self.facts()
        said = [str(one.message) for one in caught if issubclass(one.category, OffDistributionWarning)]
        for message in said:
            warn(message)
        shown = [("prompt", repr(self.prompt)), ("plain", repr(facts["plain"])), ("edited", repr(facts["edited"]))]
        write_facts({**facts, "warnings": said}, as_json=self.json, text=lambda: columns(shown))
        return 0

    def facts(self) -> dict[str, Any]:
        from saekit.errors import SaekitError
        from saekit.patching.account import IdleEditError
        from saekit.patching.generation import Sampling, encode_prompt, steer

        from .opened import place_on_model

        sampling = Sampling(new_tokens=self.tokens, temperature=self.temperature, seed=self.seed)
        named, sites = ([] if one is None else [str(one)] for one in (self.sae, self.site))
        placed = place_on_model(named, model=self.model, sites=sites, device=self.device)
        target, saes, mask = placed.target, placed.saes, placed.mask
        (site,) = saes
        prompt = encode_prompt(target, self.prompt, bos=placed.bos)
        try:
            steered = steer(target, prompt, [self.intervention(site)], saes, sampling=sampling, mask=mask)
        except IdleEditError:
            raise SaekitError(
                f"--how {self.how} changed nothing: {self.named()}, or as strong as that already; choose other "
                "--features, another --where or --how add"
            ) from None
        return {
            "model": target.name,
            "site": str(site),
            "features": self.features,
            "how": self.how,
            "amount": self.settled_amount(),
            "prompt": self.prompt,
            "plain": target.tokenizer.decode(steered.plain),
            "edited": target.tokenizer.decode(steered.edited),
            "first_difference": steered.first_difference,
        }

    def named(self) -> str:
        features = ", ".join(map(str, self.features))
        return (
            f"feature {features} was not active" if len(self.features) == 1 else f"features {features} were not active"
        )

    def settled_amount(self) -> float:
        """The number that the operation works with.

        Raises:
            SaekitError: if it needs one that is not there, or has one that it does not need.
        """
        from saekit.errors import SaekitError

        if self.amount is not None and not math.isfinite(self.amount):
            raise SaekitError(f"--amount {self.amount} is no strength; pass a finite number")
        if self.amount is None and self.how not in DEFAULTS:
            raise SaekitError(f"--how {self.how} needs a number; pass --amount, in units of the feature's strength")
        if self.amount is not None and self.how == "zero":
            raise SaekitError("--how zero takes no number; leave --amount out, or use --how set")
        return DEFAULTS[self.how] if self.amount is None else self.amount

    def intervention(self, site: "Site") -> "Intervention":
        from saekit.errors import SaekitError
        from saekit.patching import Add, Clamp, Intervention, Scale, Zero

        repeated = sorted({f for f in self.features if self.features.count(f) > 1})
        if repeated:
            raise SaekitError(f"--features names {repeated[0]} more than once; name each feature once")
        amount = self.settled_amount()
        operation: Operation = {
            "add": lambda: Add(amount),
            "set": lambda: Clamp(amount, amount),
            "scale": lambda: Scale(amount),
            "zero": lambda: Zero(),
        }[self.how]()
        return Intervention(
            site=site,
            operation=operation,
            features=self.features,
            steps=(0,) if self.where == "prompt" else None,
            positions=(-1,) if self.where == "new" else None,
        )
