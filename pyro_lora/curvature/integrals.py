"""Class probabilities from Gaussian logits: what ``predict(integral=)`` takes."""

from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    JointGaussianLogits,
    class_log_probs,
    probit,
)

__all__ = ["GaussianLogits", "JointGaussianLogits", "class_log_probs", "probit"]
