"""Engines, sessions and their end, and what is observed of statements and commits."""
