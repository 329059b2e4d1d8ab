"""Devices: everything that differs between a CPU and a GPU.

`choose` returns a `Device` on which stock Megatron-Core runs. All other code passes the `Device` along and reads its
fields, instead of checking which device it runs on.
"""

from megatron_capgap.devices.base import Component, Device
from megatron_capgap.devices.select import choose

__all__ = ["Component", "Device", "choose"]
