"""`saekit adaptive`: train, measure and look into models that decide how much to compute."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .output import Progress, columns, write_facts

if TYPE_CHECKING:
    from saekit.adaptive.saved import Saved

# facts that are a table or a list of their own
_LONG = ("budgets", "greedy", "controls", "split_oracle", "nats_by_chance_of_big", "difficulty")

_APART = ("tokens", "explained", "questions")

# flags that would otherwise be passed over in silence
_ONLY_FOR = {
    "out": ("train", "trace"),
    "seed": ("train",),
    "resume": ("train",),
    "rows": ("train", "report"),
    "speed": ("report",),
    "explain": ("report",),
    "questions": ("report",),
}
_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """Models that decide how much to compute: halting patches, big or small layers, tapes, latents.

    train makes one from nothing; report measures one on data that it has not seen; trace shows its decisions on an
    input of yours as a picture. NAME is one of the bundled models, or for report and trace a folder. INPUT is the
    number of a test digit or an image file (a-vit), a text or a text file (duo-llm), 16 symbols 1, 0 and -, as
    in 10-110-0011-0101 (adatape), or the digit to make (rin).

    Example:
      saekit adaptive report a-vit
      saekit adaptive report a-vit --explain 1 --json
      saekit adaptive trace duo-llm "for name in names:" --out routes.html
      saekit adaptive trace a-vit 17
      saekit adaptive train a-vit --seed 1 --out my-a-vit
    """

    do: Annotated[Literal["train", "report", "trace"], tyro.conf.Positional]
    """What to do."""
    name: Annotated[str, tyro.conf.Positional]
    """a-vit, duo-llm, adatape, rin, or a folder that train wrote."""
    input: Annotated[str | None, tyro.conf.Positional] = None
    """For trace."""
    out: Path | None = None
    """Folder that train writes (NAME-SEED in the current folder if not given), or page of trace (NAME-trace.html)."""
    seed: int = 0
    """Of train: weights, data order, and how the digits are divided."""
    resume: bool = False
    """Let train go on from where an earlier run for the same folder stopped."""
    rows: int | None = None
    """Rows of held-out text that duo-llm is measured on (16 if not given); the others have test sets of their own."""
    speed: bool = False
    """Let report also time: a-vit with halted patches really removed, a step of rin beside one with full attention."""
    explain: int | None = None
    """Let report also train an SAE on what this step decides by, and test its strongest features. A step is a layer,
    for adatape a tape token, for rin a step of sampling; from 0."""
    questions: bool = False
    """Let report also ask what the features behind its decisions are of, and what they do; some minutes."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.errors import SaekitError

        if (self.input is not None) != (self.do == "trace"):
            raise SaekitError(
                f"saekit adaptive {self.do} takes {'an' if self.do == 'trace' else 'no'} INPUT; see --help for examples"
            )
        unset = {one.name: one.default for one in fields(self)}
        for flag, verbs in _ONLY_FOR.items():
            if self.do not in verbs and getattr(self, flag) != unset[flag]:
                raise SaekitError(f"--{flag} is for saekit adaptive {' and '.join(verbs)}; leave it out of {self.do}")
        if self.rows is not None and self.rows < 1:
            raise SaekitError(f"--rows {self.rows} reads nothing; give at least 1")
        facts = {"train": self.train, "report": self.report, "trace": self.trace}[self.do]()
        write_facts(facts, as_json=self.json, text=lambda: as_text(facts))
        return 0

    def train(self) -> dict[str, Any]:
        from saekit.adaptive.kinds import kind_of, train_kind

        kind = kind_of(self.name)
        rows = self.rows_of(kind.name)
        stages = kind.recipe(self.seed).stages
        # not the name alone, which stands for the bundled model
        out = self.out or Path(f"{self.name}-{self.seed}")
        with Progress(f"training {self.name}", sum(stage.steps for stage in stages), unit="step") as progress:

            def follow(report: Any) -> None:
                progress.to(report["done"], f"{report['stage']}, loss {report['loss']:.3f}")

            saved = train_kind(self.name, out, seed=self.seed, rows=rows, resume=self.resume, on_report=follow)
        return {"model": str(out), **saved.facts}

    def report(self) -> dict[str, Any]:
        from saekit.adaptive.kinds import KINDS
        from saekit.adaptive.saved import load_adaptive
        from saekit.errors import SaekitError

        saved = load_adaptive(self.name)
        kind = KINDS[saved.kind]
        # refused before minutes of work, not after
        rows = self.rows_of(saved.kind)
        if self.speed and saved.kind not in ("a-vit", "rin"):
            raise SaekitError("--speed is for a-vit and rin, whose cost is what they are about; leave it out")
        if self.explain is not None:
            kind.target(saved).step(self.explain)
        facts = {"model": self.name, **kind.measure(saved, rows)}
        if self.explain is not None:
            from saekit.adaptive.explain import explain_step

            facts["explained"] = explain_step(kind.target(saved), *kind.inputs(saved), self.explain)
        if self.questions:
            facts["questions"] = kind.ask(saved)
        return facts | (self.timed(saved) if self.speed else {})

    def rows_of(self, kind: str) -> int:
        """How many rows of text to measure on; raises SaekitError if they are asked of a model that reads none."""
        from saekit.errors import SaekitError

        if self.rows is not None and kind != "duo-llm":
            raise SaekitError(f"--rows is for duo-llm, which reads text; leave it out of {kind}")
        return self.rows or _ROWS

    def timed(self, saved: "Saved") -> dict[str, float]:
        from saekit.adaptive.a_vit import AViT
        from saekit.adaptive.a_vit_report import measure_speed
        from saekit.adaptive.digits import load_digits
        from saekit.adaptive.rin_cost import measure_cost

        if not isinstance(saved.model, AViT):
            return measure_cost()
        digits = load_digits(int(saved.recipe.get("seed", 0)))
        return measure_speed(saved.model, digits.test_images(saved.model.config.image)[:64])

    def trace(self) -> dict[str, Any]:
        from saekit.adaptive.inputs import encode_text, read_input
        from saekit.adaptive.kinds import KINDS
        from saekit.adaptive.picture import write_pictures
        from saekit.adaptive.saved import load_adaptive

        saved = load_adaptive(self.name)
        batch = read_input(saved, str(self.input))
        trace = KINDS[saved.kind].target(saved).trace(batch)
        image = {"a-vit": lambda: batch[0, 0], "rin": lambda: trace.more["pictures"][0, 0]}.get(
            saved.kind, lambda: None
        )()
        out = self.out or Path(f"{Path(self.name).expanduser().resolve().name}-trace.html")
        write_pictures(out, f"{self.name}: {str(self.input)[:60]}", [trace.picture(0, image=image)])
        facts: dict[str, Any] = {"model": self.name, "page": str(out), "mac_ratio": float(trace.mac_ratio[0])}
        facts["counted"] = trace.counted
        if saved.kind == "duo-llm":
            facts["tokens_left_out"] = len(encode_text(str(self.input))) - batch.shape[1]
        facts |= {f"{option}_by_step": trace.share(option).tolist() for option in trace.options}
        if saved.kind in ("a-vit", "adatape"):
            facts["says"] = int(trace.more["logits"][0].argmax())
        if trace.texts is not None:
            facts["tokens"] = [
                {"text": text, "decisions": [trace.options[d] for d in trace.decision[0, :, place].tolist()]}
                for place, text in enumerate(trace.texts[0])
            ]
        return facts


