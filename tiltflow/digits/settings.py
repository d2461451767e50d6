"""What suits the digits of the settings of fine-tuning, where that differs from the defaults."""

from __future__ import annotations

BASE = "digits"
"""Name of the shipped base."""
REWARDS = {
    "thickness": "mean thickness of strokes; judged by a distance transform",
    **{f"digit-{d}": f"log-probability of a {d}; judged by another network" for d in range(10)},
    "inpainting": "log p(o|x) of a noisy, blurred upper half, amortised over o; judged by agreement with the digit",
}
"""Names of the rewards, and what they are."""
SUITED = {
    "rounds": 80,
    "batch": 96,
    "steps": 25,
    "rank": 32,
    "gradient_steps": 4,
    "buffer_rounds": 8,
    "learning_rate": 2e-3,
}
