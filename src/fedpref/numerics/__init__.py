"""Arithmetic on trees, seeds, metrics over clients, min-norm weights, graphs."""
