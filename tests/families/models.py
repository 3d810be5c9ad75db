"""Pico random models, one row for each architecture of transformers that people use as a backbone.

All of them are made so that nothing is trivial: norm weights and biases are not one and zero, windows are
shorter than the longest prompt, soft caps and sinks matter, and both kinds of layers are there. Widths are
multiples of 32 and 64 where bitsandbytes asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.pico import VOCABULARY, encoder_tokenizer, pico_tokenizer

WINDOW = 16
"""Tokens that a layer with a sliding window sees."""
NOISE = 0.2
"""Standard deviation of what is added to norm weights, biases and other vectors."""

IDS = {"vocab_size": VOCABULARY, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
SMALL = {
    **IDS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""Settings that most decoders share."""
UNGROUPED = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
"""The same for those that know no grouped queries."""
BERT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
"""Settings that most encoders share."""
LOCAL_FIRST = ["sliding_attention", "full_attention"]
LINEAR_FIRST = ["linear_attention", "full_attention"]
WINDOWED = {"sliding_window": WINDOW, "layer_types": LOCAL_FIRST}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "head_dim": 16,
    "layer_types": LINEAR_FIRST,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
"""Layers of gated delta rule beside full attention."""
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
}
"""Multi-head latent attention."""
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 12,
    "mamba_chunk_size": 16,
}
"""Layers of state spaces; chunks are shorter than the longest prompt."""
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""The smallest vision part."""


@dataclass(frozen=True)
class Family:
    """One row of the matrix: an architecture with settings of its own."""

    model: str
    """Class of transformers."""
    config: str
    """Class of its settings."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    encodes: bool = False
    """Whether it is an encoder."""

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.model) and hasattr(transformers, self.config)

    def build(self, seed: int = 0) -> Any:
        """Return the random model, in evaluation mode."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        model = getattr(transformers, self.model)(config).eval()
        perturb(model)
        return model

    def tokenizer(self) -> Any:
        """Return its tokenizer."""
        return encoder_tokenizer() if self.encodes else pico_tokenizer()

    def save(self, folder: Path, seed: int = 0) -> None:
        """Write model and tokenizer as transformers does."""
        self.build(seed).save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)


@torch.no_grad()
def perturb(model: Any) -> None:
    """Add noise to all vectors (norm weights, biases, sinks) and to the corrections of routers."""
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    corrections = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for tensor in (*vectors.values(), *corrections.values()):
        tensor.add_(torch.randn(tensor.shape) * NOISE)


def decoder(name: str, config: str = "", /, **settings: Any) -> Family:
    """Return the row of a decoder called NAMEForCausalLM with the usual settings and its own."""
    return Family(f"{name}ForCausalLM", config or f"{name}Config", {**SMALL, **settings})


def renamed(model: str, config: str, **settings: Any) -> Family:
    """Return the row of a decoder whose settings are not the usual ones."""
    return Family(model, config, {**IDS, **settings})


def encoder(name: str, **settings: Any) -> Family:
    """Return the row of an encoder called NAMEModel."""
    size = len(encoder_tokenizer())
    return Family(f"{name}Model", f"{name}Config", {"vocab_size": size, **BERT, **settings}, True)


GEMMA3 = {**SMALL, **WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA3 |= {
    "initializer_range": 0.1
}  # else a token's own embedding outweighs all that the layers do

DECODERS = {
    "llama": decoder("Llama"),
    "llama3_rope": decoder(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_dynamic_rope": decoder(
        "Llama",
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "mistral": decoder("Mistral", sliding_window=None),
    "mistral_window": decoder("Mistral", sliding_window=WINDOW),
    "ministral": decoder("Ministral", **WINDOWED, head_dim=16),
    "ministral3": decoder("Ministral3", head_dim=16),
    "mixtral": decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": decoder("Qwen2"),
    "qwen2_yarn": decoder(
        "Qwen2",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2_moe": decoder(
        "Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=64, mlp_only_layers=[0]
    ),
    "qwen3": decoder("Qwen3", head_dim=16),
    "qwen3_moe": decoder("Qwen3Moe", **EXPERTS, head_dim=16, mlp_only_layers=[0]),
    "qwen3_next": decoder("Qwen3Next", **EXPERTS, **DELTA, shared_expert_intermediate_size=64),
    "qwen3_5": decoder(
        "Qwen3_5",
        "Qwen3_5TextConfig",
        **DELTA,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    ),
    "gemma": decoder("Gemma", head_dim=16),
    "gemma2": decoder(
        "Gemma2",
        **WINDOWED,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        initializer_range=0.1,
    ),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": GEMMA3,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "initializer_range": 0.1,
        },
    ),
    "phi": decoder("Phi", qk_layernorm=True),
    "phi3": decoder("Phi3"),
    "phi3_window": decoder("Phi3", sliding_window=WINDOW),
    "phi3_longrope": decoder(
        "Phi3",
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            "original_max_position_embeddings": 32,
        },
    ),
    "smollm3": decoder("SmolLM3", no_rope_layers=[1, 0]),
    "olmo2": decoder("Olmo2"),
    "olmo3": decoder("Olmo3", **WINDOWED),
    "granite": decoder(
        "Granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.5,
    ),
    "granitemoehybrid": decoder(
        "GraniteMoeHybrid",
        **MAMBA,
        layer_types=LINEAR_FIRST,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        position_embedding_type="rope",
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.5,
    ),
    "cohere": decoder("Cohere", use_qk_norm=True, logit_scale=0.25),
    "cohere2": decoder("Cohere2", **WINDOWED, logit_scale=0.25),
    "starcoder2": decoder("Starcoder2", sliding_window=WINDOW),
    "stablelm": decoder("StableLm", use_qkv_bias=True, qk_layernorm=True),
    "gpt_neox": renamed("GPTNeoXForCausalLM", "GPTNeoXConfig", **UNGROUPED),
    "gpt2": renamed(
        "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, n_positions=512
    ),
    "opt": renamed(
        "OPTForCausalLM", "OPTConfig", **UNGROUPED, ffn_dim=64, word_embed_proj_dim=64, init_std=0.3
    ),
    "falcon": renamed(
        "FalconForCausalLM",
        "FalconConfig",
        **UNGROUPED,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon_alibi": renamed(
        "FalconForCausalLM",
        "FalconConfig",
        **UNGROUPED,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
    ),
    "bloom": renamed("BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4),
    "mpt": renamed(
        "MptForCausalLM", "MptConfig", d_model=64, n_layers=2, n_heads=4, max_seq_len=512
    ),
    "exaone4": decoder("Exaone4", **WINDOWED, sliding_window_pattern=2),
    "glm4": decoder("Glm4", head_dim=16),
    "ernie4_5": decoder("Ernie4_5", head_dim=16, use_bias=True),
    "hunyuan_v1_dense": decoder("HunYuanDenseV1", head_dim=16),
    "seed_oss": decoder("SeedOss", head_dim=16),
    "lfm2": decoder("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    "gpt_oss": decoder(
        "GptOss",
        **WINDOWED,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v2": decoder(
        "DeepseekV2",
        **LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "deepseek_v3": decoder(
        "DeepseekV3",
        **LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "minicpm3": decoder("MiniCPM3", **LATENT, scale_emb=3, dim_model_base=16),
    "nemotron_h": decoder(
        "NemotronH",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=12,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=64,
    ),
    "falcon_h1": decoder(
        "FalconH1",
        **MAMBA,
        mamba_d_ssm=128,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        key_multiplier=0.7,
        attention_out_multiplier=0.8,
        ssm_out_multiplier=1.3,
    ),
}
ENCODERS = {
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "xlm-roberta": encoder("XLMRoberta"),
    "deberta-v2": encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "electra": encoder("Electra", embedding_size=128),
    "modernbert": encoder(
        "ModernBert",
        local_attention=WINDOW,
        layer_types=LOCAL_FIRST,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": len(encoder_tokenizer()),
            "dim": 64,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "pad_token_id": 0,
        },
        True,
    ),
}
FAMILIES = {**DECODERS, **ENCODERS}
"""The rows of the matrix by name."""
