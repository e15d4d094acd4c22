"""The grammar of decoders, on one page and without JAX: what a config may say, and what it means.

Each choice is a small tagged part with its paper. The component that a part describes lives in
`models/layers/`; nothing here computes, so a wrong config is refused before JAX is loaded.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from jaxllm.core.config import Config, merge, union
from jaxllm.models.masks import Causal, Mask
from jaxllm.models.positions import LayerPosition, Learned, Position, Relative, RoPE, RoPE2D

if TYPE_CHECKING:
    from jaxllm.models.decoder import Decoder
    from jaxllm.models.encoder import Encoder
    from jaxllm.models.encoder_decoder import EncoderDecoder


# --- norms ---------------------------------------------------------------------------------------------------


class RMSNorm(Config):
    """x / rms(x) * scale (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    epsilon: float = Field(1e-6, gt=0)  # added to the mean square
    unit_offset: bool = False  # store scale - 1, so that weight decay pulls towards 1 (Gemma)


class LayerNorm(Config):
    """(x - mean) / std * scale + bias (Ba et al. 2016, arXiv:1607.06450); without bias: PaLM, arXiv:2204.02311."""

    kind: Literal["layernorm"] = "layernorm"
    epsilon: float = Field(1e-5, gt=0)  # added to the variance
    bias: bool = True  # learn a shift as well as a scale
    scale: bool = True  # learn a scale (OLMo, arXiv:2402.00838: neither)

    @model_validator(mode="after")
    def _no_shift_alone(self):
        if self.bias and not self.scale:
            raise ValueError("bias=true needs scale=true")
        return self


Norm = union(RMSNorm, LayerNorm)


# --- where the norms stand -----------------------------------------------------------------------------------


class Pre(Config):
    """x + f(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    kind: Literal["pre"] = "pre"


class Post(Config):
    """norm(x + f(x)) (Vaswani et al. 2017, arXiv:1706.03762)."""

    kind: Literal["post"] = "post"


class Sandwich(Config):
    """x + norm(f(norm(x))) (Ding et al. 2021, arXiv:2105.13290; Gemma 2, arXiv:2408.00118)."""

    kind: Literal["sandwich"] = "sandwich"


class Parallel(Config):
    """x + attention(norm(x)) + ffn(norm'(x)) (GPT-J; PaLM, arXiv:2204.02311, section 2)."""

    kind: Literal["parallel"] = "parallel"
    norms: Literal[1, 2] = 1  # one shared by both branches (GPT-J, PaLM) or one each (GPT-NeoX, arXiv:2204.06745)


class ResPost(Config):
    """x + norm(f(x)) (Liu et al. 2021, arXiv:2111.09883, section 3.2; OLMo 2, arXiv:2501.00656)."""

    kind: Literal["res_post"] = "res_post"


class NormedResidual(Config):
    """alpha norm(x) + f(norm(x)) (GLM; BLOOM's apply_residual_connection_post_layernorm, with alpha = 1)."""

    kind: Literal["normed_residual"] = "normed_residual"
    alpha: float = Field(1.0, gt=0)  # weight of the normed input (ChatGLM: (2L)^(1/2))


class SubLN(Config):
    """Pre-norm with a second norm before each output projection (Magneto, Wang et al. 2022, arXiv:2210.06423)."""

    kind: Literal["subln"] = "subln"


class DeepNorm(Config):
    """norm(alpha x + f(x)), alpha = (2L)^(1/4) (Wang et al. 2022, arXiv:2203.00555, table 1, decoder-only).

    The values, output projection and FFN weights start scaled by beta = (8L)^(-1/4).
    """

    kind: Literal["deepnorm"] = "deepnorm"


Placement = union(Pre, Post, Sandwich, Parallel, ResPost, NormedResidual, SubLN, DeepNorm)


# --- attention and feed-forward --------------------------------------------------------------------------------


class Attention(Config):
    """Multi-head (num_kv_heads = num_heads), grouped (fewer) or multi-query (1) attention.

    Vaswani et al. 2017, arXiv:1706.03762; Shazeer 2019, arXiv:1911.02150; Ainslie et al. 2023, arXiv:2305.13245.
    """

    num_heads: int = Field(8, gt=0)  # query heads
    num_kv_heads: int | None = Field(None, gt=0)  # key and value heads; null: as many as query heads
    head_dim: int | None = Field(None, gt=0)  # size of a head; null: embed / num_heads
    bias: bool = False  # biases on the query, key and value projections
    key_bias: bool = True  # with `bias`, on the keys too (DeBERTa: on queries and values only)
    out_bias: bool = False  # bias on the output projection
    position: LayerPosition | None = None  # how order is told to this layer; null: as `position` of the model says
    clip: float | None = Field(None, gt=0)  # queries, keys and values are cut at +-this (MPT, OLMo)
    qk_norm: Norm | None = None  # norm of queries and keys (Henry et al. 2020, arXiv:2010.04245)
    qk_norm_over: Literal["head", "heads"] = "head"  # each head with the same scale, or all heads together (OLMo 2)
    softcap: float | None = Field(None, gt=0)  # logits -> c tanh(logits / c) (Gemma 2, arXiv:2408.00118)
    window: int | None = Field(None, gt=0)  # a query sees itself and window-1 earlier tokens (Mistral, 2310.06825)
    scale: float | None = Field(None, gt=0)  # multiplies q.k; null: head_dim^(-1/2)
    log_scale: int | None = Field(None, gt=1)  # beyond so many, the n-th token's logits grow by log_this(n) (Qwen 1)
    mask: Mask = Causal()  # who sees whom, before window and documents are applied

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


Activation = Literal[
    "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu2", "silu", "sigmoid", "tanh", "mish", "identity"
]  # fmt: skip


class FFN(Config):
    """act(x W_up) W_down, or with a gate act(x W_gate) * (x W_up) W_down (Shazeer 2020, arXiv:2002.05202).

    silu + glu is SwiGLU, gelu + glu GEGLU, relu + glu ReGLU, sigmoid + glu GLU, identity + glu bilinear;
    relu2 is squared ReLU (So et al. 2021, arXiv:2109.08668).
    """

    kind: Literal["dense"] = "dense"
    mlp: int = Field(2048, gt=0)  # width of the hidden layer
    activation: Activation = "silu"  # gelu is exact (erf), gelu_tanh as GPT-2, gelu_sigmoid x sigmoid(1.702 x)
    glu: bool = True  # multiply by a gate
    bias: bool = False  # biases on all its projections


class _Router(Config):
    renormalise: bool = True  # weights of the chosen experts are divided by their sum
    bias: bool = False  # a bias on the logits
    scale: float = Field(1.0, gt=0)  # the weights are multiplied by this (DeepSeek-V2's routed_scaling_factor)


class SoftmaxRouter(_Router):
    """Softmax over all experts, then the k largest (Shazeer et al. 2017, arXiv:1701.06538; Switch, arXiv:2101.03961).

    Renormalised this is the softmax over the logits of the chosen alone (Mixtral, arXiv:2401.04088, section 2.1);
    Switch, Qwen2-MoE and OLMoE (arXiv:2409.02060) take the probabilities as they are.
    """

    kind: Literal["softmax"] = "softmax"


class SigmoidRouter(_Router):
    """Each expert has a sigmoid of its own; the k largest (DeepSeek-V3, arXiv:2412.19437, equations 13-15)."""

    kind: Literal["sigmoid"] = "sigmoid"


Router = union(SoftmaxRouter, SigmoidRouter)


class Factor(Config):
    """ceil(factor k T / E) tokens of a row of T (Switch, arXiv:2101.03961, equation 3; GShard, arXiv:2006.16668)."""

    kind: Literal["factor"] = "factor"
    factor: float = Field(1.25, gt=0)  # times an expert's share of even use


class Slots(Config):
    """So many tokens of a row, however long it is (as transformers counts for Switch)."""

    kind: Literal["slots"] = "slots"
    slots: int = Field(64, gt=0)  # tokens


Capacity = union(Factor, Slots)


class Shared(Config):
    """A feed-forward that every token passes beside its experts (DeepSeekMoE, arXiv:2401.06066, section 3.2)."""

    mlp: int = Field(2048, gt=0)  # width of the hidden layer, of all shared experts together
    gate: bool = False  # multiplied by sigmoid(x w) (Qwen2-MoE, arXiv:2407.10671)


class MoE(Config):
    """Feed-forwards of which a router gives each token its k best, weighted (Shazeer et al. 2017, arXiv:1701.06538).

    Dispatch is dense: every expert computes every token, those that were not chosen with weight 0. The router computes
    in float32 (Switch, arXiv:2101.03961, section 2.4). What keeps experts evenly used is `router` of the objective.
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(8, gt=0, le=65536)  # feed-forwards to choose from
    top_k: int = Field(2, gt=0)  # that a token is sent to
    mlp: int = Field(2048, gt=0)  # width of an expert's hidden layer
    activation: Activation = "silu"  # as of a dense feed-forward
    glu: bool = True  # multiply by a gate
    bias: bool = False  # biases on all projections of the experts
    router: Router = SoftmaxRouter()  # how tokens choose
    shared: Shared | None = None  # a feed-forward for every token; null: none
    capacity: Capacity | None = None  # tokens an expert takes of a row, first ones first; null: all that choose it
    jitter: float = Field(0.0, ge=0, lt=1)  # router inputs are multiplied by 1 +- this in training (Switch: 0.01)

    @model_validator(mode="after")
    def _enough_experts(self):
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} must not be above experts={self.experts}")
        return self


FeedForward = union(FFN, MoE, default=FFN)


class Dropout(Config):
    """Probabilities of zeroing, in training only (Srivastava et al. 2014)."""

    embedding: float = Field(0.0, ge=0, lt=1)  # of the embedded tokens
    attention: float = Field(0.0, ge=0, lt=1)  # of attention probabilities
    residual: float = Field(0.0, ge=0, lt=1)  # of each branch before it is added


class Block(Config):
    """One layer: attention and feed-forward with residual connections."""

    norm: Norm = RMSNorm()  # the norm used everywhere in the layer
    placement: Placement = Pre()  # where the norms stand
    attention: Attention = Attention()  # the attention
    cross: Attention | None = None  # attention to all of an encoder's output, between the two, whatever its mask
    ffn: FeedForward = FFN()  # the feed-forward

    @model_validator(mode="after")
    def _norms_have_a_place(self):
        if self.placement.kind == "subln" and self.ffn.kind == "moe":
            raise ValueError("placement=subln puts a norm into the feed-forward, and ffn=moe has many; take another")
        return self


# --- initialisation ------------------------------------------------------------------------------------------


class FanIn(Config):
    """Truncated normal of variance scale / fan-in (LeCun et al. 1998)."""

    kind: Literal["fan_in"] = "fan_in"
    scale: float = Field(1.0, gt=0)  # variance times fan-in
    embedding: float | None = Field(
        None, gt=0
    )  # std of embedding rows; null: 1, or embed^(-1/2) where the head is tied


class Normal(Config):
    """Normal of fixed std, everywhere (GPT-1, BERT: 0.02)."""

    kind: Literal["normal"] = "normal"
    std: float = Field(0.02, gt=0)  # standard deviation
    scale_residual: bool = False  # output projections by a further 1/sqrt(2L) (GPT-2; Radford et al. 2019, 2.3)


class SmallInit(Config):
    """Normal of std sqrt(2 / (5 D)) (Nguyen & Salazar 2019, arXiv:1910.05895), outputs 2 / (L sqrt(D)) (GPT-NeoX)."""

    kind: Literal["small"] = "small"


class Xavier(Config):
    """Normal of variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010); embeddings std D^(-1/2)."""

    kind: Literal["xavier"] = "xavier"


Init = union(FanIn, Normal, SmallInit, Xavier)


# --- stacks of layers ----------------------------------------------------------------------------------------


class Stack(Config):
    """What decoders and encoders have in common: embeddings, layers, how order is told.

    Layers repeat `pattern` (each entry is `block` with what the entry says laid over it; empty: `block` alone):
    one entry for LLaMA, two for Gemma 2's local and global layers. Layers of one entry are stacked and scanned.
    """

    vocab: int | None = Field(None, gt=0)  # rows of the embedding; null: the size of the data's tokenizer
    context: int = Field(2048, gt=0)  # longest sequence the model is meant for
    embed: int = Field(512, gt=0)  # width of the residual stream
    table: int | None = Field(None, gt=0)  # width of embedding and head, then projected (OPT 350M, ALBERT); null: embed
    num_layers: int = Field(8, gt=0)  # layers
    block: Block = Block()  # what a layer is
    pattern: tuple[Block, ...] = ()  # a repeating group of layers that differ, each a diff to `block`
    position: Position = RoPE()  # how order is told
    relative: Relative | None = None  # what distance adds to the logits of attention, besides `position`
    random_positions: int | None = Field(None, gt=0)  # positions that those of tokens are drawn from (2305.16843)
    embed_scale: float = Field(1.0, gt=0)  # embeddings are multiplied by this (Gemma, T5: sqrt(embed))
    embedding_norm: Norm | None = None  # norm of the embeddings (BERT; BLOOM, arXiv:2211.05100)
    final_norm: bool = True  # norm before the output head; post-norm stacks end in a norm already
    dropout: Dropout = Dropout()  # regularisation in training
    init: Init = FanIn()  # how weights start

    @model_validator(mode="before")
    @classmethod
    def _pattern_over_block(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("pattern"), list | tuple):
            return tree
        low = tree.get("block", {})
        low = low.model_dump() if isinstance(low, Block) else low
        pattern = [merge(low, entry) if isinstance(entry, dict) else entry for entry in tree["pattern"]]
        return tree | {"pattern": pattern}

    @model_validator(mode="after")
    def _parts_fit(self):
        for block in self.blocks:
            a = block.attention
            if a.head_dim is None and self.embed % a.num_heads:
                raise ValueError(
                    f"embed={self.embed} must be a multiple of num_heads={a.num_heads}, or set attention.head_dim"
                )
            position, rotated = self.position_of(a), self.rotary_dim(a)
            if isinstance(position, RoPE):
                if rotated % 2 or not rotated:
                    raise ValueError(
                        f"position.fraction={position.fraction} rotates {rotated} of head_dim={self.head_dim(a)}: must "
                        "be even and above 0"
                    )
                if wrong := [
                    n for n in ("short", "long") if len(getattr(position.scaling, n, ())) not in (0, rotated // 2)
                ]:
                    raise ValueError(
                        f"position.scaling.{wrong[0]} has {len(getattr(position.scaling, wrong[0]))} divisors for "
                        f"{rotated // 2} frequencies"
                    )
            if isinstance(position, RoPE2D) and rotated % 4:
                raise ValueError(f"position=rope_2d needs heads of a multiple of 4 elements, got head_dim={rotated}")
            if block.cross is not None and block.placement.kind not in ("pre", "post"):
                raise ValueError(f"cross needs placement=pre or post, got {block.placement.kind}")
        sizes = {(b.attention.num_heads, self.head_dim(b.attention)) for b in self.blocks}
        if self.relative is not None and len(sizes) > 1:
            raise ValueError(
                f"relative={self.relative.kind} needs layers with as many heads, and of a size; got {sizes}"
            )
        if len(self.blocks) > self.num_layers:
            raise ValueError(f"pattern has {len(self.blocks)} entries for num_layers={self.num_layers}")
        if len({b.placement.kind in ("post", "deepnorm") for b in self.blocks}) > 1:
            raise ValueError("pattern mixes post-norm with pre-norm placements")
        return self

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The repeating group."""
        return self.pattern or (self.block,)

    def layer(self, index: int) -> Block:
        return self.blocks[index % len(self.blocks)]

    @property
    def num_groups(self) -> int:
        """Whole repetitions of the group; `num_layers % len(blocks)` layers are left over as a tail."""
        return self.num_layers // len(self.blocks)

    def head_dim(self, attention: Attention) -> int:
        return attention.head_dim or self.embed // attention.num_heads

    def position_of(self, attention: Attention) -> Position:
        """How order is told to a layer, besides what the embeddings say."""
        return attention.position or self.position

    def rotary_dim(self, attention: Attention) -> int:
        """Elements of a head that are rotated; 0 without RoPE."""
        return round(self.head_dim(attention) * getattr(self.position_of(attention), "fraction", 0.0))

    @property
    def ropes(self) -> tuple[tuple[RoPE | RoPE2D, int], ...]:
        """The rotations that layers ask for, each once, with the elements of a head that they rotate."""
        every = ((self.position_of(b.attention), self.rotary_dim(b.attention)) for b in self.blocks)
        return tuple(dict.fromkeys(rope for rope in every if rope[0].kind in ("rope", "rope_2d")))

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: for dropout, random positions, or the jitter of routers."""
        return (
            any(self.dropout.model_dump().values())
            or self.random_positions is not None
            or any(moe.jitter for moe in self.mixtures)
        )

    @property
    def mixtures(self) -> tuple[MoE, ...]:
        """The mixtures of the repeating group."""
        return tuple(b.ffn for b in self.blocks if isinstance(b.ffn, MoE))

    @property
    def table_width(self) -> int:
        return self.table or self.embed

    @property
    def deepnorm_alpha(self) -> float:
        return math.pow(2 * self.num_layers, 0.25)

    @property
    def deepnorm_beta(self) -> float:
        return math.pow(8 * self.num_layers, -0.25)


class DecoderConfig(Stack):
    """A decoder-only language model."""

    kind: Literal["decoder"] = "decoder"
    tie: bool = False  # output head = embedding transposed (Press & Wolf 2016, arXiv:1608.05859)
    head_bias: bool = False  # bias on the output head (GPT-J)
    head_norm: bool = False  # rows of the head are scaled to length 1 (Baichuan 2, arXiv:2309.10305, section 2.3)
    logit_scale: float = Field(1.0, gt=0)  # final logits are multiplied by this (MPT)
    logit_softcap: float | None = Field(None, gt=0)  # final logits -> c tanh(logits / c) (Gemma 2)
    query_layer: Block | None = None  # on top of all, with embeddings of places as queries (PanGu-alpha, 2104.12369)
    memory: int = Field(0, ge=0)  # tokens before a segment that layers see as they were (Transformer-XL, 1901.02860)

    @model_validator(mode="after")
    def _query_layer_fits(self):
        if self.query_layer is not None:
            a = self.query_layer.attention
            if a.head_dim is None and self.embed % a.num_heads:
                raise ValueError(f"query_layer: embed={self.embed} must be a multiple of num_heads={a.num_heads}")
            if self.query_layer.cross is not None or self.query_layer.placement.kind != "pre":
                raise ValueError("query_layer takes placement=pre and no cross")
            if self.query_layer.ffn.kind != "dense":
                raise ValueError("query_layer takes ffn=dense")
        return self

    @model_validator(mode="after")
    def _memory_lasts(self):
        if self.memory and (why := self.forgets):
            raise ValueError(f"memory={self.memory}: {why}")
        return self

    @property
    def forgets(self) -> str | None:
        """Why layers cannot see the tokens of earlier segments as they were; None: they can."""
        reasons = {
            "position=learned has no vectors for tokens beyond the context; take relative=xl with position=none, or rope":
                self.position.kind == "learned",
            "position=rope_2d counts from the end of a prefix, which one segment holds; take rope":
                any(rope.kind == "rope_2d" for rope, _ in self.ropes),
            "position.scaling turns all keys by the length of a document, which its last segment tells; take linear or ntk":
                any(rope.by_length for rope, _ in self.ropes),
            "random_positions are drawn for a row, not for the text that goes on in the next; set it to null":
                self.random_positions is not None,
            "a layer sees tokens that follow, which were not there when an earlier segment was computed; take mask=causal":
                not all(b.attention.mask.causal for b in self.blocks),
            "cross attends to the input of one row; set it to null": any(b.cross is not None for b in self.blocks),
            "query_layer has embeddings for the places of one row only; set it to null": self.query_layer is not None,
        }  # fmt: skip
        return next((why for why, holds in reasons.items() if holds), None)

    def build(self, seed: int = 0) -> "Decoder":
        """The model with freshly initialised float32 weights."""
        from flax import nnx

        from jaxllm.models.decoder import Decoder

        return Decoder(self, rngs=nnx.Rngs(seed))


# --- encoders ------------------------------------------------------------------------------------------------


class Mlm(Config):
    """Logits of the token at each place: act(x W), norm, embedding transposed (Devlin et al. 2018, arXiv:1810.04805)."""

    kind: Literal["mlm"] = "mlm"
    activation: Activation = "gelu"  # of the projection to the width of the embedding
    tie: bool = True  # output = embedding transposed
    enhanced: int = Field(0, ge=0)  # times that the last layer is computed again, asked by place (DeBERTa: 2)


class Lm(Config):
    """Logits of the token at each place: embedding transposed, and a bias (Yang et al. 2019, arXiv:1906.08237)."""

    kind: Literal["lm"] = "lm"


class Pooled(Config):
    """Logits of a row, of the `pooler` of one of its tokens (Devlin et al. 2018, arXiv:1810.04805, section 3.2)."""

    kind: Literal["classification"] = "classification"
    labels: int = Field(2, gt=0)  # classes, or 1 for a regression


class NextSentence(Config):
    """Whether the second part follows the first: 2 logits of a row (BERT, section 3.1)."""

    kind: Literal["nsp"] = "nsp"


class SentenceOrder(Config):
    """Whether two parts stand in their order: 2 logits of a row (ALBERT, arXiv:1909.11942, section 3.1)."""

    kind: Literal["sop"] = "sop"


class ReplacedToken(Config):
    """One logit a token: whether a generator replaced it (ELECTRA, arXiv:2003.10555)."""

    kind: Literal["rtd"] = "rtd"
    activation: Activation = "gelu"  # of the projection before it


class PerToken(Config):
    """Logits of each token: named entities, parts of speech."""

    kind: Literal["tokens"] = "tokens"
    labels: int = Field(2, gt=0)  # classes


class Answer(Config):
    """Logits of each token, as start and as end of an answer (SQuAD; BERT, section 4.2)."""

    kind: Literal["qa"] = "qa"


Head = union(Mlm, Lm, Pooled, NextSentence, SentenceOrder, ReplacedToken, PerToken, Answer)
OF_ROWS = ("classification", "nsp", "sop")  # heads that read the pooler


class Convolution(Config):
    """norm(layer(x) + act(conv(x))) in place of the first layer alone (DeBERTa v2's nGiE)."""

    width: int = Field(3, gt=0)  # tokens that it sees, an odd number
    activation: Activation = "tanh"  # of the sum
    groups: int = Field(1, gt=0)  # the channels of each are mixed among themselves only


class EncoderConfig(Stack):
    """A bidirectional encoder with task heads (Devlin et al. 2018, arXiv:1810.04805).

    Token, position and segment embeddings are summed at the width of the `table`, normed, then projected to `embed`.
    """

    kind: Literal["encoder"] = "encoder"
    position: Position = Learned()  # how order is told
    segments: int = Field(0, ge=0)  # kinds of segment, each with an embedding (BERT: 2)
    tasks: int = Field(0, ge=0)  # kinds of task, each with an embedding (ERNIE 2, arXiv:1907.12412)
    repeat: int = Field(1, gt=0)  # times that each layer is computed with the same weights (ALBERT: 12)
    convolution: Convolution | None = None  # beside the first layer
    query_stream: bool = False  # tokens are predicted from their place and the others that they see (XLNet, 2.3)
    pooled: Literal["first", "last"] = "first"  # the token of a row that stands for it; last: rows are padded before it
    pooler: Activation | None = None  # act(x W) of that token, for heads that judge rows; null: the token itself
    heads: tuple[Head, ...] = ()  # what is predicted, each kind at most once

    @model_validator(mode="before")
    @classmethod
    def _sees_all(cls, tree: Any) -> Any:
        """Layers see both ways unless the config says otherwise."""
        return merge({"block": {"attention": {"mask": {"kind": "full"}}}}, tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _parts_agree(self):
        if self.convolution is not None and self.pattern:
            raise ValueError("convolution stands beside the first of layers that are alike; take pattern away")
        if any(b.cross is not None for b in self.blocks):
            raise ValueError("cross is for decoders")
        if self.query_stream and self.convolution is not None:
            raise ValueError("query_stream with convolution: a place would see the token that it predicts")
        if self.query_stream and any(rope.by_length for rope, _ in self.ropes):
            raise ValueError("query_stream with position.scaling by the length of a document: take another scaling")
        if self.head("lm") and self.table not in (None, self.embed):
            raise ValueError(
                f"heads: lm scores by the embedding, of table={self.table} for embed={self.embed}; take mlm"
            )
        if self.enhanced and (self.query_stream or self.repeat > 1 or self.mixtures):
            raise ValueError(
                f"heads: mlm.enhanced={self.enhanced} computes one dense last layer again; take query_stream, repeat and "
                "ffn=moe away"
            )
        if self.enhanced and not self.num_groups:
            raise ValueError(f"heads: mlm.enhanced={self.enhanced} needs layers before the last; raise num_layers")
        kinds = [head.kind for head in self.heads]
        if twice := [k for k in kinds if kinds.count(k) > 1]:
            raise ValueError(f"heads has {twice[0]} twice; each kind once")
        return self

    def head(self, kind: str) -> Any:
        """The head of that kind, or None."""
        return next((head for head in self.heads if head.kind == kind), None)

    @property
    def enhanced(self) -> int:
        """Times that the last layer is computed again for the MLM head."""
        return getattr(self.head("mlm"), "enhanced", 0)

    @property
    def num_groups(self) -> int:
        """As of any stack; the last layer stands apart if it is computed again."""
        return (self.num_layers - bool(self.enhanced)) // len(self.blocks)

    def build(self, seed: int = 0) -> "Encoder":
        """The model with freshly initialised float32 weights."""
        from flax import nnx

        from jaxllm.models.encoder import Encoder

        return Encoder(self, rngs=nnx.Rngs(seed))


# --- encoder-decoders ----------------------------------------------------------------------------------------


class EncoderDecoderConfig(Config):
    """A decoder whose layers attend to an encoder's output (Vaswani et al. 2017, arXiv:1706.03762, section 3.1)."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    encoder: EncoderConfig = EncoderConfig()  # reads
    decoder: DecoderConfig = DecoderConfig(block=Block(cross=Attention()))  # writes; its layers need `block.cross`
    share: bool = True  # one embedding for both
    start: int | None = Field(None, ge=0)  # token that every output begins with; null: said where it is generated

    @model_validator(mode="after")
    def _sides_fit(self):
        e, d = self.encoder, self.decoder
        if e.embed != d.embed:
            raise ValueError(f"encoder.embed={e.embed} must be decoder.embed={d.embed}")
        if e.heads or e.pooler:
            raise ValueError("encoder.heads and encoder.pooler are for encoders that stand alone")
        if self.share and (e.vocab, e.table) != (d.vocab, d.table):
            raise ValueError(f"share=true: encoder.vocab={e.vocab} and table must be the decoder's, {d.vocab}")
        if any(b.cross is None for b in d.blocks):
            raise ValueError("decoder.block.cross is missing: the decoder would not see what the encoder reads")
        return self

    @property
    def vocab(self) -> int | None:
        return self.decoder.vocab

    @property
    def context(self) -> int:
        return self.decoder.context

    @property
    def table_width(self) -> int:
        return self.decoder.table_width

    @property
    def draws(self) -> bool:
        return self.encoder.draws or self.decoder.draws

    @property
    def mixtures(self) -> tuple[MoE, ...]:
        return self.encoder.mixtures + self.decoder.mixtures

    def build(self, seed: int = 0) -> "EncoderDecoder":
        """The model with freshly initialised float32 weights."""
        from flax import nnx

        from jaxllm.models.encoder_decoder import EncoderDecoder

        return EncoderDecoder(self, rngs=nnx.Rngs(seed))


AnyModel = DecoderConfig | EncoderConfig | EncoderDecoderConfig


DecoderModel = union(DecoderConfig)  # what is trained and planned
Model = union(DecoderConfig, EncoderConfig, EncoderDecoderConfig, default=DecoderConfig)

# What the backward pass keeps of a layer instead of computing it again; see jaxllm.models.remat.
Kept = Literal["q", "k", "v", "attention", "residual", "gate", "up"]
Policy = Literal["none", "full", "dots", "save_attention", "offload"]


class Keep(Config):
    """What is kept of a layer, by name, and where; a bare list is `device`."""

    device: tuple[Kept, ...] = ()  # in the device's memory, besides the layer's input
    host: tuple[Literal["input", "q", "k", "v", "attention", "residual", "gate", "up"], ...] = ()  # in the host's

    @model_validator(mode="after")
    def _each_in_one_place(self):
        if twice := [name for name in self.device if name in self.host]:
            raise ValueError(f"{twice[0]} cannot be kept in both places, device={self.device} and host={self.host}")
        return self


def _policy_or_names(value: Any) -> Any:
    """A list is what is kept on the device; `{kind: full}` is the policy, unless a config laid over it names parts."""
    match value:
        case list() | tuple():
            return {"device": value}
        case {"kind": kind, **parts} if kind in get_args(Policy):
            return parts or kind
    return value


_TAGS = {str: "<policy>", dict: "<keep>", Keep: "<keep>"}
Remat = Annotated[
    Annotated[
        Annotated[Policy, Tag("<policy>")] | Annotated[Keep, Tag("<keep>")],
        Discriminator(
            lambda value: _TAGS.get(type(value)),
            custom_error_type="remat",
            custom_error_message=f"must be {', '.join(get_args(Policy))}, or a list of {', '.join(get_args(Kept))}",
        ),
    ],
    BeforeValidator(_policy_or_names),
]
