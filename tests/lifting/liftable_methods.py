"""PEFT's methods other than LoRA, by the name of their configuration class."""

from collections.abc import Callable
from contextlib import chdir
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.lifting.liftable_row import Row, adapted, bert, llama, lora, texts

Q_AND_V = ("q_proj", "v_proj")
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def method(
    name: str,
    config_class: str,
    sites: str = "",
    *,
    network: Callable[[], nn.Module] = llama,
    inputs: Callable[[], dict[str, Any]] = texts,
    one_by_one: str = "",
    refused: str = "",
    note: str = "",
    needs: str = "",
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> Row:
    """A row of the method with that configuration class of PEFT's."""

    def build() -> nn.Module:
        return adapted(network(), getattr(peft, config_class)(**config), dtype)

    return Row(
        group="Other methods of PEFT",
        name=name,
        build=build,
        inputs=inputs,
        sites=sites,
        one_by_one=one_by_one,
        refused=refused,
        note=note,
        tolerance=1e-12 if dtype is torch.float64 else 1e-5,
        needs=needs or f"peft.{config_class}",
    )


in_attention = partial(method, **ATTENTION)
causal_lm = partial(
    method, network=lambda: llama(AutoModelForCausalLM), task_type="CAUSAL_LM"
)


def with_tasks() -> dict[str, Tensor]:
    return {**texts(), "task_ids": torch.tensor([0, 1, 1])}


def x_lora() -> nn.Module:
    """Two saved LoRA adapters, mixed by a classifier."""
    with TemporaryDirectory() as folder, chdir(folder):  # peft writes below it
        for name in ("0", "1"):
            lora(llama(AutoModelForCausalLM), *Q_AND_V).save_pretrained(
                f"{folder}/{name}"
            )
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=16,
            xlora_depth=1,
            adapters={name: f"{folder}/{name}" for name in ("0", "1")},
        )
        return adapted(llama(AutoModelForCausalLM, use_cache=False), config)


