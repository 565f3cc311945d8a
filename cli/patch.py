"""`saekit patch`: what each feature, at each place, carries of the difference between two prompts."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import Stages, columns, write_facts

if TYPE_CHECKING:
    from saekit.patching.patch_table import PatchTable
    from saekit.targets import Site

    from .contrast import Contrast

COLUMNS = ("site", "position", "token", "feature", "effect", "share")
SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """Give every feature, alone and at one token at a time, the strength that it has after another prompt.

    The model is run once for each feature, Site and position where the two prompts differ, and the effect is what
    becomes of the logit of --answer less that of --wrong: exact, not estimated. So PROMPT is one after which the
    answer does not follow, and --other one after which it does. The whole table is written as CSV, and a run that
    was interrupted goes on with --resume.

    Example:
      saekit patch "    x = items[value" --other "    x = items(value" --answer ")" --wrong "]"
      saekit patch "    x = items[value" --other "    x = items(value" --answer ")" --wrong "]" \\
          --sae sae-1 pystd/layers.2 --out bracket.csv --resume
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """Text to run the model on."""
    other: str
    """A prompt of as many tokens, whose features are put in."""
    answer: str
    """The token that ought to follow the other prompt."""
    wrong: str
    """The token that it is compared with."""
    sae: tuple[str, ...] = ()
    """SAEs at one or more Sites: folders, files, names from `saekit list`, or places on the Hub. The bundled one if not
    given."""
    site: tuple[str, ...] = ()
    """One for each --sae, if they are to read elsewhere than where they were trained."""
    model: str | None = None
    """Another model than the one they were trained on."""
    batch_rows: int = 64
    """Places tried per forward pass."""
    out: Path = Path("patch.csv")
    """The table to write: site, position, token, feature, effect, share."""
    resume: bool = False
    """Go on from where an earlier run of the same command stopped."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.dashboards.static_page import check_writable, write_text
        from saekit.errors import SaekitError
        from saekit.patching.effects import metric_of
        from saekit.patching.patch_table import patch_features
        from saekit.training.stop import RunStopped, StopRequested, StopSignals

        from .contrast import open_contrast

        if self.batch_rows < 1:
            raise SaekitError(f"--batch-rows {self.batch_rows} tries nothing; give 1 or more")
        check_writable(self.out)
        asked = open_contrast(
            self.prompt, self.other, self.answer, self.wrong,
            saes=self.sae, model=self.model, sites=self.site, device=self.device,
        )  # fmt: skip
        assert asked.other_ids is not None
        unfinished = self.out.with_name(f"{self.out.name}.unfinished.safetensors")
        with Stages("places") as bars, StopSignals():
            try:
                tables = patch_features(
                    asked.target, asked.saes, asked.ids, asked.other_ids, asked.metric,
                    mask=asked.mask, batch_rows=self.batch_rows, unfinished=unfinished, resume=self.resume,
                    on_progress=bars.to,
                )  # fmt: skip
            except StopRequested as stop:
                message = f"stopped, and saved in {unfinished}; the same command with --resume goes on from there"
                raise RunStopped(stop.signal, message) from None
        rows = rows_of(tables, asked)
        write_text(self.out, as_csv(rows))
        strongest = sorted(rows, key=lambda row: -abs(row["effect"]))[:SHOWN]
        facts = {
            "model": asked.target.name,
            "prompt": self.prompt,
            "other": self.other,
            "answer": self.answer,
            "wrong": self.wrong,
            "logit_difference": float(metric_of(asked.target, asked.ids, asked.metric)),
            "total": float(next(iter(tables.values())).total),
            "places": {str(site): len(table.at) for site, table in tables.items()},
            "strongest": strongest,
            "table": str(self.out),
        }
        write_facts(facts, as_json=self.json, text=lambda: as_text(facts))
        return 0


def rows_of(tables: "Mapping[Site, PatchTable]", asked: "Contrast") -> list[dict[str, Any]]:
    """The table, Site by Site; `share` is of the whole difference between the two prompts."""
    tokens = asked.tokens(asked.ids[0])
    rows: list[dict[str, Any]] = []
    for site, table in tables.items():
        found = (table.at.position, table.at.feature, table.effect, table.effect / table.total)
        for position, feature, effect, share in zip(*(column.tolist() for column in found), strict=True):
            row = (str(site), position, tokens[position], feature, effect, share)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def as_csv(rows: list[dict[str, Any]]) -> str:
    """With a heading, and quotes where a token needs them."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_text(facts: dict[str, Any]) -> str:
    """The report for people."""
    places = ", ".join(f"{count:,} at {site}" for site, count in facts["places"].items())
    lines = [
        ("asked", f"logit of {facts['answer']!r} less that of {facts['wrong']!r}: {facts['logit_difference']:+.2f}"),
        ("other", f"{facts['total']:+.2f} more after the other prompt"),
        ("patched", f"features that differ, one place at a time: {places}"),
    ]
    rows = [
        (f"{row['site']} #{row['feature']} at {row['token']!r} ({row['position']})", _effect(row))
        for row in facts["strongest"]
    ]
    heading = "largest effects, in logits; parts overlap, and need not add up"
    return f"{columns(lines)}\n\n  {heading}\n{columns(rows)}\n\n  {facts['table']}"


def _effect(row: dict[str, Any]) -> str:
    return f"{row['effect']:+.3g}  ({row['share']:.0%})"
