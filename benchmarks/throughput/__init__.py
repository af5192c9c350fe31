"""The same federated work by a bare loop and by fedloom: see README.md."""
