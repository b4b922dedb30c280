"""Bayesian LoRA adapters as Pyro random variables."""

from pyro_lora import models
from pyro_lora.curvature.fisher_roots import FisherRoot, fisher_root
from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    JointGaussianLogits,
    class_log_probs,
    laplace_bridge,
    probit,
)
from pyro_lora.curvature.structures import (
    DenseFactors,
    DiagonalFactors,
    KroneckerFactors,
    dense,
    diagonal,
    ekfac,
    joint_structure,
    kfac_expand,
    kfac_reduce,
)
from pyro_lora.export import plots
from pyro_lora.export.adapters import export_adapters
from pyro_lora.export.checkpoint import load, save
from pyro_lora.export.datatree import to_datatree
from pyro_lora.export.diagnose import diagnose
from pyro_lora.export.diagnosis import Diagnosis
from pyro_lora.export.inference_data import to_inference_data
from pyro_lora.export.training_folder import load_state, save_state
from pyro_lora.infer import kernels, schedules
from pyro_lora.infer.auto_laplace import AutoLaplace
from pyro_lora.infer.effective_predictions import effective_num_predictions
from pyro_lora.infer.ensemble import ensemble
from pyro_lora.infer.laplace_posterior import LaplacePosterior
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.infer.particle_posterior import ParticlePosterior
from pyro_lora.infer.stein_discrepancy import (
    SteinDiscrepancy,
    kernelized_stein_discrepancy,
)
from pyro_lora.infer.svgd import SVGD
from pyro_lora.lifting import priors
from pyro_lora.lifting.lifted_network import LiftedNetwork, lift
from pyro_lora.lifting.trunk_cache import cached_trunk
from pyro_lora.predict.acquisition import Acquisition, acquire
from pyro_lora.predict.dropout import DropoutPosterior, mc_dropout
from pyro_lora.predict.generate import Generation, generate
from pyro_lora.predict.predict import predict
from pyro_lora.predict.prediction import Prediction, auroc, fit_temperature
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.semantic import SemanticEntropy, semantic_entropy
from pyro_lora.predict.sequence_scores import SequenceLogProb, sequence_log_prob
from pyro_lora.predict.token_prediction import TokenPrediction

__all__ = [
    "SVGD",
    "Acquisition",
    "AutoLaplace",
    "DenseFactors",
    "Diagnosis",
    "DiagonalFactors",
    "DropoutPosterior",
    "FisherRoot",
    "GaussianLogits",
    "Generation",
    "JointGaussianLogits",
    "KroneckerFactors",
    "LaplacePosterior",
    "LiftedNetwork",
    "MixturePosterior",
    "ParticlePosterior",
    "Prediction",
    "RegressionPrediction",
    "SemanticEntropy",
    "SequenceLogProb",
    "SteinDiscrepancy",
    "TokenPrediction",
    "acquire",
    "auroc",
    "cached_trunk",
    "class_log_probs",
    "dense",
    "diagnose",
    "diagonal",
    "effective_num_predictions",
    "ekfac",
    "ensemble",
    "export_adapters",
    "fisher_root",
    "fit_temperature",
    "generate",
    "joint_structure",
    "kernelized_stein_discrepancy",
    "kernels",
    "kfac_expand",
    "kfac_reduce",
    "laplace_bridge",
    "lift",
    "load",
    "load_state",
    "mc_dropout",
    "models",
    "plots",
    "predict",
    "priors",
    "probit",
    "save",
    "save_state",
    "schedules",
    "semantic_entropy",
    "sequence_log_prob",
    "to_datatree",
    "to_inference_data",
]
