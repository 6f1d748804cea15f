"""A vLLM platform plugin for tests: the CPU platform, but Ray workers ask for (logical) GPUs.

It stands beside a hand-written `dist-info`, so that it is active exactly where this directory is on
`PYTHONPATH` (see `cluster.RayHead(logical_gpus=True)`), and never by being installed.
"""

from vllm.platforms.cpu import CpuPlatform


def register() -> str:
    """Name the platform class for vLLM, which imports it later."""
    return f"{__name__}.LogicalGpuPlatform"


class LogicalGpuPlatform(CpuPlatform):  # type: ignore[misc] # vLLM is not followed
    """Computes on the CPU, and lets vLLM's real Ray executor place its workers on Ray's GPUs."""

    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_control_id: str) -> int:
        """Read Ray's logical GPU index; the CPU platform would look it up as a NUMA node."""
        return int(device_control_id)
