"""One file per local algorithm; each works on a whole cohort at once."""

from fedloom.clients.local_only import local_only
from fedloom.clients.sgd import sgd_client

__all__ = ["local_only", "sgd_client"]
