"""The demo's model and how it is trained: plain Pyro, the same for every method."""

from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

import pyro_lora as pl

PRIOR_PRECISION = 0.1
LEARNING_RATE = 4e-3
NUM_WARMUP_STEPS = 20

Batch = dict[str, Tensor]


class Batches(Sized, Iterable[Batch], Protocol):
    """Batches of the model's keyword arguments, to iterate as often as needed."""


def classifier(lora: pl.LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    """A Pyro model of the labels of ``num_data`` texts given the lifted network.

    Args:
        lora: The lifted network; its logits are (..., B, C).
        num_data: Rows in the whole training set, which a batch stands for.

    Returns:
        The model, with the batch as its keyword arguments.
    """

    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", num_data, subsample=input_ids):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def fit_map(
    model: Callable[..., Tensor],
    lora: pl.LiftedNetwork,
    batches: Batches,
    *,
    epochs: int,
    seed: int,
    title: str,
) -> pl.AutoLaplace:
    """The mode of the log joint, by Pyro's own SVI, from a fresh adapter and head.

    Args:
        model: The Pyro model.
        lora: The model's lifted network.
        batches: Batches of the training rows.
        epochs: Passes over the batches.
        seed: Seed of the initial weights.
        title: What the progress bar is called.

    Returns:
        A guide at the mode, ready for its Laplace approximation.
    """
    pyro.set_rng_seed(seed)
    optim = decaying_adam(epochs * len(batches))
    # A store of its own: guides of one class share their parameters' names, and the
    # second one would silently go on from the first one's values.
    with pyro.get_param_store().scope():
        guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_fresh())
        svi = SVI(model, guide, optim, Trace_ELBO())
        train(svi.step, optim, batches, epochs=epochs, title=title)
    return guide


def fit_particles(
    model: Callable[..., Tensor],
    lora: pl.LiftedNetwork,
    batches: Batches,
    kernel: pl.kernels.Kernel | pl.kernels.NoRepulsion,
    *,
    repulsion: float | None,
    num_particles: int,
    epochs: int,
    seed: int,
    title: str,
) -> pl.SVGD:
    """Particles moved by SVGD from fresh adapters and heads.

    ``SVGD.run`` would do, but for the learning rate, which here falls with each step.

    Args:
        model: The Pyro model.
        lora: The model's lifted network.
        batches: Batches of the training rows.
        kernel: One of ``pl.kernels``; ``NoRepulsion()`` makes a deep ensemble.
        repulsion: Its strength in function space; None is the library's default.
        num_particles: How many.
        epochs: Passes over the batches.
        seed: Seed of the initial weights: equal seeds start at equal particles.
        title: What the progress bar is called.

    Returns:
        The engine, whose ``posterior()`` is a guide.
    """
    pyro.set_rng_seed(seed)
    optim = decaying_adam(epochs * len(batches))
    svgd = pl.SVGD(
        model,
        kernel,
        optim,
        num_particles,
        repulsion=repulsion,
        init_loc_fn=lora.init_to_fresh(),
    )
    train(svgd.step, optim, batches, epochs=epochs, title=title)
    return svgd


def decaying_adam(num_steps: int) -> pyro.optim.PyroLRScheduler:
    """Adam whose learning rate warms up, then falls linearly to zero.

    Args:
        num_steps: Steps in the whole run.

    Returns:
        A pyro optimiser; its ``step()`` is called once a batch.
    """

    def factor(step: int) -> float:
        return min((step + 1) / NUM_WARMUP_STEPS, 1.0) * (1 - step / num_steps)

    return pyro.optim.LambdaLR(  # type: ignore[attr-defined]  # made at import
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE},
            "lr_lambda": factor,
        }
    )


def train(
    step: Callable[..., Any],
    optim: pyro.optim.PyroLRScheduler,
    batches: Batches,
    *,
    epochs: int,
    title: str,
) -> None:
    """Step through the batches ``epochs`` times, the learning rate after each step.

    Args:
        step: One step of SVI or SVGD on a batch; returns the loss.
        optim: The optimiser that ``step`` uses.
        batches: Batches of the training rows.
        epochs: Passes over the batches.
        title: What the progress bar is called.
    """
    total, first = epochs * len(batches), None
    with tqdm(total=total, desc=title, unit="step", disable=None) as bar:
        for _ in range(epochs):
            for batch in batches:
                loss = float(step(**batch))
                optim.step()
                # The loss itself is mostly the prior's constant.
                first = loss if first is None else first
                bar.set_postfix(change=f"{loss - first:+.0f} nats", refresh=False)
                bar.update()
