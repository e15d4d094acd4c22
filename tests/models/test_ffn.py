import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.config import FFN as FFNConfig
from jaxllm.models.config import Activation, Block, DecoderConfig
from jaxllm.models.layers.ffn import FFN, activate
from jaxllm.models.module import split

KINDS = typing.get_args(Activation)
X = np.concatenate([np.linspace(-8, 8, 101), [0.0]]).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_their_slopes_equal_those_of_torch(kind):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    peer = {
        "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu,
        "relu2": lambda x: F.relu(x) ** 2, "sigmoid": torch.sigmoid, "identity": lambda x: x,
        "tanh": torch.tanh, "mish": F.mish, "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    }[kind]  # fmt: skip
    x = torch.tensor(X, requires_grad=True)
    y = peer(x)
    np.testing.assert_allclose(activate(kind, jnp.asarray(X)), y.detach(), atol=1e-5)
    y.sum().backward()
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda x: activate(kind, x)))(jnp.asarray(X)), x.grad, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_forward_is_its_formula(kind, glu, bias):
    """FFN(x) = act(x W_up + b) W_down + c; FFN_GLU(x) = (act(x W_gate + b') * (x W_up + b)) W_down + c."""
    block = Block(ffn=FFNConfig(mlp=12, activation=kind, glu=glu, bias=bias))
    ffn = FFN(DecoderConfig(embed=8, num_layers=1, block=block, position="none"), block, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    names = ["w_up", "w_down"] + glu * ["w_gate"] + bias * (["b_up", "b_down"] + glu * ["b_gate"])
    w = {name: rng.normal(size=getattr(ffn, name).shape).astype(np.float32) for name in names}
    for name in names:
        getattr(ffn, name)[...] = jnp.asarray(w[name])
    assert sorted(split(ffn)[1]) == sorted(names)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    act = lambda h: np.asarray(activate(kind, jnp.asarray(h)))
    b = lambda name: w.get(name, 0)
    up = x @ w["w_up"] + b("b_up")
    hidden = act(x @ w["w_gate"] + b("b_gate")) * up if glu else act(up)
    np.testing.assert_allclose(ffn(jnp.asarray(x)), hidden @ w["w_down"] + b("b_down"), rtol=1e-4, atol=1e-3)