def as_text(facts: dict[str, Any]) -> str:
    """Two columns; what is long comes behind them."""
    from saekit.adaptive.duo_report import table

    short = [(name, shown(value)) for name, value in facts.items() if name not in (*_LONG, *_APART)]
    parts = [columns(short)]
    if "budgets" in facts:
        parts.append("nats per token, by budget\n" + table(facts["budgets"]))
    for name in _LONG[1:]:
        if name in facts:
            parts.append(f"{name}\n" + columns((key, shown(value)) for key, value in facts[name].items()))
    if "explained" in facts:
        parts.append(features_as_text(facts["explained"]))
    for question, numbers in facts.get("questions", {}).items():
        parts.append(f"{question}\n" + columns((name, shown(value)) for name, value in numbers.items()))
    if "tokens" in facts:
        lines = [(repr(token["text"]), " ".join(token["decisions"])) for token in facts["tokens"]]
        parts.append("decisions by layer\n" + columns(lines))
    return "\n\n".join(parts)


def features_as_text(explained: dict[str, Any]) -> str:
    """One line per feature."""
    lines = [(f"feature {found['feature']}", as_line(found)) for found in explained["features"]]
    measured = f"FVU {explained['fvu']:.3f}"
    if "error_share" in explained:
        measured += f", error {explained['error_share']:.1%} of the score"
    head = f"what decides at {explained['site']} ({measured})"
    return f"{head}\n{columns(lines)}"


def as_line(found: dict[str, Any]) -> str:
    added = f", adds {found['mean_added']:+.3f}" if "mean_added" in found else ""
    return (
        f"on {found['rate']:.1%} of tokens{added}; ablated, it flips "
        f"{found['decision']['flipped']:.2%} of decisions (features like it at most "
        f"{found['strongest_control']:.2%}, p = {found['p']:.2f})"
    )


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " ".join(shown(item) for item in value)
    return str(value)
