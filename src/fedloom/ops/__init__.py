"""Operators, each fast one beside its plain reference."""
