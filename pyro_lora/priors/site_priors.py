"""Different priors on different sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from pyro_lora.ground.settings import check_function, check_name
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network, Prior
from pyro_lora.lifting.sites import lora_factor


@dataclass(frozen=True, repr=False)
class by_site(FieldsShown):
    """A prior for each group of sites, by patterns of their names.

    For a wider prior on a new head than on the adapter, say. The first pattern that
    matches a site decides. Patterns are those of ``fnmatch``, case-sensitive: ``*``
    matches anything, dots too. Each prior sees a part of the lifted network: its own
    sites, and their values.

    Args:
        priors: Pattern -> prior, in order.

    Raises:
        TypeError: If it isn't a mapping to priors.
        ValueError: If there is no pattern, or (when called) a site matches none, or a
            pattern other than ``*`` decides for no site.

    >>> from pyro_lora.priors import normal
    >>> prior = by_site({"head.*": normal(10.0), "*.B": normal(0.1), "*": normal(1.0)})
    """

    priors: Mapping[str, Prior]

    def __post_init__(self) -> None:
        if not isinstance(self.priors, Mapping):
            raise TypeError(
                "by_site takes a mapping, {pattern: prior}, '*' for all, found "
                f"{self.priors!r}."
            )
        for pattern, choice in self.priors.items():
            check_name("by_site: a pattern", pattern)
            check_function(f"by_site: {pattern!r}", choice, "a prior")
        if not self.priors:
            raise ValueError(
                "by_site got no patterns. Give {pattern: prior}, '*' for all."
            )
        # A copy, which nobody changes; the dataclass is frozen for us, too.
        object.__setattr__(self, "priors", dict(self.priors))

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site.

        Raises:
            ValueError: If a site matches no pattern, or a pattern no site.
        """
        groups: dict[str, list[str]] = {pattern: [] for pattern in self.priors}
        unmatched = []
        for site in lora.sites:
            for pattern in self.priors:
                if fnmatchcase(site, pattern):
                    groups[pattern].append(site)
                    break
            else:
                unmatched.append(site)
        if unmatched:
            raise ValueError(
                f"Sites {unmatched} match none of the patterns {list(self.priors)}: "
                "every site needs a prior. Add a pattern for them, or '*' last, for "
                "the rest."
            )
        unused = [p for p, sites in groups.items() if not sites and p != "*"]
        if unused:
            raise ValueError(
                f"Patterns {unused} decide for none of the sites {list(lora.sites)}. "
                "Correct or remove them, and put the narrower pattern first."
            )
        weights: dict[str, Tensor] = {}
        for pattern, sites in groups.items():
            if sites:
                part = PartialNetwork(lora, tuple(sites))
                weights |= self.priors[pattern](part)
        return weights


@dataclass(frozen=True, eq=False)
class PartialNetwork:
    """Some sites of a lifted network, as a prior sees them.

    Attributes:
        whole: The lifted network.
        names: The sites, in the network's order.
    """

    whole: Network
    names: tuple[str, ...]

    @property
    def network(self) -> nn.Module:
        """The whole network under the sites."""
        return self.whole.network

    @property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Site name -> parameter names, in layer order."""
        return {name: self.whole.sites[name] for name in self.names}

    @property
    def initial_weights(self) -> dict[str, Tensor]:
        """Site name -> the values at the time of lifting."""
        return {name: self.whole.initial_weights[name] for name in self.names}

    def weights(self) -> dict[str, Tensor]:
        """The present values, stacked as sites."""
        weights = self.whole.weights()
        return {name: weights[name] for name in self.names}

    def zeros(self) -> dict[str, Tensor]:
        """Zeros of every site's shape, dtype and device."""
        zeros = self.whole.zeros()
        return {name: zeros[name] for name in self.names}

    def num_experts(self, path: str) -> int | None:
        """How many experts' matrices a layer stacks."""
        return self.whole.num_experts(path)

    def delta_weight_factors(
        self, weights: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors of the layers all of whose LoRA matrices are among these sites."""
        # The whole network asks for all sites; what is made of zeros isn't given back.
        factors = self.whole.delta_weight_factors({**self.whole.zeros(), **weights})
        elsewhere = {
            factor[0]
            for site, parameters in self.whole.sites.items()
            if site not in self.names
            for factor in map(lora_factor, parameters)
            if factor is not None
        }
        return {path: pair for path, pair in factors.items() if path not in elsewhere}
