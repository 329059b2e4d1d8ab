"""The only place that knows the difference between a CPU and a GPU.

`choose` gives a `Device` on which stock Megatron-Core runs. Nothing else in the project asks which
device it is on: it passes the `Device` along and reads its fields.
"""

from megatron_capgap.devices.base import Component, Device
from megatron_capgap.devices.select import choose

__all__ = ["Component", "Device", "choose"]
