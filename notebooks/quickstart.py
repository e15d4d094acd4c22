"""The end of `make quickstart`, after `jaxllm prepare` and `jaxllm train`: was anything learnt?

    python notebooks/quickstart.py configs/train/quickstart.yaml [a.b=value ...]

Draws the loss curves, fits a bigram of bytes on the same training text as a yardstick, and lets the model write.
"""

import sys
from pathlib import Path

from jaxllm.core.config import load
from jaxllm.data.manifest import open_prepared
from jaxllm.evaluation.bigram import bigram_bits_per_byte
from jaxllm.evaluation.report import draw_losses, series
from jaxllm.train.config import RunConfig
from jaxllm.verbs import generate

cfg = load(RunConfig, sys.argv[1], sys.argv[2:])
run = Path(cfg.out)

print(f"loss curves: {draw_losses(run)}\n")
measured = series(run, "validation_bits_per_byte")
if not measured:
    sys.exit(
        f"{run}: no held-out evaluation was logged, so there is nothing to compare with a bigram; let the run end,"
        " or, if its data was prepared with `validation: 0`, prepare it with more and train again"
    )
generate(
    run, 'prompt=["def "]', "max_new_tokens=80", "sampling={kind: sample, temperature: 0.6, top_p: 0.95}", "seed=1"
)

_, bits_per_byte = measured["validation_bits_per_byte"]
bigram = bigram_bits_per_byte(open_prepared(cfg.data.path))
print(f"\nquickstart: model {bits_per_byte[-1]:.3f} bits/byte, bigram {bigram:.3f} bits/byte, run folder {run}")
