"""A float32 network's posterior is that of the same network in float64."""

import copy

import pyro
import pytest
import torch
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import laplace
from tests.networks import batch, bert, inputs

pytestmark = pytest.mark.untrained

# float32 has 1e-7, of which a network and its gradients lose a digit, and the integral
# over three classes two more.
TOLERANCES: dict[Structure, float] = {
    pl.structures.KFAC(): 1e-4,
    # A token's mean for each datum: most directions have none, and beside a weak prior
    # count by the rounding of sums in float32, 1e-7 of the largest.
    pl.structures.KFAC(reduce=True): 1e-3,
    pl.structures.EKFAC(): 1e-4,
    pl.structures.Diagonal(): 1e-4,
    pl.structures.Dense(): 1e-4,
    pl.structures.Exact(): 1e-4,
    # Outside of the span a contrast has the prior's variance, and a matrix in float32
    # 1e-7 of that beside those that the data leave.
    pl.structures.Exact(num_inducing=12): 1e-3,
}
_NATS = 0.02  # of an evidence of a thousand: that rounding again, in log det P


# Under the wide prior the data leave some contrasts a ten thousandth of their variance.
@pytest.mark.parametrize(
    ("structure", "num_labels", "scale"),
    [(pl.structures.KFAC(), 2, 1.0), *((x, 3, 30.0) for x in TOLERANCES)],
)
@pytest.mark.few(4)
def test_float32_is_float64(
    structure: Structure, num_labels: int, scale: float
) -> None:
    tolerance = TOLERANCES[structure]
    narrow = bert(num_labels, hidden_size=32, dtype=torch.float32)
    wide = copy.deepcopy(narrow).double()
    texts = batch(20, num_labels=num_labels)
    posteriors, covariances, log_probs = [], [], []
    for network in (narrow, wide):
        lora = pl.lift(network, prior=pl.priors.normal(scale=scale))
        pyro.set_rng_seed(1)  # the same rows are drawn
        posterior = laplace(lora, texts, 7, structure=structure)
        posteriors.append(posterior)
        logits = posterior.linearized(inputs(texts))
        covariances.append(logits.covariance_matrix.double())
        log_probs.append(pl.predict(posterior, [inputs(texts)]).log_probs)
    evidences = [x.log_evidence() for x in posteriors]
    assert_close(*evidences, rtol=0, atol=_NATS)
    least = float(covariances[1].diagonal(dim1=-2, dim2=-1).min())
    assert_close(*covariances, rtol=tolerance, atol=tolerance * least)
    assert_close(*log_probs, rtol=0, atol=tolerance)
