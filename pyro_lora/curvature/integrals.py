"""Class probabilities from Gaussian logits: what ``predict(integral=)`` takes."""

from pyro_lora.curvature.gaussian_logits import (
    class_log_probs,
    laplace_bridge,
    probit,
)

__all__ = ["class_log_probs", "laplace_bridge", "probit"]
