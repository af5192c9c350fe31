"""Map-reduces over clients: all give the same result."""

from fedloom.runtimes.batched import batched, sequential
from fedloom.runtimes.dropout import with_dropout
from fedloom.runtimes.loopback import ClientSite, loopback

__all__ = ["ClientSite", "batched", "loopback", "sequential", "with_dropout"]
