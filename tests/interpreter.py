"""Triton 3.6's CPU interpreter, mended as far as the kernels here need it. For tests: never a shipped path.

The interpreter is chosen when a kernel is decorated, so TRITON_INTERPRET=1 must be in the environment before
the first import of triton; `mend()` then repairs it once.
"""

import os

import triton
import triton.runtime.interpreter as interpreter
from triton.language import tensor

MENDED_VERSION = "3.6."


def mend() -> None:
    """Make loops with run-time bounds work.

    The interpreter keeps a scalar as an array of one element and turns it into a range bound by int(array),
    which numpy 2.4 refuses unless the array has no dimension.
    """
    version = triton.__version__
    if not version.startswith(MENDED_VERSION):
        raise RuntimeError(f"the interpreter is mended for Triton {MENDED_VERSION}x, this is {version}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor_class: type[tensor], scope: interpreter._LangPatchScope) -> None:
        original(tensor_class, scope)
        scope.set_attr(tensor_class, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
