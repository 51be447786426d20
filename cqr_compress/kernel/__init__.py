"""Compiled lookups for the CPU, in C."""
