"""One file per local algorithm; each works on a whole cohort at once."""

from fedloom.clients.alternate import alternate
from fedloom.clients.error_feedback import error_feedback
from fedloom.clients.fednova import fednova_client
from fedloom.clients.local_only import local_only
from fedloom.clients.mezo import mezo_client
from fedloom.clients.scaffold import scaffold_client, with_control
from fedloom.clients.sgd import sgd_client
from fedloom.clients.split_personal import split_personal
from fedloom.clients.start_loss import tells_start_loss
from fedloom.clients.zo import zo_client

__all__ = [
    "alternate",
    "error_feedback",
    "fednova_client",
    "local_only",
    "mezo_client",
    "scaffold_client",
    "sgd_client",
    "split_personal",
    "tells_start_loss",
    "with_control",
    "zo_client",
]
