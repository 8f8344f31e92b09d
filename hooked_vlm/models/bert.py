"""BLIP's text transformer: a BERT (Devlin et al. 2019) that can look at another tower, encode or decode."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import TokenEmbedding, activation, bidirectional_mask, build_norm, causal_mask
from hooked_vlm.config import AttentionImplementation, BertConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.models.tower import Known, Tower, shown


class Unembedding(nn.Module):
    """BERT's language-model head around its LayerNorm: a dense layer before, the vocabulary after."""

    def __init__(self, d_model: int, d_vocab: int, act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.act = activation(act)
        self.decoder = nn.Linear(d_model, d_vocab)


class Bert(Tower):
    """Token ids to states, and to logits where the tower has a head."""

    config: BertConfig

    def __init__(self, config: BertConfig, attention: AttentionImplementation) -> None:
        super().__init__(config)
        self.embed = TokenEmbedding(config.d_vocab, config.d_model, config.n_ctx)
        self.hook_embed = HookPoint("b p d_model")
        self.hook_pos_embed = HookPoint("b p d_model")
        self.ln_pre = build_norm(config)
        self.hook_full_embed = HookPoint("b p d_model", aliased=True)
        self._build_blocks(attention)
        self.hook_out = HookPoint("b p d_model", aliased=True)
        if config.has_head:
            self.unembed = Unembedding(config.d_model, config.d_vocab, config.act)
            self.ln_final = build_norm(config)
            self.hook_logits = HookPoint("b p d_vocab")
            if config.ties_embeddings:
                self.unembed.decoder.weight = self.embed.token.weight

    def embed_tokens(
        self,
        input_ids: Int[Tensor, "b p"],
        *,
        known: Known | None = None,
        position_ids: Int[Tensor, "b p"] | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        """What block 0 reads."""
        self.n_known = 0 if known is None else len(known)
        batch, n_new = input_ids.shape
        tokens = self.hook_embed(self.embed.token(input_ids))
        pos = shown(self.hook_pos_embed, self.embed.positions(self.n_known, n_new, position_ids), batch)
        return self.hook_full_embed(self.ln_pre(tokens + pos))

    def forward(
        self,
        input_ids: Int[Tensor, "b p"],
        attention_mask: Int[Tensor, "b p_all"] | None = None,
        *,
        other: Float[Tensor, "b k d_other"] | None = None,
        other_attention_mask: Int[Tensor, "b k"] | None = None,
        known: Known | None = None,
        position_ids: Int[Tensor, "b p"] | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        """States ``[b p d_model]`` after the last block.

        Args:
            attention_mask: 1 for tokens, 0 for padding; covers the known positions too.
            other: the states that cross-attention reads; without them cross-attention is passed over.
            other_attention_mask: 0 for states of ``other`` that nobody may read.
            known: keys and values of earlier positions, extended by this call.
        """
        resid = self.embed_tokens(input_ids, known=known, position_ids=position_ids)
        n_new, dtype = input_ids.shape[1], self.embed.token.weight.dtype
        if self.config.is_causal:
            mask = causal_mask(attention_mask, n_new, self.n_known, dtype, input_ids.device)
        else:
            mask = bidirectional_mask(attention_mask, n_new, dtype)
        other_mask = bidirectional_mask(other_attention_mask, n_new, dtype)
        return self.read_out(self.run_blocks(resid, mask=mask, known=known, other=other, other_mask=other_mask))

    def read_out(self, resid: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.hook_out(resid)

    def logits(self, states: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_vocab"]:
        """The head: dense, GELU, LayerNorm, vocabulary."""
        return self.hook_logits(self.unembed.decoder(self.ln_final(self.unembed.act(self.unembed.dense(states)))))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.token.weight

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        return self.embed.pos.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.decoder.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.decoder.bias
