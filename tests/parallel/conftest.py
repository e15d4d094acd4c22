import os

import pytest


@pytest.fixture(scope="session")
def v5e():
    """Four TPU chips to compile for (marker `tpu_aot`)."""
    # Without these libtpu looks for the metadata server of a TPU machine, for many seconds.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:2x2", "tpu").devices
