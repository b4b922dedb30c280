"""From a checkpoint to answers: one process fits and saves, another one serves.

Run it by ``python -m examples.serving``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pyro
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

import pyro_lora as pl
from examples import toy

NUM_DATA = 128
SURE = 0.3  # nats of epistemic entropy beyond which a person should look


def fit(folder: Path) -> None:
    """What runs once: the posterior, in a folder of safetensors and JSON."""
    train = toy.reviews(NUM_DATA, seed=1)
    lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(30):
        for batch in train:
            svi.step(**batch)
    pl.save(guide.laplace_approximation(train).optimize_prior(), folder)


def serve(folder: Path) -> Callable[[dict[str, Tensor]], list[str]]:
    """What runs all day: the network is lifted, the posterior loaded, once."""
    lora = pl.lift(toy.network())  # the prior comes from the folder
    model = pl.models.classification(lora, NUM_DATA)
    posterior = pl.load(folder, lora, model=model)

    def answer(texts: dict[str, Tensor]) -> list[str]:
        prediction = pl.predict(posterior, [texts])
        answers = []
        for probs, doubt in zip(
            prediction.probs, prediction.epistemic_entropy.tolist(), strict=True
        ):
            what = ("unkind", "kind")[int(probs.argmax())]
            line = f"{what:6} {float(probs.max()):.2f}, epistemic entropy {doubt:.2f}"
            answers.append(line + (" -> to a person" if doubt > SURE else ""))
        return answers

    return answer


pyro.set_rng_seed(0)
checkpoint = Path(tempfile.mkdtemp()) / "posterior"
fit(checkpoint)
answer = serve(checkpoint)
for unseen in (False, True):
    (request,) = toy.reviews(8, seed=4, unseen=unseen)
    del request["labels"]
    print("words that it hasn't seen:" if unseen else "words that it has seen:")
    print("\n".join(answer(request)))
