"""How the bundled language model is made: a small Llama on the source of Python's standard library.

The result is a plain Hugging Face folder (config, safetensors, tokenizer.json). Hidden matrices are
trained by Muon, which gets a small model further per token than Adam; embeddings and norms by AdamW.
The learning rate warms up, stays, and falls linearly to zero over the last part of the run, so a run
that has not begun to fall can be resumed with another length and is the same as if started with it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from saekit.activations.text import Document, split_documents, stdlib_documents
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.errors import DataError, FileError, SaekitError
from saekit.training.state_file import (
    check_unfinished,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    write_state,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|endoftext|>"
STATE_FILE = "pretrain_state.safetensors"
SMALLEST_VOCABULARY = 257


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """What decides the weights of the language model."""

    vocabulary: int = 4096
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_mlp: int = 608
    context: int = 512
    tokens: int = 24_000_000
    batch_tokens: int = 8192
    hidden_lr: float = 8e-3
    """Muon's learning rate, in Adam's units (updates scaled to Adam's usual size)."""
    other_lr: float = 4e-3
    warmup_tokens: int = 520_000
    """Over which the learning rate rises; not a share of the run, so that its length can be changed later."""
    decay: float = 0.4
    """Share of the run over which the learning rate falls to zero."""
    weight_decay: float = 0.05
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_tokens < self.context:
            raise SaekitError(
                f"a batch of {self.batch_tokens:,} tokens is less than one row of {self.context:,}; "
                "raise batch_tokens, or lower context"
            )
        if self.vocabulary < SMALLEST_VOCABULARY:
            raise SaekitError(
                f"vocabulary={self.vocabulary:,} cannot hold every byte and BOS; give at least {SMALLEST_VOCABULARY}"
            )
        if self.tokens < self.batch_tokens:
            raise SaekitError(
                f"tokens={self.tokens:,} is less than one batch of {self.batch_tokens:,}; "
                "raise tokens, or lower batch_tokens"
            )

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def lr_factor(self, step: int) -> float:
        """Share of the full learning rate at this step: trapezoid."""
        rise = (step + 1) / max(1, round(self.warmup_tokens / self.batch_tokens))
        fall = (self.steps - step) / max(1, round(self.decay * self.steps))
        return min(1.0, rise, fall)


def train_tokenizer(documents: Sequence[Document], vocabulary: int, context: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE; no text is unknown to it, and it puts BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=context
    )


def build_model(config: PretrainConfig, bos: int) -> "LlamaForCausalLM":
    """A Llama of the configured size with seeded random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=bos,
            pad_token_id=bos,
            dtype="float32",
        )
    )


def next_token_loss(model: nn.Module, ids: Tensor, *, autocast: bool = False) -> Tensor:
    """Mean nats per predicted token of `ids` `(rows, context)`."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_nats(model: nn.Module, rows: TokenRows, *, max_rows: int | None = None, batch_rows: int = 16) -> float:
    """Mean nats per token over rows that training never saw, in full precision."""
    ids = rows.ids[:max_rows]
    total = sum(next_token_loss(model, part).item() * len(part) for part in ids.split(batch_rows))
    return total / len(ids)


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    compile_model: bool = False,
    save_every: int = 200,
    on_report: Callable[[dict], None] = lambda report: None,
) -> "LlamaForCausalLM":
    """Train the tokenizer and the model, and leave a Hugging Face folder in `out`.

    Args:
        resume: go on from the state that an earlier run left in `out`.
        compile_model: use `torch.compile` (needs a C++ compiler); results differ in the last bits.
        on_report: called after every step with step, tokens, loss, and now and then held_out.

    Raises:
        FileError: `resume` without a state, a state without `resume`, or one whose settings differ by more than tokens.
        DataError: less text than one batch.
        SaekitError: a torch without the optimiser that trains the matrices.
    """
    _check_torch()
    state_path = check_unfinished(out / STATE_FILE, resume=resume)
    train_documents, test_documents = split_documents(stdlib_documents(tests=True), held_out=config.held_out)
    tokenizer = train_tokenizer(train_documents, config.vocabulary, config.context)
    rows = tokenize_documents(train_documents, tokenizer, context=config.context)
    held_out = tokenize_documents(test_documents, tokenizer, context=config.context)
    assert rows.bos is not None
    model = build_model(config, rows.bos)
    optimizers = _optimizers(model, config)
    start = _resume(state_path, config, model, optimizers) if resume else 0
    loss_of = torch.compile(next_token_loss) if compile_model else next_token_loss
    batch_rows = _rows_per_batch(config, rows)
    for step in range(start, config.steps):
        began = time.perf_counter()
        loss = loss_of(model, rows.ids[_batch_rows(step, batch_rows, len(rows), config.seed)], autocast=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, full_lr in zip(optimizers, (config.hidden_lr, config.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = full_lr * config.lr_factor(step)
            optimizer.step()
            optimizer.zero_grad()
        report = {
            "step": step + 1,
            "tokens": (step + 1) * config.batch_tokens,
            "loss": loss.item(),
            "tokens_per_second": config.batch_tokens / (time.perf_counter() - began),
        }
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            report["held_out"] = held_out_nats(model, held_out, max_rows=64)
            _save_state(state_path, step + 1, config, model, optimizers)
        on_report(report)

    export_model(model, tokenizer, config, out)
    state_path.unlink(missing_ok=True)
    return model


def export_model(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", config: PretrainConfig, out: Path
) -> None:
    """Write the Hugging Face folder; weights as float16 on disk, which halves them and reads back as float32."""
    model.half().save_pretrained(out)
    model.float()
    settings = json.loads((out / "config.json").read_text())
    settings["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    (out / "pretrain.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def _check_torch() -> None:
    if not hasattr(torch.optim, "Muon"):
        raise SaekitError(
            f"pretraining needs torch.optim.Muon, and torch {torch.__version__} has none; install 2.9 or newer"
        )


def _rows_per_batch(config: PretrainConfig, rows: TokenRows) -> int:
    batch_rows = config.batch_tokens // config.context
    if len(rows) < batch_rows:
        raise DataError(
            f"the text fills {len(rows):,} rows of {config.context} tokens, but a batch takes {batch_rows:,}; "
            "lower batch_tokens, or give more text"
        )
    return batch_rows


def _optimizers(model: nn.Module, config: PretrainConfig) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    other = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(hidden, lr=config.hidden_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def _batch_rows(step: int, batch_rows: int, n_rows: int, seed: int) -> Tensor:
    """Which rows a step reads: every epoch is its own permutation, so the step alone decides."""
    per_epoch = n_rows // batch_rows
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch_rows : (place + 1) * batch_rows]


def _save_state(
    path: Path, step: int, config: PretrainConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for which, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer.{which}")
    write_state(path, tensors, {"step": str(step), "config": json.dumps(asdict(config))})


def _resume(path: Path, config: PretrainConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    try:
        return _restore(path, config, model, optimizers)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise FileError(
            f"{path} does not fit this config, or is damaged; resume with the sizes it was started with, or start anew"
        ) from error


def _restore(path: Path, config: PretrainConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    tensors, metadata = read_state(path)
    saved = json.loads(metadata["config"])
    for name, value in asdict(config).items():
        if name != "tokens" and saved[name] != value:  # a run may be made longer or shorter
            raise FileError(
                f"{path} was saved by a run with {name} = {saved[name]}, and this one has {value}; "
                "resume with the settings it was started with, or start anew"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for which, optimizer in enumerate(optimizers):
        restore_optimizer(optimizer, f"optimizer.{which}", tensors)
    return int(metadata["step"])
