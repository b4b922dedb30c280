"""The libraries that `benchmarks.laplace` compares, each with the same three jobs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import bayesian_lora
import bayesian_lora.main
import laplace
import laplace.curvature
import pyro
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BatchEncoding,
    BertConfig,
    LlamaConfig,
)

import pyro_lora as pl

VOCABULARY, RANK, BLORA_RANK = 1000, 8, 10
BATCH = 16  # of the fits, and of the predictive that the targets are about
Texts = dict[str, Tensor]
Job = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network with LoRA r=8 on query and value of every layer, and its data."""

    kind: str
    layers: int
    hidden: int
    num_classes: int
    num_data: int
    length: int
    device: str

    def network(self) -> PeftModel:
        """The network, the same at each call, its adapter away from zero."""
        torch.manual_seed(0)
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 32,
            "num_labels": self.num_classes,
            "pad_token_id": 0,
        }
        if self.kind == "Llama":
            config: Any = LlamaConfig(**sizes, intermediate_size=3 * self.hidden)
            targets = ["q_proj", "v_proj"]
        else:
            config = BertConfig(
                **sizes,
                intermediate_size=4 * self.hidden,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            targets = ["query", "value"]
        base = AutoModelForSequenceClassification.from_config(config)
        lora = LoraConfig(r=RANK, target_modules=targets, task_type="SEQ_CLS")
        network = get_peft_model(base.to(self.device), lora)
        for name, parameter in network.named_parameters():
            # Only LoRA, since bayesian-lora has no curvature of a head.
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        return network.eval()

    def batches(self, size: int = BATCH) -> list[Texts]:
        """All data, without padding."""
        torch.manual_seed(1)
        shape = (self.num_data, self.length)
        ids = torch.randint(1, VOCABULARY, shape, device=self.device)
        labels = torch.randint(self.num_classes, shape[:1], device=self.device)
        rows = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
        }
        return [
            {name: x[start : start + size] for name, x in rows.items()}
            for start in range(0, self.num_data, size)
        ]

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.layers} layers of {self.hidden}, C={self.num_classes}"
        )


def logits(network: Any, texts: Mapping[str, Tensor]) -> Tensor:
    """The network's logits, (B, C)."""
    found: Tensor = network(
        input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
    ).logits
    return found


def floor(network: PeftModel, texts: Texts) -> None:
    """One forward and C - 1 backward passes of the plain network."""
    trained = [p for p in network.parameters() if p.requires_grad]
    terms = logits(network, texts).sum(0)[:-1]
    for i, term in enumerate(terms):
        torch.autograd.grad(term, trained, retain_graph=i < len(terms) - 1)


class Sized(list[Texts]):
    """Batches with the number of data where laplace-torch looks for it."""

    @property
    def dataset(self) -> range:
        return range(sum(len(texts["labels"]) for texts in self))


class LogitsOnly(nn.Module):
    """The network as laplace-torch wants it: from a batch to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, texts: Texts) -> Tensor:
        return logits(self.network, texts)


@dataclass(frozen=True)
class Library:
    """What one library does in a setting.

    Attributes:
        fit: A KFAC fit to the given batches, which the other two then use.
        predict: Class probabilities of one batch by the linearised predictive.
        evidence: The evidence and its gradient in the prior precision; None where
            the library's isn't one.
    """

    fit: Callable[[list[Texts]], Any]
    predict: Callable[[Texts], Any]
    evidence: Job | None


def ours(setting: Setting) -> tuple[Library, Callable[[list[Texts]], None]]:
    """This library, and training by SVI over the given batches."""
    lora = pl.lift(setting.network(), prior=pl.priors.normal(scale=1.0))
    kept: dict[str, Any] = {}

    def guide_for(batches: list[Texts]) -> pl.AutoLaplace:
        num_data = sum(len(texts["labels"]) for texts in batches)
        model = pl.models.classification(lora, num_data)
        return pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.KFAC()
        )

    def fit(batches: list[Texts]) -> None:
        posterior = guide_for(batches).laplace_approximation(batches)
        kept["posterior"] = posterior
        kept["squares"] = {s: x.square().sum() for s, x in posterior.mode().items()}

    def train(batches: list[Texts]) -> None:
        pyro.clear_param_store()
        guide = guide_for(batches)
        svi = SVI(guide.model, guide, Adam({"lr": 1e-4}), Trace_ELBO())
        for texts in batches:
            svi.step(**texts)
        pyro.clear_param_store()  # or a fit would take the trained mode

    def evidence() -> None:
        gaussian = kept["posterior"].gaussian
        log_tau = torch.zeros(
            (), dtype=torch.float64, device=setting.device, requires_grad=True
        )
        tau = log_tau.exp()
        full = {s: tau.reshape([1] * x.ndim) for s, x in gaussian.loc.items()}
        log_prior = sum(
            x.numel() * log_tau - tau * kept["squares"][s]
            for s, x in gaussian.loc.items()
        )
        (0.5 * log_prior - 0.5 * gaussian.log_det(full)).backward()

    def predictive(texts: Texts) -> Tensor:
        return pl.integrals.probit(kept["posterior"].linearized(texts))

    return Library(fit, predictive, evidence), train


def laplace_torch(setting: Setting, backend: str) -> Library:
    """laplace-torch's Kron with the exact GGN by one of its backends."""
    kind = getattr(laplace.curvature, backend)
    # A network of its own: the backends leave hooks on it.
    approximation = laplace.Laplace(
        LogitsOnly(setting.network()),
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=kind,
        backend_kwargs={"stochastic": False},
    )

    def evidence() -> None:
        tau = torch.ones((), device=setting.device, requires_grad=True)
        approximation.log_marginal_likelihood(prior_precision=tau).backward()

    return Library(
        lambda batches: approximation.fit(Sized(batches)),
        lambda texts: approximation(texts, pred_type="glm", link_approx="probit"),
        evidence,
    )


def blora(setting: Setting) -> Library:
    """bayesian-lora, whose Fisher is sampled and sees the last token only."""
    network = setting.network()
    kept: dict[str, Any] = {}

    def fit(batches: list[Texts]) -> None:
        threshold = setting.hidden // 2
        factors = bayesian_lora.calculate_kronecker_factors(
            network,
            logits,
            batches,
            n_kfac=BLORA_RANK,
            lr_threshold=threshold,
            target_module_keywords=["lora"],
        )
        network.eval()
        kept["factors"] = bayesian_lora.cholesky_decompose_small_factors(
            factors, threshold, setting.device, torch.float32
        )

    def predictive(texts: Texts) -> Tensor:
        inputs = BatchEncoding({k: v for k, v in texts.items() if k != "labels"})
        jacobian, _ = bayesian_lora.main.jacobian_mean(
            network, inputs, output_callback=lambda output: output.logits
        )
        covariance: Tensor = bayesian_lora.variance(
            inputs,
            jacobian,
            kept["factors"],
            torch.tensor(1.0, device=setting.device),
            setting.num_classes,
            RANK,
            BLORA_RANK,
            setting.device,
        )
        return covariance

    return Library(fit, predictive, None)
