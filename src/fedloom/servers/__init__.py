"""One file per rule for how the server moves towards the proposal."""

from fedloom.servers.optimize import fed_adagrad, fed_adam, fed_avgm, fed_yogi, nesterov, optimize
from fedloom.servers.replace import replace

__all__ = ["fed_adagrad", "fed_adam", "fed_avgm", "fed_yogi", "nesterov", "optimize", "replace"]
