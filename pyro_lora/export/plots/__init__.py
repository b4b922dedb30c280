"""Figures. Each function draws on the axes that it is given, and returns them.

They need matplotlib: ``pip install 'pyro-lora[plots]'``.
"""

from pyro_lora.export.plots.calibration import rejection, reliability
from pyro_lora.export.plots.entropy_curves import entropy
from pyro_lora.export.plots.layers import delta_norms, effective_parameters
from pyro_lora.export.plots.particle_forces import forces
from pyro_lora.export.plots.prior_scale import evidence

__all__ = [
    "delta_norms",
    "effective_parameters",
    "entropy",
    "evidence",
    "forces",
    "rejection",
    "reliability",
]
