"""`saekit train`: from a model and a text to an SAE folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .output import columns, read_and_written, write_facts
from .recipe import described, train_configs
from .speed import speed_line, train_with_progress
from .training_data import harvest_of, read_corpus, recorded, sites_of

if TYPE_CHECKING:
    from saekit.activations.corpus import Corpus
    from saekit.activations.harvest import Harvest
    from saekit.sae import SAE
    from saekit.targets import Target
    from saekit.training.config import TrainConfig
    from saekit.training.saved_run import RunFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """Train an SAE on a model's activations, evaluate it on held-out text, and save it.

    Without arguments: the bundled model, the source of Python's standard library, the middle layer. A
    run that was interrupted goes on with --resume and ends with the same weights as one that was not.

    Example:
      saekit train --k 32 --features 4096 --tokens 1000000
      saekit train --k 32 --features 4096 --tokens 1000000 --resume
      saekit train ./my-model ./notes.txt --site layers.3 --out my-sae
      saekit train gpt2 NeelNanda/pile-10k --site blocks.8.hook_resid_pre --rule mutual
      saekit train --site layers.2.mlp:in --site-out layers.2.mlp:out --skip
      saekit train --site layers.1 layers.2 layers.3 --crosscoder --out my-crosscoder
      saekit train ./my-model ./notes.txt --start my-sae --rule jumprelu --learning-rate 3e-4 --out tuned
    """

    model: Annotated[str, tyro.conf.Positional] = "pystd"
    """The bundled model, a local folder, or a name on the Hub."""
    text: Annotated[str, tyro.conf.Positional] = "stdlib"
    """The standard library's source, a file or folder, JSONL, token ids in a .npy file, or a data set on the Hub."""
    site: tuple[str, ...] = ()
    """Where to read; several give one SAE each from one forward pass. The middle layer if not given."""
    site_out: tuple[str, ...] = ()
    """What to reconstruct, if not the input: one for each --site. Trains transcoders."""
    crosscoder: bool = False
    """Train one dictionary over all Sites of --site, with one code for each token, instead of an SAE each."""
    skip: bool = False
    """Give transcoders a linear connection past their features."""
    rule: Literal["topk", "feature", "mutual", "relu", "gated", "jumprelu"] = "topk"
    """Who chooses: each token its features, each feature its tokens, or both at once; or, with no budget, a
    penalty on activity: L1 on ReLU activations, on gates, or a count of what passes trained thresholds."""
    k: int = 32
    """Mean number of active features per token."""
    exponent: float = 0.0
    """For --rule feature: budgets fall as rank to the minus this; 0 makes them equal."""
    offset: float = 0.0
    """For --exponent: added to the rank, which flattens the head of the curve."""
    then_feature: float | None = None
    """Share of the run after which --rule mutual or topk goes on as feature choice, on the curve it has led to."""
    no_relu: bool = False
    """Negative activations count with what they are instead of as zero; for rules with a budget."""
    matryoshka: bool = False
    """Every prefix of the dictionary has to reconstruct by itself; for rules with a budget."""
    features: int | None = None
    """Width of the dictionary; 4,096 if not given, or that of --start."""
    start: tuple[str, ...] = ()
    """SAEs to go on from instead of new weights, one for each --site; MODEL and TEXT are not taken from
    them, and a lower --learning-rate may be wise. With --rule jumprelu the thresholds of the SAE are fine-tuned; one
    that has none (top-k) begins with the cut that leaves --k features active on average."""
    tokens: int = 1_000_000
    """Length of training; a shorter text is read more than once."""
    batch_tokens: int = 1024
    """Tokens per step."""
    learning_rate: float | None = None
    """Peak learning rate; derived from the width and, but for --rule feature, from --batch-tokens if not given."""
    auxiliary: Literal["zipf", "k", "none"] = "zipf"
    """Which unused features are asked to explain what is left over: under-used and dead, dead, or none."""
    auxiliary_claim: Literal["token", "feature"] = "token"
    """Of --auxiliary zipf: who chooses. Each token half of d_model of the unused features, or each unused feature a
    few tokens, which is faster, and better for wide dictionaries and few active features."""
    bf16_auxiliary: bool = False
    """Compute the auxiliary loss from numbers rounded to bfloat16: faster on CPUs with instructions for it."""
    auxiliary_sample: float = 1.0
    """Share of each batch that the auxiliary loss is measured on; less is faster."""
    equal_norms: bool = False
    """Scale every centred token to one norm before encoding."""
    bf16_screening: bool = False
    """Find candidates in bfloat16 and select by their exact scores: faster on CPUs with instructions for it."""
    prefetch: bool = False
    """Run the model for the next buffer while training empties this one: for a GPU, or cores to spare."""
    context: int | None = None
    """Tokens per row; the model's own context, at most 256, if not given."""
    row_bos: Literal["yes", "no"] = "yes"
    """Whether every row of tokens opens with BOS; "no" cuts the text as it flows."""
    held_out_rows: int = 160
    """Rows at the end of the text that training does not see; of stdlib, whole modules are held out instead."""
    max_documents: int | None = None
    """Read no more documents than this; a data set on the Hub may have no end."""
    seed: int = 0
    """Decides weights and order of the data; the same seed gives the same SAE on a CPU."""
    device: str = "cpu"
    out: Path = Path("sae")
    """Folder to write; with several Sites, the folder that holds a folder for each."""
    resume: bool = False
    """Go on from where an earlier run with the same settings stopped."""
    save_every: int | None = None
    """Steps between saved states of the unfinished run, kept beside --out; about every five minutes if not given."""
    dry_run: bool = False
    """Only say what the run would take."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.targets import Target

        from .crosscoder import run_joint
        from .estimate import estimate
        from .opened import load_of_one_site

        run_file = None if self.dry_run else run_file_of(self)
        target = Target.load(self.model, device=self.device)
        if self.crosscoder:
            return run_joint(self, target, run_file)
        starts = [load_of_one_site(path) for path in self.start]
        configs = train_configs(self, target, starts)
        corpus = read_corpus(self, target)
        source = harvest_of(self, target, corpus, sites_of(configs))
        if run_file is None:
            facts = estimate(configs, source, self.device, starts=starts)
            write_facts(facts, as_json=self.json, text=lambda: columns((k, str(v)) for k, v in facts.items()))
            return 0
        facts = train_and_evaluate(self, target, corpus, configs, source, starts=starts, run_file=run_file)
        write_facts({"saes": facts} if len(facts) > 1 else facts[0], as_json=self.json, text=lambda: as_text(facts))
        return 0


def run_file_of(command: Train) -> "RunFile":
    """Where the run is saved while it is unfinished, once it is clear that it may begin."""
    from saekit.errors import SaekitError
    from saekit.training.saved_run import RunFile
    from saekit.training.state_file import check_unfinished

    if command.save_every is not None and command.save_every < 1:
        raise SaekitError(f"save_every={command.save_every}: give at least 1 step, or leave it out")
    # beside the folder, which is there when it is whole or not at all
    out = command.out if command.out.name not in ("", "..") else command.out.resolve()
    path = check_unfinished(out.with_name(f"{out.name}.unfinished.safetensors"), resume=command.resume)
    return RunFile(path=path, resume=command.resume, every=command.save_every)


def train_and_evaluate(
    command: Train,
    target: "Target",
    corpus: "Corpus",
    configs: Sequence["TrainConfig"],
    source: "Harvest",
    *,
    starts: Sequence["SAE"] = (),
    run_file: "RunFile | None" = None,
) -> list[dict[str, Any]]:
    """Train, save, evaluate on the held-out rows; one dict of facts per SAE."""
    from saekit.checkpoint import check_writable
    from saekit.sae_config import with_metadata

    folders = [command.out if len(configs) == 1 else command.out / folder_of(c) for c in configs]
    for folder in folders:
        check_writable(folder)
    saes, speed = train_with_progress(
        configs,
        source,
        model_name=command.model,
        context_size=corpus.train.context,
        start=starts or None,
        device=command.device,
        run_file=run_file,
    )
    for sae, folder in zip(saes, folders, strict=True):
        sae.cfg = with_metadata(sae.cfg, **recorded(command, corpus, source))
        sae.save(folder)
    if run_file is not None:
        run_file.path.unlink(missing_ok=True)
    return [
        evaluate_saved(sae, target, corpus, config, source, folder) | speed
        for sae, config, folder in zip(saes, configs, folders, strict=True)
    ]


def evaluate_saved(
    sae: "SAE", target: "Target", corpus: "Corpus", config: "TrainConfig", source: "Harvest", folder: Path
) -> dict[str, Any]:
    """The facts of an SAE that is safe in its folder, where its metrics are added."""
    from saekit.errors import SaekitError
    from saekit.sae_config import with_metadata

    from .evaluate import evaluate_with_progress, with_missing

    try:
        metrics = evaluate_with_progress(sae, target, corpus.held_out, config.site, source.mask).metrics()
    except SaekitError as error:
        raise SaekitError(f"the SAE is saved in {folder}, but cannot be evaluated: {error}") from error
    sae.cfg = with_metadata(sae.cfg, evaluation=metrics)
    sae.save(folder)
    return {
        "sae": str(folder),
        "site": read_and_written(config.site, config.site_out),
        "rule": described(config),
        **with_missing(metrics),
    }


def folder_of(config: "TrainConfig") -> str:
    """Its Sites' text as the name of a folder."""
    sites = str(config.site) if config.site_out is None else f"{config.site}-{config.site_out}"
    return sites.replace(":", "_").replace("@", "_").replace("*", "every")


def as_text(facts: Sequence[dict[str, Any]]) -> str:
    """The facts for people, one block per SAE."""
    from .evaluate import metric_lines

    return "\n\n".join(
        "\n".join([f"{fact['sae']}  ({fact['rule']} at {fact['site']})", metric_lines(fact), speed_line(fact)])
        for fact in facts
    )
