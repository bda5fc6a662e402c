"""Parameters of published models that have no preset of ours: shapes from their config.json, counts as published.

DeepSeek-V2 and V3 (671 B, 37 B active) and Kimi K2 are not here: their attention keeps a compressed latent and their
first blocks are dense, which our settings cannot say. Presets are held in ``test_flops.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.plan.flops import count_parameters

Published = tuple[str, dict[str, Any], dict[str, Any] | None, float, float | None, str]
"""Name, model, experts, total, active (None: dense), source."""

MODELS: list[Published] = [
    ("Qwen3-30B-A3B", {"num_layers": 48, "d_model": 2048, "num_heads": 32, "num_kv_heads": 4, "d_head": 128,
                       "d_ff": 6144, "vocab_size": 151936},
     {"num_experts": 128, "top_k": 8, "d_expert": 768}, 30.5e9, 3.3e9, "Qwen/Qwen3-30B-A3B, model card"),
    ("Qwen3-235B-A22B", {"num_layers": 94, "d_model": 4096, "num_heads": 64, "num_kv_heads": 4, "d_head": 128,
                         "d_ff": 12288, "vocab_size": 151936},
     {"num_experts": 128, "top_k": 8, "d_expert": 1536}, 235e9, 22e9, "Qwen/Qwen3-235B-A22B, model card"),
    ("Qwen2-57B-A14B", {"num_layers": 28, "d_model": 3584, "num_heads": 28, "num_kv_heads": 4, "d_ff": 18944,
                        "vocab_size": 151936},
     {"num_experts": 64, "top_k": 8, "d_expert": 2560, "num_shared_experts": 8, "shared_gate": True}, 57.4e9, 14e9,
     "Qwen2 technical report, arXiv:2407.10671, table 1; Qwen/Qwen2-57B-A14B, model card"),
    ("Qwen1.5-MoE-A2.7B", {"num_layers": 24, "d_model": 2048, "num_heads": 16, "d_ff": 5632, "vocab_size": 151936},
     {"num_experts": 60, "top_k": 4, "d_expert": 1408, "num_shared_experts": 4, "shared_gate": True}, 14.3e9, 2.7e9,
     "Qwen/Qwen1.5-MoE-A2.7B, model card"),
    ("OLMoE-1B-7B", {"num_layers": 16, "d_model": 2048, "num_heads": 16, "d_ff": 1024, "vocab_size": 50304},
     {"num_experts": 64, "top_k": 8, "d_expert": 1024}, 6.9e9, 1.3e9, "arXiv:2409.02060"),
    ("DBRX", {"num_layers": 40, "d_model": 6144, "num_heads": 48, "num_kv_heads": 8, "d_ff": 10752,
              "vocab_size": 100352},
     {"num_experts": 16, "top_k": 4}, 132e9, 36e9, "databricks/dbrx-base, model card"),
    ("Phi-3.5-MoE", {"num_layers": 32, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "d_ff": 6400,
                     "vocab_size": 32064},
     {"num_experts": 16, "top_k": 2}, 41.9e9, 6.6e9, "microsoft/Phi-3.5-MoE-instruct, model card; its checkpoint"),
    ("Grok-1", {"num_layers": 64, "d_model": 6144, "num_heads": 48, "num_kv_heads": 8, "d_ff": 32768,
                "vocab_size": 131072, "activation": "geglu", "tie_embeddings": True},
     {"num_experts": 8, "top_k": 2}, 314e9, None, "xAI, Open release of Grok-1, 17 March 2024"),
    ("gpt-oss-120b", {"num_layers": 36, "d_model": 2880, "num_heads": 64, "num_kv_heads": 8, "d_head": 64,
                      "d_ff": 2880, "vocab_size": 201088},
     {"num_experts": 128, "top_k": 4}, 116.83e9, None, "arXiv:2508.10925, table 1"),
    ("gpt-oss-20b", {"num_layers": 24, "d_model": 2880, "num_heads": 64, "num_kv_heads": 8, "d_head": 64,
                     "d_ff": 2880, "vocab_size": 201088},
     {"num_experts": 32, "top_k": 4}, 20.91e9, None, "arXiv:2508.10925, table 1"),
    ("Llama 3 8B", {"num_layers": 32, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "d_ff": 14336,
                    "vocab_size": 128256}, None, 8_030_261_248, None, "meta-llama/Meta-Llama-3-8B, its checkpoint"),
    ("Llama 3 70B", {"num_layers": 80, "d_model": 8192, "num_heads": 64, "num_kv_heads": 8, "d_ff": 28672,
                     "vocab_size": 128256}, None, 70_553_706_496, None, "meta-llama/Meta-Llama-3-70B, its checkpoint"),
    ("Llama 3.1 405B", {"num_layers": 126, "d_model": 16384, "num_heads": 128, "num_kv_heads": 8, "d_ff": 53248,
                        "vocab_size": 128256}, None, 405e9, None, "arXiv:2407.21783, table 3"),
    ("Llama 2 7B", {"num_layers": 32, "d_model": 4096, "num_heads": 32, "d_ff": 11008, "vocab_size": 32000}, None,
     6_738_415_616, None, "meta-llama/Llama-2-7b-hf, its checkpoint"),
    ("Mistral 7B", {"num_layers": 32, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "d_ff": 14336,
                    "vocab_size": 32000}, None, 7_241_732_096, None, "mistralai/Mistral-7B-v0.1, its checkpoint"),
    ("MPT-30B", {"num_layers": 48, "d_model": 7168, "num_heads": 64, "d_ff": 28672, "vocab_size": 50368,
                 "activation": "gelu", "norm": "layernorm", "positions": "learned", "context": 2048,
                 "tie_embeddings": True}, None, 29_975_214_080, None,
     "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "moe", "total", "active", "source"), MODELS, ids=[row[0] for row in MODELS])
def test_a_model_has_the_published_parameters(name, model, moe, total, active, source) -> None:
    shapes = {"tie_embeddings": False, "context": 4096, **model}
    count = count_parameters(ModelConfig(**shapes, moe=MoEConfig(**moe) if moe else None))
    assert count.total == pytest.approx(total, rel=0.01), source
    if active is not None:
        # published with two digits, some of them cut off rather than rounded
        digit = 0.1e9 if active < 10e9 else 1e9
        assert active - digit / 2 <= count.active < active + digit, source


def test_there_are_enough_of_them() -> None:
    assert len(MODELS) >= 12
