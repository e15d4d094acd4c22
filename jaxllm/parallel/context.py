"""Attention over rows that several devices share.

`mixing` is the attention of one layer as `jaxllm.models.layers.attention.Mixing` has it: arrays in, arrays out, no
mesh. Tokens are its `Tokens`: where the tokens of one side stand, a tree of arrays [B, T].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm.core.axes import placed_by
from jaxllm.core.errors import ConfigError
from jaxllm.core.shapes import Array, Float, Int, PyTree
from jaxllm.parallel.collectives import by_device, exchange, share_count, taken_axes
from jaxllm.parallel.config import Context, Ring, Rules, Ulysses, axis_names
from jaxllm.parallel.sharding import Placed

LOGITS = 2**22  # logits of one head of one row that a device has at once: 16 MiB


def spread(mesh: jax.sharding.Mesh, rules: Rules, cfg: Context) -> Callable[..., Array]:
    """Attention across the shares of a row: (mixing, q_BTNH, k_BTKH, v_BTKH, query tokens, key tokens) -> o_BTNH.

    Arrays are global. A balanced ring wants rows in the order of `zigzag`, and causal attention.
    """

    def attend(mixing: Any, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, q: PyTree, k: PyTree) -> Array:
        rows = q_BTNH.shape[:2]
        assert k_BTKH.shape[:2] == rows, "context parallelism is for training: as many queries as keys"
        q, k = jax.tree.map(lambda x: jnp.broadcast_to(x, rows), (q, k))
        match cfg:
            case Ring():
                return ring(mesh, rules, cfg.balanced, mixing, q_BTNH, k_BTKH, v_BTKH, q, k)
            case Ulysses():
                return ulysses(mesh, rules, mixing, q_BTNH, k_BTKH, v_BTKH, q, k)

    return attend


def zigzag(length: int, shares: int) -> Int[np.ndarray, " T"]:
    """Order of the tokens of a row in which share i has chunks i and 2n-1-i of 2n.

    Raises:
      ConfigError: the row does not divide.
    """
    if length % (2 * shares):
        raise ConfigError(
            f"rows of {length} tokens do not divide into 2 x {shares} chunks, two for each share of a balanced ring; "
            f"take lengths that are multiples of {2 * shares}, or set context={{kind: ring, balanced: false}}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shares, -1)
    return np.concatenate([chunks[[i, 2 * shares - 1 - i]].reshape(-1) for i in range(shares)])


# --- all-to-all ------------------------------------------------------------------------------------------------------


def ulysses(
    mesh: jax.sharding.Mesh, rules: Rules, mixing: Any,
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, q: PyTree, k: PyTree,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Whole rows of a share of the heads during attention (Jacobs et al. 2023, arXiv:2309.14509)."""
    row = axis_names(rules.seq)
    heads = (*axis_names(rules.heads), *reversed(row))
    within = Placed(mesh, rules.model_copy(update={"seq": None, "heads": heads, "kv_heads": heads}), Rules())
    k_BTKH, v_BTKH = shared_out(mesh, heads, q_BTNH.shape[2], k_BTKH, v_BTKH)
    layout = PartitionSpec(*rules.mesh_axes(("batch", "seq", "heads", "head_dim")))

    def whole(x: Array) -> tuple[Array, PartitionSpec]:
        spec = layout
        for axis in reversed(row):
            x, spec = exchange(x, mesh, spec, axis, source=1, target=2)
        return x, spec

    (q_BTNH, spec), (k_BTKH, _), (v_BTKH, _) = map(whole, (q_BTNH, k_BTKH, v_BTKH))
    q, k = jax.tree.map(lambda x: within.constrain(x, ("batch", "seq")), (q, k))
    with placed_by(within):
        o_BTNH = mixing.over_rows(q_BTNH, k_BTKH, v_BTKH, q, k)
    for axis in row:
        o_BTNH, spec = exchange(o_BTNH, mesh, spec, axis, source=2, target=1)
    return o_BTNH


def shared_out(mesh: jax.sharding.Mesh, axes: tuple[str, ...], num_heads: int, *kv: Array) -> tuple[Array, ...]:
    """Keys and values with each head as often as it takes to share them out over `axes` as the query heads are."""
    shares, K = share_count(mesh, axes), kv[0].shape[2]
    assert num_heads % shares == 0, f"{num_heads} heads over {axes} of {shares} devices are refused by RunConfig"
    G = num_heads // K
    times = next(r for r in range(1, G + 1) if G % r == 0 and K * r % shares == 0)
    return tuple(jnp.repeat(x, times, axis=2) if times > 1 else x for x in kv)


# --- ring ------------------------------------------------------------------------------------------------------------


