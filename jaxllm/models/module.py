"""Models as values: a static definition and a flat dict of named arrays."""

import functools
import re
from collections.abc import Mapping

import jax
from flax import nnx

from jaxllm.core.shapes import Array, Key
from jaxllm.models import layout
from jaxllm.models.config import AnyModel, DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.encoder import Encoder
from jaxllm.models.encoder_decoder import EncoderDecoder
from jaxllm.models.layout import Places
from jaxllm.models.remat import Remat
from jaxllm.models.stack import make

Params = dict[str, Array]
Axes = dict[str, tuple[str | None, ...]]
Model = Decoder | Encoder | EncoderDecoder

CLASSES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}  # by kind of config


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The model's definition (static, hashable) and its weights by name, as in `blocks.0.attention.w_q`."""
    graphdef, state, _ = nnx.split(model, nnx.Param, ...)
    return graphdef, {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Model:
    """The model of these weights; inverse of `split`. Shapes do for weights that will not be looked at."""
    flat = [(tuple(int(p) if p.isdigit() else p for p in name.split(".")), nnx.Param(v)) for name, v in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def create(cfg: AnyModel, key: Key[Array, ""], places: Places | None = None) -> Params:
    """Freshly initialised float32 weights; pure, to be jitted with `out_shardings`."""
    options = {} if places is None else {"places": places}
    return split(CLASSES[cfg.kind](cfg, rngs=nnx.Rngs(params=key), **options))[1]


def abstract(
    cfg: AnyModel, *, scan: bool = True, remat: Remat = "none", places: Places | None = None
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct], Axes]:
    """Definition, shapes (as ShapeDtypeStruct) and logical axes of the weights, without making any."""
    options = {"scan": scan, "remat": remat} | ({} if places is None else {"places": places})
    model = nnx.eval_shape(lambda: CLASSES[cfg.kind](cfg, rngs=nnx.Rngs(params=0), **options))
    graphdef, state, _ = nnx.split(model, nnx.Param, ...)
    shapes, axes = {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        stacked = ("layers",) if "blocks" in path[:2] else ()
        shapes[name] = variable.get_value()
        axes[name] = stacked + variable.get_metadata()["axes"]
    return graphdef, shapes, axes


def for_decoding(model: Model) -> Model:
    """The model as this platform decodes it fastest.

    On CPU that is a decoder without stacks, each layer's weights in arrays of their own: XLA's CPU backend copies them
    out of a stack at every token, which is as much work as what is done with them. Queries, keys and values are one
    product.
    """
    if jax.default_backend() != "cpu" or not isinstance(model, Decoder) or not model.blocks:
        return model
    params = layout.unstack(split(model)[1], model.cfg)
    named = {re.sub(r"^layers\.", "tail.", name): x for name, x in params.items()}
    apart = merge(_unstacked(model.cfg), named)
    if model.cfg.relative is None:  # else what is learned of distance may be projected by one of them
        for block in apart.tail:
            block.attention.fuse()
    return apart


@functools.cache
def _unstacked(cfg: DecoderConfig) -> nnx.GraphDef:
    """The definition of a decoder with all layers in `tail`."""

    def make_one() -> Decoder:
        model = Decoder(cfg, rngs=nnx.Rngs(params=0))
        model.blocks = nnx.List([])
        model.tail = nnx.List([make(cfg, cfg.layer(i), jax.random.key(0)) for i in range(cfg.num_layers)])
        return model

    return nnx.graphdef(nnx.eval_shape(make_one))
