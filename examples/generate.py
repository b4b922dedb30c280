"""A language model that says where it's unsure, word by word.

Run it by ``python -m examples.generate``.
"""

import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro.optim import Adam
from transformers import LlamaConfig, LlamaForCausalLM

import pyro_lora as pl

SYMBOLS = "_.abcdefghijklmnop"  # padding, the end, letters
PAD, END = 0, 1


def encode(texts: list[str]) -> torch.Tensor:
    """Token ids, padded on the left."""
    length = max(map(len, texts))
    return torch.tensor(
        [[SYMBOLS.index(c) for c in t.rjust(length, "_")] for t in texts]
    )


pyro.set_rng_seed(0)
config = LlamaConfig(
    vocab_size=len(SYMBOLS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    pad_token_id=PAD,
    eos_token_id=END,
    bos_token_id=None,
)
adapter = LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    modules_to_save=["lm_head"],
)
lora = pl.lift(get_peft_model(LlamaForCausalLM(config), adapter))

# It learns to go on in the alphabet, from texts of the letters a to i.
letters = SYMBOLS[2:]
texts = [letters[i : i + 4] + "." for i in range(6)]
rows = encode(texts)
model = pl.models.language_model(lora, num_data=len(rows))
svgd = pl.SVGD(
    model,
    pl.kernels.RBF(),
    Adam({"lr": 2e-2}),
    num_particles=8,
    init_loc_fn=lora.init_to_fresh(),
)
svgd.run([{"input_ids": rows, "labels": rows}], num_epochs=80)

# All particles go through the network at once; what they agree on is what they know.
prompts = ["ab", "de", "mn"]
ids = encode(prompts)
answer = pl.generate(
    svgd.posterior(),
    ids,
    lora=lora,
    attention_mask=(ids != PAD).long(),
    max_new_tokens=4,
)
for prompt, tokens, doubts in zip(
    prompts, answer.new_tokens, answer.epistemic_entropy, strict=True
):
    words = [
        f"{SYMBOLS[token]} ({doubt:.2f})"
        for token, doubt in zip(tokens.tolist(), doubts.tolist(), strict=True)
        if token != PAD
    ]
    print(f"{prompt} -> {' '.join(words)}")
