r"""IVON: an optimiser whose estimate of the curvature is a Gaussian's.

:math:`q(w) = N(m, \sigma^2)` with :math:`\sigma^{-2} = N h + \tau`, where h is the
diagonal of the Hessian of the mean loss :math:`\ell` and :math:`N(0, 1 / \tau)` the
prior. With a gradient g at a draw :math:`w = m + \sigma \epsilon`, Stein's identity
:math:`E[g (w - m) / \sigma^2] = E[\ell''(w)]` gives an estimate of h without second
derivatives (Shen et al. 2024, algorithm 1, https://arxiv.org/abs/2402.17641; there N is
:math:`\lambda`, and :math:`\tau = \lambda \delta`). A step is one gradient, as Adam's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from pyro_lora.ground.interrupts import undone
from pyro_lora.ground.settings import check_count, check_number, check_positive
from pyro_lora.ground.summary import brief
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior
from pyro_lora.posteriors.prior import log_prior_by_site

_SAME = 1e-5  # relative difference of two log densities


class IVON(torch.optim.Optimizer):
    r"""Improved variational online Newton, for any training loop of the network's own.

    Gradients are taken at a draw of the weights, so a backward pass belongs into a
    block of :meth:`sampled`, after which the weights are their mean again::

        optimizer = pl.methods.IVON(peft_model.parameters(), lr=0.1, num_data=500)
        for batch in loader:
            optimizer.zero_grad()
            with optimizer.sampled():
                peft_model(**batch).loss.backward()  # the mean loss of the batch
            optimizer.step()
        posterior = optimizer.posterior(lora, model=model)

    or a closure does all of that, ``optimizer.step(closure)``. Several blocks before a
    step add up, as gradients do: divide each loss by their number. With
    ``transformers.Trainer``, put the block around ``training_step``. A ``GradScaler``
    goes into the block, ``optimizer.sampled(scaler)``.

    Args:
        params: Parameters, or groups of them. Frozen ones stay as they are.
        lr: Learning rate, of about the size that SGD takes: of the first step, in the
            direction of the gradient, as in the paper.
        num_data: N, data that the mean loss is a mean over.
        prior_precision: :math:`\tau` of the prior N(0, 1 / tau), nats, full data: that
            of ``priors.normal(scale)`` is 1 / scale ** 2. The loss must not have it.
        betas: Of the averages of gradients and curvature, each in [0, 1). The second
            forgets after 1 / (1 - beta) steps: for fewer of them, take a smaller one.
        init_hessian: h at first, of the mean loss. Too small a value starts from
            draws that are far away.
        clip_radius: No weight moves further than ``lr * clip_radius`` in a step, as
            under Adam none moves much further than its rate; None: as far as the
            gradient says. Where an estimate of the curvature is far too small, that is
            a step from which no later one returns. The estimate itself stays as it is.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If a number is out of its range.
    """

    # In a block of `sampled`, what the gradients are after it; None outside.
    _gradients: dict[nn.Parameter, Tensor | None] | None = None
    _has_untold = False  # whether a block since the last step wasn't told of a scaler
    # It then says that it is there, by grad_scale and found_inf, and leaves the rest.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        init_hessian: float = 1.0,
        clip_radius: float | None = None,
    ) -> None:
        check_positive("lr", lr)
        check_count("num_data", num_data)
        check_positive("prior_precision", prior_precision)
        check_positive("init_hessian", init_hessian)
        if clip_radius is not None:
            check_positive("clip_radius", clip_radius)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, found {betas!r}.")
        for beta in betas:
            check_number("Each of betas", beta, 0, 1)
            if beta == 1:
                raise ValueError("Each of betas must be less than 1, found 1.")
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "prior_precision": prior_precision,
            "betas": tuple(betas),
            "init_hessian": init_hessian,
            "clip_radius": clip_radius,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state that was saved without it
            group.setdefault("clip_radius", None)

    @contextmanager
    def sampled(self, scaler: GradScaler | None = None) -> Iterator[None]:
        """A block in which the parameters are a draw; a backward pass belongs there.

        Args:
            scaler: What the loss is scaled by, of which the curvature mustn't know.

        Yields:
            Nothing.

        Raises:
            RuntimeError: Inside of another such block.
        """
        if self._gradients is not None:
            raise RuntimeError("The weights are a draw already. Leave that block.")
        means: dict[nn.Parameter, Tensor] = {}
        gradients: dict[nn.Parameter, Tensor | None] = {}  # as they are afterwards

        @torch.no_grad()
        def put_back() -> None:
            for p, mean in means.items():
                p.copy_(mean)
                p.grad = gradients[p]
            self._gradients = None

        with undone(put_back):
            self._gradients = gradients
            self._has_untold |= scaler is None
            loss_scale = 1.0 if scaler is None else scaler.get_scale()
            noises: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
            with torch.no_grad():
                for p, group in self._parameters():
                    sd = self._sd(p, group)
                    noises[p] = torch.randn_like(p) * sd, sd
                    # Those of earlier blocks stay, and have noise of their own.
                    gradients[p], p.grad = p.grad, None
                    means[p] = p.clone()
                    p.add_(noises[p][0])
            yield
            with torch.no_grad():
                for p, (noise, sd) in noises.items():
                    if p.grad is None:
                        continue
                    # g (w - m) / sigma^2, whose mean is the Hessian's diagonal
                    estimate = p.grad * noise / (sd.square() * loss_scale)
                    state, earlier = self.state[p], gradients[p]
                    state["estimate"] = state.get("estimate", 0) + estimate
                    gradients[p] = p.grad if earlier is None else earlier + p.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, in a block of :meth:`sampled` those before it, too.

        Args:
            set_to_none: As in every optimiser.
        """
        super().zero_grad(set_to_none)
        self._has_untold &= self._gradients is not None  # the block that it is in stays
        for p, _ in self._parameters():
            self.state[p].pop("estimate", None)
            if self._gradients is not None:
                self._gradients[p] = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the mean, and the curvature.

        Args:
            closure: Zeroes the gradients, computes the loss, and its gradient.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: If a gradient wasn't taken in a block of :meth:`sampled`, or
                a step in one, or a ``GradScaler`` was in none.
        """
        loss = None
        if self._gradients is not None:
            raise RuntimeError("step is taken after the block of sampled, not in it.")
        found_inf = getattr(self, "found_inf", None)  # by a GradScaler's step
        if found_inf is not None:
            if self._has_untold:
                raise RuntimeError(
                    "The loss is scaled by a GradScaler, and so would be the "
                    "curvature: take the gradient in `with optimizer.sampled(scaler):`."
                )
            if bool(found_inf):
                for p, _ in self._parameters():
                    self.state[p].pop("estimate", None)
                return loss
            if (scale := getattr(self, "grad_scale", None)) is not None:
                for p, _ in self._parameters():
                    if p.grad is not None:
                        p.grad.div_(scale.to(p.grad.device))
        if closure is not None:
            with self.sampled(), torch.enable_grad():
                loss = closure()
        for p, group in self._parameters():
            if p.grad is None:
                continue
            state = self.state[p]
            estimate = state.pop("estimate", None)
            if estimate is None:
                raise RuntimeError(
                    "IVON takes gradients at a draw of the weights. Put the backward "
                    "pass into `with optimizer.sampled():`."
                )
            state.setdefault("step", 0)
            state.setdefault("momentum", torch.zeros_like(p))
            beta1, beta2 = group["betas"]
            h = self._hessian(p, group)
            delta = group["prior_precision"] / group["num_data"]
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 1 - beta1)
            # The last term keeps h + delta positive, a step along its own geometry.
            change = (1 - beta2) * (estimate - h)
            state["hessian"] = h + change + change.square() / (2 * (h + delta))
            gradient = state["momentum"] / (1 - beta1 ** state["step"])
            relative = (state["hessian"] + delta) / (group["init_hessian"] + delta)
            direction = (gradient + delta * p) / relative
            if (radius := group["clip_radius"]) is not None:
                direction = direction.clamp(-radius, radius)
            p.sub_(group["lr"] * direction)
        return loss

    def posterior(
        self,
        lora: LiftedNetwork,
        *,
        model: Model | None = None,
        obs_site: str | None = None,
    ) -> GaussianPosterior:
        """The Gaussian that it has come to.

        Args:
            lora: The lifted network whose parameters it trains.
            model: The Pyro model, where something needs it.
            obs_site: The likelihood's site, None for the only one.

        Returns:
            The posterior; sites that it doesn't train are points.

        Raises:
            RuntimeError: Inside of a block of :meth:`sampled`.
            TypeError: If ``lora`` is something else.
            ValueError: If it trains none of the network's parameters, or some layers of
                a site and others not.

        Warns:
            UserWarning: If the network was lifted with another prior, which is the
                posterior's.
        """
        check_lora(lora)
        if self._gradients is not None:
            raise RuntimeError("The weights are a draw: leave the block of sampled.")
        # Whoever zeroes gradients has a state, a step alone makes a curvature of it.
        groups = {
            p: group
            for p, group in self._parameters()
            if "step" in self.state.get(p, {})
        }
        scale = {}
        for site, like in lora.weights().items():
            own = [member.parameter for member in lora.parameters[site]]
            trained = [p for p in own if p in groups]
            if not trained:
                continue
            if len(trained) < len(own):
                raise ValueError(
                    f"Site {site!r}: IVON trains {len(trained)} of its {len(own)} "
                    "parameters. Give it all of them, or none."
                )
            sds = [self._sd(p, groups[p]).to(like) for p in own]
            scale[site] = torch.stack(sds)
            if not scale[site].isfinite().all():
                raise ValueError(
                    f"Site {site!r}: IVON's curvature is NaN or infinite, as after a "
                    "gradient that was. Skip such steps, or lower lr."
                )
        if not scale:
            raise ValueError(
                "This IVON has trained none of the network's parameters. Give it "
                "lora.network.parameters(), and take a step."
            )
        weights = lora.weights()
        with drawing_nothing(weights):
            at = {site: x[None] for site, x in weights.items()}
            log_prior = log_prior_by_site(lora.prior, (lora,), at)
        for site in scale:
            own = sum(
                dist.Normal(0.0, groups[x.parameter]["prior_precision"] ** -0.5)
                .log_prob(x.parameter.detach().double())
                .sum()
                for x in lora.parameters[site]
            )
            there = log_prior.get(site)
            if there is None or not torch.allclose(there[0], own, rtol=_SAME):
                warn(
                    f"Site {site!r}: IVON trained under N(0, 1 / prior_precision), and "
                    "the posterior has the prior that the network was lifted with, "
                    f"{brief(lora.prior)}. Lift it with prior=priors.normal("
                    "prior_precision ** -0.5)."
                )
                break
        return GaussianPosterior(weights, scale, (lora,), model, obs_site)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in self.param_groups:
            yield from ((p, group) for p in group["params"] if p.requires_grad)

    def _hessian(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if "hessian" not in state:
            state["hessian"] = torch.full_like(p, group["init_hessian"])
        h: Tensor = state["hessian"]
        return h

    def _sd(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        precision = group["num_data"] * self._hessian(p, group)
        sd: Tensor = (precision + group["prior_precision"]).rsqrt()
        return sd
