"""Model that vLLM builds from a pruned checkpoint: vLLM's Llama with layers of different sizes.

The layers of Llama, Mistral, Qwen2 and Qwen3 are the same computation but for biases and the norms over queries and
keys, so vLLM's Llama layers serve all four; those of Granite and SmolLM3, as pyprune writes them, should be no others,
but were not run. vLLM's own Qwen2 would not do: it takes the head dimension to be hidden_size / heads. Weight loading,
packing (qkv_proj, gate_up_proj), quantization and pipeline parallelism are vLLM's; each layer's `Attention` gets that
layer's heads, from which vLLM sizes its KV cache.

Written against vLLM 0.32 and 0.33.
"""

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from ...architectures import QWEN2, QWEN3, family_of
from ...errors import InputError
from .tensor_parallel import check_tensor_parallel


class PrunedAttention(LlamaAttention):
    """Attention with the layer's number of heads, Qwen2's biases on q, k, v, and `o_proj_bias`."""

    def __init__(self, config: Any, *, bias: bool, bias_o_proj: bool, **arguments: Any) -> None:
        super().__init__(
            config,
            bias=bias or family_of(config.model_type) is QWEN2,
            bias_o_proj=bias_o_proj or config.o_proj_bias,
            **arguments,
        )


class PrunedQwen3Attention(PrunedAttention):
    """Attention with Qwen3's norms over each head's queries and keys, before the rotary embedding."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[tokens], [tokens, hidden_size] → [tokens, hidden_size]."""
        qkv, _ = self.qkv_proj(hidden_states)  # [tokens, (heads + 2 · KV heads) · head_dim], of this device
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class PrunedDecoderLayer(LlamaDecoderLayer):
    """A layer built from its entry of `per_layer_config`, with a bias on down_proj if `down_proj_bias`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        own = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        attention = PrunedQwen3Attention if family_of(own.model_type) is QWEN3 else PrunedAttention
        super().__init__(vllm_config, prefix, own, attn_layer_type=attention)
        if own.down_proj_bias and self.mlp.down_proj.bias is None:
            self.mlp.down_proj = RowParallelLinear(
                own.intermediate_size,
                own.hidden_size,
                bias=True,
                quant_config=self.get_quant_config(vllm_config),
                prefix=f"{prefix}.mlp.down_proj",
            )


class PrunedForCausalLM(LlamaForCausalLM):
    """A pruned model of any family that pyprune knows.

    InputError: a layer that cannot be split over the tensor-parallel devices.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PrunedDecoderLayer):
        config = vllm_config.model_config.hf_config
        if not family_of(config.model_type).computes_llama(config):
            raise InputError(f"vLLM: factors or layers of this {config.model_type} model are not those of Llama")
        check_tensor_parallel(family_of(config.model_type).shapes(config), get_tensor_model_parallel_world_size())
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