SHARED = "several layers share a parameter"
PROMPT = "PEFT puts the prompt before the inputs of the whole network"
ROWS = [
    in_attention(
        "AdaLoRA",
        "AdaLoraConfig",
        "lora: A, B, E",
        init_r=3,
        target_r=2,
        total_step=10,
    ),
    method(
        "IA3",
        "IA3Config",
        "ia3: l",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    in_attention("VeRA", "VeraConfig", "vera: lambda_b, lambda_d", r=4),
    in_attention("PVeRA", "PveraConfig", "pvera: lambda_b, lambda_d", r=4),
    in_attention("LoHa", "LoHaConfig", "hada: w1_a, w1_b, w2_a, w2_b", r=2),
    in_attention("LoKr", "LoKrConfig", "lokr: w1, w2", r=2),
    in_attention("OFT", "OFTConfig", "oft: R", oft_block_size=4),
    in_attention(
        "BOFT", "BOFTConfig", "boft: R, s", boft_block_size=4, boft_n_butterfly_factor=1
    ),
    in_attention("HRA", "HRAConfig", "hra: u", r=2),
    in_attention("FourierFT", "FourierFTConfig", "fourierft: spectrum", n_frequency=10),
    in_attention("WaveFT", "WaveFTConfig", "waveft: spectrum", n_frequency=10),
    in_attention("RandLora", "RandLoraConfig", "randlora: gamma, lambda", r=4),
    in_attention(
        "VB-LoRA",
        "VBLoRAConfig",
        "vblora: logits_A, logits_B, vector_bank",
        r=2,
        num_vectors=8,
        vector_length=4,
        topk=2,
        one_by_one=SHARED,
    ),
    in_attention(
        "Uni-LoRA",
        "UniLoraConfig",
        "unilora: theta_d",
        r=2,
        theta_d_length=16,
        one_by_one=SHARED,
    ),
    in_attention(
        "TinyLoRA", "TinyLoraConfig", "tinylora: v", one_by_one=SHARED, r=2, u=4
    ),
    in_attention("Lily", "LilyConfig", "lily: A, B, router", one_by_one=SHARED, r=2),
    in_attention("PEANuT", "PeanutConfig", "peanut: A, B", r=2),
    in_attention("HiRA", "HiraConfig", "hira: A, B", r=2),
    in_attention("DeLoRA", "DeloraConfig", "delora: A, B, lambda", r=2),
    in_attention("DEFT", "DeftConfig", "deft: P, R", r=2),
    in_attention("GraLoRA", "GraloraConfig", "gralora: A, B", r=4, gralora_k=2),
    in_attention("GLoRA", "GloraConfig", "glora: Xd, Xu", r=2),
    in_attention("MiSS", "MissConfig", "miss: block", r=2),
    in_attention("C3A", "C3AConfig", "c3a: kernel", block_size=4),
    in_attention("RoAd", "RoadConfig", "road: alpha, theta", group_size=4),
    in_attention("SHiRA", "ShiraConfig", "shira: weight", r=2),
    in_attention("Super", "SupertuningConfig", "supertuning: values", sparsity=0.9),
    in_attention("OSF", "OSFConfig", "osf: S_low, U_low, V_low", effective_rank=2),
    in_attention("PSOFT", "PsoftConfig", "psoft: vector_a, vector_b, weight", r=4),
    in_attention(
        "FRoD", "FrodConfig", "frod: lambda_l, lambda_s_values", progressbar=False
    ),
    in_attention(
        "AdaMSS",
        "AdamssConfig",
        "adamss: A, B",
        r=4,
        num_subspaces=2,
        subspace_rank=1,
        needs="sklearn",
        dtype=torch.float32,  # its layers know no float64
        note="in float32",
    ),
    causal_lm(
        "Poly",
        "PolyConfig",
        "poly: lora_A, lora_B, module_logits",
        **ATTENTION,
        inputs=with_tasks,
        r=2,
        n_tasks=2,
        n_skills=2,
        n_splits=1,
    ),
    method("BEFT", "BeftConfig", "beft: bias", network=bert, target_modules=["value"]),
    method("LN tuning", "LNTuningConfig", "ln_tuning: weight", target_modules=["norm"]),
    method(
        "trainable tokens",
        "TrainableTokensConfig",
        "trainable_tokens: delta",
        token_indices=[1, 2, 3],
        target_modules=["embed_tokens"],
    ),
    causal_lm(
        "prompt tuning",
        "PromptTuningConfig",
        "prompt: weight",
        one_by_one=PROMPT,
        num_virtual_tokens=3,
    ),
    causal_lm(
        "P-tuning",
        "PromptEncoderConfig",
        "prompt: bias, weight",
        one_by_one=PROMPT,
        num_virtual_tokens=3,
        encoder_hidden_size=8,
    ),
    causal_lm(
        "prefix tuning",
        "PrefixTuningConfig",
        "prompt: weight",
        one_by_one=PROMPT,
        num_virtual_tokens=3,
    ),
    causal_lm(
        "multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        "prompt: prefix_task_cols, prefix_task_rows, weight",
        one_by_one=PROMPT,
        inputs=with_tasks,
        num_virtual_tokens=3,
        num_tasks=2,
    ),
    causal_lm(
        "context-aware prompt tuning",
        "CPTConfig",
        refused="CPT",
        note="it projects its weights at every call: use prompt tuning",
        cpt_token_ids=[1, 2, 3],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
    ),
    causal_lm(
        "Cartridges",
        "CartridgeConfig",
        "prompt: trainable_embedding",
        one_by_one=PROMPT,
        num_virtual_tokens=3,
    ),
    causal_lm(
        "LLaMA-Adapter",
        "AdaptionPromptConfig",
        "base: adaption_gate, adaption_prompt",
        adapter_len=3,
        adapter_layers=1,
        target_modules="self_attn",
    ),
    causal_lm(
        "Shadow",
        "ShadowConfig",
        "shadow: bias, down, up, weight; base: weight",
        one_by_one="its layers hand on a state of their own",
        r=2,
    ),
    Row(
        group="Other methods of PEFT",
        name="X-LoRA",
        build=x_lora,
        refused="X-LoRA",
        note="it mixes adapters by a classifier: lift one of them",
    ),
]
