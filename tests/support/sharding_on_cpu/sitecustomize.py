"""On the path of a process, lets accelerate share weights out over CPU processes, which it offers for accelerators alone."""

import os

if "RANK" in os.environ:
    from accelerate import state

    original = state.PartialState.__init__

    def with_cpus_as_devices(self, *arguments, **settings):
        original(self, *arguments, **settings)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = with_cpus_as_devices
