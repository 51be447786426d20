"""Name patterns of embedding tables, and of similarly named tensors, in known model families.

Patterns are matched against a tensor's name without wrapper prefixes and without a trailing `.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_forward_module.", "_orig_mod.", "module.")


@dataclass(frozen=True)
class Pattern:
    """A name pattern, with the reason and the confidence that it implies.

    Attributes:
        regex: searched in the stripped name.
        reason: explanation for the report.
        confidence: confidence that the tensor is an embedding table, 0 to 1.
        parameter: whether a parameter that is not the weight of a layer may be such a table too. Grids of
            positions and codebooks are such parameters, with names that contain "embed", and no lookups.
    """

    regex: re.Pattern[str]
    reason: str
    confidence: float = 0.0
    parameter: bool = False


def _pattern(regex: str, reason: str, confidence: float = 0.0, parameter: bool = False) -> Pattern:
    return Pattern(re.compile(regex), reason, confidence, parameter)


_START = r"(?:^|\.)"
TABLES = (
    _pattern(_START + r"emb_l\.\d+$", "DLRM emb_l.N", 0.99),
    _pattern(_START + r"token_embedding_table\.embedding$", "RecBole fused token fields", 0.99),
    _pattern(_START + r"embedding_dict\.[^.]+$", "DeepCTR embedding_dict", 0.98, parameter=True),
    _pattern(_START + r"(?:embedding|fm_embedding|ffm\.embeddings\.\d+)\.embedding$", "fused feature table", 0.97),
    _pattern(
        _START + r"(?:user|item|attribute|category|feature|field|artist|movie|news|tag)s?"
        r"_?(?:id_)?(?:emb|embed|embedding|embeddings)(?:_table|_layer)?$",
        "recommender table",
        0.99,
        parameter=True,
    ),
    _pattern(
        _START + r"(?:user|item|artist|movie|news|tag|category)s?(?:_ids?)?$",
        "named like the ids of a recommender table",
        0.8,
    ),
    _pattern(
        _START + r"(?:embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|token_embd|shared|"
        r"token_embeddings?|char_embeddings?|src_embed|tgt_embed|embed_out_tied)$",
        "token embeddings of a language model",
        0.98,
        parameter=True,
    ),
    _pattern(
        _START
        + r"(?:wpe|embed_positions|(?:[a-z0-9_]*_)?(?:pos|positions?|positional)_(?:emb|embeds?|embeddings?)"
        r"(?:_table|_layer)?)$",
        "position embeddings",
        0.95,
    ),
    _pattern(
        _START + r"(?:token_type|segment|type|lang|language)_?(?:embeddings?|emb|embed)$",
        "token type embeddings",
        0.95,
    ),
    _pattern(
        _START + r"(?:entity|ent|relation|rel|node)_(?:emb|embed|embedding|embeddings)"
        r"(?:\._embeddings?)?$",
        "knowledge graph embeddings",
        0.98,
        parameter=True,
    ),
    _pattern(_START + r"(?:entity|relation)_representations\.\d+\._embeddings$", "PyKEEN representation", 0.98),
    _pattern(_START + r"codebook$", "codebook of a vector quantizer", 0.95),
    _pattern(_START + r"(?:embedding_bags|embeddings)\.[^.]+$", "TorchRec embedding collection", 0.97),
    _pattern(_START + r"embe?d?s?(?:_layers?|_dict)?\.[^.]+$", "a member of a dict of embeddings", 0.85),
    _pattern(_START + r"_embeddings?$", "PyKEEN representation", 0.95),
    _pattern(r"^(?:embeddings?|emb|vectors|word_vectors)$", "the file's own embedding tensor", 0.95, True),
    _pattern(
        _START + r"(?:[a-z0-9_]*_)?(?:emb|embs|embed|embeds|embedding|embeddings|lookup|lut)(?:_[a-z]+)?"
        r"(?:\.\d+)?$",
        "named like an embedding",
        0.9,
    ),
    _pattern(r"(?i)embed", "its name contains embed", 0.75),
)
"""First match wins."""
UNKNOWN = _pattern("", "", 0.1)
"""What a name implies that matches nothing."""
LISTED = re.compile(r"(?:^|\.)\d+(?:\.|$)")
"""A member of a numbered list of layers, or in one."""
NOT_TABLES = (
    _pattern(r"(?i)(?:patch|patches|conv)_?(?:to_|linear_)?embed[a-z]*$", "projects image patches"),
    _pattern(
        r"(?i)(?:embed[a-z_]*|emb)[._]?(?:layer_?)?norm|(?:^|[._])(?:layer_?norm|ln|norm)\d*$|_norm$",
        "a normalization layer",
    ),
    _pattern(r"(?i)exp_avg|momentum_buffer|max_exp_avg|(?:^|\.)(?:optimizer|optim)s?\.", "optimizer state"),
    _pattern(
        _START + r"(?:lm_head|output_projection|embed_out|un_?embed[a-z]*|generator\.proj|decoder|"
        r"cls\.predictions\.decoder)$",
        "an output head that shares no memory with a table",
    ),
    _pattern(r"(?i)rotary|inv_freq|sinusoid|relative_attention_bias", "position arithmetic, not a lookup"),
    _pattern(
        r"(?i)(?:^|[._])(?:t|time|timestep|time_text|guidance|label)_embed(?:der|ding)?\.(?:mlp|linear|proj)",
        "an MLP over embeddings",
    ),
    _pattern(
        r"(?i)embed[a-z_]*[._](?:proj|projection|linear|dense|fc|mlp|conv|transform|mapper|hidden_mapping_in)\w*"
        r"(?:\.\d+)?$",
        "a projection of embeddings",
    ),
    _pattern(
        r"(?i)(?:^|[._])(?:qkv|query|key|value|fc|linear|lin|dense|proj|projection|mlp|ffn|gate|router|up|down|"
        r"heads?|classifier|attention|attn|conv|kernel|top_l|bot_l|out|output|logits)"
        r"(?:_?(?:proj|projection|linear|lin|layer|dense|in|out|\d+))*(?:\.\d+)?$",
        "a linear layer by its name",
    ),
)
"""Checked before TABLES: a match here takes precedence."""
REFUSED = (
    _pattern(_START + r"emb_l\.\d+\.weight_[qr]$", "DLRM's quotient-remainder trick: already compositional"),
    _pattern(
        _START + r"emb_l\.\d+\.(?:embs|proj)$",
        "DLRM's mixed-dimension trick: the table has its own projection",
    ),
)
"""Tables that another technique has already compressed; they are not compressed again."""
FOREIGN = (
    _pattern(
        r"(?:^|\.)(?P<stem>.*?)\.?(?:weight_packed|weight_qscale|weight_qzero_points?)$",
        "quantized by a row-wise packer",
    ),
    _pattern(r"(?:^|\.)(?P<stem>.*?)\.?assignments$", "quantized by iPQ (centroids and assignments)"),
    _pattern(
        r"^(?P<stem>.*?)\.?(?:weight\.)?(?:absmax|quant_map|quant_state\.[\w]+)$", "quantized by bitsandbytes"
    ),
    _pattern(r"^(?P<stem>.*?)\.?(?:qweight|qzeros)$", "quantized by GPTQ or AWQ"),
    _pattern(r"^(?P<stem>)mapping$", "a model2vec table with quantized vocabulary (`mapping`)"),
)
"""Tensors that occur only in files quantized by another tool."""
TIED_PAIRS = (
    (r"lm_head\.weight$", r"(?:embed_tokens|wte|word_embeddings?|shared|tok_embeddings|embed_in)\.weight$"),
    (r"embed_out\.weight$", r"embed_in\.weight$"),
    (r"cls\.predictions\.decoder\.weight$", r"word_embeddings\.weight$"),
    (r"(?:encoder|decoder)\.embed_tokens\.weight$", r"shared\.weight$"),
    (r"decoder\.embed_tokens\.weight$", r"encoder\.embed_tokens\.weight$"),
    (r"output_projection\.weight$", r"embed_tokens\.weight$"),
    (r"output\.weight$", r"tok_embeddings\.weight$"),
)
"""(head, table): names under which models save a tied weight twice if the format cannot share memory."""


def stripped(name: str) -> str:
    """Remove wrapper prefixes at any position, and the trailing `.weight`."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name.removesuffix(".weight")
