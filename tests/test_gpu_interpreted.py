"""The Triton kernels in Triton's interpreter (tests/triton_cases.py)."""

from tests.interpreting import NEEDS_TRITON, assert_all_pass


@NEEDS_TRITON
def test_triton_cases() -> None:
    assert_all_pass("triton_cases")