def ring(
    mesh: jax.sharding.Mesh, rules: Rules, balanced: bool, mixing: Any,
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, q: PyTree, k: PyTree,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Keys and values go round; each device has queries, output and their log-sum-exp of its own tokens only.

    The backward pass goes round once more and computes the softmax of each block again (Liu et al. 2023,
    arXiv:2310.01889, algorithm 1): exact, and nothing of size [T, T] is kept, or exists.
    """
    assert mixing.causal or not balanced, "a balanced order of tokens is for causal attention"
    heads = axis_names(rules.heads)
    k_BTKH, v_BTKH = shared_out(mesh, heads, q_BTNH.shape[2], k_BTKH, v_BTKH)
    turns = Turns(mixing, axis_names(rules.seq), share_count(mesh, rules.seq), balanced)
    rows = PartitionSpec(*rules.mesh_axes(("batch", "seq")))
    by_head = PartitionSpec(*rows, heads or None)
    arrays = (by_head, by_head, by_head, rows, rows, PartitionSpec(heads or None))
    forward = by_device(turns.forward, mesh, arrays, (by_head, by_head))
    backward = by_device(turns.backward, mesh, (*arrays, by_head, by_head, by_head), (by_head, by_head, by_head))

    @jax.custom_vjp
    def attend(*inputs):
        return forward(*inputs)[0]

    def attend_forward(*inputs):
        # Named as `Mixing.over_mesh` promises, both of them: with one missing, remat would go round again for it.
        o_BTNH, log_z_BTN = (checkpoint_name(x, "attention") for x in forward(*inputs))
        return o_BTNH, (*inputs, o_BTNH, log_z_BTN)

    def attend_backward(kept, do_BTNH):
        return *backward(*kept, do_BTNH), None, None, None  # positions have no gradient, slopes are no weights

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_BTNH, k_BTKH, v_BTKH, q, k, mixing.slopes())


class Turns:
    """What each device does as blocks of keys and values come by. All arrays are shares.

    To be made where attention is traced: within the stages of a pipeline blocks are gathered, not sent.
    """

    def __init__(self, mixing: Any, axes: tuple[str, ...], shares: int, balanced: bool):
        self.mixing, self.axes, self.shares = mixing, axes, shares
        # Two stages of a pipeline need not be at the same place of the program. XLA takes a permutation for one
        # exchange of all devices, and gets it wrong then, silently; a gathering is one of each group.
        self.gathers = "pipe" in taken_axes()
        self.chunks = 2 if balanced else 1  # runs of neighbouring tokens that a share has

    def forward(
        self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, q: PyTree, k: PyTree, slopes_N: Float[Array, " N"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """Output and log of the softmax's denominator."""
        parts = self.parts(q_BTNH.shape[1])
        mine = split((q_BTNH, q), parts)

        def see(total: PyTree, block: PyTree, pairs: Int[Array, "P 2"]) -> tuple[PyTree, tuple]:
            def one(total, pair):
                (q_BTNH, q), (k_BTKH, v_BTKH, k) = at(mine, pair[0]), at(block, pair[1])
                new = self.mixing.partial(q_BTNH, k_BTKH, v_BTKH, q, k, slopes_N)
                return put(total, merged(at(total, pair[0]), new), pair[0]), None

            return jax.lax.scan(one, total, pairs)[0], ()

        B, T, N, H = q_BTNH.shape
        nothing = jnp.zeros((B, T, N, H), jnp.float32), jnp.full((B, T, N), -jnp.inf)
        block = split((k_BTKH, v_BTKH, k), self.chunks)
        (o_BTNH, log_z_BTN), _ = self.round(split(nothing, parts), block, see, parts)
        return joined(o_BTNH).astype(v_BTKH.dtype), joined(log_z_BTN)

    def backward(
        self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, q: PyTree, k: PyTree, slopes_N: Float[Array, " N"],
        o_BTNH: Array, log_z_BTN: Array, do_BTNH: Array,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:  # fmt: skip
        """Gradients of queries, keys and values; those of keys and values travel with them, and come home."""
        parts = self.parts(q_BTNH.shape[1])
        do_BTNH = do_BTNH.astype(jnp.float32)
        # d softmax = p (dp - sum p dp), and the sum is do . o (Dao et al. 2022, arXiv:2205.14135, equation 4).
        delta_BTN = jnp.sum(do_BTNH * o_BTNH, -1)
        mine = split((q_BTNH, q, log_z_BTN, do_BTNH, delta_BTN), parts)
        own = split((k_BTKH, v_BTKH, k), self.chunks)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own[:2])

        def see(dq: Array, block: PyTree, pairs: Int[Array, "P 2"]) -> tuple[Array, PyTree]:
            def one(sums, pair):
                dq, dkv = sums
                (q_BTNH, q, log_z, do, delta), (k_BTKH, v_BTKH, k) = at(mine, pair[0]), at(block, pair[1])
                _, pull = jax.vjp(
                    lambda *qkv: self.mixing.weighted(*qkv, q, k, slopes_N, log_z), q_BTNH, k_BTKH, v_BTKH
                )
                new_dq, *new_dkv = pull((do, -delta))
                dq = put(dq, at(dq, pair[0]) + new_dq, pair[0])
                return (dq, put(dkv, added(at(dkv, pair[1]), tuple(new_dkv)), pair[1])), None

            return jax.lax.scan(one, (dq, zeros), pairs)[0]

        dq, (dk, dv) = self.round(jnp.zeros(mine[0].shape, jnp.float32), own, see, parts)
        return joined(dq).astype(q_BTNH.dtype), joined(dk).astype(k_BTKH.dtype), joined(dv).astype(v_BTKH.dtype)

    def round(self, total: PyTree, own: PyTree, see: Callable, parts: int) -> tuple[PyTree, PyTree]:
        """`total` after every block came by; and what was left at the device's own, by all.

        see(total, block, pairs) -> total, what it leaves at the block. Blocks are sent on before they are looked at,
        and what is left at them a turn later: neither is waited for, if looking takes longer than sending.
        """
        if self.gathers:
            return self.at_once(total, own, see, parts)

        def turn(carry, step):
            total, left, block = carry
            after, sent = self.sent((block, left))
            total, new = see(total, block, self.pairs(step, parts))
            return (total, added(sent, new), after), None

        total, left = see(total, own, self.own_pairs(parts))
        carry, _ = jax.lax.scan(turn, (total, left, self.sent(own)), jnp.arange(1, self.shares - 1))
        (total, left, _), _ = turn(carry, self.shares - 1)
        return total, self.sent(left)

    def at_once(self, total: PyTree, own: PyTree, see: Callable, parts: int) -> tuple[PyTree, PyTree]:
        """`round` with all blocks gathered at the start (Llama 3, arXiv:2407.21783, 3.3.2) and none sent on."""
        blocks = jax.lax.all_gather(own, self.axes)
        me = jax.lax.axis_index(self.axes)

        def turn(carry, step):
            total, left = carry
            whose = (me - step) % self.shares
            total, new = see(total, at(blocks, whose), self.pairs(step, parts))
            return (total, put(left, new, whose)), None

        total, new = see(total, own, self.own_pairs(parts))
        left = jax.tree.map(lambda x: jnp.zeros((self.shares, *x.shape), x.dtype), new)
        (total, left), _ = jax.lax.scan(turn, (total, put(left, new, me)), jnp.arange(1, self.shares))
        return total, jax.lax.psum_scatter(left, self.axes) if jax.tree.leaves(left) else left

    def sent(self, tree: PyTree) -> PyTree:
        """What the device before this one has."""
        n = self.shares
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, [(i, (i + 1) % n) for i in range(n)]), tree)

    def parts(self, tokens: int) -> int:
        """Parts that the queries are cut into, so that at most LOGITS logits of a head are there at once."""
        chunk = tokens // self.chunks
        at_once = max(1, LOGITS // chunk)
        return self.chunks * next(r for r in range(1, chunk + 1) if chunk % r == 0 and chunk // r <= at_once)

    def own_pairs(self, parts: int) -> Int[Array, "P 2"]:
        """(part of the queries, chunk of the keys) to look at in the device's own block.

        First those that a query itself is among: what is merged with others then is never empty.
        """
        return self.of_parts([(0, 0), (1, 1), (1, 0)] if self.chunks == 2 else [(0, 0)], parts)

    def pairs(self, step: Int[Array, ""] | int, parts: int) -> Int[Array, "P 2"]:
        """The same in the block that comes by at `step`.

        Balanced, device i has chunks i and 2n-1-i, and the block those of device s. The late chunk sees the early one
        of every other device; of early and early, late and late one pair is visible: the one with the later query.
        """
        if self.chunks == 1:
            return self.of_parts([(0, 0)], parts)
        me = jax.lax.axis_index(self.axes)
        late = jnp.where((me - step) % self.shares < me, 0, 1)
        return self.of_parts([(1, 0), (late, late)], parts)

    def of_parts(self, pairs: list[tuple], parts: int) -> Int[Array, "P 2"]:
        """Pairs of chunks as pairs of a part of the queries and a chunk of the keys."""
        each = parts // self.chunks
        return jnp.array([(q * each + r, k) for q, k in pairs for r in range(each)])


def merged(total: tuple[Array, Array], new: tuple[Array, Array]) -> tuple[Array, Array]:
    """softmax over two sets of keys, from that over each and the logs of their denominators; `total` is never empty
    where `new` is."""
    log_z = jnp.logaddexp(total[1], new[1])
    o = sum(o * jnp.exp(z - log_z)[..., None] for o, z in (total, new))
    return o, log_z


def split(tree: PyTree, pieces: int) -> PyTree:
    """[B, T, ...] -> [pieces, B, T / pieces, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0), tree)


def joined(x: Array) -> Array:
    """The inverse of `split`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def at(tree: PyTree, i: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: PyTree, values: PyTree, i: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, i, 0), tree, values)


def added(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)
