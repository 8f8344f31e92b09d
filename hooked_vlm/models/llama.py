"""The language model: a LLaMA (Touvron et al. 2023), or one of its kin by config: Vicuna, Mistral, Qwen2, Phi-3."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import Rotary, TokenEmbedding, build_norm, causal_mask
from hooked_vlm.config import AttentionImplementation, LlamaConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.models.tower import Known, Tower


class Llama(Tower):
    """Token ids to embeddings, embeddings to states, states to logits; images take their places among embeddings."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, attention: AttentionImplementation) -> None:
        super().__init__(config)
        assert config.rotary is not None
        self.embed = TokenEmbedding(config.d_vocab, config.d_model)
        self.rotary = Rotary(config.rotary)
        self.hook_embed = HookPoint("b p d_model")
        self.hook_merged_embed = HookPoint("b p d_model", aliased=True)
        self.hook_full_embed = HookPoint("b p d_model", aliased=True)
        self._build_blocks(attention)
        self.ln_final = build_norm(config)
        self.hook_out = HookPoint("b p d_model", aliased=True)
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=config.has_head_bias)
        self.hook_logits = HookPoint("b p d_vocab")
        if config.ties_embeddings:
            self.unembed.weight = self.embed.token.weight

    def embed_tokens(
        self, input_ids: Int[Tensor, "b p"], *, known: Known | None = None
    ) -> Float[Tensor, "b p d_model"]:
        """The tokens' embeddings; an image token's is a placeholder."""
        self.n_known = 0 if known is None else len(known)
        return self.hook_embed(self.embed.token(input_ids))

    def forward(
        self,
        embeds: Float[Tensor, "b p d_model"],
        attention_mask: Int[Tensor, "b p_all"] | None = None,
        *,
        known: Known | None = None,
        position_ids: Int[Tensor, "b p"] | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        """States ``[b p d_model]`` after the last normalisation.

        Args:
            embeds: token embeddings, image features in place.
            attention_mask: 1 for tokens, 0 for padding; covers the known positions too.
            known: keys and values of earlier positions, extended by this call.
            position_ids: by default every position counts, padding too, as in HF's forward; only differences between
                positions matter to a rotary embedding.
        """
        n_known, n_new = 0 if known is None else len(known), embeds.shape[1]
        self.n_known = n_known
        if position_ids is None:
            position_ids = torch.arange(n_known, n_known + n_new, device=embeds.device)[None]
        windows = self.config.windows or (None,) * len(self.blocks)
        masks = {
            window: causal_mask(attention_mask, n_new, n_known, embeds.dtype, embeds.device, window)
            for window in set(windows)
        }
        resid = self.run_blocks(
            self.merged(embeds),
            mask=[masks[window] for window in windows],
            known=known,
            rotation=self.rotary(position_ids, embeds.dtype),
        )
        return self.read_out(resid)

    def merged(self, embeds: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        """What block 0 reads, of token embeddings with the image features in place."""
        return self.hook_full_embed(self.hook_merged_embed(embeds))

    def read_out(self, resid: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.hook_out(self.ln_final(resid))

    def logits(self, states: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_vocab"]:
        return self.hook_logits(self.unembed(states))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.token.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        return self.unembed.bias
