"""What suits the digits of the settings of fine-tuning, where that differs from the defaults."""

from __future__ import annotations

SUITED = {
    "rounds": 80,
    "batch": 96,
    "steps": 25,
    "rank": 32,
    "gradient_steps": 4,
    "buffer_rounds": 8,
    "learning_rate": 2e-3,
}
