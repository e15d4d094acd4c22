"""What each kind of chip can do, with sources. No JAX here.

Sources, as marked beside the numbers:
  [docs]     cloud.google.com/tpu/docs, one page per version (v4, v5e, v5p, v6e, tpu7x)
  [book]     "How to Scale Your Model", jax-ml.github.io/scaling-book, part 2: what links and networks carry in practice
  [sheet]    NVIDIA's data sheets and DGX user guides of A100, H100, H200 and B200; dense, without sparsity
  [libtpu]   what the compiler itself reports for a program that does not fit, or counts cycles with
  [xla]      device descriptions of openxla/xla, xla/backends/gpu/target_config/specs
  assumed    published nowhere that we know of; the comment says after what
"""

from typing import NamedTuple

GIB = 2**30


class Torus(NamedTuple):
    """Links between neighbouring TPUs of a slice."""

    dims: int  # of the grid of a slice
    link: float  # bytes/s one way of one link; a chip has two a dimension
    hop: float  # seconds that a message of no bytes takes to a neighbour

    def rings(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Of each dimension of a slice: whether its two ends are linked.

        Cubes of 4x4x4 are wired by optical switches into a torus [docs v4, v5p]; flat slices are cut out of a
        16x16 torus, and keep its wrap-around where they span it whole [docs v5e, v6e].
        """
        if self.dims == 3:
            return (all(n % 4 == 0 for n in shape),) * 3
        return tuple(n == 16 for n in shape)


class Switch(NamedTuple):
    """GPUs of a host, each linked to all others."""

    bandwidth: float  # bytes/s one way out of one GPU
    hop: float  # seconds that a message of no bytes takes


class Network(NamedTuple):
    """Between slices or hosts."""

    bandwidth: float  # bytes/s one way, a chip's share of its host's
    hop: float  # seconds that a message of no bytes takes


class Cuda(NamedTuple):
    """What the CUDA compiler asks about a GPU that is not there [xla]."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared: int  # bytes of shared memory of one
    shared_block: int  # bytes of it that one block may ask for
    l2: int  # bytes
    tensor_ops: int  # bf16 multiplications and additions a tensor core does a clock


class Chip(NamedTuple):
    """One kind of accelerator chip."""

    name: str  # as in `--on`
    platform: str  # of JAX: tpu, cuda or cpu
    title: str  # `device_kind` of its JAX devices
    clock: float  # Hz, what the compiler's cycles are to be divided by
    flops: float  # dense bf16 peak of the chip, FLOP/s
    hbm_bytes: int
    hbm_usable: int  # bytes of it that a program may use: the rest is the runtime's
    hbm_bandwidth: float  # bytes/s
    watts: float  # typical while training, of the chip alone: no host, no cooling
    cores: int = 1  # TensorCores a chip; where Google's names count cores, they count these
    devices: int = 1  # JAX devices a chip
    names_count: str = "chips"  # what the number in a name of Google's counts: chips or cores
    pod: int = 0  # chips of the largest slice of TPUs
    hosts_of: int = 4  # chips a host
    links: Torus | Switch | None = None
    network: Network | None = None
    pcie: float = 16e9  # bytes/s one way between a chip and its host's memory
    cuda: Cuda | None = None

    @property
    def device_flops(self) -> float:
        """Dense bf16 peak of one JAX device, FLOP/s."""
        return self.flops / self.devices

    @property
    def device_hbm(self) -> int:
        """Bytes a program may use on one JAX device."""
        return self.hbm_usable // self.devices

    @property
    def device_bandwidth(self) -> float:
        """HBM bytes/s of one JAX device."""
        return self.hbm_bandwidth / self.devices


HOP = 1e-6  # [book]: about a microsecond a hop, whatever the chip
DCN_HOP = 2e-5  # assumed: a round through host memory and the data-centre network
NVLINK_HOP = 3e-6  # assumed, after NCCL's measured latencies inside a host
IB_HOP = 1e-5  # assumed, after NCCL's measured latencies between hosts

# fmt: off
_ALL = (
    Chip(
        "v4", "tpu", "TPU v4",
        clock=1.05e9,  # Jouppi et al. 2023, arXiv:2304.01433, table 4
        flops=275e12, hbm_bytes=32 * GIB, hbm_bandwidth=1200e9,  # [docs]
        hbm_usable=int(30.75 * GIB),  # [libtpu]
        watts=170,  # mean that was measured [docs]
        cores=2, names_count="cores",
        pod=4096,  # [docs]
        links=Torus(3, 4.5e10, HOP),  # [book]
        network=Network(3.125e9, DCN_HOP),  # assumed, as v5e
    ),
    Chip(
        "v5e", "tpu", "TPU v5 lite",
        clock=1.5e9,  # [book]
        flops=197e12, hbm_bytes=16 * GIB, hbm_bandwidth=819e9,  # [docs]
        hbm_usable=int(15.75 * GIB),  # [libtpu]
        watts=170,  # assumed, as v4
        pod=256,  # [docs]
        links=Torus(2, 4.5e10, HOP),  # [book]; [docs]: 400 GB/s over 4 links, both ways
        network=Network(3.125e9, DCN_HOP),  # [docs]: 6.4 Tbit/s for the 256 chips of a pod
    ),
    Chip(
        "v5p", "tpu", "TPU v5",
        clock=1.75e9,  # [libtpu]: peak / (8 arrays x 128 x 128 x 2)
        flops=459e12, hbm_bandwidth=2765e9,  # [docs]
        hbm_bytes=96 * GIB,  # assumed: 95 [docs], of which programs may use more [libtpu]
        hbm_usable=int(95.74 * GIB),  # [libtpu]
        watts=400,  # assumed: v4's, times the ratio of peaks, less what a new process saves
        cores=2, names_count="cores",
        pod=8960,  # [docs]
        links=Torus(3, 9e10, HOP),  # [book]; [docs]: 1200 GB/s over 6 links, both ways
        network=Network(6.25e9, DCN_HOP),  # [docs]: 50 Gbit/s a chip
    ),
    Chip(
        "v6e", "tpu", "TPU v6 lite",
        # assumed, as v5p: peak / (4 x 256 x 256 x 2). [docs] say 2 arrays of 256 x 256, which would do 262,144 FLOPs a
        # cycle; of a product of 8192 x 8192 x 8192 [libtpu] counts 369,000 a cycle.
        clock=1.75e9,
        flops=918e12, hbm_bytes=32 * GIB, hbm_bandwidth=1638e9,  # [docs]
        hbm_usable=int(31.25 * GIB),  # [libtpu]
        watts=300,  # assumed: 4.7 x the work of v5e at what Google calls 67% better efficiency, and more
        pod=256,  # [docs]
        links=Torus(2, 9e10, HOP),  # [book]; [docs]: 800 GB/s over 4 links, both ways
        network=Network(12.5e9, DCN_HOP),  # [docs]: 4 x 200 Gbit/s for the 8 chips of a host
        pcie=32e9,  # generation 5 [docs]
    ),
    Chip(
        "tpu7x", "tpu", "TPU7x",
        clock=2.2e9,  # assumed, as v6e: peak / (2 cores x 4 x 256 x 256 x 2); [libtpu] counts 422,000 a core and cycle
        flops=2307e12, hbm_bytes=192 * GIB, hbm_bandwidth=7380e9,  # [docs]
        hbm_usable=int(189.5 * GIB),  # [libtpu]
        watts=900,  # assumed: Google's pod of 9216 draws about 10 MW
        cores=2, devices=2, names_count="cores",
        pod=9216,  # [docs]
        links=Torus(3, 9e10, HOP),  # [docs]: 1200 GB/s over 6 links, both ways, as v5p
        network=Network(12.5e9, DCN_HOP),  # assumed, as v6e
        pcie=32e9,  # assumed, as v6e
    ),
    Chip(
        "a100", "cuda", "NVIDIA A100-SXM4-80GB",
        clock=1.41e9, flops=312e12, hbm_bytes=80 * GIB, hbm_bandwidth=2039e9, watts=400,  # [sheet]
        hbm_usable=int(79 * GIB),  # assumed: less what the CUDA context takes
        hosts_of=8,
        links=Switch(300e9, NVLINK_HOP),  # [sheet]: 600 GB/s both ways
        network=Network(25e9, IB_HOP),  # DGX A100: 200 Gbit/s a GPU [sheet]
        pcie=25e9,  # generation 4, 16 lanes, less its headers
        cuda=Cuda((8, 0), 108, 167936, 166912, 40 * 2**20, 512),
    ),
    Chip(
        "h100", "cuda", "NVIDIA H100 80GB HBM3",
        clock=1.83e9, flops=989.4e12, hbm_bytes=80 * GIB, hbm_bandwidth=3350e9, watts=700,  # SXM5 [sheet]
        hbm_usable=int(79 * GIB),  # assumed: less what the CUDA context takes
        hosts_of=8,
        links=Switch(450e9, NVLINK_HOP),  # [sheet]: 900 GB/s both ways
        network=Network(50e9, IB_HOP),  # DGX H100: 400 Gbit/s a GPU [sheet]
        pcie=50e9,  # generation 5, 16 lanes, less its headers
        cuda=Cuda((9, 0), 132, 233472, 232448, 50 * 2**20, 1024),
    ),
    Chip(
        "h200", "cuda", "NVIDIA H200",
        clock=1.83e9, flops=989.4e12, hbm_bytes=141 * 10**9, hbm_bandwidth=4800e9, watts=700,  # [sheet]
        hbm_usable=140 * 10**9,  # assumed: less what the CUDA context takes
        hosts_of=8,
        links=Switch(450e9, NVLINK_HOP),  # [sheet]
        network=Network(50e9, IB_HOP),  # [sheet]
        pcie=50e9,
        cuda=Cuda((9, 0), 132, 233472, 232448, 50 * 2**20, 1024),
    ),
    Chip(
        "b200", "cuda", "NVIDIA B200",
        clock=1.85e9, flops=2250e12, hbm_bytes=180 * 10**9, hbm_bandwidth=7700e9, watts=1000,  # HGX [sheet]
        hbm_usable=179 * 10**9,  # assumed: less what the CUDA context takes
        hosts_of=8,
        links=Switch(900e9, NVLINK_HOP),  # [sheet]: 1.8 TB/s both ways
        network=Network(50e9, IB_HOP),  # DGX B200: 400 Gbit/s a GPU [sheet]
        pcie=50e9,
        cuda=Cuda((10, 0), 148, 233472, 232448, 126 * 2**20, 2048),
    ),
    Chip(
        "cpu", "cpu", "cpu",  # to try a plan anywhere: every number is assumed, of a few cores of a server
        clock=2.5e9, flops=2e11, hbm_bytes=16 * GIB, hbm_usable=16 * GIB, hbm_bandwidth=20e9, watts=100,
        hosts_of=1024, links=Switch(10e9, HOP), network=Network(1e9, DCN_HOP),
    ),
)
# fmt: on

CHIPS = {chip.name: chip for chip in _ALL}
