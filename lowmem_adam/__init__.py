"""Adam for models whose optimizer state does not fit: 8-bit moments in a ``torch.optim.Optimizer``."""

from lowmem_adam import checkpoint
from lowmem_adam.ddp import reduce_scatter_hook
from lowmem_adam.in_backward import step_in_backward
from lowmem_adam.optimizer import Adam8bit, AdamW8bit

# From here on this name is the function's and no more its module's.
from lowmem_adam.profile import profile

__version__ = "0.1.0"

__all__ = ["Adam8bit", "AdamW8bit", "__version__", "checkpoint", "profile", "reduce_scatter_hook", "step_in_backward"]
