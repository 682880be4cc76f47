"""What is said when `vllm serve` does not start."""

import pytest

from serving.server import cause_of_failure

LOGS = {
    "(APIServer pid=3) WARNING limits cause errors like `OSError: too many open files`\n"
    "(Worker pid=7) ERROR ValueError: Too little memory. Decrease it.\nRuntimeError: Engine core": (
        "Too little memory. Decrease it."
    ),
    "ValidationError: 1 validation error for VllmConfig\n  Value error, the head is missing "
    "[type=value_error, input_value=ArgsKwargs(())]": "the head is missing",
    "vllm serve: error: unrecognized arguments: --dtpye": "unrecognized arguments: --dtpye",
    "vllm_offq.errors.UserError: quantize it again": "quantize it again",
    "INFO: nothing to see": "",
}


@pytest.mark.parametrize("log", LOGS)
def test_first_error_is_the_cause(log: str) -> None:
    assert cause_of_failure(log) == LOGS[log]
