"""What one GPU is to reach, by the first name found in the device's; tables print it beside what was measured."""

HEAD_MEMORY_MIB = 384  # of head and loss, whatever the number of positions
PLAN_MEMORY_ERROR, PLAN_TIME_ERROR = 0.10, 0.15  # of the planner's estimates
GPT_TIME_RATIO = 1.05  # of a token's time over that of a causal GPT of the same size

GOALS = {
    "H100": {
        "SEDD-small bf16": "500,000 tokens/s",
        "1.7B bf16": "450 TFLOP/s",
        "7B-slice fp8-delayed": "750 TFLOP/s",
        "head and loss": "15 ms",
        "sampling": "1.5 s a sample",
    },
    "H200": {
        "SEDD-small bf16": "520,000 tokens/s",
        "1.7B bf16": "475 TFLOP/s",
        "7B-slice fp8-delayed": "780 TFLOP/s",
        "head and loss": "14 ms",
        "sampling": "1.5 s a sample",
    },
}


def goal_of(name: str, device_name: str) -> str:
    """The goal in words; empty where there is none for this measurement or device."""
    goals = next((goals for device, goals in GOALS.items() if device in device_name), {})
    return goals.get(name, "")
