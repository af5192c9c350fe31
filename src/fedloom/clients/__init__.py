"""One file per local algorithm; each works on a whole cohort at once."""

from fedloom.clients.alternate import alternate
from fedloom.clients.error_feedback import error_feedback
from fedloom.clients.local_only import local_only
from fedloom.clients.sgd import sgd_client
from fedloom.clients.split_personal import split_personal

__all__ = ["alternate", "error_feedback", "local_only", "sgd_client", "split_personal"]
