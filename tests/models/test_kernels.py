"""Which layers a kernel takes, and that it is asked for what the layer shows."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.axes import Placement
from jaxllm.models import config
from jaxllm.models.layers.attention import Mixing, Tokens
from jaxllm.models.positions import ALiBi
from pallas_kernels.attention import masks

DOCUMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])


def mixing(alibi=None, cross=False, **attention) -> Mixing:
    return Mixing(config.Attention(num_heads=4, **attention), 0.1, alibi, cross)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_a_kernel_is_asked_for_what_the_layer_shows(kind, window):
    layer, T = mixing(mask={"kind": kind}, window=window), DOCUMENTS.shape[1]
    index = jnp.arange(T)[None]
    tokens = Tokens(index, index, DOCUMENTS, jnp.zeros((1, 1), bool))
    np.testing.assert_array_equal(masks.dense(layer.algebra(DOCUMENTS), T, T), layer.visible(tokens, tokens))


def test_hopper_takes_training_in_half_precision_and_leaves_the_rest():
    def takes(layer=None, chip="NVIDIA H200", dtype=jnp.bfloat16, T=256, S=None, H=128) -> bool:
        place = types.SimpleNamespace(
            **dict.fromkeys(vars(Placement), len) | {"platform": "gpu", "chip": chip, "spread": None}
        )
        q, k = jnp.zeros((1, T, 4, H), dtype), jnp.zeros((1, S or T, 2, H), dtype)
        return (layer or mixing()).kernel_applies(place, q, k)

    assert takes() and takes(chip="NVIDIA H100 80GB HBM3", dtype=jnp.float16, T=100, H=64)
    assert takes(mixing(mask={"kind": "full"}, window=8))
    assert not takes(chip="NVIDIA A100-SXM4-40GB") and not takes(dtype=jnp.float32) and not takes(H=80)
    assert not takes(T=1, S=256)
    assert not takes(mixing(ALiBi())) and not takes(mixing(cross=True)) and not takes(mixing(mask={"kind": "prefix"}))
    assert not mixing().kernel_applies(None, *[jnp.zeros((1, 8, 4, 64), jnp.bfloat16)] * 2)


@pytest.mark.parametrize(
    ("chip", "scope"), [("TPU v4", "splash"), ("TPU v5 lite", "splash"), ("NVIDIA H100 80GB HBM3", "hopper")]
)
def test_every_tpu_and_hopper_has_its_kernel(chip, scope):
    q, k = jnp.zeros((1, 256, 4, 128), jnp.bfloat16), jnp.zeros((1, 256, 2, 128), jnp.bfloat16)
    document = jnp.zeros((1, 256), jnp.int32)
    program = jax.make_jaxpr(lambda *args: mixing().kernel(chip, *args))(q, k, k, document)
    assert scope in program.pretty_print(name_stack=True)
