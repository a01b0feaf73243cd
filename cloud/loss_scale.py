"""Dynamic loss scaling for fp16, local to the middle.

Gradients of activations underflow in fp16. The middle multiplies the gradient that comes in by a scale and
divides by it what goes out and what stays; the edge never sees the scale. A step that overflows shows as a
norm that is not finite; the edge then aborts it on both sides, and the scale is halved here.
The rule is that of torch.amp.GradScaler.
"""

from collections.abc import Mapping
from typing import Any

GROWTH_INTERVAL = 2000
LARGEST = 2.0**24


class LossScale:
    """The scale and its history.

    Attributes:
        value: what to multiply the incoming gradient by; 1.0 when scaling is off.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._good_steps = 0

    def stepped(self) -> None:
        """A step was applied: grow now and then."""
        self._good_steps += 1
        if self.enabled and self._good_steps % GROWTH_INTERVAL == 0:
            self.value = min(self.value * 2, LARGEST)

    def overflowed(self) -> None:
        """A step was thrown away: shrink."""
        self._good_steps = 0
        if self.enabled:
            self.value = max(self.value / 2, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The scale and its history, as plain values."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` returned, of a job with scaling on or off as here."""
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
