"""CUDA kernels of our own: compiled at run time for the card that is there, planned and launched from here.

The sources are in ``kernels/`` (CUDA C++). ``source`` reads them, ``nvrtc`` and ``cache`` compile them,
``arithmetic`` and ``step`` work out tiles, splits and grids without a device, ``device`` loads and launches,
``attention`` and ``layer`` are what the worker calls. Only ``device`` needs cuda.core.
"""
