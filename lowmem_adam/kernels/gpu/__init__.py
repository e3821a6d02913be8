"""The step in Triton's language, for accelerators: ``format``, ``weights``, ``step`` and ``records``.

Only ``kernels.triton`` imports these modules, with the first step that needs them: they import Triton.
"""
