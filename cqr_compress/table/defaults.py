"""Arguments of torch's functions that create tensors.

A process can change torch's default dtype and device (`torch.set_default_device("meta")`): each call states both.
"""

from __future__ import annotations

from typing import Any

import torch

CPU_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
