"""A Laplace posterior at the end of transformers' training, its calibration logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, Literal

from transformers import Trainer, TrainerCallback

import pyro_lora.models as models
from pyro_lora.curvature.structures import KFAC, Structure
from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.summary import Summarised, brief
from pyro_lora.infer.auto_laplace import AutoLaplace
from pyro_lora.lift import lift
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.particle_posterior import ensemble
from pyro_lora.posteriors.posterior import Posterior
from pyro_lora.predict.predict import predict
from pyro_lora.priors import Prior

_LOGGED = ("accuracy", "nll", "ece", "rmse", "coverage")  # those that a kind has
_OF_TEXTS: tuple[Any, ...] = (  # models of networks that put out numbers for a text
    models.classification,
    models.multi_label,
    models.regression,
    models.preference,
)


class LaplaceCallback(TrainerCallback, Summarised):
    """Puts a Laplace posterior around the adapter that a Trainer has trained.

    When training ends, the trained weights (those of the best checkpoint, with
    ``load_best_model_at_end``) are the mode, and the curvature is that of the whole
    training set. Through the Trainer's own log, and so to wherever it reports, go
    ``laplace_log_evidence`` (nats) and, for the evaluation data, accuracy, NLL (nats)
    and ECE of the weights alone and of the posterior: ``eval_map_nll``,
    ``eval_laplace_nll`` and so on. Where that raises an error, or is interrupted, the
    trained weights are saved before, into the Trainer's ``output_dir``.

    Args:
        trainer: The Trainer that it is added to.
        model: From the lifted network and the number of training data to a Pyro model;
            one of ``models``. Of a language model that is trained on texts it's
            ``models.language_model``, with ``fisher="mc"``.
        prior: Of the weights; None is ``priors.normal(scale=1.0)``.
        structure: Of the precision, as for :class:`AutoLaplace`.
        fisher: As for :class:`AutoLaplace`.
        optimize_prior: Whether its precision is chosen by the evidence.

    Attributes:
        posterior: The posterior; None until training has ended.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If the Trainer has no training data, doesn't know how many, leaves
            some out (``dataloader_drop_last``), or is one of several processes; or the
            model is of texts, and the network a language model.

    .. code-block:: python

        trainer = Trainer(peft_model, arguments, train_dataset=..., eval_dataset=...)
        callback = pl.LaplaceCallback(trainer)
        trainer.add_callback(callback)
        trainer.train()
        callback.posterior.save_pretrained("my_posterior")
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        model: Callable[[LiftedNetwork, int], Model] = models.classification,
        prior: Prior | None = None,
        structure: Structure = KFAC(),
        fisher: Literal["exact", "mc", "empirical"] = "exact",
        optimize_prior: bool = True,
    ) -> None:
        check_kind("trainer", trainer, Trainer, "a transformers.Trainer")
        expected = "a function of a lifted network and a number, such as one of models"
        check_kind("model", model, Callable, expected)
        data = trainer.train_dataset
        if not isinstance(data, Sized):
            raise ValueError(
                f"The Trainer's train_dataset is a {type(data).__name__}, which has no "
                "length. A Laplace approximation needs all training data, a known "
                "number of them."
            )
        if trainer.args.dataloader_drop_last or trainer.args.world_size > 1:
            raise ValueError(
                "A Laplace approximation goes once through all training data, in one "
                "process; found dataloader_drop_last="
                f"{trainer.args.dataloader_drop_last} and {trainer.args.world_size} "
                "processes. Fit it afterwards, on the saved adapter."
            )
        _check_head(model, trainer.accelerator.unwrap_model(trainer.model))
        self.trainer = trainer
        self.posterior: LaplacePosterior | None = None
        self._model, self._prior = model, prior
        self._structure, self._fisher = structure, fisher
        self._optimize_prior = optimize_prior

    def _facts(self) -> dict[str, str]:
        return {
            "model": brief(self._model),
            "prior": "as lift's" if self._prior is None else brief(self._prior),
            "structure": brief(self._structure),
            "fisher": brief(self._fisher),
            "optimize_prior": brief(self._optimize_prior),
            "posterior": brief(self.posterior),
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fit the posterior and log how well calibrated it is."""
        try:
            self._fit()
        except BaseException as error:
            # Neither does train() return, nor is what comes after it in a script run.
            self.trainer.save_model()
            error.add_note(
                "The trained weights are saved: the adapter is in "
                f"{self.trainer.args.output_dir!r}."
            )
            raise

    def _fit(self) -> None:
        trainer = self.trainer
        data: Any = trainer.train_dataset
        lora = lift(trainer.accelerator.unwrap_model(trainer.model), prior=self._prior)
        model = self._model(lora, len(data))
        guide = AutoLaplace(
            model,
            init_loc_fn=lora.init_to_adapter(),
            structure=self._structure,
            fisher=self._fisher,
        )
        # Its loader for tests gives each datum once, in order, where the network is.
        posterior = guide.laplace_approximation(trainer.get_test_dataloader(data))
        if self._optimize_prior:
            posterior = posterior.optimize_prior()
        self.posterior = posterior
        logs = {"laplace_log_evidence": float(posterior.log_evidence())}
        methods: dict[str, Posterior] = {
            "map": ensemble(lora, [posterior.mode()]),
            "laplace": posterior,
        }
        for name, held_out in _evaluation_data(trainer).items():
            batches = trainer.get_test_dataloader(held_out)
            for method, of in methods.items():
                logs |= _calibration(of, batches, model, f"{name}_{method}")
        trainer.log(logs)


def _check_head(model: Any, network: Any) -> None:
    """Check that a ready model of texts isn't for logits over a vocabulary.

    Raises:
        ValueError: If it is.
    """
    head = getattr(network, "get_output_embeddings", lambda: None)()
    if head is None or model not in _OF_TEXTS:
        return
    network = getattr(network, "get_base_model", lambda: network)()
    raise ValueError(
        f"model: models.{model.__name__} is for networks as AutoModelForSequence"
        f"Classification loads them, but the Trainer's, a {type(network).__name__}, "
        "gives logits over a vocabulary at each token. Give model=models."
        "language_model, fisher='mc'; or, for answers of some words, fit models."
        "multiple_choice afterwards, on the saved adapter."
    )


def _evaluation_data(trainer: Trainer) -> dict[str, Any]:
    """The Trainer's evaluation data by the prefix that it gives their metrics."""
    data: Any = trainer.eval_dataset
    if data is None:
        return {}
    # A Dataset of datasets is a mapping from columns, but no dict.
    if isinstance(data, dict):
        return {f"eval_{name}": held_out for name, held_out in data.items()}
    return {"eval": data}


def _calibration(
    posterior: Posterior, batches: Any, model: Model, prefix: str
) -> Mapping[str, float]:
    metrics = predict(posterior, batches, model=model).metrics()
    return {f"{prefix}_{name}": metrics[name] for name in _LOGGED if name in metrics}
