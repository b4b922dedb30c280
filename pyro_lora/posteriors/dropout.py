"""MC dropout: the adapter's weights, with dropout left on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pyro_lora.curvature.joint_distribution import sample_deltas
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.summary import Summarised, brief, weights_facts
from pyro_lora.ground.weights import handing_out_copies
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.prior import networks_prior
from pyro_lora.priors import Prior


@handing_out_copies("weights")
@dataclass(frozen=True, eq=False, repr=False)
class DropoutPosterior(Summarised):
    """One weight set, whose draws differ by what dropout drops. A Pyro guide.

    :func:`predict` leaves dropout on for it, and each of its draws and each datum has a
    mask of its own. They come from torch's generator as the batches go by: the seed
    decides them for given batches and ``chunk_size``, not for others.

    Gal & Ghahramani (2016), https://arxiv.org/abs/1506.02142.

    Attributes:
        weights: Site -> value.
        networks: The lifted networks in the model.
        model: The Pyro model; None where it isn't known.
        obs_site: The likelihood's site, None for the only one.
    """

    weights: dict[str, Tensor]
    networks: tuple[LiftedNetwork, ...]
    model: Model | None = None
    obs_site: str | None = None

    num_samples: ClassVar[int | None] = None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the sites, at the weights whatever the model's arguments."""
        return sample_deltas(self.weights, self.weights, self.networks)

    def _facts(self) -> dict[str, str]:
        return {
            **weights_facts(self.weights),
            "obs_site": brief(self.obs_site),
            "model": brief(self.model),
        }

    @property
    def prior(self) -> Prior:
        """The prior of the networks."""
        return networks_prior(self.networks)

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """The weights, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        return {
            site: x.expand(num_samples, *x.shape).clone()
            for site, x in self.weights.items()
        }

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError("MC dropout has no density of the weights.")

    def gaussians(self) -> list[tuple[float, Any]]:
        """None."""
        return []


def mc_dropout(
    lora: LiftedNetwork,
    weights: dict[str, Tensor] | None = None,
    *,
    model: Model | None = None,
    obs_site: str | None = None,
) -> DropoutPosterior:
    """A posterior by dropout, of a network that was trained with it.

    Args:
        lora: The lifted network, with dropout somewhere (``LoraConfig.lora_dropout``).
        weights: A weight set with values of all of the model's latent sites, a mode;
            None is the adapter's present one.
        model: The Pyro model, where something needs it.
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
    return DropoutPosterior(dict(weights), (lora,), model, obs_site)


def has_dropout(posterior: object) -> bool:
    """Whether the network is to be run with dropout on."""
    return isinstance(posterior, DropoutPosterior)


def check_no_dropout(posterior: object, caller: str) -> None:
    """Refuse MC dropout where dropout would be off, and all of its draws the same.

    Args:
        posterior: Any posterior.
        caller: Names of what was called with it.

    Raises:
        ValueError: If it is :func:`mc_dropout`'s.
    """
    if has_dropout(posterior):
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
