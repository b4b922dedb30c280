"""MC dropout: the adapter's weights, with dropout left on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.posteriors.joint_distribution import check_num_samples


@dataclass(frozen=True, eq=False)
class DropoutPosterior:
    """One weight set, whose draws differ by what dropout drops. A Pyro guide.

    :func:`predict` leaves dropout on for it, and each of its draws and each datum has a
    mask of its own. They come from torch's generator as the batches go by: the seed
    decides them for given batches and ``chunk_size``, not for others.

    Gal & Ghahramani (2016), https://arxiv.org/abs/1506.02142.

    Attributes:
        weights: Site -> value.
        loras: The lifted networks in the model.
        obs_site: The likelihood's site, None for the only one.
    """

    weights: dict[str, Tensor]
    loras: tuple[LiftedNetwork, ...]
    obs_site: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the sites, at the weights whatever the model's arguments."""
        infer: dict[str, Any] = {
            site: {"lora": (lora,)} for lora in self.loras for site in lora.sites
        }
        return {
            site: pyro.sample(
                site, dist.Delta(x, event_dim=x.ndim), infer=infer.get(site, {})
            )
            for site, x in self.weights.items()
        }

    @property
    def prediction_method(self) -> Literal["sample"]:
        """How to predict: by running the network at draws."""
        return "sample"

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """The weights, site -> value with a leading (S,)."""
        check_num_samples(num_samples)
        return {s: x.expand(num_samples, *x.shape) for s, x in self.weights.items()}


def mc_dropout(
    lora: LiftedNetwork,
    weights: dict[str, Tensor] | None = None,
    *,
    obs_site: str | None = None,
) -> DropoutPosterior:
    """A posterior by dropout, of a network that was trained with it.

    Args:
        lora: The lifted network, with dropout somewhere (``LoraConfig.lora_dropout``).
        weights: A weight set with values of all of the model's latent sites, a mode;
            None is the adapter's present one.
        obs_site: The likelihood's site, None for the only one.

    Returns:
        A guide, for :func:`predict`.

    Raises:
        ValueError: If the network has no dropout, or a site is missing.
    """
    check_lora(lora)
    if not any(_drops(module) for module in lora.network.modules()):
        raise ValueError(
            "The network has no dropout, so MC dropout would predict from one weight "
            "set. Set LoraConfig.lora_dropout or the network's own dropout."
        )
    weights = lora.weights() if weights is None else weights
    missing = lora.sites.keys() - weights.keys()
    if missing:
        raise ValueError(f"Site {sorted(missing)[0]!r} is missing from the weights.")
    return DropoutPosterior(dict(weights), (lora,), obs_site)


def check_no_dropout(posterior: object, caller: str) -> None:
    """Refuse MC dropout where dropout would be off, and all of its draws the same.

    Args:
        posterior: Any guide.
        caller: Names of what was called with it.

    Raises:
        ValueError: If it is :func:`mc_dropout`'s.
    """
    if isinstance(posterior, DropoutPosterior):
        raise ValueError(
            f"Dropout is off in {caller}, so that all draws of mc_dropout are the "
            "same. Use predict, which leaves it on, or another posterior."
        )


def drop(lora: LiftedNetwork) -> None:
    """Turn dropout on; batch norms keep evaluating."""
    lora.network.train()
    for module in lora.network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _drops(module: nn.Module) -> bool:
    # Attention of transformers has the probability as a number.
    return (isinstance(module, _DropoutNd) and module.p > 0) or any(
        "dropout" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )
