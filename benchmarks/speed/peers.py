"""One training step of other libraries, each as its own trainer takes it. Runs in their environment, without saekit."""
# the peers live in an environment of their own
# pyright: reportMissingImports=false

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.case import Size, dead_features

Step = Callable[[Tensor], None]
NAMES = ("sparsify", "dictionary_learning_topk", "dictionary_learning_batchtopk", "saelens_topk", "saelens_batchtopk")


def contenders() -> list[str]:
    return [*NAMES, *(f"{name}+aux" for name in NAMES)]


def build(name: str, size: Size, sample: Tensor) -> Step:
    """A function that takes one training step on a batch; `+aux` with the dead features that ours have."""
    peer, _, auxiliary = name.partition("+")
    dead = dead_features(size).to(sample.device) if auxiliary else None
    if peer == "sparsify":
        return _sparsify(size, sample, dead)
    if peer.startswith("dictionary_learning"):
        return _dictionary_learning(size, sample, dead, batch="batch" in peer)
    return _saelens(size, sample, dead, batch="batch" in peer)


def _sparsify(size: Size, sample: Tensor, dead: Tensor | None) -> Step:
    """What `Trainer.fit` does around its coder, with Adam as it sets it up."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(size.d_model, SparseCoderConfig(num_latents=size.n_features, k=size.k), device=sample.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4)

    def step(batch: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(batch, dead_mask=dead)
        (out.fvu + (1 / 32) * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dictionary_learning(size: Size, sample: Tensor, dead: Tensor | None, *, batch: bool) -> Step:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = (BatchTopKTrainer if batch else TopKTrainer)(
        steps=100_000,
        activation_dim=size.d_model,
        dict_size=size.n_features,
        k=size.k,
        layer=0,
        lm_name="none",
        seed=0,
        device=str(sample.device),
        auxk_alpha=1 / 32 if dead is not None else 0,
    )
    steps = 0

    def step(batch: Tensor) -> None:
        nonlocal steps
        steps += 1  # not from 0, at which it first computes a median
        if dead is not None:
            trainer.num_tokens_since_fired[dead] = 1 << 40
        trainer.update(steps, batch)

    return step


def _saelens(size: Size, sample: Tensor, dead: Tensor | None, *, batch: bool) -> Step:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shared = {
        "d_in": size.d_model,
        "d_sae": size.n_features,
        "device": str(sample.device),
        # the mode with sparse activations fails in its first backward pass on a CPU
        "use_sparse_activations": sample.device.type != "cpu",
    }
    if batch:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=float(size.k), **shared))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=size.k, **shared))
    config = SAETrainerConfig(
        total_training_samples=size.n_tokens * 100_000,
        train_batch_size_samples=size.n_tokens,
        lr_end=3e-5,  # its runner derives it
        device=str(sample.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(batch: Tensor) -> None:
        # forward passes without firing, of which more than a thousand are death
        trainer.n_forward_passes_since_fired.zero_()
        if dead is not None:
            trainer.n_forward_passes_since_fired[dead] = 1e6
        trainer._train_step(sae=trainer.sae, sae_in=batch)

    return step
