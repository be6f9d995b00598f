"""smoke"""

import numpy as np
from warpcache.engine.cuda_device import CudaDevice
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.array import DeviceArray


def test_device(software_cuda):
    with CudaDevice(0) as d:
        s = d.stream("a")
        w = d.worker_stream("w")
        a = d.upload(np.arange(10, dtype=np.float32))
        assert (d.download(a) == np.arange(10)).all()
        b = DeviceArray.borrow(a, device=0, stream=s.handle)

        class C:
            def __init__(self, a):
                self.a = a

            @property
            def __cuda_array_interface__(self):
                return self.a.__cuda_array_interface__

        c = DeviceArray.borrow(C(a), device=0, stream=s.handle)
        assert c.pointer == a.pointer
        w.submit(lambda: None).wait()
        assert d.architecture == "sm_90"
