"""Draws of a posterior as PEFT adapters, answering together without pyro_lora.

Run it by ``python -m examples.adapters``.
"""

import tempfile
from pathlib import Path

import pyro
import torch
from peft import PeftModel
from pyro.optim import Adam

import pyro_lora as pl
from examples import toy

NUM_DRAWS = 4

pyro.set_rng_seed(0)
train, test = toy.reviews(128, seed=1), toy.reviews(64, seed=2)
lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
model = pl.models.classification(lora, num_data=128)
svgd = pl.SVGD(
    model,
    pl.kernels.RBF(space="function"),
    Adam({"lr": 1e-2}),
    NUM_DRAWS,
    init_loc_fn=lora.init_to_fresh(),
)
svgd.run(train, num_epochs=15)
particles = svgd.posterior()

folder = Path(tempfile.mkdtemp()) / "adapters"
pl.export_adapters(particles, folder, NUM_DRAWS)
print((folder / "draw_000" / "README.md").read_text())

# From here on PEFT alone: every text goes through the network under each adapter.
names = sorted(path.name for path in folder.iterdir())
served = PeftModel.from_pretrained(toy.base_network(), folder / names[0], names[0])
for name in names[1:]:
    served.load_adapter(folder / name, name)
served.eval()

probs = []
for batch in test:
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = served(
            input_ids=ids.repeat(NUM_DRAWS, 1),
            attention_mask=batch["attention_mask"].repeat(NUM_DRAWS, 1),
            adapter_names=[name for name in names for _ in ids],
        ).logits
    probs.append(logits.view(NUM_DRAWS, len(ids), -1).softmax(-1).mean(0))

expected = pl.predict(particles, test).probs
difference = float((torch.cat(probs) - expected).abs().max())
print(f"PEFT's probabilities differ from pyro_lora's by {difference:.1e} at most")
