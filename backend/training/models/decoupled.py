"""Decoupled cross-attention (IP-Adapter, arXiv 2308.06721): style and identity tokens have keys and values of their own beside the text's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TEXT_TOKENS = 77


class Branch(nn.Module):
    """One cross-attention layer's own keys and values, which begin as the text's, and a gate per channel on what they give, which begins
    at zero: at step 0 the network is the base bit for bit."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.key = _copy(attention.to_k)
        self.value = _copy(attention.to_v)
        self.gate = nn.Parameter(torch.zeros(self.value.out_features, device=self.value.weight.device))

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """query (B, heads, N, d), tokens (B, T, D) -> (B, heads, N, d) in the query's dtype."""
        tokens = tokens.to(self.gate.dtype)
        heads = query.shape[1]
        key, value = (_heads(project(tokens), heads).to(query.dtype) for project in (self.key, self.value))
        gate = self.gate.view(heads, 1, -1).to(query.dtype)
        return gate * F.scaled_dot_product_attention(query, key, value)


class DecoupledAttention:
    """Processor of a diffusers cross-attention layer: attention to the 77 text tokens plus the branch's to what follows them.

    A context of text alone gives what diffusers' own processor gives, bit for bit. The branch is registered by its owner, not here.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, C), encoder_hidden_states (B, 77 + T, D) -> (B, N, C). Raises ValueError for a mask, which SDXL has none of."""
        if attention_mask is not None:
            raise ValueError("masks on the context are not supported with decoupled injection")
        text, tokens = encoder_hidden_states[:, :TEXT_TOKENS], encoder_hidden_states[:, TEXT_TOKENS:]
        query = _heads(attn.to_q(hidden_states), attn.heads)
        attended = F.scaled_dot_product_attention(query, _heads(attn.to_k(text), attn.heads), _heads(attn.to_v(text), attn.heads))
        if tokens.shape[1]:
            attended = attended + self.branch(query, tokens)
        joined = attended.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](joined))


def decouple(unet: Any) -> nn.ModuleList:
    """Gives every cross-attention layer of an SDXL UNet a branch and returns the branches, which the caller registers."""
    branches = nn.ModuleList()
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            branch = Branch(module)
            module.set_processor(DecoupledAttention(branch))
            branches.append(branch)
    return branches


def _copy(linear: Any) -> nn.Linear:
    """A float32 copy of a projection without bias."""
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    with torch.no_grad():
        copy.weight.copy_(linear.weight)
    return copy


def _heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
