"""MaxText's training step as a peer: compiled by the same compiler for the same chips, read by the same eyes.

    python -m jaxllm.plan.maxtext ours|maxtext CASE FILE

writes one side of a case to FILE. Run by `jaxllm bench plan --peer maxtext`, in the Python that has MaxText (which pins
JAX and libtpu, so it has an environment of its own); both sides run there, one process each. MaxText's settings are
those of its published scripts and defaults.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One model on one topology, as either side says it."""

    topology: str
    rows: int  # of a chip
    length: int
    overrides: tuple[str, ...]  # of `LLAMA2`
    maxtext: tuple[str, ...]  # arguments
    flags: str = ""  # of libtpu, as MaxText's script for that chip sets them


LLAMA2 = {
    "out": "unused", "steps": 1000, "data": {"path": "unused"}, "precision": "bfloat16",
    "model": {
        "vocab": 32000, "embed": 4096, "num_layers": 32,
        "block": {"attention": {"num_heads": 32}, "ffn": {"mlp": 11008}},
    },
    "optimizer": {"kind": "adamw", "learning_rate": 3e-4},
}  # fmt: skip
# The libtpu flags of MaxText 0.2.5's own scripts: configs/tpu/v5e/llama2_7b.sh and v6e/llama2_7b_4096.sh. On v6e its
# libtpu refuses the fusion of asynchronous collectives: left out. That for v5p it refuses, too: no flags there.
OVERLAP = "--xla_enable_async_all_gather=true --xla_tpu_overlap_compute_collective_tc=true"
V5E = (
    f"{OVERLAP} --xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
)
V6E = f"{OVERLAP} --xla_tpu_scoped_vmem_limit_kib=98304"
LLAMA3 = (
    "model.vocab=128256", "model.block.attention.num_kv_heads=8", "model.block.ffn.mlp=14336",
    "model.position.theta=500000",
)  # fmt: skip
CASES = {
    # what the backward pass keeps is what MaxText's policy keeps
    "llama2-7b_v5e-256": Case(
        "v5e-256", 4, 2048, ("remat=[q, k, v]",), ("model_name=llama2-7b", "remat_policy=save_qkv_proj"), V5E
    ),
    "llama2-7b_v5e-256_full": Case(
        "v5e-256", 4, 2048, ("remat=full",), ("model_name=llama2-7b", "remat_policy=full"), V5E
    ),
    "llama2-7b_v5p-128": Case(
        "v5p-128", 4, 4096, ("remat=[q, k, v, residual, gate, up]",), ("model_name=llama2-7b", "remat_policy=minimal")
    ),
    "llama3-8b_v6e-256": Case(
        "v6e-256", 2, 8192, (*LLAMA3, "remat=full"), ("model_name=llama3-8b", "remat_policy=full"), V6E
    ),
}


def config(case: Case) -> Any:
    """Our RunConfig of a case."""
    from jaxllm.core.config import parse
    from jaxllm.plan.topology import topology
    from jaxllm.train.config import RunConfig

    devices = topology(case.topology).devices
    tree = LLAMA2 | {"batch": case.rows * devices}
    return parse(RunConfig, tree, [*case.overrides, f"model.context={case.length}", f"mesh.fsdp={devices}"])


def ours(case: Case) -> Any:
    """Proof of our step."""
    from jaxllm.plan.compiled import prove
    from jaxllm.plan.topology import topology

    return prove(config(case), topology(case.topology))


def maxtext(case: Case) -> Any:
    """Proof of MaxText's step: its own ahead-of-time compilation, watched."""
    from jaxllm.plan.topology import devices, topology

    on = topology(case.topology)
    devices(on)  # sets libtpu's environment
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    seen: dict[str, Any] = {}
    compile_step = train_compile.jit_and_compile

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen["mesh"], clock, cpu = args[3], time.perf_counter(), time.process_time()
        seen["compiled"] = compile_step(*args, **kwargs)
        seen.update(wall=time.perf_counter() - clock, cpu=time.process_time() - cpu)
        return seen["compiled"]

    train_compile.jit_and_compile = watched
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main([
        "train_compile", str(base), f"compile_topology={case.topology}", "compile_topology_num_slices=1",
        f"per_device_batch_size={case.rows}", f"max_target_length={case.length}", "use_iota_embed=true", *case.maxtext,
    ])  # fmt: skip
    from jaxllm.plan.compiled import Made, proof_of

    made = Made(seen["compiled"], case.length, seen["cpu"], seen["wall"])
    return proof_of(made, config(case), on, seen["mesh"])


def record(proof: Any) -> dict[str, Any]:
    """What a comparison shows of one side. Cycles and times are the compiler's and the planner's, not measured."""
    from jaxllm.plan.calibration import calibration
    from jaxllm.plan.predict import of_program

    a = proof.account
    predicted = of_program(proof, calibration(proof.on))
    return {
        "peak_bytes": proof.peak_bytes, "collective_bytes": a.collective_bytes,
        "collective_bytes_total": sum(a.collective_bytes.values()), "hardware_flops": proof.hardware_flops,
        "kernel_flops": a.kernel_flops, "cycles": a.cycles, "cycles_total": sum(a.cycles.values()),
        "predicted_step_ms": list(predicted.step_ms), "expected_step_ms": predicted.expected_ms,
        "terms_ms": predicted.terms, "compile_s": proof.compile_s, "rss_bytes": proof.rss_bytes, "notes": proof.notes,
    }  # fmt: skip


def main(side: str, name: str, file: str) -> None:
    case = CASES[name]
    if side == "maxtext" and case.flags:
        os.environ["LIBTPU_INIT_ARGS"] = case.flags
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    proof = {"ours": ours, "maxtext": maxtext}[side](case)
    from jaxllm.core.machine import versions

    result = record(proof) | {"case": case._asdict(), "versions": versions()}
    Path(file).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
