"""The encoder-decoder: an encoder reads, a decoder writes; with a cache for generation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Float, Int, Key
from jaxllm.models.config import EncoderDecoderConfig
from jaxllm.models.decoder import Cache, Decoder
from jaxllm.models.encoder import Encoder
from jaxllm.models.layers.attention import KV, Tokens
from jaxllm.models.layers.block import Memory, Watch
from jaxllm.models.layers.init import Weight, std
from jaxllm.models.layers.param import param
from jaxllm.models.remat import Remat


class EncoderDecoder(nnx.Module):
    """See `EncoderDecoderConfig`."""

    def __init__(self, cfg: EncoderDecoderConfig, *, rngs: nnx.Rngs, scan: bool = True, remat: Remat = "none"):
        self.cfg = cfg
        if cfg.share:
            V, width = cfg.decoder.vocab, cfg.decoder.table_width
            self.embedding = param(rngs, std(cfg.decoder, Weight("embedding", V, width)), vocab=V, embed=width)
        options = {"scan": scan, "remat": remat, "embedded": not cfg.share}
        self.encoder = Encoder(cfg.encoder, rngs=rngs, **options)
        self.decoder = Decoder(cfg.decoder, rngs=rngs, **options)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        documents_BT: Int[Array, "B T"],
        *,
        read_BS: Int[Array, "B S"],
        read_positions_BS: Int[Array, "B S"],
        read_documents_BS: Int[Array, "B S"],
        key: Key[Array, ""] | None = None,
        watch: Watch | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of the token after each token of the output.

        Args: as `Decoder` has them, of the output; `read_...` of the input. A document of the output sees the document
        of the input with the same id. `watch` is told of the routers of each side in turn.
        """
        at, on = (None, None) if key is None else jax.random.split(key)
        memory = self.read(read_BS, read_positions_BS, read_documents_BS, at, watch)
        x_BTD = self.decoder.hidden(
            tokens_BT, positions_BT, documents_BT, key=on, table_VD=self.table, memory=memory, watch=watch
        )
        return self.decoder.logits(x_BTD, self.table)

    @property
    def table(self) -> Float[Array, "V D"] | None:
        """The embedding of both, where they share it."""
        return self.embedding[...] if self.cfg.share else None

    def read(
        self,
        tokens_BS: Int[Array, "B S"],
        positions_BS: Int[Array, "B S"],
        documents_BS: Int[Array, "B S"],
        key: Key[Array, ""] | None = None,
        watch: Watch | None = None,
    ) -> Memory:
        """What the encoder makes of the input."""
        x_BSD = self.encoder.hidden(tokens_BS, positions_BS, documents_BS, key=key, table_VD=self.table, watch=watch)
        index_1S = -1 - jnp.arange(tokens_BS.shape[1])[None]
        return Memory(x_BSD, Tokens(index_1S, positions_BS, documents_BS, jnp.zeros((1, 1), bool)))

    def prefill(
        self,
        tokens_BT: Int[Array, "B T"],
        pad_B: Int[Array, " B"],
        *,
        capacity: int,
        prefix_len_B: Int[Array, " B"] | None = None,
        start: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the first token of each output, and the cache of the input and of the start of the output.

        Args:
          tokens_BT: the input, left-padded by `pad_B` tokens.
          capacity: tokens of the output that the cache must be able to hold, the one that it begins with included.
          prefix_len_B: means nothing here: the encoder sees all of the input.
          start: the token that outputs begin with; None: the config's.

        Raises:
          ConfigError: nothing says what outputs begin with.
        """
        if start is None and self.cfg.start is None:
            raise ConfigError("model.start is not set: the token that every output begins with")
        start_BT = jnp.full((len(pad_B), 1), self.cfg.start if start is None else start, jnp.int32)
        T, B = tokens_BT.shape[1], tokens_BT.shape[0]
        position_BT = jnp.arange(T)[None] - pad_B[:, None]
        memory = self.read(tokens_BT, jnp.maximum(position_BT, 0), (position_BT >= 0).astype(jnp.int32))
        logits_BV, cache = self.decoder.prefill(
            start_BT, jnp.zeros(B, jnp.int32), capacity=capacity, table_VD=self.table, memory=memory
        )
        # Keys and values of the input are the same for all tokens that follow.
        of = lambda block: block.cross.keys_values(memory.x_BSD, ())
        _, stacked = jax.lax.scan(lambda _, blocks: (None, tuple(map(of, blocks))), None, tuple(self.decoder.blocks))
        cross: tuple[tuple[KV, ...], tuple[KV, ...]] = (stacked, tuple(map(of, self.decoder.tail)))
        return logits_BV, cache._replace(cross=cross, memory=memory._replace(x_BSD=None))

    def decode(self, tokens_B: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token in each row, and the cache that holds it."""
        return self.decoder.decode(tokens_B, cache, self.table)
