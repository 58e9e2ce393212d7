"""Training on several processes: who they are, how the model is shared, gradients, loss and checkpoints over them.

with World.start(tensor_parallel=2) as world:                       # under torchrun; one process otherwise
    model = parallelize(model, world, "fsdp")
    optimizer = torch.optim.AdamW(unwrap(model).parameters())
    with world.local(model, last=True):
        total, logs = loss_sum(model(ids).logits, targets)
    (total * world.scale(count)).backward()                         # count: targets of the whole batch
    clip_grad_norm(unwrap(model).parameters(), 1.0)
    optimizer.step()
    weights, tensors = gather_state(model, optimizer)               # plain, on rank 0
"""

from vesalius.train.parallel.gradients import clip_grad_norm, grad_norm, synchronised, unwrap
from vesalius.train.parallel.loss import LossSum, TokenLosses, loss_sum, token_losses
from vesalius.train.parallel.state import State, gather_state, load_state
from vesalius.train.parallel.strategy import STRATEGIES, parallelize
from vesalius.train.parallel.tensor import check_split
from vesalius.train.parallel.world import ParallelError, World

__all__ = [
    "STRATEGIES",
    "LossSum",
    "ParallelError",
    "State",
    "TokenLosses",
    "World",
    "check_split",
    "clip_grad_norm",
    "gather_state",
    "grad_norm",
    "load_state",
    "loss_sum",
    "parallelize",
    "synchronised",
    "token_losses",
    "unwrap",
]
