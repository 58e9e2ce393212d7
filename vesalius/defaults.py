"""What is taken where nothing is said. The command line's help needs it, and loads no PyTorch to print itself."""

from __future__ import annotations

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_MEMORY_GB = 1.0  # working memory of batches of interventions
DEFAULT_HELD_OUT = 200  # prompts for a transplant
