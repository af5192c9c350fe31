"""Map-reduces over clients: all give the same result."""

from fedloom.runtimes.cohort import batched, sequential
from fedloom.runtimes.dropout import with_dropout
from fedloom.runtimes.fedbuff import buffered
from fedloom.runtimes.messages import ClientSite, loopback
from fedloom.runtimes.ranks import with_ranks
from fedloom.runtimes.room import Room

__all__ = ["ClientSite", "Room", "batched", "buffered", "loopback", "sequential", "with_dropout", "with_ranks"]
