"""Bayesian LoRA adapters as Pyro random variables.

The public names are loaded, all at once, when the first of them is asked for: what
needs none of them, such as the command line's help, doesn't wait for torch.
"""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what _HOMES says below, for whom no code runs
    from pyro_lora import models, priors
    from pyro_lora.curvature import integrals, structures
    from pyro_lora.diagnose.diagnose import diagnose
    from pyro_lora.diagnose.effective_predictions import effective_num_predictions
    from pyro_lora.diagnose.stein_discrepancy import kernelized_stein_discrepancy
    from pyro_lora.export import plots
    from pyro_lora.export.adapters import export_adapters
    from pyro_lora.export.checkpoint import load, load_metadata, save
    from pyro_lora.export.datatree import to_datatree
    from pyro_lora.export.inference_data import to_inference_data
    from pyro_lora.export.pretrained import from_pretrained
    from pyro_lora.export.trainer_callback import LaplaceCallback
    from pyro_lora.ground.ranks import share
    from pyro_lora.infer import methods
    from pyro_lora.infer.auto_laplace import AutoLaplace
    from pyro_lora.infer.svgd import kernels, schedules
    from pyro_lora.infer.svgd.svgd import SVGD
    from pyro_lora.lift import lift
    from pyro_lora.lifting.cached_trunk import cached_trunk
    from pyro_lora.lifting.lifted_network import LiftedNetwork
    from pyro_lora.likelihood import likelihoods
    from pyro_lora.likelihood.text_batches import text_batches
    from pyro_lora.memory_plan import plan_memory
    from pyro_lora.posteriors.dropout import mc_dropout
    from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
    from pyro_lora.posteriors.mixture_posterior import MixturePosterior
    from pyro_lora.posteriors.particle_posterior import ParticlePosterior, ensemble
    from pyro_lora.posteriors.posterior import Posterior
    from pyro_lora.predict.acquisition import acquire
    from pyro_lora.predict.generate import generate
    from pyro_lora.predict.mixture_prediction import MixturePrediction
    from pyro_lora.predict.multi_label_prediction import MultiLabelPrediction
    from pyro_lora.predict.predict import predict
    from pyro_lora.predict.prediction import Prediction, auroc, fit_temperature
    from pyro_lora.predict.regression import RegressionPrediction
    from pyro_lora.predict.semantic import semantic_entropy
    from pyro_lora.predict.sequence_scores import sequence_log_prob
    from pyro_lora.predict.state_distance import load_state_distance, state_distance
    from pyro_lora.predict.token_prediction import TokenPrediction

__all__ = [
    "SVGD",
    "AutoLaplace",
    "LaplaceCallback",
    "LaplacePosterior",
    "LiftedNetwork",
    "MixturePosterior",
    "MixturePrediction",
    "MultiLabelPrediction",
    "ParticlePosterior",
    "Posterior",
    "Prediction",
    "RegressionPrediction",
    "TokenPrediction",
    "acquire",
    "auroc",
    "cached_trunk",
    "diagnose",
    "effective_num_predictions",
    "ensemble",
    "export_adapters",
    "fit_temperature",
    "from_pretrained",
    "generate",
    "integrals",
    "kernelized_stein_discrepancy",
    "kernels",
    "lift",
    "likelihoods",
    "load",
    "load_metadata",
    "load_state_distance",
    "mc_dropout",
    "methods",
    "models",
    "plan_memory",
    "plots",
    "predict",
    "priors",
    "save",
    "schedules",
    "semantic_entropy",
    "sequence_log_prob",
    "share",
    "state_distance",
    "structures",
    "text_batches",
    "to_datatree",
    "to_inference_data",
]

_HOMES = {
    "pyro_lora": "models priors",
    "pyro_lora.curvature": "integrals structures",
    "pyro_lora.diagnose.diagnose": "diagnose",
    "pyro_lora.diagnose.effective_predictions": "effective_num_predictions",
    "pyro_lora.diagnose.stein_discrepancy": "kernelized_stein_discrepancy",
    "pyro_lora.export": "plots",
    "pyro_lora.export.adapters": "export_adapters",
    "pyro_lora.export.checkpoint": "load load_metadata save",
    "pyro_lora.export.datatree": "to_datatree",
    "pyro_lora.export.inference_data": "to_inference_data",
    "pyro_lora.export.pretrained": "from_pretrained",
    "pyro_lora.export.trainer_callback": "LaplaceCallback",
    "pyro_lora.ground.ranks": "share",
    "pyro_lora.infer": "methods",
    "pyro_lora.infer.auto_laplace": "AutoLaplace",
    "pyro_lora.infer.svgd": "kernels schedules",
    "pyro_lora.infer.svgd.svgd": "SVGD",
    "pyro_lora.lift": "lift",
    "pyro_lora.lifting.cached_trunk": "cached_trunk",
    "pyro_lora.lifting.lifted_network": "LiftedNetwork",
    "pyro_lora.likelihood": "likelihoods",
    "pyro_lora.likelihood.text_batches": "text_batches",
    "pyro_lora.memory_plan": "plan_memory",
    "pyro_lora.posteriors.dropout": "mc_dropout",
    "pyro_lora.posteriors.laplace_posterior": "LaplacePosterior",
    "pyro_lora.posteriors.mixture_posterior": "MixturePosterior",
    "pyro_lora.posteriors.particle_posterior": "ParticlePosterior ensemble",
    "pyro_lora.posteriors.posterior": "Posterior",
    "pyro_lora.predict.acquisition": "acquire",
    "pyro_lora.predict.generate": "generate",
    "pyro_lora.predict.mixture_prediction": "MixturePrediction",
    "pyro_lora.predict.multi_label_prediction": "MultiLabelPrediction",
    "pyro_lora.predict.predict": "predict",
    "pyro_lora.predict.prediction": "Prediction auroc fit_temperature",
    "pyro_lora.predict.regression": "RegressionPrediction",
    "pyro_lora.predict.semantic": "semantic_entropy",
    "pyro_lora.predict.sequence_scores": "sequence_log_prob",
    "pyro_lora.predict.state_distance": "load_state_distance state_distance",
    "pyro_lora.predict.token_prediction": "TokenPrediction",
}


@cache
def _load() -> None:
    # All at once, since some register themselves with others.
    public = {}
    for home, names in _HOMES.items():
        module = import_module(home)
        for name in names.split():
            value = vars(module).get(name)
            public[name] = import_module(f"{home}.{name}") if value is None else value
    globals().update(public)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the function ``predict`` when the room of that name is imported."""
        is_room = isinstance(value, ModuleType) and name in __all__
        if not is_room or name in _HOMES[__name__].split():
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    # Nor what this file imports, nor the rooms: those are in no docs.
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


if not TYPE_CHECKING:  # or every misspelt name would be a public one

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            _load()
        try:
            return globals()[name]
        except KeyError:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(
                message, name=name, obj=sys.modules[__name__]
            ) from None
